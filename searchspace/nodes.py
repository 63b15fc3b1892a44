"""The graph's nodes: one frozen spec for each operation, told apart by the key that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias

from searchspace.errors import SpecError, one_of, show
from searchspace.plain import dataclass_decoder, decode, decoder_for, encode, expect_mapping, join_path, key

PoolKind: TypeAlias = Literal["mean", "self_aggregate", "last", "linear", "attention"]
UpscaleKind: TypeAlias = Literal["uniform", "learned"]
JoinKind: TypeAlias = Literal["base", "residual", "anchor", "anchor_star", "sum", "weighted", "mixture"]
TopologyKind: TypeAlias = Literal["base", "residual", "anchor", "anchor_star", "mesh", "mix", "runge_kutta"]
Support: TypeAlias = Literal["residual", "anchor", "anchor_star"]
MixWeights: TypeAlias = Literal["sum", "static", "dynamic"]
Tableau: TypeAlias = Literal["euler", "midpoint", "rk4"]
EmbedScale: TypeAlias = Literal["none", "sqrt_d_model"]
MeshEntry: TypeAlias = Literal["state", "embedding"]
FrontRule: TypeAlias = Literal["read", "zero"]
ResidualKind: TypeAlias = Literal["add", "gate", "gru"]
Positions: TypeAlias = Literal["chunk_index", "last_token"]
StepKind: TypeAlias = Literal["add", "scale"]
NormKind: TypeAlias = Literal["rms", "layer"]
NormPlace: TypeAlias = Literal["pre", "peri", "post", "sandwich"]
FfnKind: TypeAlias = Literal["gelu", "swiglu", "relu2"]
RecallKind: TypeAlias = Literal["add", "linear", "concat"]
ReadRule: TypeAlias = Literal["auto", "closed", "own_chunk"]
ResidualScale: TypeAlias = Literal["none", "inverse_depth", "inverse_sqrt_depth"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelUse:
    """A level as a node or a schedule entry uses it: its name, perhaps with some keys replaced."""

    level: str = key("Name of the level to start from.")
    offset: int | None = key("Chunk offset here.", default=None, low=0)
    pool: PoolKind | None = key("Pool here.", default=None)
    upscale: UpscaleKind | None = key("Up-scaling here.", default=None)
    delay: int = key("Read the latents as of this many tokens ago.", default=0, low=0, high=65536)

    @staticmethod
    def __decode__(data: object, path: str) -> LevelUse:
        if isinstance(data, str):
            return LevelUse(level=data)
        if isinstance(data, dict):
            use: LevelUse = dataclass_decoder(LevelUse)(data, path)
            return use
        raise SpecError(path, f"expected a level, got {show(data)}", "name one, or write {level: NAME, offset: 0}")

    def __encode__(self) -> object:
        changed = {
            name: value
            for name in ("offset", "pool", "upscale", "delay")
            if (value := getattr(self, name)) not in (None, 0) or (name == "offset" and value == 0)
        }
        return {"level": self.level, **changed} if changed else self.level


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSettings:
    """Memory slots with learned writes and reads (MeSH)."""

    slots: int | Literal["auto"] = key("Memory slots; auto is iterations + 3.", default="auto", low=2, high=256)
    entry: MeshEntry = key(
        "What the routers before the first iteration read: the state that enters the loop, or the embedding (the paper "
        "leaves it open).",
        default="state",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSettings:
    """Several supports at once (MeSH, appendix E.2)."""

    of: tuple[Support, ...] = key("What the update is added to.")
    weights: MixWeights = key(
        "sum: all of each. static: a learned factor for each, and the update's. dynamic: for each token, a router's "
        "softmax over the update and each.",
        default="sum",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RungeKuttaSettings:
    """Iterations as stages of an explicit Runge-Kutta step over depth (R2N2, arXiv 2211.12386)."""

    tableau: Tableau | None = key("euler: 1 stage a step. midpoint: 2. rk4: 4.", default=None)
    learned: bool = key("Train the tableau's factors, one set for all steps, from these values.", default=False)
    stages: int | None = key(
        "Instead of a named tableau, one of so many stages with learned factors, from 1/n for the stage before and for "
        "each in the step.",
        default=None,
        low=1,
        high=64,
    )

    @property
    def scheme(self) -> ButcherTableau:
        """The factors to begin with."""
        if self.tableau is not None:
            return TABLEAUS[self.tableau]
        n = self.stages or 1
        return ButcherTableau(tuple((*[0.0] * (j - 1), 1 / n)[:j] for j in range(n)), (1 / n,) * n)

    @property
    def trains(self) -> bool:
        """Whether the factors are learned."""
        return self.learned or self.stages is not None


class ButcherTableau(NamedTuple):
    """An explicit Runge-Kutta scheme: what each stage and the step add to the state, per earlier stage."""

    stage_factors: tuple[tuple[float, ...], ...]
    step_factors: tuple[float, ...]

    @property
    def stages(self) -> int:
        return len(self.step_factors)


TABLEAUS: dict[str, ButcherTableau] = {
    "euler": ButcherTableau(((),), (1.0,)),
    "midpoint": ButcherTableau(((), (0.5,)), (0.0, 1.0)),
    "rk4": ButcherTableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}

_SETTINGS: dict[str, type[MeshSettings | MixSettings | RungeKuttaSettings]] = {
    "mesh": MeshSettings,
    "mix": MixSettings,
    "runge_kutta": RungeKuttaSettings,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologySpec:
    """How an iteration's update meets the loop state and older states."""

    kind: TopologyKind
    settings: MeshSettings | MixSettings | RungeKuttaSettings | None = None

    @staticmethod
    def __decode__(data: object, path: str) -> TopologySpec:
        if isinstance(data, str) and data not in ("mix", "runge_kutta"):
            kind: TopologyKind = decoder_for(TopologyKind)(data, path)
            return TopologySpec(kind=kind, settings=MeshSettings() if kind == "mesh" else None)
        mapping = expect_mapping(data, path, "a topology: a name or {mesh: {slots: auto}}")
        name = next(iter(mapping), "")
        if len(mapping) != 1 or name not in _SETTINGS:
            raise SpecError(path, f"unknown topology {show(mapping)}", "write a name, or " + one_of(_SETTINGS, name))
        settings = decode(_SETTINGS[name], mapping[name], join_path(path, name))
        if isinstance(settings, MixSettings) and not 1 <= len(settings.of) == len(set(settings.of)):
            raise SpecError(f"{path}.mix.of", f"{list(settings.of)} is not a set of supports", "name each once")
        if isinstance(settings, RungeKuttaSettings) and (settings.tableau is None) == (settings.stages is None):
            raise SpecError(f"{path}.runge_kutta", "has no scheme, or two", "give one of tableau and stages")
        return TopologySpec(kind=decoder_for(TopologyKind)(name, path), settings=settings)

    def __encode__(self) -> object:
        return self.kind if self.settings in (None, MeshSettings()) else {self.kind: encode(self.settings)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedNode:
    """Token ids to token stream."""

    embed: Literal["tokens"] = key("The input: tokens.")
    scale: EmbedScale = key(
        "sqrt_d_model: multiplied by it in the forward (MeSH, appendix B), the weights drawn smaller by as much.",
        default="none",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNode:
    """One use of a block, at its input's level."""

    block: str = key("Name of the block.")
    input: str = key("The stream it reads.", name="in")
    recall: str | None = key("The stream injected again, for a block with internal recall.", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolNode:
    """Assign to a level's chunks, and reduce each to a latent."""

    pool: LevelUse = key("The coarser level.")
    input: str = key("The stream to pool.", name="in")


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscaleNode:
    """Spread latents back to a finer level, by the kind of the latents' own level."""

    upscale: LevelUse = key("The finer level to return to.")
    input: str = key("The latents to spread.", name="in")
    delay: int = key("Read as of this many positions of the finer level ago.", default=0, low=0, high=65536)
    reads: ReadRule = key(
        "closed: the last chunk closed; own_chunk: the chunk one is in, which looks ahead; "
        "auto: closed in a causal model, else own_chunk.",
        default="auto",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinNode:
    """Topology step: an update, and what it is added to."""

    join: JoinKind = key(
        "base: the update alone. weighted: a sum with a factor for each input. mixture: the first and all "
        "from the third on, weighted for each token by a softmax router that reads the second. Others: the sum."
    )
    inputs: tuple[str, ...] = key("The update first, then states.", name="in")
    factors: tuple[float, ...] = key("Of weighted, one for each input.", default=())
    learned: bool = key("Whether the factors of weighted are trained.", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNode:
    """A memory whose slot 0 holds the input and whose other slots are zero (MeSH)."""

    memory: int = key("Number of slots.", low=2, high=256)
    input: str = key("What slot 0 holds.", name="in")


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteNode:
    """A new memory: the update added to every slot, weighted by a router reading the state."""

    write: str = key("The memory to write to.")
    inputs: tuple[str, ...] = key("[update, state].", name="in")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadNode:
    """The slots' sum, weighted by a router reading the state."""

    read: str = key("The memory to read.")
    input: str = key("The state the router reads.", name="in")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormNode:
    """Normalise a stream."""

    norm: NormKind = key("Normalization kind.")
    input: str = key("The stream to normalise.", name="in")
    weights: str | None = key("Nodes that give the same name share their weights.", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNode:
    """A learned vector added to a stream, or multiplied with it."""

    step: StepKind = key("add: starts at zero. scale: starts at one.")
    input: str = key("The stream.", name="in")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallNode:
    """Inject the input again: state and input become the new state (external recall)."""

    recall: RecallKind = key("add: sum. linear: W_x state + W_e input. concat: W [state; input].")
    inputs: tuple[str, ...] = key("[state, input].", name="in")
    weights: str | None = key("Nodes that give the same name share their weights.", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopNode:
    """Sugar: the block applied once for each entry of the schedule."""

    loop: str = key("Name of the block to repeat.")
    input: str = key("The state it starts from.", name="in")
    schedule: tuple[LevelUse, ...] = key("The level of each iteration, in order.")
    topology: TopologySpec = key("How each update meets the state.", default=TopologySpec(kind="residual"))
    embedding: str | None = key("Slot 0 of mesh, the anchor of anchor_star; default: the only embed.", default=None)
    recall: RecallKind | None = key("Inject the loop's input before each iteration.", default=None)
    norm: NormKind | None = key(
        "Normalise the loop's state after each iteration. (Outer normalization, a norm after every residual sum, is "
        "norm_place: post.)",
        default=None,
    )
    step: StepKind | None = key(
        "A vector for each iteration, on entering it: added (step embedding) or multiplied (element vector).",
        default=None,
    )

    @property
    def reads_embedding(self) -> bool:
        """Whether the topology uses the embedding."""
        settings = self.topology.settings
        return self.topology.kind in ("mesh", "anchor_star") or (
            isinstance(settings, MixSettings) and "anchor_star" in settings.of
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNode:
    """Final norm and logits."""

    head: Literal["lm"] = key("Kind of head.")
    input: str = key("The stream it reads, at full resolution.", name="in")
    norm: NormKind | Literal["none"] = key("Final normalization.", default="rms")


NodeSpec: TypeAlias = (
    EmbedNode
    | BlockNode
    | PoolNode
    | UpscaleNode
    | JoinNode
    | MemoryNode
    | WriteNode
    | ReadNode
    | NormNode
    | RecallNode
    | StepNode
    | LoopNode
    | HeadNode
)
NODE_TYPES: dict[str, type[NodeSpec]] = {
    "loop": LoopNode,
    "head": HeadNode,  # first: they have keys that are operations too (norm, recall)
    "embed": EmbedNode,
    "block": BlockNode,
    "pool": PoolNode,
    "upscale": UpscaleNode,
    "join": JoinNode,
    "memory": MemoryNode,
    "write": WriteNode,
    "read": ReadNode,
    "norm": NormNode,
    "recall": RecallNode,
    "step": StepNode,
}


def _decode_node(data: object, path: str) -> NodeSpec:
    """One graph node: the operation it names decides its type."""
    mapping = expect_mapping(data, path, "a node such as {block: core, in: h0}")
    op = next((op for op in NODE_TYPES if op in mapping), None)
    if op is None:
        other = next((k for k in mapping if k != "in"), None)
        raise SpecError(path, "names no operation", one_of(NODE_TYPES, other))
    own_keys = {f.metadata["key"] or f.name for f in fields(NODE_TYPES[op])}
    if also := [other for other in NODE_TYPES if other in mapping and other not in own_keys]:
        raise SpecError(path, f"names two operations, {op} and {also[0]}", "make them two nodes")
    node: NodeSpec = decode(NODE_TYPES[op], mapping, path)
    return node


def decode_graph(data: object, path: str) -> dict[str, NodeSpec]:
    """All nodes of a graph by name."""
    return {name: _decode_node(node, f"{path}.{name}") for name, node in expect_mapping(data, path).items()}


def node_inputs(node: NodeSpec) -> Iterator[tuple[str, str]]:
    """Every (key path, node name) that a node reads."""
    if isinstance(node, JoinNode | WriteNode | RecallNode):
        yield from ((f"in.{i}", name) for i, name in enumerate(node.inputs))
    elif not isinstance(node, EmbedNode):
        yield "in", node.input
    if isinstance(node, BlockNode) and node.recall is not None:
        yield "recall", node.recall
    if isinstance(node, WriteNode):
        yield "write", node.write
    if isinstance(node, ReadNode):
        yield "read", node.read
    if isinstance(node, LoopNode) and node.embedding is not None:
        yield "embedding", node.embedding


def level_uses(node: NodeSpec) -> Iterator[tuple[str, LevelUse]]:
    """Every (key path, level use) of a node."""
    if isinstance(node, PoolNode):
        yield "pool", node.pool
    elif isinstance(node, UpscaleNode):
        yield "upscale", node.upscale
    elif isinstance(node, LoopNode):
        yield from ((f"schedule.{i}", use) for i, use in enumerate(node.schedule))
