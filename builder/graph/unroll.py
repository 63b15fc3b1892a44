"""From an `ArchSpec` to the graph: offsets decided, loops written out, every node an operation of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from builder.graph.emit import Emitter, Value
from builder.graph.ir import TOKEN_LEVEL, Attr, Graph, Level, meet
from builder.graph.topologies import UNROLLINGS, Loop
from builder.iterations import training_weights
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.nodes import (
    ArrangeNode,
    BlockNode,
    EmbedNode,
    HeadNode,
    JoinNode,
    LevelUse,
    LoopNode,
    LossNode,
    MemoryNode,
    NodeSpec,
    NormNode,
    PoolNode,
    ReadNode,
    RecallNode,
    StepNode,
    UpscaleNode,
    WriteNode,
    level_uses,
    node_inputs,
)


def lower_arch(arch: ArchSpec) -> Graph:
    """Write the architecture out as primitive operations.

    Raises:
        SpecError: if a node is never used, or offsets can't be made to nest.
    """
    order, head = _topological(arch)
    empty = Graph(
        name=arch.name,
        nodes=(),
        output=head,
        losses=tuple(name for name in order if isinstance(arch.graph[name], LossNode)),
        blocks=arch.blocks,
        vocab_size=arch.vocab_size,
        seq_len=arch.seq_len,
        d_model=arch.d_model,
        causal=arch.causal,
        tie_embeddings=arch.tie_embeddings,
        norm_eps=arch.norm_eps,
        residual_scale=arch.residual_scale,
        parametrization=arch.parametrization,
        base=arch.base,
        iterations={
            name: node.iterations
            for name, node in ((name, arch.graph[name]) for name in order)
            if isinstance(node, LoopNode) and node.iterations
        },
        training_weights=training_weights(arch),
    )
    to = Emitter(empty, arch, _resolve_levels(arch, order))
    values: dict[str, Value] = {}
    for name in order:
        to.key = f"graph.{name}"
        values[name] = _lower(to, values, name, arch.graph[name])
    return empty.with_nodes(tuple(to.nodes))


def _topological(arch: ArchSpec) -> tuple[list[str], str]:
    """The nodes, inputs first, and which is the head; a node that no output needs is a mistake."""
    order: list[str] = []
    placed: set[str] = set()
    head = next(name for name, node in arch.graph.items() if isinstance(node, HeadNode))
    stack = [*(name for name, node in arch.graph.items() if isinstance(node, LossNode)), head]
    while stack:
        name = stack[-1]
        missing = [source for _, source in _sources(arch, arch.graph[name]) if source not in placed]
        if missing:
            stack.append(missing[0])
            continue
        stack.pop()
        if name not in placed:
            placed.add(name)
            order.append(name)
    for name in arch.graph:
        if name not in placed:
            raise SpecError(f"graph.{name}", "is never used", "read it in another node, or remove it")
    return order, head


def _sources(arch: ArchSpec, node: NodeSpec) -> list[tuple[str, str]]:
    sources = list(node_inputs(node))
    if isinstance(node, LoopNode) and node.embedding is None and node.reads_embedding:
        sources.append(("embedding", _only_embed(arch)))
    return sources


def _only_embed(arch: ArchSpec) -> str:
    return next(name for name, node in arch.graph.items() if isinstance(node, EmbedNode))


def _resolve_levels(arch: ArchSpec, order: list[str]) -> dict[str, Level]:
    """Every declared level with its offset: as given, or for auto the nearest to chunk/2 that nests.

    Levels nest where one is pooled or upscaled to the other; a use with an offset of its own counts too.
    """
    at: dict[str, LevelUse] = {}  # how each node's value came to its level; absent: full resolution
    pairs: list[tuple[LevelUse, LevelUse]] = []
    for name in order:
        node = arch.graph[name]
        source = at.get(getattr(node, "input", "") or next(iter(getattr(node, "inputs", ())), ""))
        target = node.pool if isinstance(node, PoolNode) else node.upscale if isinstance(node, UpscaleNode) else source
        if target is not None:
            at[name] = target
        if source is not None:
            pairs.extend((source, use) for _, use in level_uses(node))
    fixed = {name: spec.offset for name, spec in arch.levels.items() if spec.offset != "auto"}
    for name in sorted((n for n in arch.levels if n not in fixed), key=lambda level: arch.levels[level].chunk):
        fixed[name] = _auto_offset(arch, name, pairs, fixed)
    return {name: Level(spec.chunk, fixed[name]) for name, spec in arch.levels.items()}


def _auto_offset(arch: ArchSpec, name: str, pairs: list[tuple[LevelUse, LevelUse]], fixed: Mapping[str, int]) -> int:
    """The offset nearest to half a chunk at which ``name`` nests with every neighbour whose offset is known."""
    chunk = arch.levels[name].chunk
    neighbours = set()
    for pair in pairs:
        for own, other in (pair, pair[::-1]):
            offset = fixed.get(other.level) if other.offset is None else other.offset
            if own.level == name and own.offset is None and other.level != name and offset is not None:
                neighbours.add(Level(arch.levels[other.level].chunk, offset))

    # Levels nest where their offsets are equal modulo the finer chunk. Chunks that do not divide never nest: that is
    # for the verifier to tell, at the node where it happens.
    neighbours = {n for n in neighbours if max(n.chunk, chunk) % min(n.chunk, chunk) == 0}
    fits: tuple[int, int] | None = (1, 0)
    for finer, offset in ((min(n.chunk, chunk), n.offset) for n in neighbours):
        fits = None if fits is None else meet(fits, (finer, offset % finer))
    if fits is None:
        shown = ", ".join(str(n) for n in sorted(neighbours))
        raise SpecError(f"levels.{name}.offset", f"no offset nests with all of {shown}", "give offsets that agree")
    period, residue = fits
    below = residue + max(0, chunk // 2 - residue) // period * period
    return min((o for o in (below, below + period) if o < chunk), key=lambda offset: abs(offset - chunk // 2))


def _lower(to: Emitter, v: dict[str, Value], name: str, node: NodeSpec) -> Value:
    """Append the operations of one node of the file; ``v`` holds those before it."""
    attrs: dict[str, Attr]
    if isinstance(node, EmbedNode):
        scale: dict[str, Attr] = {} if node.scale == "none" else {"scale": node.scale}
        return to.emit(name, "embed", {}, TOKEN_LEVEL, scale, owner="embed")
    if isinstance(node, BlockNode):
        return to.block(name, node.block, v[node.input], v[node.recall] if node.recall else None)
    if isinstance(node, PoolNode):
        return to.pool(name, v[node.input], node.pool)
    if isinstance(node, UpscaleNode):
        declared = to.arch.levels[node.upscale.level]
        then = replace(to.like(declared, node.upscale), level=to.level_of(node.upscale))
        return to.upscale(name, v[node.input], then, node.delay + node.upscale.delay, node.reads)
    if isinstance(node, JoinNode):
        first, *others = [v[i] for i in node.inputs]
        if node.join == "weighted":
            return to.weighted(name, [first, *others], node.factors, learned=node.learned)
        if node.join == "mixture":
            return to.mixture(name, first, others[0], others[1:])
        return to.sum(name, first, others)
    if isinstance(node, MemoryNode):
        return to.emit(name, "memory", {"first": v[node.input]}, v[node.input].level, {"slots": node.memory})
    if isinstance(node, WriteNode):
        update, state = (v[i] for i in node.inputs)
        return to.write(name, v[node.write], update, state, key=f"{to.key}.write")
    if isinstance(node, ReadNode):
        return to.read(name, v[node.read], v[node.input], key=f"{to.key}.read")
    if isinstance(node, NormNode):
        return to.norm(name, node.norm, v[node.input], owner=f"shared.{node.weights}" if node.weights else "")
    if isinstance(node, RecallNode):
        owner = f"shared.{node.weights}" if node.weights else ""
        return to.recall(name, node.recall, v[node.inputs[0]], v[node.inputs[1]], owner=owner)
    if isinstance(node, StepNode):
        return to.step(name, node.step, v[node.input])
    if isinstance(node, ArrangeNode):
        attrs = {"sides": node.arrange, "axes": node.axes, "back": node.back}
        return to.emit(name, "arrange", {"stream": v[node.input]}, v[node.input].level, attrs)
    if isinstance(node, LoopNode):
        start = v[node.input]
        embedding = v[node.embedding or _only_embed(to.arch)] if node.reads_embedding else start
        return UNROLLINGS[node.topology.kind].unroll(Loop(to, name, node, start, embedding))
    if isinstance(node, LossNode):
        return to.emit(name, f"loss.{node.loss}", {"logits": v[node.input]}, TOKEN_LEVEL, {"weight": node.weight})
    attrs, read = {"norm": node.norm, **({"hidden": True} if node.hidden else {})}, v[node.input]
    if node.head == "sequence":
        read = to.emit(f"{name}.mean", "mean", {"stream": read}, read.level)
    return to.emit(name, "head", {"stream": read}, read.level, attrs, owner="head")
