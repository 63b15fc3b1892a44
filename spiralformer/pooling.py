"""Down-scaling: assign tokens to chunks, reduce each chunk to a latent.

Level (chunk g, offset w): token i belongs to chunk floor((i + w) / g), so the first chunk has g - w
members. Only closed chunks become latents: L tokens give floor((L + w) / g).

Shape legend: B batch, L tokens, M latents, G chunk, D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def assign(x_BLD: Tensor, chunk: int, offset: int) -> Tensor:
    """Closed chunks; the ``offset`` missing members of the first one are zero.

    Shape:
        (B, L, D) -> (B, M, G, D).
    """
    latents = (x_BLD.shape[1] + offset) // chunk
    if offset:
        x_BLD = F.pad(x_BLD, (0, 0, offset, 0))
    return x_BLD[:, : latents * chunk].unflatten(1, (latents, chunk))


class Pool(nn.Module):
    """Base of the pools: a level relative to the input's.

    Shape:
        (B, L, D) -> (B, M, D) with M = floor((L + offset) / chunk).
    """

    def __init__(self, chunk: int, offset: int) -> None:
        super().__init__()
        self.chunk, self.offset = chunk, offset


class MeanPool(Pool):
    """Mean over a chunk's members."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        z_BMD = assign(x_BLD, self.chunk, self.offset).mean(dim=2)
        if self.offset:  # the first chunk is short
            z_BMD = torch.cat((z_BMD[:, :1] * (self.chunk / (self.chunk - self.offset)), z_BMD[:, 1:]), dim=1)
        return z_BMD


class LastPool(Pool):
    """A chunk's last member."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD[:, self.chunk - self.offset - 1 :: self.chunk]


class SelfAggregatePool(Pool):
    """Softmax over a chunk's members of a linear score (SpiralFormer, section 1.3 of its readings)."""

    def __init__(self, chunk: int, offset: int, d_model: int) -> None:
        super().__init__(chunk, offset)
        self.scorer = nn.Linear(d_model, 1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        score_BMG1 = assign(self.scorer(x_BLD), self.chunk, self.offset)
        if self.offset and score_BMG1.shape[1]:
            missing = torch.arange(self.chunk, device=x_BLD.device) < self.offset
            first = score_BMG1[:, :1].masked_fill(missing[:, None], -torch.inf)
            score_BMG1 = torch.cat((first, score_BMG1[:, 1:]), dim=1)
        return (score_BMG1.softmax(dim=2) * assign(x_BLD, self.chunk, self.offset)).sum(dim=2)
