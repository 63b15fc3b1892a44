"""From an `ArchSpec` to the graph: offsets decided, loops written out, every node an operation of the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from builder.ir import TOKEN_LEVEL, Attr, Graph, Level, Node
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.nodes import (
    BlockNode,
    EmbedNode,
    HeadNode,
    JoinNode,
    LevelUse,
    LoopNode,
    MemoryNode,
    NodeSpec,
    NormNode,
    PoolNode,
    ReadNode,
    RecallNode,
    UpscaleNode,
    WriteNode,
    level_uses,
    node_inputs,
)

_AUTO_SLOTS_BEYOND_ITERATIONS = 3  # MeSH: B = N_loop + 3


def lower_arch(arch: ArchSpec) -> Graph:
    """Write the architecture out as primitive operations.

    Raises:
        SpecError: if a node is never used, or offsets can't be made to nest.
    """
    order = _topological(arch)
    lowering = _Lowering(arch, _resolve_levels(arch, order))
    for name in order:
        lowering.lower(name, arch.graph[name])
    return Graph(
        name=arch.name,
        nodes=tuple(lowering.nodes),
        output=lowering.value[order[-1]].node,
        blocks=arch.blocks,
        vocab_size=arch.vocab_size,
        seq_len=arch.seq_len,
        d_model=arch.d_model,
        causal=arch.causal,
        tie_embeddings=arch.tie_embeddings,
        norm_eps=arch.norm_eps,
        residual_scale=arch.residual_scale,
    )


def _topological(arch: ArchSpec) -> list[str]:
    """The nodes, inputs first, the head last; a node that the head does not need is a mistake."""
    order: list[str] = []
    placed: set[str] = set()
    stack = [next(name for name, node in arch.graph.items() if isinstance(node, HeadNode))]
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
    return order


def _sources(arch: ArchSpec, node: NodeSpec) -> list[tuple[str, str]]:
    sources = list(node_inputs(node))
    if isinstance(node, LoopNode) and node.embedding is None and node.topology.kind in ("mesh", "anchor_star"):
        sources.append(("embedding", _only_embed(arch)))
    return sources


def _only_embed(arch: ArchSpec) -> str:
    return next(name for name, node in arch.graph.items() if isinstance(node, EmbedNode))


def _resolve_levels(arch: ArchSpec, order: list[str]) -> dict[str, Level]:
    """Every declared level with its offset: as given, or for auto the nearest to chunk/2 that nests."""
    borders: dict[str, set[str]] = {name: set() for name in arch.levels}
    at: dict[str, str] = {}  # declared level of each node's value; absent: full resolution
    for name in order:
        node = arch.graph[name]
        source = at.get(getattr(node, "input", "") or next(iter(getattr(node, "inputs", ())), ""))
        if isinstance(node, PoolNode):
            at[name] = node.pool.level
        elif isinstance(node, UpscaleNode):
            at[name] = node.upscale.level
        elif source is not None:
            at[name] = source
        for _, use in level_uses(node):
            if source is not None and source != use.level:
                fine, coarse = sorted((source, use.level), key=lambda level: arch.levels[level].chunk)
                borders[coarse].add(fine)
    levels: dict[str, Level] = {}
    for name in sorted(arch.levels, key=lambda level: arch.levels[level].chunk):
        spec = arch.levels[name]
        if spec.offset != "auto":
            levels[name] = Level(spec.chunk, spec.offset)
            continue
        finer = [levels[other] for other in borders[name] if other in levels]
        fits = (
            [w for w in range(spec.chunk) if all((w - f.offset) % f.chunk == 0 for f in finer)]
            if finer
            else [spec.chunk // 2]
        )
        if not fits:
            shown = ", ".join(str(f) for f in finer)
            raise SpecError(
                f"levels.{name}.offset", f"no offset nests in all of {shown}", "give these levels offsets that agree"
            )
        levels[name] = Level(spec.chunk, min(fits, key=lambda w: abs(w - spec.chunk // 2)))
    return levels


@dataclass(frozen=True, slots=True)
class _Value:
    """A node's result, and how its latents are spread when it is upscaled."""

    node: str
    level: Level
    upscale: str = "uniform"


