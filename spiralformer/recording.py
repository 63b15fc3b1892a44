"""What layers give at every call, as each token sees it: streams, and attention weights.

A layer of a coarse level gives latents. Token i sees the last one closed at or before it, zero before the first; its
attention weights are that latent's, each shared equally by the tokens of the latent that it looks at.

Shape legend: B batch, R rows that close a chunk, L tokens, M latents, N heads, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.attention import Attention
from spiralformer.block import Block
from spiralformer.decoding import Clock, Rows, index_of


class Site(NamedTuple):
    """One call of a block."""

    clock: Clock
    layers: int
    heads: int


class Given(NamedTuple):
    """What one layer gave at one call."""

    stream: Tensor
    """(B, M, D)."""
    weights: Tensor | None
    """(B, N, M, M'), where they are recorded."""


class Recorder:
    """A context in which layers' outputs are collected, in the order of calls.

    Args:
        root: the module whose blocks are watched.
        attentions: whether to collect attention weights too; who attends must then put them into ``recorded``.
    """

    def __init__(self, root: nn.Module, *, attentions: bool) -> None:
        self.root, self.attentions = root, attentions
        self.streams: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for module in self.root.modules():
            if isinstance(module, Block):
                for layer in module.layers:
                    self._handles.append(layer.register_forward_hook(self._note))
            elif isinstance(module, Attention) and self.attentions:
                module.recorded = self.weights
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.root.modules():
            if isinstance(module, Attention):
                module.recorded = None

    def _note(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self.streams.append(output)

    def given(self) -> Iterator[Given]:
        """What was collected since the last time."""
        weights = self.weights if self.attentions else [None] * len(self.streams)
        collected = [Given(*pair) for pair in zip(self.streams, weights, strict=True)]
        self.streams.clear()
        self.weights.clear()
        return iter(collected)


def in_parallel(recorder: Recorder, sites: Sequence[Site], embeds_BLD: Tensor) -> list[Given | None]:
    """What every layer call gave to all latents at once; None: its level has no latent yet."""
    given, length = recorder.given(), embeds_BLD.shape[1]
    return [next(given) if site.clock.count(length) else None for site in sites for _ in range(site.layers)]


def to_tokens(
    calls: Sequence[Given | None], sites: Sequence[Site], like_BLD: Tensor, place_BL: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Streams (B, L, D) and attention weights (B, N, L, L) of every layer call, as tokens see them.

    Args:
        calls: of `in_parallel`.
        sites: the calls of blocks.
        like_BLD: any stream of tokens.
        place_BL: for each token, its number in its row, negative for padding; None: 0, 1, ...
    """
    streams, weights = [], []
    batch, length, _ = like_BLD.shape
    order_BL = torch.arange(length, device=like_BLD.device).expand(batch, -1)
    plain_BL = order_BL if place_BL is None else place_BL
    called = [site for site in sites for _ in range(site.layers)]
    for (clock, _, heads), call in zip(called, calls, strict=True):
        if call is None:
            streams.append(torch.zeros_like(like_BLD))
            weights.append(like_BLD.new_zeros(batch, heads, length, length))
        elif clock.chunk == 1 and place_BL is None:
            streams.append(call.stream)
            weights += [call.weights] if call.weights is not None else []
        else:
            read_BL = (plain_BL + clock.offset + 1) // clock.chunk - 1
            streams.append(take(call.stream, read_BL))
            if call.weights is not None:
                weights.append(spread_keys(take_rows(call.weights, read_BL), clock, plain_BL))
    return streams, weights


def spread_keys(weights_BNLM: Tensor, clock: Clock, place_BK: Tensor) -> Tensor:
    """Weights on latents, laid on their tokens: (B, N, L, K)."""
    chunk_BK = (place_BK + clock.offset) // clock.chunk
    members_BK = torch.where(chunk_BK == 0, clock.chunk - clock.offset, clock.chunk)
    known_BK = (place_BK >= 0) & (chunk_BK < weights_BNLM.shape[3])
    index = torch.where(known_BK, chunk_BK, 0)[:, None, None].expand(*weights_BNLM.shape[:3], -1)
    spread = weights_BNLM.gather(3, index) / members_BK[:, None, None].to(weights_BNLM.dtype)
    return torch.where(known_BK[:, None, None], spread, 0.0)


def last_given(
    calls: Sequence[Given | None], sites: Sequence[Site], lengths: Sequence[int], like_BLD: Tensor
) -> list[Given]:
    """Of every layer call, the last latent (B, 1, D) that each row has closed, and its weights (B, N, 1, M)."""
    called = [site for site in sites for _ in range(site.layers)]
    found = []
    for (clock, _, heads), call in zip(called, calls, strict=True):
        if call is None:
            zero = like_BLD.new_zeros(len(lengths), 1, like_BLD.shape[2])
            found.append(Given(zero, like_BLD.new_zeros(len(lengths), heads, 1, 0)))
            continue
        read_B1 = torch.tensor([[clock.count(length) - 1] for length in lengths], device=like_BLD.device)
        weights = None if call.weights is None else take_rows(call.weights, read_B1)
        found.append(Given(take(call.stream, read_B1), weights))
    return found


def renew(last: list[Given], recorder: Recorder, sites: Sequence[Site], rows: Sequence[Rows | None]) -> list[Given]:
    """The same after one more token, for which the blocks ran for ``rows`` of each site."""
    given = recorder.given()
    renewed, number = [], 0
    for site, which in zip(sites, rows, strict=True):
        for _ in range(site.layers):
            old = last[number]
            renewed.append(old if which is None else _put(old, next(given), which))
            number += 1
    return renewed


def _put(old: Given, new: Given, rows: Rows) -> Given:
    index = index_of(rows, old.stream)
    stream = old.stream.index_copy(0, index, new.stream)
    if old.weights is None or new.weights is None:
        return Given(stream, None)
    longer = max(new.weights.shape[3], old.weights.shape[3])
    kept, fresh = (F.pad(w, (0, longer - w.shape[3])) for w in (old.weights, new.weights))
    return Given(stream, kept.index_copy(0, index, fresh))


def take(values_BMX: Tensor, read_BL: Tensor) -> Tensor:
    """values[b, read[b, l]]; zero for a negative index."""
    index = read_BL.clamp(min=0, max=max(values_BMX.shape[1] - 1, 0))
    taken = values_BMX.gather(1, index[..., None].expand(-1, -1, values_BMX.shape[2]))
    return torch.where((read_BL >= 0)[..., None], taken, 0.0)


def take_rows(values_BNMX: Tensor, read_BL: Tensor) -> Tensor:
    """`take` of every head: (B, N, M, X) -> (B, N, L, X)."""
    taken = take(values_BNMX.transpose(1, 2).flatten(2), read_BL)
    return taken.unflatten(2, values_BNMX.shape[1::2]).transpose(1, 2)
