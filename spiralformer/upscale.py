"""Up-scaling: spread latents back over the positions of a finer level.

Position i reads the last chunk closed at or before it, j = floor((i + w + 1) / g) - 1, at place
r = i - e_j, and gets sqrt(g) * beta[j, r] * z_j with sum over r of beta = 1. Before any chunk has
closed it gets zero. (SpiralFormer's right shift by g - 1, stated without the shift.)

Shape legend: B batch, T tokens, L positions of the finer level, M latents, G chunk, D model.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Upscale(nn.Module):
    """Base of the up-scalings.

    Args:
        chunk: positions of the finer level in one latent.
        offset: of the chunk borders, in positions of the finer level.
        delay: read as of this many positions ago.
        own_chunk: read the chunk one is in, closed or not (not causal).
        zero_front: give zero up to the end of the first whole chunk, as a literal right shift by g - 1 does; else a
            short chunk that the offset leaves at the front is read once it is closed.
        target: (chunk, offset) of the finer level, in tokens.

    Shape:
        z (B, M, D), tokens (B, T) -> (B, L, D), L the finer level's length for T tokens.
    """

    def __init__(
        self,
        chunk: int,
        offset: int,
        *,
        delay: int,
        own_chunk: bool,
        target: tuple[int, int],
        zero_front: bool = False,
    ) -> None:
        super().__init__()
        self.target_chunk, self.target_offset = target
        self.chunk, self.scale = chunk, math.sqrt(chunk)
        self.shift = (-offset if own_chunk else chunk - offset - 1) + delay
        self.first = chunk - 1 + delay if zero_front else self.shift

    def forward(self, z_BMD: Tensor, tokens_BT: Tensor) -> Tensor:
        return self.place(self.spread(z_BMD), tokens_BT)

    def spread(self, z_BMD: Tensor) -> Tensor:
        """Every latent's updates for the places that read it, (B, M, D) -> (B, M, G, D)."""
        raise NotImplementedError

    def reads(self, position: int) -> tuple[int, int]:
        """(chunk, place) that a position reads; a negative chunk is zero."""
        return divmod(position - self.shift, self.chunk) if position >= self.first else (-1, 0)

    def place(self, update_BMGD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Lay the chunks' places on the positions; zero where no closed chunk can be read."""
        length = (tokens_BT.shape[1] + self.target_offset) // self.target_chunk
        flat = update_BMGD.flatten(1, 2)[:, self.first - self.shift :]
        if flat.shape[1] == 0:
            return flat.new_zeros(flat.shape[0], length, flat.shape[2])
        shift = min(self.first, length)
        return F.pad(flat, (0, 0, shift, length - shift - flat.shape[1]))


class UniformUpscale(Upscale):
    """beta = 1 / g at every place."""

    def spread(self, z_BMD: Tensor) -> Tensor:
        return (z_BMD / self.scale).unsqueeze(2).expand(-1, -1, self.chunk, -1)


class LearnedUpscale(Upscale):
    """beta = softmax over places of a linear map of the latent."""

    def __init__(self, chunk: int, offset: int, *, d_model: int, **settings: Any) -> None:
        super().__init__(chunk, offset, **settings)
        self.allocation = nn.Linear(d_model, chunk)

    def spread(self, z_BMD: Tensor) -> Tensor:
        beta_BMG = self.allocation(z_BMD).softmax(dim=-1)
        return (self.scale * beta_BMG).unsqueeze(-1) * z_BMD.unsqueeze(2)
