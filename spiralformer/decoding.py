"""Decoding one token at a time: the compiled graph, interpreted node by node, levels as clocks.

A node at level (g, w) runs at token i only if (i + w + 1) % g == 0. Every call site of a block has its own
key-value cache, a pool keeps what the open chunk's members contributed, an up-scaling the updates of the
chunks that can still be read. One token's logits equal those of the parallel forward.

Shape legend: B batch, L tokens, M latents, G chunk, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from spiralformer.attention import KeyValueCache
from spiralformer.block import Block
from spiralformer.pooling import Pool, assign
from spiralformer.upscale import Upscale

SITE = "site"
"""Key of a `Site` in the meta of a code node."""
UNDECODABLE = "undecodable"
"""Key, in the meta of the output node, of why a model can't decode; empty if it can."""


class Clock(NamedTuple):
    """A level as a clock over tokens."""

    chunk: int
    offset: int

    def ticks(self, token: int) -> bool:
        """Whether a chunk closes at this token."""
        return (token + self.offset + 1) % self.chunk == 0

    def count(self, tokens: int) -> int:
        """How many chunks this many tokens close."""
        return (tokens + self.offset) // self.chunk


@dataclass(frozen=True, slots=True)
class Site:
    """What decoding must know of one code node."""

    kind: str
    """block, pool, upscale, head or plain."""
    clock: Clock
    """Of the value it gives."""
    source: Clock
    """Of the value it reads."""


class _PoolState:
    """Contributions of the open chunk's members."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.missing = pool.offset
        self.parts: list[list[Tensor]] = []

    def push(self, x_B1D: Tensor) -> None:
        self.parts.append(list(self.pool.members(x_B1D)))

    def close(self) -> Tensor:
        chunks = []
        for member_parts in zip(*self.parts, strict=True):
            first = member_parts[0]
            absent = [torch.zeros_like(first)] * self.missing
            chunks.append(torch.cat((*absent, *member_parts), dim=1).unsqueeze(1))
        latent_B1D = self.pool.reduce(*chunks, missing=self.missing)
        self.parts, self.missing = [], 0
        return latent_B1D

    def prefill(self, x_BLD: Tensor) -> Tensor:
        pool = self.pool
        parts = pool.members(x_BLD)
        latents_BMD = pool.reduce(*[assign(part, pool.chunk, pool.offset) for part in parts], missing=pool.offset)
        closed = latents_BMD.shape[1] * pool.chunk - pool.offset
        if closed > 0:
            self.missing = 0
        for i in range(max(0, closed), x_BLD.shape[1]):
            self.parts.append([part[:, i : i + 1] for part in parts])
        return latents_BMD


class _UpscaleState:
    """Updates of the chunks that can still be read, by chunk."""

    def __init__(self, upscale: Upscale) -> None:
        self.upscale = upscale
        self.updates_BGD: dict[int, Tensor] = {}
        self.received = 0

    def receive(self, z_BMD: Tensor) -> None:
        update_BMGD = self.upscale.spread(z_BMD)
        for m in range(z_BMD.shape[1]):
            self.updates_BGD[self.received + m] = update_BMGD[:, m]
        self.received += z_BMD.shape[1]

    def read(self, position: int, like_BD: Tensor) -> Tensor:
        chunk, place = self.upscale.reads(position)
        for old in [j for j in self.updates_BGD if j < chunk]:
            del self.updates_BGD[old]
        if chunk < 0:
            return torch.zeros_like(like_BD).unsqueeze(1)
        return self.updates_BGD[chunk][:, place : place + 1]

    def prefill(self, z_BMD: Tensor, tokens_BL: Tensor) -> Tensor:
        update_BMGD = self.upscale.spread(z_BMD)
        self.received = z_BMD.shape[1]
        placed_BLD = self.upscale.place(update_BMGD, tokens_BL)
        next_chunk, _ = self.upscale.reads(placed_BLD.shape[1])
        for j in range(max(0, next_chunk), self.received):
            self.updates_BGD[j] = update_BMGD[:, j]
        return placed_BLD


class DecodeState:
    """All that decoding remembers of a batch of sequences. Made by `SpiralFormer.decode_state`.

    Args:
        model: a decodable model.
        batch_size: sequences, all of one length.
        max_len: tokens it has room for.
        dtype: of the key-value cache; None is the model's own.

    Raises:
        ValueError: if the model can't decode.
    """

    def __init__(self, model: fx.GraphModule, batch_size: int, max_len: int, dtype: torch.dtype | None) -> None:
        if reason := why_not(model):
            raise ValueError(f"this model can't decode: {reason}; run the whole prefix instead")
        weight = next(model.parameters())
        self.batch_size, self.max_len = batch_size, max_len
        self.position = 0
        self.caches: dict[str, list[KeyValueCache]] = {}
        self.pools: dict[str, _PoolState] = {}
        self.upscales: dict[str, _UpscaleState] = {}
        for node in model.graph.nodes:
            site = node.meta.get(SITE)
            if site is None or site.kind not in ("block", "pool", "upscale"):
                continue
            module = model.get_submodule(str(node.target))
            if isinstance(module, Block):
                c, capacity = module.config, site.clock.count(max_len)
                self.caches[node.name] = [
                    KeyValueCache(batch_size, c.kv_heads, capacity, c.head_dim, weight.device, dtype or weight.dtype)
                    for _ in range(c.layers)
                ]
            elif isinstance(module, Pool):
                self.pools[node.name] = _PoolState(module)
            elif isinstance(module, Upscale):
                self.upscales[node.name] = _UpscaleState(module)

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of all key-value caches."""
        return sum(cache.num_bytes for caches in self.caches.values() for cache in caches)


