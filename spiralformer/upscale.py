"""Up-scaling: spread latents back over the positions of a finer level.

Position i reads the last chunk closed at or before it, j = floor((i + w + 1) / g) - 1, at place
r = i - e_j, and gets sqrt(g) * beta[j, r] * z_j with sum over r of beta = 1. Before any chunk has
closed it gets zero. (SpiralFormer's right shift by g - 1, stated without the shift.)

Shape legend: B batch, T tokens, L positions of the finer level, M latents, G chunk, D model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.decoding import Opening, Rows, index_of, put
from spiralformer.starts import Scales, Starts


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
        z (B, M, D), tokens (B, T) -> (B, L, D), L the finer level's length for T tokens; visible (B, M): which latents
        are closed by tokens, not by padding.
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
        self.remembered = delay // chunk + 3
        """How many chunks back a position can read, and one."""

    def forward(self, z_BMD: Tensor, *, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        if visible is not None:  # a chunk that padding closed is none
            z_BMD = torch.where(visible[..., None], z_BMD, 0.0)
        return self.place(self.spread(z_BMD), tokens)

    def open(self, opening: Opening) -> UpscaleMemory:
        """What decoding remembers at one call site."""
        return UpscaleMemory(self, opening)

    def spread(self, z_BMD: Tensor) -> Tensor:
        """Every latent's updates for the places that read it, (B, M, D) -> (B, M, G, D)."""
        raise NotImplementedError

    def reads(self, position: int) -> tuple[int, int]:
        """(chunk, place) that a position reads; a negative chunk is zero."""
        return divmod(position - self.shift, self.chunk) if position >= self.first else (-1, 0)

    def place(self, update_BMGD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Lay the chunks' places on the positions; zero where no closed chunk can be read."""
        length = (tokens_BT.shape[1] + self.target_offset) // self.target_chunk
        if torch.compiler.is_exporting():  # for any length; views would tie the program to how this one divides
            place_L = torch.arange(length, device=update_BMGD.device)
            chunk_L, within_L = (place_L - self.shift) // self.chunk, (place_L - self.shift) % self.chunk
            known_L = (place_L >= self.first) & (chunk_L < update_BMGD.shape[1])
            read_BLD = update_BMGD[:, torch.where(known_L, chunk_L, 0), within_L]
            return torch.where(known_L[:, None], read_BLD, 0.0)
        flat = update_BMGD.flatten(1, 2)[:, self.first - self.shift :]
        before, cut = max(self.first, 0), max(-self.first, 0)
        return F.pad(flat, (0, 0, before, self.chunk))[:, cut : cut + length]


class UpscaleMemory:
    """Updates (B, K, G, D) of the last K chunks, which can still be read; chunk j stands at j modulo K."""

    def __init__(self, upscale: Upscale, opening: Opening) -> None:
        self.upscale, self.source, self.batch_size = upscale, opening.source, opening.batch_size
        self.like_D = opening.like
        self.kept = upscale.remembered
        if opening.max_len is not None:
            self.kept = min(self.kept, max(1, opening.source.count(opening.max_len)))
        self.updates_BKGD: Tensor | None = None

    def prefill(self, z_BMD: Tensor, *, lengths: Sequence[int], tokens: Tensor) -> Tensor:
        update_BMGD = self.upscale.spread(z_BMD)
        kept = []
        for row, length in enumerate(lengths):
            closed = self.source.count(length)
            kept += [(row, chunk) for chunk in range(max(0, closed - self.kept), closed)]
        if kept:
            rows, chunks = torch.tensor(kept, device=z_BMD.device).T
            self._buffer(update_BMGD)[rows, chunks % self.kept] = update_BMGD[rows, chunks]
        return self.upscale.place(update_BMGD, tokens)

    def take(self, z_R1D: Tensor, *, rows: Rows) -> None:
        update_RGD = self.upscale.spread(z_R1D)[:, 0]
        put(self._buffer(update_RGD[:, None]), rows, [place % self.kept for place in rows.places], update_RGD)

    def give(self, rows: Rows) -> Tensor:
        reads = [self.upscale.reads(place) for place in rows.places]
        nothing = [chunk < 0 for chunk, _ in reads]
        if self.updates_BKGD is None or all(nothing):
            return self.like_D.new_zeros(len(reads), 1, self.like_D.shape[0])
        if rows.place is not None:
            chunk, place = reads[0]
            return self.updates_BKGD[:, chunk % self.kept, place : place + 1]
        where = torch.tensor([(chunk % self.kept, place) for chunk, place in reads], device=self.updates_BKGD.device)
        read_RD = self.updates_BKGD[index_of(rows, where), where[:, 0], where[:, 1]]
        return torch.where(torch.tensor(nothing, device=where.device)[:, None], 0.0, read_RD).unsqueeze(1)

    def select(self, rows_B: Tensor) -> None:
        if self.updates_BKGD is not None:
            self.updates_BKGD = self.updates_BKGD[rows_B]

    def mark(self) -> list[Tensor]:
        return [] if self.updates_BKGD is None else [self.updates_BKGD.clone()]

    def back_to(self, mark: list[Tensor]) -> None:
        self.updates_BKGD = mark[0].clone() if mark else None

    def _buffer(self, like_BMGD: Tensor) -> Tensor:
        if self.updates_BKGD is None:
            self.updates_BKGD = like_BMGD.new_zeros(self.batch_size, self.kept, *like_BMGD.shape[2:])
        return self.updates_BKGD


class UniformUpscale(Upscale):
    """beta = 1 / g at every place."""

    def spread(self, z_BMD: Tensor) -> Tensor:
        return (z_BMD / self.scale).unsqueeze(2).expand(-1, -1, self.chunk, -1)


class LearnedUpscale(Upscale):
    """beta = softmax over places of a linear map of the latent."""

    def __init__(self, chunk: int, offset: int, *, d_model: int, **settings: Any) -> None:
        super().__init__(chunk, offset, **settings)
        self.allocation = nn.Linear(d_model, chunk)

    def starts(self, scales: Scales) -> Starts:
        """As the uniform one."""
        return {"allocation.weight": ("fill", 0.0)}

    def spread(self, z_BMD: Tensor) -> Tensor:
        beta_BMG = self.allocation(z_BMD).softmax(dim=-1)
        return (self.scale * beta_BMG).unsqueeze(-1) * z_BMD.unsqueeze(2)
