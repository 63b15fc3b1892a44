"""Recall: the input injected into the state again (arXiv 2604.15259), each made with (D).

Shape legend: B batch, L positions, D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        return {f"{name}.weight": ("normal", self.state.in_features**-0.5) for name in ("state", "input")}

    def forward(self, state_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        return self.state(state_BLD) + self.input(input_BLD)


class AffineRecall(LinearRecall):
    """W_x state + b_x + W_e input + b_e, as in the code of arXiv 2604.15259.

    Shape:
        state (B, L, D), input (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.state = nn.Linear(d_model, d_model)
        self.input = nn.Linear(d_model, d_model)

    def starts(self, scales: Scales) -> Starts:
        """As `LinearRecall`, biases at zero."""
        return {**super().starts(scales), "state.bias": ("fill", 0.0), "input.bias": ("fill", 0.0)}


class DiagonalRecall(nn.Module):
    """exp(-a dt) state + dt input, a and dt of each dimension above zero: the state can not grow (arXiv 2604.12946).

    A linear system with a negative diagonal, made discrete.

    Shape:
        state (B, L, D), input (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(d_model))
        self.step = nn.Parameter(torch.zeros(d_model))

    def starts(self, scales: Scales) -> Starts:
        """A decay of a half, and as much of the input."""
        return {"log_rate": ("fill", 0.0), "step": ("fill", 0.0)}

    def forward(self, state_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        step_D = F.softplus(self.step)
        return torch.exp(-step_D * self.log_rate.exp()) * state_BLD + step_D * input_BLD


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
