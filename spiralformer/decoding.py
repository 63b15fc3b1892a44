"""Decoding one token at a time: what remembers, for which rows, and when.

A level (g, w) closes a chunk at a row's token i where (i + w + 1) % g == 0; its operations run for the rows that close
one. Rows may have different lengths. Parts that remember (blocks, pools, up-scalings) open a `Memory`: ``prefill`` runs
a prompt in parallel, ``take`` is told what comes in when the source's level closes a chunk, ``give`` says what goes
out when its own does. One token's logits equal those of the parallel forward.

Shape legend: B batch, R rows that close a chunk, L positions, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Clock(NamedTuple):
    """A level as a clock over tokens."""

    chunk: int
    offset: int

    def count(self, tokens: int) -> int:
        """How many chunks this many tokens close."""
        return (tokens + self.offset) // self.chunk


class Rows(NamedTuple):
    """Rows of a batch that close a chunk now."""

    which: Tensor | None
    """(R,); None: all of them."""
    places: tuple[int, ...]
    """For each, the number of the chunk that it closes."""
    place: int | None
    """That number, where it is all rows and one number."""


class Opening(NamedTuple):
    """What a memory is opened for."""

    batch_size: int
    max_len: int | None
    """Tokens it has room for; None: it grows."""
    like: Tensor
    """Any stream's width, device and dtype: (D,)."""
    cache_dtype: torch.dtype
    clock: Clock = Clock(1, 0)
    """Of the value that is given."""
    source: Clock = Clock(1, 0)
    """Of the value that is taken."""

    def at(self, clock: tuple[int, int], source: tuple[int, int]) -> Opening:
        """The same for a part between two levels."""
        return self._replace(clock=Clock(*clock), source=Clock(*source))


class Memory(Protocol):
    """What one call site of a part remembers of every row."""

    def prefill(self, *inputs: Tensor, lengths: Sequence[int], **settings: Any) -> Tensor:
        """Run a prompt in parallel; row b has lengths[b] tokens, what stands after them is padding."""
        ...

    def take(self, *inputs: Tensor, rows: Rows, **settings: Any) -> None:
        """Each input (R, 1, D), of the rows whose source closes a chunk."""
        ...

    def give(self, rows: Rows) -> Tensor:
        """The value (R, 1, D) of the rows that close a chunk."""
        ...

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order; a row may come twice."""
        ...

    def mark(self) -> Any:
        """What it takes to come back here; None: nothing, as what comes later writes over what is taken back."""
        ...

    def back_to(self, mark: Any) -> None:
        """As it was at the mark."""
        ...


class Mark(NamedTuple):
    """A place in a text that a `DecodeState` can come back to."""

    lengths: tuple[int, ...]
    memories: Mapping[str, Any]
    """By call site, what each memory asks for."""

    @property
    def is_lengths_alone(self) -> bool:
        """Whether any earlier place is known by its lengths."""
        return all(memory is None for memory in self.memories.values())


class DecodeState:
    """All that decoding remembers of a batch of sequences.

    Args:
        memories: by call site.
        batch_size: sequences; their lengths may differ.
        max_len: tokens each has room for; None: no limit.
    """

    def __init__(self, memories: Mapping[str, Memory], batch_size: int, max_len: int | None) -> None:
        self.memories = dict(memories)
        self.max_len = max_len
        self.lengths = [0] * batch_size

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeState:
        """What is remembered, copied; the modules that remember it are shared."""
        for memory in self.memories.values():
            memo.update((id(part), part) for part in vars(memory).values() if isinstance(part, nn.Module))
        copied = copy(self)
        copied.__dict__.update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __getitem__(self, site: str) -> Memory:
        return self.memories[site]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def position(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of all key-value caches."""
        return sum(getattr(memory, "num_bytes", 0) for memory in self.memories.values())

    def rows(self, chunk: int, offset: int) -> Rows | None:
        """The rows whose next token closes a chunk; None if there is none."""
        first = self.lengths[0] + offset + 1
        if self.lengths.count(self.lengths[0]) == len(self.lengths):
            place = first // chunk - 1
            return Rows(None, (place,) * len(self.lengths), place) if first % chunk == 0 else None
        ticking = [row for row, length in enumerate(self.lengths) if (length + offset + 1) % chunk == 0]
        if not ticking:
            return None
        places = tuple((self.lengths[row] + offset + 1) // chunk - 1 for row in ticking)
        return Rows(None if len(ticking) == len(self.lengths) else torch.tensor(ticking), places, None)

    def begin(self, lengths: Sequence[int]) -> None:
        """Note the lengths of prompts.

        Raises:
            ValueError: if the state is not empty, or a prompt does not fit.
        """
        if any(self.lengths):
            raise ValueError(f"the state holds {self.position} tokens already; prefill takes an empty one")
        self.check_room(max(lengths))
        self.lengths = list(lengths)

    def advance(self) -> None:
        """Every row is one token longer."""
        self.lengths = [length + 1 for length in self.lengths]

    def mark(self) -> Mark:
        """What it takes to come `back_to` here, as one who decodes tokens on trial does."""
        return Mark(tuple(self.lengths), {site: memory.mark() for site, memory in self.memories.items()})

    def back_to(self, mark: Mark) -> None:
        """As at the mark, which this state gave since its rows were last selected."""
        self.lengths = list(mark.lengths)
        for site, memory in self.memories.items():
            memory.back_to(mark.memories[site])

    def check(self, tokens_BL: Tensor) -> None:
        """Raise ValueError unless the rows are this state's."""
        if tokens_BL.dim() != 2 or tokens_BL.shape[0] != self.batch_size or tokens_BL.shape[1] < 1:
            raise ValueError(f"expected {self.batch_size} sequences of length >= 1, got {tuple(tokens_BL.shape)}")

    def check_room(self, more: int) -> None:
        """Raise ValueError if there is no room for so many more tokens of every row."""
        if self.max_len is not None and self.position + more > self.max_len:
            raise ValueError(
                f"the state has room for {self.max_len} tokens, not {self.position + more}; give a larger max_len"
            )

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order, as beam search does."""
        self.lengths = [self.lengths[row] for row in rows_B.tolist()]
        for memory in self.memories.values():
            memory.select(rows_B)


def put(buffer: Tensor, rows: Rows, slots: Sequence[int], value: Tensor) -> None:
    """buffer[row, slot] = value, for each of the rows.

    Shape:
        buffer (B, S, ...), value (R, ...).
    """
    if rows.place is not None:
        buffer[:, slots[0]] = value.to(buffer.dtype)
    else:
        buffer[index_of(rows, buffer), torch.tensor(slots, device=buffer.device)] = value.to(buffer.dtype)


def pick(buffer: Tensor, rows: Rows) -> Tensor:
    """The rows of a buffer (B, ...)."""
    return buffer if rows.which is None else buffer[rows.which.to(buffer.device)]


def index_of(rows: Rows, like: Tensor) -> Tensor:
    """(R,), beside ``like``."""
    return torch.arange(len(rows.places), device=like.device) if rows.which is None else rows.which.to(like.device)


def last_of(x_BLD: Tensor, lengths: Sequence[int], keep: int) -> Tensor:
    """The last position of each row (B, 1, D) for ``keep`` 1; all for 0."""
    if keep == 0:
        return x_BLD
    if len(set(lengths)) == 1:
        return x_BLD[:, lengths[0] - keep : lengths[0]]
    rows_B = torch.arange(len(lengths), device=x_BLD.device)
    return x_BLD[rows_B, torch.tensor(lengths, device=x_BLD.device) - 1].unsqueeze(1)