def why_not(model: fx.GraphModule) -> str:
    """Why a model can't decode; empty if it can."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    return str(output.meta.get(UNDECODABLE, "it was not built by the compiler"))


@torch.no_grad()
def prefill(model: fx.GraphModule, tokens_BL: Tensor, state: DecodeState) -> Tensor:
    """Run a prompt in parallel into an empty state.

    Shape:
        tokens (B, L), L >= 1 -> logits of the last token (B, V).

    Raises:
        ValueError: if the state is not empty, or the prompt does not fit.
    """
    if state.position:
        raise ValueError(f"the state holds {state.position} tokens already; prefill takes an empty one")
    _check(tokens_BL, state, tokens_BL.shape[1] if tokens_BL.dim() == 2 else 0)
    values: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        site = node.meta.get(SITE)
        if site is None or site.kind == "plain":
            _run_plain(model, node, values, tokens_BL)
            continue
        args, kwargs = _arguments(node, values)
        if site.kind == "block":
            values[node] = model.get_submodule(node.target)(*args, **kwargs, caches=state.caches[node.name])
        elif site.kind == "pool":
            values[node] = state.pools[node.name].prefill(*args)
        elif site.kind == "upscale":
            values[node] = state.upscales[node.name].prefill(*args)
        else:
            values[node] = model.get_submodule(node.target)(args[0][:, -1:], *args[1:])
    state.position = tokens_BL.shape[1]
    return _output(model, values)


@torch.no_grad()
def decode(model: fx.GraphModule, tokens_B: Tensor, state: DecodeState) -> Tensor:
    """One more token for every sequence.

    Shape:
        tokens (B,) -> logits (B, V); equal to the parallel forward's at this position.

    Raises:
        ValueError: if the state is full, or the batch is another one.
    """
    _check(tokens_B[:, None], state, 1)
    token = state.position
    values: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        site = node.meta.get(SITE)
        if site is None:
            _run_plain(model, node, values, tokens_B[:, None])
            continue
        ticks = site.clock.ticks(token)
        if site.kind == "pool":
            if site.source.ticks(token):
                state.pools[node.name].push(values[node.args[0]])
            if ticks:
                values[node] = state.pools[node.name].close()
        elif site.kind == "upscale":
            upscale = state.upscales[node.name]
            if site.source.ticks(token):
                upscale.receive(values[node.args[0]])
            if ticks:
                values[node] = upscale.read(site.clock.count(token + 1) - 1, _like(model, tokens_B))
        elif ticks and site.kind == "block":
            args, kwargs = _arguments(node, values)
            values[node] = model.get_submodule(node.target)(*args, **kwargs, caches=state.caches[node.name])
        elif ticks:
            _run_plain(model, node, values, tokens_B[:, None])
    state.position += 1
    return _output(model, values)


def _check(tokens_BL: Tensor, state: DecodeState, length: int) -> None:
    if tokens_BL.dim() != 2 or tokens_BL.shape[0] != state.batch_size or length < 1:
        raise ValueError(f"expected {state.batch_size} sequences of one length >= 1, got {tuple(tokens_BL.shape)}")
    if state.position + length > state.max_len:
        raise ValueError(
            f"the state has room for {state.max_len} tokens, not {state.position + length}; give a larger max_len"
        )


def _run_plain(model: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], tokens_BL: Tensor) -> None:
    if node.op == "placeholder":
        values[node] = tokens_BL
    elif node.op == "get_attr":
        values[node] = model.get_parameter(str(node.target))
    elif node.op == "call_module":
        args, kwargs = _arguments(node, values)
        values[node] = model.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_function":
        args, kwargs = _arguments(node, values)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _arguments(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return args, kwargs


def _output(model: fx.GraphModule, values: dict[fx.Node, Any]) -> Tensor:
    output = next(node for node in model.graph.nodes if node.op == "output")
    logits_B1V: Tensor = values[output.args[0]]
    return logits_B1V[:, -1]


def _like(model: fx.GraphModule, tokens_B: Tensor) -> Tensor:
    """Zeros of a stream's shape (B, D) and kind."""
    embed = model.get_submodule("embed")
    assert isinstance(embed, nn.Embedding)
    return embed.weight.new_zeros(tokens_B.shape[0], embed.embedding_dim)
