"""Down-scaling: assign tokens to chunks, reduce each chunk to a latent.

Level (chunk g, offset w): token i belongs to chunk floor((i + w) / g), so the first chunk has g - w
members. Only closed chunks become latents: L tokens give floor((L + w) / g).

A pool is two steps: what each member contributes, computed as it comes (`members`), and how a closed
chunk's contributions become a latent (`reduce`). Decoding keeps the contributions of the open chunk.

Shape legend: B batch, L tokens, M latents, G chunk, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.decoding import Opening, Rows, pick, put
from spiralformer.starts import Scales, Starts


def assign(x_BLD: Tensor, chunk: int, offset: int) -> Tensor:
    """Closed chunks; the ``offset`` missing members of the first one are zero.

    Shape:
        (B, L, D) -> (B, M, G, D).
    """
    latents = (x_BLD.shape[1] + offset) // chunk
    if offset:
        x_BLD = F.pad(x_BLD, (0, 0, offset, 0))
    if torch.compiler.is_exporting():  # for any length; a view would tie the program to how this one divides
        first_M1 = torch.arange(latents, device=x_BLD.device)[:, None] * chunk
        return x_BLD[:, first_M1 + torch.arange(chunk, device=x_BLD.device)]
    return x_BLD[:, : latents * chunk].unflatten(1, (latents, chunk))


class Pool(nn.Module):
    """Base of the pools: a level relative to the input's.

    Shape:
        (B, L, D) -> (B, M, D) with M = floor((L + offset) / chunk).
    """

    def __init__(self, chunk: int, offset: int) -> None:
        super().__init__()
        self.chunk, self.offset = chunk, offset

    def forward(self, x_BLD: Tensor) -> Tensor:
        chunks = [assign(part, self.chunk, self.offset) for part in self.members(x_BLD)]
        return self.reduce(*chunks, missing=self.offset)

    def open(self, opening: Opening) -> PoolMemory:
        """What decoding remembers at one call site."""
        return PoolMemory(self, opening)

    def members(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """What each token contributes to its chunk."""
        return (x_BLD,)

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        """Chunks of contributions (B, M, G, ...) to latents; the first chunk lacks ``missing`` members."""
        raise NotImplementedError


class PoolMemory:
    """Contributions of the open chunk's members, (B, G, ...) each."""

    def __init__(self, pool: Pool, opening: Opening) -> None:
        self.pool, self.batch_size, self.source = pool, opening.batch_size, opening.source
        self.parts: list[Tensor] = []

    def prefill(self, x_BLD: Tensor, *, lengths: Sequence[int]) -> Tensor:
        pool, contributions = self.pool, self.pool.members(x_BLD)
        open_members = []
        for row, length in enumerate(lengths):
            members = self.source.count(length)
            closed = (members + pool.offset) // pool.chunk * pool.chunk - pool.offset
            open_members += [(row, member) for member in range(max(closed, 0), members)]
        self._make_room(contributions)
        if open_members:
            rows, places = torch.tensor(open_members, device=x_BLD.device).T
            for buffer, part in zip(self.parts, contributions, strict=True):
                buffer[rows, (places + pool.offset) % pool.chunk] = part[rows, places]
        return pool.reduce(*[assign(c, pool.chunk, pool.offset) for c in contributions], missing=pool.offset)

    def take(self, x_R1D: Tensor, *, rows: Rows) -> None:
        contributions = self.pool.members(x_R1D)
        self._make_room(contributions)
        slots = [(place + self.pool.offset) % self.pool.chunk for place in rows.places]
        for buffer, part in zip(self.parts, contributions, strict=True):
            put(buffer, rows, slots, part[:, 0])

    def give(self, rows: Rows) -> Tensor:
        chunks = [pick(buffer, rows).unsqueeze(1) for buffer in self.parts]
        begins = [place == 0 for place in rows.places]  # a first chunk lacks members
        if not self.pool.offset or len(set(begins)) == 1:
            return self.pool.reduce(*chunks, missing=self.pool.offset if begins[0] else 0)
        short, whole = (self.pool.reduce(*chunks, missing=missing) for missing in (self.pool.offset, 0))
        return torch.where(torch.tensor(begins, device=whole.device)[:, None, None], short, whole)

    def select(self, rows_B: Tensor) -> None:
        self.parts = [buffer[rows_B] for buffer in self.parts]

    def mark(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.parts]

    def back_to(self, mark: list[Tensor]) -> None:
        self.parts = [buffer.clone() for buffer in mark]

    def _make_room(self, contributions: Sequence[Tensor]) -> None:
        if not self.parts:
            shape = (self.batch_size, self.pool.chunk)
            self.parts = [part.new_zeros(*shape, *part.shape[2:]) for part in contributions]


