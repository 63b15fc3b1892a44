"""Feed-forwards, each made with (D, F, bias).

Shape legend: B batch, L positions, D model, F hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.starts import Scales, Starts


class GeluFeedForward(nn.Module):
    """out(gelu(up(x))).

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.out = nn.Linear(hidden, d_model, bias=bias)

    def starts(self, scales: Scales) -> Starts:
        return {"out.weight": ("normal", scales.branch)}

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.out(self.activate(self.up(x_BLD)))

    def activate(self, hidden_BLF: Tensor) -> Tensor:
        """The nonlinearity."""
        return F.gelu(hidden_BLF)


class SquaredReluFeedForward(GeluFeedForward):
    """out(relu(up(x))^2) (Primer, arXiv 2109.08668)."""

    def activate(self, hidden_BLF: Tensor) -> Tensor:
        return F.relu(hidden_BLF).square()


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): silu(gate) * up, then out.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, d_model, bias=bias)

    def starts(self, scales: Scales) -> Starts:
        return {"out.weight": ("normal", scales.branch)}

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLD).chunk(2, dim=-1)
        return self.out(self.activate(gate_BLF) * up_BLF)

    def activate(self, gate_BLF: Tensor) -> Tensor:
        """The gate's nonlinearity."""
        return F.silu(gate_BLF)
