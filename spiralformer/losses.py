"""Losses of a model's own, added to its task's in training.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn


class ZLoss(nn.Module):
    """Keeps the softmax's normaliser near one: ``weight * mean(logsumexp(logits)^2)`` (PaLM, arXiv 2204.02311, 5).

    Args:
        weight: of the loss.

    Shape:
        (B, L, V) -> a scalar.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, logits_BLV: Tensor) -> Tensor:
        return self.weight * logits_BLV.float().logsumexp(dim=-1).square().mean()
