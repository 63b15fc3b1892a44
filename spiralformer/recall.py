"""Recall: the input injected into the state again (arXiv 2604.15259), each made with (D).

Shape legend: B batch, L positions, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spiralformer.starts import Scales, Starts


class AddRecall(nn.Module):
    """state + input.

    Shape:
        state (B, L, D), input (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()

    def forward(self, state_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        return state_BLD + input_BLD


class LinearRecall(nn.Module):
    """W_x state + W_e input.

    Shape:
        state (B, L, D), input (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.state = nn.Linear(d_model, d_model, bias=False)
        self.input = nn.Linear(d_model, d_model, bias=False)

    def starts(self, scales: Scales) -> Starts:
        """It stands in the stream itself: variance is preserved."""
        return {name: ("normal", p.shape[1] ** -0.5) for name, p in self.named_parameters()}

    def forward(self, state_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        return self.state(state_BLD) + self.input(input_BLD)


class ConcatRecall(nn.Module):
    """W [state; input] (the adapter of arXiv 2502.05171).

    Shape:
        state (B, L, D), input (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False)

    def starts(self, scales: Scales) -> Starts:
        """It stands in the stream itself: variance is preserved."""
        return {"adapter.weight": ("normal", self.adapter.in_features**-0.5)}

    def forward(self, state_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        return self.adapter(torch.cat((state_BLD, input_BLD), dim=-1))