@dataclass(slots=True)
class _Lowering:
    arch: ArchSpec
    levels: dict[str, Level]
    nodes: list[Node] = field(default_factory=list)
    value: dict[str, _Value] = field(default_factory=dict)

    def lower(self, name: str, node: NodeSpec) -> None:
        """Append the operations of one spec node."""
        v = self.value
        if isinstance(node, EmbedNode):
            v[name] = self.emit(name, "embed", (), TOKEN_LEVEL, owner="embed")
        elif isinstance(node, BlockNode):
            v[name] = self.block(name, node.block, v[node.input])
        elif isinstance(node, PoolNode):
            v[name] = self.pool(name, v[node.input], node.pool)
        elif isinstance(node, UpscaleNode):
            target = self.level_of(node.upscale)
            declared = self.arch.levels[node.upscale.level]
            upscale = node.upscale.upscale or declared.upscale
            v[name] = self.upscale(name, v[node.input], target, upscale, node.delay + node.upscale.delay, node.reads)
        elif isinstance(node, JoinNode):
            v[name] = self.join(name, node.join, [v[i] for i in node.inputs])
        elif isinstance(node, MemoryNode):
            v[name] = self.emit(name, "memory", (v[node.input],), v[node.input].level, slots=node.memory)
        elif isinstance(node, WriteNode):
            v[name] = self.route(
                name, "write", (v[node.write], v[node.inputs[0]], v[node.inputs[1]]), f"graph.{name}.write"
            )
        elif isinstance(node, ReadNode):
            v[name] = self.route(name, "read", (v[node.read], v[node.input]), f"graph.{name}.read")
        elif isinstance(node, NormNode):
            owner = f"shared.{node.weights}" if node.weights else f"sites.{name}"
            v[name] = self.emit(name, f"norm.{node.norm}", (v[node.input],), v[node.input].level, owner=owner)
        elif isinstance(node, RecallNode):
            owner = f"shared.{node.weights}" if node.weights else f"sites.{name}"
            v[name] = self.recall(name, node.recall, v[node.inputs[0]], v[node.inputs[1]], owner)
        elif isinstance(node, LoopNode):
            v[name] = self.loop(name, node)
        else:
            v[name] = self.emit(name, "head", (v[node.input],), v[node.input].level, owner="head", norm=node.norm)

    def level_of(self, use: LevelUse) -> Level:
        level = self.levels[use.level]
        return level if use.offset is None else Level(level.chunk, use.offset)

    def emit(
        self, name: str, op: str, inputs: tuple[_Value, ...], level: Level, owner: str = "", **attrs: Attr
    ) -> _Value:
        names = tuple([value.node for value in inputs])
        self.nodes.append(Node(name, op, names, level, owner, tuple(attrs.items())))
        return _Value(name, level, inputs[0].upscale if inputs else "uniform")

    def block(self, name: str, block: str, source: _Value) -> _Value:
        return self.emit(name, "block", (source,), source.level, owner=f"blocks.{block}", block=block)

    def pool(self, name: str, source: _Value, use: LevelUse) -> _Value:
        declared, level = self.arch.levels[use.level], self.level_of(use)
        kind = use.pool or declared.pool
        owner = f"sites.{name}" if kind == "self_aggregate" else ""
        pooled = self.emit(name, f"pool.{kind}", (source,), level, owner=owner)
        return _Value(pooled.node, level, use.upscale or declared.upscale)

    def upscale(self, name: str, source: _Value, target: Level, then: str, delay: int, reads: str) -> _Value:
        if reads == "auto":
            reads = "closed" if self.arch.causal else "own_chunk"
        owner = f"sites.{name}" if source.upscale == "learned" else ""
        spread = self.emit(name, f"upscale.{source.upscale}", (source,), target, owner=owner, delay=delay, reads=reads)
        return _Value(spread.node, target, then)

    def join(self, name: str, kind: str, values: list[_Value]) -> _Value:
        op = "join.base" if kind == "base" else "join.sum"
        return self.emit(name, op, tuple(values), values[-1].level)

    def route(self, name: str, op: str, values: tuple[_Value, ...], path: str) -> _Value:
        memory = next(node for node in self.nodes if node.name == values[0].node)
        if memory.op not in ("memory", "write"):
            raise SpecError(path, f"'{memory.name}' is not a memory", "name a node made by memory or write")
        return self.emit(name, op, values, values[-1].level, owner=f"sites.{name}", slots=memory.int_attr("slots"))

    def recall(self, name: str, kind: str, state: _Value, source: _Value, owner: str) -> _Value:
        return self.emit(name, f"recall.{kind}", (state, source), state.level, owner="" if kind == "add" else owner)

    def loop(self, name: str, loop: LoopNode) -> _Value:
        """One group of operations for each entry of the schedule; the state stays at the input's level."""
        start, kind = self.value[loop.input], loop.topology.kind
        embedding = start
        if kind in ("mesh", "anchor_star"):
            embedding = self.value[loop.embedding or _only_embed(self.arch)]
        state, memory = start, start
        if kind == "mesh":
            slots = loop.topology.slots
            slots = len(loop.schedule) + _AUTO_SLOTS_BEYOND_ITERATIONS if slots == "auto" else slots
            memory = self.emit(f"{name}.memory", "memory", (embedding,), embedding.level, slots=slots)
            memory = self.route(f"{name}.start.write", "write", (memory, start, start), f"graph.{name}")
            state = self.route(f"{name}.start.read", "read", (memory, start), f"graph.{name}")
        for t, use in enumerate(loop.schedule):
            at = f"{name}.t{t}"
            entered = state
            if loop.recall is not None:
                entered = self.recall(f"{at}.recall", loop.recall, state, start, f"sites.{name}.recall")
            latents = self.block(f"{at}.block", loop.loop, self.pool(f"{at}.pool", entered, use))
            update = self.upscale(f"{at}.upscale", latents, state.level, state.upscale, use.delay, "auto")
            if kind == "mesh":
                memory = self.route(f"{at}.write", "write", (memory, update, state), f"graph.{name}")
                state = self.route(f"{at}.read", "read", (memory, state), f"graph.{name}")
            else:
                meets = {"base": [], "residual": [state], "anchor": [start], "anchor_star": [embedding]}[kind]
                state = self.join(f"{at}.join", kind, [update, *meets])
            if loop.norm is not None:
                state = self.emit(f"{at}.norm", f"norm.{loop.norm}", (state,), state.level, owner=f"sites.{name}.norm")
        return _Value(state.node, state.level, start.upscale)
