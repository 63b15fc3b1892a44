"""What an architecture costs, from its graph alone: no torch, no arrays, well under a millisecond."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from builder.graph.blocks import norm_params
from builder.graph.ir import Graph, Level, Node, meet
from builder.graph.ops import OPS
from builder.iterations import TRAINING_FACTOR
from searchspace.tables import complete, table

CACHE_BYTES_PER_ELEMENT = 2  # bf16


@dataclass(frozen=True, slots=True)
class Cost:
    """Exact totals at one sequence length. FLOPs: matrix products and attention, multiply-add = 2, attention dense."""

    seq_len: int
    params: int
    """Unique parameters: a shared block once."""
    params_non_embedding: int
    """Without the embedding and the head's matrix."""
    flops: int
    """One forward over ``seq_len`` tokens."""
    kv_cache_bytes: int
    """Key-value cache after ``seq_len`` tokens, in bf16."""
    decode_flops: int | None
    """Decoding ``seq_len`` tokens one by one; None where there is no decoding (``causal: false``)."""
    decode_flops_worst_token: int | None
    """The most expensive of those tokens."""
    training_flops: int | None = None
    """In the mean, of a step of training over ``seq_len`` tokens; None: three times the forward."""

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs, per token."""
        return self.flops / self.seq_len

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward; where a loop's iterations are drawn for each step, in the mean."""
        return (TRAINING_FACTOR * self.flops if self.training_flops is None else self.training_flops) / self.seq_len

    @property
    def kv_cache_bytes_per_token(self) -> float | None:
        """Cache bytes, per token; None where there is no decoding."""
        return None if self.decode_flops is None else self.kv_cache_bytes / self.seq_len

    @property
    def decode_flops_per_token(self) -> float | None:
        """Mean over positions 0 .. seq_len - 1."""
        return None if self.decode_flops is None else self.decode_flops / self.seq_len


@complete
@dataclass(frozen=True, slots=True)
class CostMetric:
    """A number of a `Cost` that a budget may limit."""

    name: str
    """Also the attribute of `Cost`; None where an architecture has none."""
    words: str
    label: str
    """Of a column."""
    objective: bool
    """Whether it may be minimised beside the loss."""

    def of(self, cost: Cost) -> float | None:
        """Its value."""
        value: float | None = getattr(cost, self.name)
        return value


COSTS = table(
    "a cost metric",
    (
        CostMetric("params", "Unique parameters.", "params", objective=True),
        CostMetric("params_non_embedding", "Without embedding and head matrix.", "params in blocks", objective=False),
        CostMetric("flops_per_token", "Forward FLOPs per token at seq_len.", "FLOPs/tok", objective=True),
        CostMetric("kv_cache_bytes_per_token", "Key-value cache, bf16.", "KV bytes/tok", objective=True),
        CostMetric("decode_flops_per_token", "Decoding, mean over positions.", "decode FLOPs/tok", objective=True),
        CostMetric("decode_flops_worst_token", "Decoding, most expensive position.", "most FLOPs/tok", objective=False),
    ),
)


@dataclass(frozen=True, slots=True)
class CostPart:
    """One owner's or operation's share."""

    part: str
    level: Level
    uses: int
    params: int
    flops: int


