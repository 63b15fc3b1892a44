"""Architectures for people: a one-line summary, a strip of the schedule, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby

from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.pricing.cost import Cost, breakdown, estimate
from searchspace.arch import ArchSpec
from searchspace.choices import Categorical, Scalar
from searchspace.errors import SpecError
from searchspace.nodes import (
    ArrangeNode,
    BlockNode,
    EmbedNode,
    HeadNode,
    LoopNode,
    LossNode,
    NodeSpec,
    NormNode,
    level_uses,
)
from searchspace.space import SpaceSpec
from searchspace.topologies import MixSettings, TopologySpec

_STRIP = 32  # tokens: two chunks of 16

_IN_CHAINS = EmbedNode | BlockNode | LoopNode | HeadNode | NormNode | ArrangeNode | LossNode


_MANY = 5  # iterations of one level, that are counted


def summarize(arch: ArchSpec) -> str:
    """In the field's notation: ``1 + 2R[8 4] + 1, mesh`` for a core of 2 layers looped at chunks 8 and 4.

    Wirings that are no chain of blocks and loops are told by their layers and chunks.
    """
    if not all(isinstance(node, _IN_CHAINS) for node in arch.graph.values()):
        chunks = sorted({arch.levels[use.level].chunk for node in arch.graph.values() for _, use in level_uses(node)})
        layers = sum(block.layers for block in arch.blocks.values())
        return f"graph of {len(arch.graph)} nodes, {layers} layers, chunks {' '.join(map(str, chunks)) or '1'}"
    parts, topologies = [], []
    for node in _chain(arch):
        if isinstance(node, BlockNode):
            parts.append(str(arch.blocks[node.block].layers))
        elif isinstance(node, LoopNode):
            chunks = [arch.levels[use.level].chunk for use in node.schedule]
            parts.append(f"{arch.blocks[node.loop].layers}R[{_in_short(chunks)}]")
            topologies.append(topology_name(node.topology))
    return ", ".join([" + ".join(parts) or "no layers", *dict.fromkeys(topologies)])


def topology_name(topology: TopologySpec) -> str:
    """Its kind; of a mix, of what: ``mix(residual, anchor)``."""
    if not isinstance(settings := topology.settings, MixSettings):
        return topology.kind
    weights = "" if settings.weights == "sum" else f"{settings.weights} "
    return f"{weights}mix({', '.join(settings.of)})"


def _in_short(chunks: Sequence[int]) -> str:
    """``8 4 2``; many of one kind as ``1 x12``."""
    runs = [(chunk, len([*same])) for chunk, same in groupby(chunks)]
    return " ".join(f"{chunk} x{count}" if count >= _MANY else " ".join([str(chunk)] * count) for chunk, count in runs)


def labels(candidates: Sequence[tuple[ArchSpec, Mapping[str, Scalar]]]) -> list[str]:
    """`summarize` for each candidate with its decisions; where some read alike, with decisions that tell them apart."""
    summaries = [summarize(arch) for arch, _ in candidates]
    alike: dict[str, list[Mapping[str, Scalar]]] = {}
    for summary, (_, choices) in zip(summaries, candidates, strict=True):
        alike.setdefault(summary, []).append(choices)
    telling = {summary: _telling(group) for summary, group in alike.items() if len(group) > 1}
    found = []
    for summary, (_, choices) in zip(summaries, candidates, strict=True):
        told = [decided(name, choices[name]) for name in telling.get(summary, ()) if name in choices]
        found.append("; ".join([summary, *([", ".join(told)] if told else [])]))
    return found


def _telling(group: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """The fewest decisions that split the group as far as its decisions can, the most telling first."""
    names = list(dict.fromkeys(name for choices in group for name in choices))
    chosen: list[str] = []
    parts = 1
    while names:
        split = {n: len({tuple(str(c.get(m)) for m in (*chosen, n)) for c in group}) for n in names}
        best = max(names, key=split.__getitem__)
        if split[best] == parts:
            break
        chosen.append(best)
        names.remove(best)
        parts = split[best]
    return chosen


def decided(name: str, value: Scalar) -> str:
    """One decision, in short."""
    for head in ("graph.", "levels.", "blocks.", "vars.", "training."):
        name = name.removeprefix(head)
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def _chain(arch: ArchSpec) -> list[NodeSpec]:
    """The nodes from the embedding to the head, whatever their order in the file (``extends`` may change it)."""
    chain: list[NodeSpec] = [next(node for node in arch.graph.values() if isinstance(node, HeadNode))]
    while not isinstance(node := chain[-1], EmbedNode):
        assert isinstance(node, BlockNode | LoopNode | HeadNode | NormNode | ArrangeNode)
        chain.append(arch.graph[node.input])
    return chain[::-1]


def decision_rows(space: SpaceSpec) -> list[tuple[str, str]]:
    """Every decision that may come up, and what it chooses from."""
    rows = []
    for decision in space.decisions:
        if isinstance(decision, Categorical):
            options = ", ".join(map(str, decision.options))
        else:
            step = "" if decision.step in (None, 1) else f" in steps of {decision.step:g}"
            options = f"{decision.low:g} to {decision.high:g}{step}{', log' if decision.log else ''}"
        rows.append((decision.name, options))
    return rows


def cost_ranges(space: SpaceSpec, samples: int = 100) -> list[tuple[str, str]]:
    """The least and the most that random candidates cost."""
    costs = []
    for seed in range(samples):
        with suppress(SpecError):  # it does not compile
            costs.append(estimate(compile_arch(space.sample(seed).arch)))
    metrics = ("params", "flops_per_token", "decode_flops_per_token", "kv_cache_bytes_per_token")
    names = ("parameters", "forward FLOPs per token", "decode FLOPs per token", "KV cache bytes per token")
    rows = []
    for metric, name in zip(metrics, names, strict=True):
        if values := [value for cost in costs if (value := getattr(cost, metric)) is not None]:
            rows.append((name, f"{short(min(values))} to {short(max(values))}"))
    return rows


def short(number: float) -> str:
    """Four digits and a unit: 234.0K, 1.209G."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}E"


