"""Rotary position embedding (arXiv 2104.09864), on the first dimensions of each head.

Shape legend: B batch, L positions, N heads, H head dim, R rotated dimensions (R <= H).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_MOST_TABULATED = 1 << 22  # entries of a table: 16 MiB in fp32


class Rotary(nn.Module):
    """Tables of cosines and sines by position index.

    Args:
        rotary_dim: number of dimensions rotated, even; 0 rotates nothing.
        base: base of the frequencies.
        max_len: positions tabulated at the start, up to some megabytes; those of longer inputs are computed as they
            come.
        axes: sides of a grid that the positions go over row by row; each axis has its share of the dimensions.
    """

    cos_LR: Tensor
    sin_LR: Tensor

    def __init__(self, rotary_dim: int, base: float, max_len: int, axes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.axes = axes
        self.rotary_dim = rotary_dim
        self.base = base
        length = min(max_len, _MOST_TABULATED // max(rotary_dim, 1))  # a model's longest input may be never met
        cos_LR, sin_LR = self._tables(length, torch.get_default_device())
        self.register_buffer("cos_LR", cos_LR, persistent=False)
        self.register_buffer("sin_LR", sin_LR, persistent=False)

    def reset(self) -> None:
        """Compute the tables again, where they lie (after `to_empty`)."""
        self.cos_LR, self.sin_LR = self._tables(self.cos_LR.shape[0], self.cos_LR.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move with the model, but keep the tables' precision: in bf16, late positions would share their angles."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos_LR.dtype != torch.float32:
            self.reset()
        return self

    def forward(self, length: int, stride: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions first, first + stride, ..., each (length, R)."""
        end = first + (length - 1) * stride + 1
        cos_LR, sin_LR = self._reaching(end, device)
        return cos_LR[first:end:stride], sin_LR[first:end:stride]

    def at(self, positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines for one position of each row, each (B, 1, 1, R)."""
        cos_LR, sin_LR = self._reaching(max(positions) + 1, device)
        places_B = torch.tensor(positions, device=device)
        return cos_LR[places_B][:, None, None], sin_LR[places_B][:, None, None]

    def _reaching(self, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables of so many positions: those held, or new ones where these are too short or lie elsewhere."""
        if end > self.cos_LR.shape[0] or device != self.cos_LR.device:
            return self._tables(end, device)
        return self.cos_LR, self.sin_LR

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        share = max(self.rotary_dim // max(len(self.axes), 1), 1)
        exponents = torch.arange(0, share if self.rotary_dim else 0, 2, dtype=torch.float32, device=device) / share
        places, rest_L = list[Tensor](), torch.arange(length, device=device)
        for side in self.axes[:0:-1]:
            places.insert(0, rest_L % side)
            rest_L = rest_L // side
        angles = torch.cat([torch.outer(place.float(), self.base**-exponents) for place in (rest_L, *places)], dim=-1)
        angles_LR = torch.cat((angles, angles), dim=-1)
        return angles_LR.cos(), angles_LR.sin()


def rotate(x_BNLH: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head, halves paired as in GPT-NeoX.

    Shape:
        x_BNLH (B, N, L, H), tables (L, R) or (B, 1, L, R) -> (B, N, L, H).
    """
    rotary_dim = cos_LR.shape[-1]
    if rotary_dim == 0:
        return x_BNLH
    x, rest = (
        (x_BNLH, None)
        if rotary_dim == x_BNLH.shape[-1]
        else x_BNLH.split((rotary_dim, x_BNLH.shape[-1] - rotary_dim), dim=-1)
    )
    left, right = x.chunk(2, dim=-1)
    rotated = (x * cos_LR + torch.cat((-right, left), dim=-1) * sin_LR).to(x_BNLH.dtype)
    return rotated if rest is None else torch.cat((rotated, rest), dim=-1)
