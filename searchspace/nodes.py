"""The graph's nodes: one frozen spec for each operation, told apart by the key that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal, TypeAlias

from searchspace.errors import SpecError, one_of, show
from searchspace.plain import dataclass_decoder, decode, expect_mapping, key
from searchspace.tables import Open
from searchspace.topologies import TopologySpec

PoolKind: TypeAlias = Annotated[Literal["mean", "self_aggregate", "last", "linear", "attention"], Open("pool")]
UpscaleKind: TypeAlias = Annotated[Literal["uniform", "learned"], Open("upscale")]
JoinKind: TypeAlias = Literal["base", "residual", "anchor", "anchor_star", "sum", "weighted", "mixture"]
EmbedScale: TypeAlias = Literal["none", "sqrt_d_model"]
FrontRule: TypeAlias = Literal["read", "zero"]
ResidualKind: TypeAlias = Annotated[Literal["add", "gate", "gru"], Open("residual")]
Positions: TypeAlias = Literal["chunk_index", "last_token"]
StepKind: TypeAlias = Annotated[Literal["add", "scale"], Open("step")]
NormKind: TypeAlias = Annotated[Literal["rms", "layer"], Open("norm")]
NormPlace: TypeAlias = Literal["pre", "peri", "post", "sandwich"]
FfnKind: TypeAlias = Annotated[Literal["gelu", "swiglu", "relu2"], Open("ffn")]
RecallKind: TypeAlias = Annotated[Literal["add", "linear", "affine", "concat", "diagonal"], Open("recall")]
QkNorm: TypeAlias = bool | Literal["after_rotation"]
LoopStart: TypeAlias = Literal["input", "noise"]
Per: TypeAlias = Literal["iteration", "level", "loop"]
IterationSampling: TypeAlias = Literal["fixed", "uniform", "poisson_lognormal", "progressive"]
LossKind: TypeAlias = Annotated[Literal["z"], Open("loss")]
ReadRule: TypeAlias = Literal["auto", "closed", "own_chunk"]
ResidualScale: TypeAlias = Literal["none", "inverse_depth", "inverse_sqrt_depth"]
Parametrization: TypeAlias = Literal["standard", "mup", "completep"]


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
class ArrangeNode:
    """Positions in another order: those of a grid, by other axes first."""

    arrange: tuple[int, ...] = key("Sides of the grid that positions fill row by row: [3, 3, 3, 3] is 9 x 9 in boxes.")
    axes: tuple[int, ...] = key(
        "Its axes in the order of the result, slowest first: [0, 2, 1, 3] makes each box of that board a run of nine."
    )
    input: str = key("The stream, at full resolution.", name="in")
    back: bool = key("From that order back to where positions stood.", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallNode:
    """Inject the input again: state and input become the new state (external recall)."""

    recall: RecallKind = key(
        "add: sum. linear: W_x state + W_e input. affine: with biases. concat: W [state; input]. diagonal: a decay of "
        "each dimension, below one, and the input times a step (Parcae)."
    )
    inputs: tuple[str, ...] = key("[state, input].", name="in")
    weights: str | None = key("Nodes that give the same name share their weights.", default=None)


MOST_MEANS = 4
"""A Poisson draw beyond so many times its mean counts as that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationsSpec:
    """How often a loop runs in training, and how often a trained model is tried; else as its schedule says.

    They are drawn for each step, in whole turns of the schedule: [four, two, one, four, two, one] is two turns.
    """

    train: int | None = key(
        "In training: so many (fixed), at most (uniform, progressive), or about as many in the mean "
        "(poisson_lognormal); default: as the schedule.",
        default=None,
        low=1,
        high=512,
    )
    sample: IterationSampling = key(
        "fixed; uniform: 1 .. train; poisson_lognormal: a Poisson number, its mean log-normal (arXiv 2502.05171); "
        "progressive: n of 0 .. train - 1 without gradient, then 1 .. train - n with it (arXiv 2604.15259).",
        default="fixed",
    )
    gradient_through: int | None = key(
        "Only the last so many pass a gradient; default: all.", default=None, low=1, high=512
    )
    segments: int = key(
        "Each batch is trained on in so many steps, one after another, and each begins with the state that the one "
        "before ended with, detached (deep supervision; TRM, arXiv 2510.04871).",
        default=1,
        low=1,
        high=64,
    )
    test: tuple[int, ...] = key(
        "How often the loop runs when a model of a task with levels of difficulty is tried on the harder ones, beside "
        "as the schedule says.",
        default=(),
    )

    @property
    def trains_as_scheduled(self) -> bool:
        """Whether every step of training is the schedule's."""
        return self.sample == "fixed" and self.train is None and self.gradient_through is None


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

    noise: float = key(
        "Standard deviation of normal noise on the state before each iteration, in training.", default=0.0, low=0.0
    )
    start: LoopStart = key(
        "The first state: the input, or noise (zeros when it is not trained; arXiv 2502.05171); the input then comes "
        "in by recall, or as the anchor.",
        default="input",
    )
    per: Per = key(
        "Whose the weights of an iteration's own parts are (routers, step vectors, mixtures, scorers, allocations): "
        "iteration, each has its own; level, those at one level share them; loop, all do, but for pools and "
        "up-scalings, whose shape goes by the level. With the last two a trained model runs under other schedules of "
        "these levels.",
        default="iteration",
    )
    iterations: IterationsSpec | None = key(
        "How often it runs in training, and when it is tried; default: as the schedule says.", default=None
    )

    @property
    def turn(self) -> int:
        """The fewest iterations after which the schedule begins again, and a step of the topology ends."""
        own, stages = self.schedule, self.topology.row.stages(self.topology.settings)
        return next(n for n in range(1, len(own) + 1) if n % stages == 0 and own[n:] == own[:-n])

    @property
    def most_iterations(self) -> int:
        """In its schedule, in a step of training, or when it is tried."""
        given, own = self.iterations, len(self.schedule)
        if given is None:
            return own
        means = MOST_MEANS if given.sample == "poisson_lognormal" else 1
        return max(own, (given.train or own) * means, *given.test)

    @property
    def segments(self) -> int:
        """Steps of training on one batch, each from the state of the one before."""
        return 1 if self.iterations is None else self.iterations.segments

    @property
    def varies(self) -> bool:
        """Whether it runs in other numbers of iterations than the schedule's."""
        given, own = self.iterations, len(self.schedule)
        return given is not None and (
            given.sample != "fixed" or given.train not in (None, own) or bool({*given.test} - {own})
        )

    @property
    def reads_embedding(self) -> bool:
        """Whether the topology uses the embedding."""
        return self.topology.row.reads_embedding(self.topology.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNode:
    """Final norm and logits."""

    head: Literal["lm", "sequence"] = key(
        "lm: logits of each position. sequence: of the mean over all positions, the same at each."
    )
    input: str = key("The stream it reads, at full resolution.", name="in")
    norm: NormKind | Literal["none"] = key("Final normalization.", default="rms")
    hidden: bool = key(
        "A hidden layer of d_model between norm and logits, a linear map and GELU (arXiv 2604.15259, code).",
        default=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossNode:
    """A loss of the model's own, added to its task's in training; no other node reads it."""

    loss: LossKind = key("z: the square of the logits' logsumexp, which keeps them from drifting.")
    input: str = key("The logits.", name="in")
    weight: float = key("Its weight beside the task's loss.", default=1e-4, low=0.0)


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
    | ArrangeNode
    | StepNode
    | LoopNode
    | HeadNode
    | LossNode
)
NODE_TYPES: dict[str, type[NodeSpec]] = {
    "loop": LoopNode,
    "head": HeadNode,  # first: they have keys that are operations too (norm, recall)
    "loss": LossNode,
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
    "arrange": ArrangeNode,
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