def span(fewest: int, most: int) -> str:
    """From one to the other; of one number, that."""
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"


def draw_strip(graph: Graph) -> str:
    """Chunk borders of every level on the first tokens: ``|`` begins a chunk, ``>`` closes one."""
    rows = {}
    for node in graph.nodes:
        if node.op == "block" and node.level.chunk > 1:
            rows[node.level] = node.name
    lines = []
    for level in sorted(rows, reverse=True):
        cells = []
        for token in range(min(_STRIP, graph.seq_len)):
            place = (token + level.offset) % level.chunk
            cells.append(">" if place == level.chunk - 1 else "|" if place == 0 or token == 0 else "-")
        lines.append(f"  chunk {level.chunk:>4}, offset {level.offset:>3}  {''.join(cells)}")
    return "\n".join(lines)


def cost_rows(graph: Graph) -> list[tuple[str, str, str, str, str]]:
    """(part, level, uses, parameters, share of FLOPs) for a table."""
    parts = breakdown(graph)
    total = sum(part.flops for part in parts) or 1
    return [
        (
            part.part,
            f"{part.level.chunk}+{part.level.offset}",
            str(part.uses),
            f"{part.params:,}",
            f"{part.flops / total:.1%}",
        )
        for part in parts
    ]


def in_bytes(count: float) -> str:
    """Bytes for people."""
    unit = max(0, min(4, (int(count).bit_length() - 1) // 10))
    amount = count / 1024**unit
    return f"{amount:,.0f} {_UNITS[unit]}" if unit == 0 or amount >= 100 else f"{amount:.3g} {_UNITS[unit]}"


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def cost_lines(cost: Cost) -> list[tuple[str, str]]:
    """(what, value) of the totals."""
    lines = [
        ("parameters", f"{cost.params:,}"),
        ("  without embeddings", f"{cost.params_non_embedding:,}"),
        ("forward FLOPs per token", f"{cost.flops_per_token:,.0f}"),
        ("training FLOPs per token", f"{cost.training_flops_per_token:,.0f}"),
    ]
    if cost.kv_cache_bytes_per_token is not None:
        lines.append(("KV cache per token (bf16)", f"{cost.kv_cache_bytes_per_token:,.1f} bytes"))
    if cost.decode_flops is not None:
        lines.append(("decode FLOPs per token, mean", f"{cost.decode_flops_per_token:,.0f}"))
        lines.append(("decode FLOPs per token, worst", f"{cost.decode_flops_worst_token:,.0f}"))
    return lines


def notes_on(arch: ArchSpec) -> list[str]:
    """What an architecture's author may not have meant."""
    used = {(node.level.chunk, node.level.offset) for node in compile_arch(arch).nodes}
    names = {level.chunk: name for name, level in arch.levels.items()}
    return [
        f"chunk {chunk} is longer than seq_len {arch.seq_len}: level '{names.get(chunk, chunk)}' tells next to nothing"
        for chunk, _ in sorted(used)
        if chunk > arch.seq_len
    ]