def estimate(graph: Graph) -> Cost:
    """Price a verified graph at its ``seq_len``.

    Equal to the built module: parameters always, FLOPs to `FlopCounterMode` on the meta device.
    """
    levels = {node.name: node.level for node in graph.nodes}
    params: dict[str, int] = {}
    work: dict[Level, list[int]] = {}
    for node in graph.nodes:
        row = OPS[node.op]
        inputs = [levels[source] for source in node.inputs]
        if node.owner and node.owner not in params:
            params[node.owner] = row.params(graph, node, inputs)
        for item in row.works(graph, node, inputs):
            total = work.setdefault(item.level, [0, 0, 0])
            total[0] += item.per_position
            total[1] += item.per_pair
            total[2] += item.cached
    length = graph.seq_len
    flops = cached = decoded = 0
    for level, (per_position, per_pair, per_cached) in work.items():
        positions = level.closed_chunks(length)
        flops += positions * per_position + positions * positions * per_pair
        cached += positions * per_cached
        decoded += positions * per_position + positions * (positions + 1) // 2 * per_pair
    total_params = sum(params.values())
    return Cost(
        seq_len=length,
        params=total_params,
        params_non_embedding=total_params - _embedding_params(graph, params),
        flops=flops,
        kv_cache_bytes=cached * CACHE_BYTES_PER_ELEMENT,
        decode_flops=decoded if graph.causal else None,
        decode_flops_worst_token=_worst_token(work, length) if graph.causal else None,
        training_flops=_training_flops(graph, flops) if graph.training_weights else None,
    )


def _flops(graph: Graph, node: Node, levels: Mapping[str, Level]) -> int:
    works = OPS[node.op].works(graph, node, [levels[source] for source in node.inputs])
    counts = [(item.level.closed_chunks(graph.seq_len), item) for item in works]
    return sum(positions * item.per_position + positions**2 * item.per_pair for positions, item in counts)


def flops_of(graph: Graph, names: Collection[str]) -> int:
    """Forward FLOPs of some nodes over ``seq_len`` tokens."""
    levels = {node.name: node.level for node in graph.nodes}
    return sum(_flops(graph, node, levels) for node in graph.nodes if node.name in names)


def _training_flops(graph: Graph, flops: int) -> int:
    """The whole three times, but for the iterations that are drawn: those by what a step takes of them."""
    levels = {node.name: node.level for node in graph.nodes}
    total = float(TRAINING_FACTOR * flops)
    for node in graph.nodes:
        loop, t = node.iteration
        if t is not None and loop in graph.training_weights:
            total += (graph.training_weights[loop][t] - TRAINING_FACTOR) * _flops(graph, node, levels)
    return round(total)


def breakdown(graph: Graph) -> tuple[CostPart, ...]:
    """Parameters and FLOPs by owner (or operation) and level, in the graph's order."""
    levels = {node.name: node.level for node in graph.nodes}
    parts: dict[tuple[str, Level], CostPart] = {}
    counted: set[str] = set()
    for node in graph.nodes:
        row = OPS[node.op]
        inputs = [levels[source] for source in node.inputs]
        flops = _flops(graph, node, levels)
        params = 0 if node.owner in counted else row.params(graph, node, inputs)
        counted.add(node.owner)
        if not flops and not params and node.op != "block":
            continue
        part = node.owner if node.op in ("block", "embed", "head") else node.op
        level = row.works(graph, node, inputs)[0].level
        old = parts.get((part, level), CostPart(part, level, 0, 0, 0))
        parts[part, level] = CostPart(part, level, old.uses + 1, old.params + params, old.flops + flops)
    return tuple(parts.values())


def _embedding_params(graph: Graph, params: dict[str, int]) -> int:
    head = next(node for node in graph.nodes if node.name == graph.output)
    logits = params["head"] - norm_params(head.attr("norm", str), graph.d_model)
    return params.get("embed", 0) + logits


def _worst_token(work: dict[Level, list[int]], length: int) -> int:
    """The most expensive token closes chunks of some set of levels; of those that close these, the last costs most.

    Sets of levels whose closing tokens meet are walked, not tokens; each has one residue modulo one period.
    """
    meetings = {(1, 0)}
    for level in work:
        closing = (level.chunk, (-1 - level.offset) % level.chunk)
        meetings |= {met for at in meetings if (met := meet(at, closing)) is not None and met[1] < length}
    worst = 0
    for period, residue in meetings:
        token = residue + (length - 1 - residue) // period * period
        flops = 0
        for level, (per_position, per_pair, _) in work.items():
            latents, open_members = divmod(token + level.offset + 1, level.chunk)
            if open_members == 0:
                flops += per_position + latents * per_pair
        worst = max(worst, flops)
    return worst
