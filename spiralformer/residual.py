"""How a branch's output meets the state, each made with (D, scale).

Shape legend: B batch, L positions, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AddResidual(nn.Module):
    """x + scale * u.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        return x_BLD + u_BLD if self.scale == 1.0 else torch.add(x_BLD, u_BLD, alpha=self.scale)


class GateResidual(nn.Module):
    """sigmoid(W_x x) x + sigmoid(W_u u) scale u.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.keep = nn.Linear(d_model, d_model, bias=False)
        self.take = nn.Linear(d_model, d_model, bias=False)
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        return self.keep(x_BLD).sigmoid() * x_BLD + self.take(u_BLD).sigmoid() * (self.scale * u_BLD)


class GruResidual(nn.Module):
    """A GRU cell: the update is its input, the state its hidden state.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.from_update = nn.Linear(d_model, 3 * d_model)
        self.from_state = nn.Linear(d_model, 3 * d_model)
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        update_r, update_z, update_n = self.from_update(self.scale * u_BLD).chunk(3, dim=-1)
        state_r, state_z, state_n = self.from_state(x_BLD).chunk(3, dim=-1)
        reset, keep = (update_r + state_r).sigmoid(), (update_z + state_z).sigmoid()
        return torch.lerp((update_n + reset * state_n).tanh(), x_BLD, keep)
