"""What looks at all positions: another order of them, so that what is near on a board is near in the row; their mean.

Shape legend: B batch, L positions, D model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Arrange(nn.Module):
    """Positions as a grid that they fill row by row, gone over in another order of its axes; or put back.

    Of a grid that is not full, positions that are not there are left out. Beyond it another one begins.

    Args:
        sides: of the grid.
        axes: in the order of the result, the one that changes slowest first.
        back: from that order to where positions stood.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, sides: Sequence[int], axes: Sequence[int], *, back: bool) -> None:
        super().__init__()
        self.sides, self.axes, self.back = tuple(sides), tuple(axes), back

    def ranks(self, length: int, device: torch.device) -> Tensor:
        """The place of each position in a full grid, (L,)."""
        at_L, whole = torch.arange(length, device=device), math.prod(self.sides)
        strides = [math.prod(self.sides[axis + 1 :]) for axis in range(len(self.sides))]
        rank_L = torch.zeros_like(at_L)
        for axis in self.axes:
            rank_L = rank_L * self.sides[axis] + at_L // strides[axis] % self.sides[axis]
        return at_L // whole * whole + rank_L

    def forward(self, x_BLD: Tensor, *, visible: Tensor | None = None) -> Tensor:
        rank_L = self.ranks(x_BLD.shape[1], x_BLD.device)
        if visible is None:
            order_L = rank_L.argsort()
            return x_BLD[:, order_L.argsort() if self.back else order_L]
        rank_BL = torch.where(visible, rank_L, torch.iinfo(torch.long).max)  # padding stays behind
        order_BL = rank_BL.argsort(dim=1, stable=True)
        order_BL = order_BL.argsort(dim=1) if self.back else order_BL
        return x_BLD.gather(1, order_BL[..., None].expand_as(x_BLD))


class MeanOfAll(nn.Module):
    """The mean over a sequence, at each of its positions.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def forward(self, x_BLD: Tensor, *, visible: Tensor | None = None) -> Tensor:
        if visible is None:
            return x_BLD.mean(dim=1, keepdim=True).expand_as(x_BLD)
        real_BL1 = visible[..., None].to(x_BLD.dtype)
        count_B11 = real_BL1.sum(dim=1, keepdim=True).clamp_min(1.0)
        return ((x_BLD * real_BL1).sum(dim=1, keepdim=True) / count_B11).expand_as(x_BLD)