class MeanPool(Pool):
    """Mean over a chunk's members."""

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        return mean_of_members(chunks[0], missing)


class LastPool(Pool):
    """A chunk's last member."""

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        return chunks[0][:, :, -1]


class SelfAggregatePool(Pool):
    """Softmax over a chunk's members of a linear score (SpiralFormer's self-aggregation)."""

    def __init__(self, chunk: int, offset: int, d_model: int) -> None:
        super().__init__(chunk, offset)
        self.scorer = nn.Linear(d_model, 1, bias=False)  # softmax would not see a bias

    def starts(self, scales: Scales) -> Starts:
        """As the mean."""
        return {"scorer.weight": ("fill", 0.0)}

    def members(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        return x_BLD, self.scorer(x_BLD)

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        x_BMGD, score_BMG1 = chunks
        return (softmax_of_members(score_BMG1, missing) * x_BMGD).sum(dim=2)


class LinearPool(Pool):
    """A linear map of a chunk's members laid end to end (Hourglass); missing members are zero."""

    def __init__(self, chunk: int, offset: int, d_model: int) -> None:
        super().__init__(chunk, offset)
        self.mix = nn.Linear(chunk * d_model, d_model, bias=False)

    def starts(self, scales: Scales) -> Starts:
        """It stands in the stream itself: variance is preserved."""
        return {"mix.weight": ("normal", self.mix.in_features**-0.5)}

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        return self.mix(chunks[0].flatten(2))


class AttentionPool(Pool):
    """One query, the mean of the members, attends to them; added to that mean (Hourglass's resampling)."""

    def __init__(self, chunk: int, offset: int, d_model: int) -> None:
        super().__init__(chunk, offset)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.scale = d_model**-0.5

    def members(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        return x_BLD, self.key_value(x_BLD)

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        x_BMGD, key_value = chunks
        key_BMGD, value_BMGD = key_value.chunk(2, dim=-1)
        mean_BMD = mean_of_members(x_BMGD, missing)
        score_BMG1 = (self.query(mean_BMD).unsqueeze(2) * key_BMGD).sum(dim=-1, keepdim=True) * self.scale
        return mean_BMD + self.out((softmax_of_members(score_BMG1, missing) * value_BMGD).sum(dim=2))


def mean_of_members(x_BMGD: Tensor, missing: int) -> Tensor:
    """Mean over G, for a first chunk that lacks ``missing`` members."""
    z_BMD = x_BMGD.mean(dim=2)
    if missing:
        chunk = x_BMGD.shape[2]
        z_BMD = torch.where(_is_first(z_BMD)[:, None], z_BMD * (chunk / (chunk - missing)), z_BMD)
    return z_BMD


def softmax_of_members(score_BMG1: Tensor, missing: int) -> Tensor:
    """Softmax over G, for a first chunk that lacks ``missing`` members."""
    if missing:
        absent_G1 = torch.arange(score_BMG1.shape[2], device=score_BMG1.device)[:, None] < missing
        score_BMG1 = score_BMG1.masked_fill(_is_first(score_BMG1)[:, None, None] & absent_G1, -torch.inf)
    return score_BMG1.softmax(dim=2)


def _is_first(x_BM: Tensor) -> Tensor:
    """(M,): which chunk is the first."""
    return torch.arange(x_BM.shape[1], device=x_BM.device) == 0
