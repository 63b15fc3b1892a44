"""From an `ArchSpec` to the graph: offsets decided, loops written out, every node an operation of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from builder.graph.ir import TOKEN_LEVEL, Attr, Graph, Level, Node, meet
from searchspace.arch import ArchSpec, LevelSpec
from searchspace.errors import SpecError
from searchspace.nodes import (
    BlockNode,
    EmbedNode,
    HeadNode,
    JoinNode,
    LevelUse,
    LoopNode,
    MemoryNode,
    MeshSettings,
    MixSettings,
    NodeSpec,
    NormNode,
    PoolNode,
    ReadNode,
    RecallNode,
    RungeKuttaSettings,
    StepNode,
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


@dataclass(frozen=True, slots=True)
class _Value:
    """A node's result, and how its latents are spread when it is upscaled."""

    node: str
    level: Level
    upscale: str = "uniform"
    positions: str = "chunk_index"
    front: str = "read"


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
            scale: dict[str, Attr] = {} if node.scale == "none" else {"scale": node.scale}
            v[name] = self.emit(name, "embed", (), TOKEN_LEVEL, owner="embed", **scale)
        elif isinstance(node, BlockNode):
            v[name] = self.block(name, node.block, v[node.input], v[node.recall] if node.recall else None)
        elif isinstance(node, PoolNode):
            v[name] = self.pool(name, v[node.input], node.pool)
        elif isinstance(node, UpscaleNode):
            target = self.level_of(node.upscale)
            declared = self.arch.levels[node.upscale.level]
            then = replace(self.like(declared, node.upscale), level=target)
            v[name] = self.upscale(name, v[node.input], then, node.delay + node.upscale.delay, node.reads)
        elif isinstance(node, JoinNode):
            v[name] = self.join(name, node.join, [v[i] for i in node.inputs], node.factors, node.learned)
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
        elif isinstance(node, StepNode):
            v[name] = self.step(name, node.step, v[node.input])
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
        return replace(inputs[0], node=name, level=level) if inputs else _Value(name, level)

    def block(self, name: str, block: str, source: _Value, recalled: _Value | None = None) -> _Value:
        attrs: dict[str, Attr] = {"block": block}
        if recalled is not None:
            attrs["recall"] = str(self.arch.blocks[block].recall)
        if source.positions != "chunk_index" and source.level != TOKEN_LEVEL:
            attrs["positions"] = source.positions
        inputs = (source,) if recalled is None else (source, recalled)
        return self.emit(name, "block", inputs, source.level, owner=f"blocks.{block}", **attrs)

    def pool(self, name: str, source: _Value, use: LevelUse) -> _Value:
        declared, level = self.arch.levels[use.level], self.level_of(use)
        kind = use.pool or declared.pool
        owner = "" if kind in ("mean", "last") else f"sites.{name}"
        pooled = self.emit(name, f"pool.{kind}", (source,), level, owner=owner)
        return replace(self.like(declared, use), node=pooled.node, level=level)

    def like(self, declared: LevelSpec, use: LevelUse) -> _Value:
        """A value of a level, as it says of its latents."""
        return _Value("", TOKEN_LEVEL, use.upscale or declared.upscale, declared.positions, declared.front)

    def upscale(self, name: str, source: _Value, then: _Value, delay: int, reads: str) -> _Value:
        """Spread ``source`` back to the level of ``then``, which says how that is spread in turn."""
        target = then.level
        if reads == "auto":
            reads = "closed" if self.arch.causal else "own_chunk"
        owner = f"sites.{name}" if source.upscale == "learned" else ""
        attrs: dict[str, Attr] = {"delay": delay, "reads": reads}
        if source.front != "read" and reads == "closed":
            attrs["front"] = source.front
        spread = self.emit(name, f"upscale.{source.upscale}", (source,), target, owner=owner, **attrs)
        return replace(then, node=spread.node)

    def join(
        self,
        name: str,
        kind: str,
        values: list[_Value],
        factors: Sequence[float] = (),
        learned: bool = False,
        owner: str = "",
    ) -> _Value:
        """Fewer factors than values: the first values have none."""
        last, inputs = values[-1], tuple(values)
        if kind == "weighted":
            attrs: dict[str, Attr] = {"factors": ",".join(f"{f:.12g}" for f in factors), "learned": int(learned)}
            owner = (owner or f"sites.{name}") if learned else ""
            joined = self.emit(name, "join.weighted", inputs, last.level, owner=owner, **attrs)
        elif kind == "mixture":
            joined = self.emit(name, "join.mixture", inputs, last.level, owner=f"sites.{name}")
        else:
            joined = self.emit(name, "join.base" if kind == "base" else "join.sum", inputs, last.level)
        return replace(last, node=joined.node)

    def step(self, name: str, kind: str, source: _Value) -> _Value:
        return self.emit(name, f"step.{kind}", (source,), source.level, owner=f"sites.{name}")

    def route(self, name: str, op: str, values: tuple[_Value, ...], path: str) -> _Value:
        memory = next(node for node in self.nodes if node.name == values[0].node)
        if memory.op not in ("memory", "write"):
            raise SpecError(path, f"'{memory.name}' is not a memory", "name a node made by memory or write")
        return self.emit(name, op, values, values[-1].level, owner=f"sites.{name}", slots=memory.int_attr("slots"))

    def recall(self, name: str, kind: str, state: _Value, source: _Value, owner: str) -> _Value:
        return self.emit(name, f"recall.{kind}", (state, source), state.level, owner="" if kind == "add" else owner)

    def loop(self, name: str, loop: LoopNode) -> _Value:
        """One group of operations for each entry of the schedule; the state stays at the input's level."""
        start, settings = self.value[loop.input], loop.topology.settings
        embedding = self.value[loop.embedding or _only_embed(self.arch)] if loop.reads_embedding else start
        if isinstance(settings, MeshSettings):
            return self.mesh_loop(name, loop, start, embedding, settings)
        if isinstance(settings, RungeKuttaSettings):
            return self.runge_kutta_loop(name, loop, start, settings)
        state = start
        for t in range(len(loop.schedule)):
            update = self.iteration(name, loop, t, state, start)
            supports = {"residual": state, "anchor": start, "anchor_star": embedding}
            at = f"{name}.t{t}.join"
            if isinstance(settings, MixSettings):
                state = self.mix(at, update, state, [supports[support] for support in settings.of], settings.weights)
            elif loop.topology.kind == "base":
                state = self.join(at, "base", [update])
            else:
                state = self.join(at, "sum", [update, supports[loop.topology.kind]])
            state = self.loop_norm(name, loop, t, state)
        return state

    def iteration(self, name: str, loop: LoopNode, t: int, state: _Value, start: _Value) -> _Value:
        """One pass of the core: step, recall, pool, block, upscale. Gives the update."""
        at, use = f"{name}.t{t}", loop.schedule[t]
        entered = state
        if loop.step is not None:
            entered = self.step(f"{at}.step", loop.step, entered)
        if loop.recall is not None:
            entered = self.recall(f"{at}.recall", loop.recall, entered, start, f"sites.{name}.recall")
        latents = self.pool(f"{at}.pool", entered, use)
        recalled = None
        if self.arch.blocks[loop.loop].recall is not None:
            recalled = self.pool(f"{at}.recalled", start, replace(use, pool="mean"))
        latents = self.block(f"{at}.block", loop.loop, latents, recalled)
        return self.upscale(f"{at}.upscale", latents, state, use.delay, "auto")

    def loop_norm(self, name: str, loop: LoopNode, t: int, state: _Value) -> _Value:
        if loop.norm is None:
            return state
        return self.emit(f"{name}.t{t}.norm", f"norm.{loop.norm}", (state,), state.level, owner=f"sites.{name}.norm")

    def mix(self, name: str, update: _Value, state: _Value, supports: list[_Value], weights: str) -> _Value:
        if weights == "dynamic":
            return self.join(name, "mixture", [update, state, *supports])
        if weights == "static":
            factors = [1.0, *[1.0 / len(supports)] * len(supports)]
            return self.join(name, "weighted", [update, *supports], factors, learned=True)
        return self.join(name, "sum", [update, *supports])

    def mesh_loop(self, name: str, loop: LoopNode, start: _Value, embedding: _Value, settings: MeshSettings) -> _Value:
        """Every update is written to the memory, every state read from it; one write and read before the first."""
        auto = len(loop.schedule) + _AUTO_SLOTS_BEYOND_ITERATIONS
        slots = auto if settings.slots == "auto" else settings.slots
        path = f"graph.{name}"
        memory = self.emit(f"{name}.memory", "memory", (embedding,), embedding.level, slots=slots)
        asked = start if settings.entry == "state" else embedding
        if asked.level != start.level:
            raise SpecError(f"{path}.topology.mesh.entry", "the embedding is at another level", "use entry: state")
        memory = self.route(f"{name}.start.write", "write", (memory, start, asked), path)
        state = self.route(f"{name}.start.read", "read", (memory, asked), path)
        for t in range(len(loop.schedule)):
            update = self.iteration(name, loop, t, state, start)
            memory = self.route(f"{name}.t{t}.write", "write", (memory, update, state), path)
            state = self.route(f"{name}.t{t}.read", "read", (memory, state), path)
            state = self.loop_norm(name, loop, t, state)
        return state

    def runge_kutta_loop(self, name: str, loop: LoopNode, start: _Value, settings: RungeKuttaSettings) -> _Value:
        """Iterations are stages v_j = f(x + sum of theta_jl v_l); a step is x + sum of theta_j v_j."""
        tableau, state = settings.scheme, start
        for first in range(0, len(loop.schedule), tableau.stages):
            stages: list[_Value] = []
            for j, factors in enumerate(tableau.stage_factors):
                owner = f"sites.{name}.stage{j}" if settings.trains else ""
                point = self.combine(f"{name}.t{first + j}.stage", state, stages, factors, owner)
                stages.append(self.iteration(name, loop, first + j, point, start))
            t = first + tableau.stages - 1
            owner = f"sites.{name}.step" if settings.trains else ""
            state = self.combine(f"{name}.t{t}.join", state, stages, tableau.step_factors, owner)
            state = self.loop_norm(name, loop, t, state)
        return state

    def combine(self, name: str, state: _Value, stages: list[_Value], factors: Sequence[float], owner: str) -> _Value:
        """The state plus the stages, with factors that ``owner`` learns; else those of factor 0 are left out."""
        used = [(stage, f) for stage, f in zip(stages, factors, strict=True) if f or owner]
        if not used:
            return state
        values, own = [state, *[stage for stage, _ in used]], [factor for _, factor in used]
        if owner:
            return self.join(name, "weighted", values, own, learned=True, owner=owner)
        return self.join(name, "weighted", values, [1.0, *own])
