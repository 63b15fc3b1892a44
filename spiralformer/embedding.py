"""Token embedding and language-model heads.

Shape legend: B batch, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.starts import Scales, Starts


class ScaledEmbedding(nn.Embedding):
    """Token embedding times sqrt(D) (MeSH, appendix B).

    Shape:
        (B, L) -> (B, L, D).
    """

    def starts(self, scales: Scales) -> Starts:
        return {"weight": ("normal", scales.small)}

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return super().forward(tokens_BL) * math.sqrt(self.embedding_dim)


class HiddenLayer(nn.Module):
    """GELU(W norm(x) + b): what a head with a hidden layer reads (arXiv 2604.15259, code).

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.hidden = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.gelu(self.hidden(self.norm(x_BLD)))


class Head(nn.Module):
    """Final norm, then logits.

    Shape:
        (B, L, D) -> (B, L, V).
    """

    def __init__(self, d_model: int, vocab_size: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.logits = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.logits(self.norm(x_BLD))


class TiedHead(nn.Module):
    """Final norm, then logits by the embedding's own weights.

    Shape:
        (B, L, D), weight (V, D) -> (B, L, V).
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BLD: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.norm(x_BLD), weight)
