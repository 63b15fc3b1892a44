"""What a row of the table of operations says. Free of torch: classes of `spiralformer` are named, not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from builder.graph.ir import Graph, Level, Node
from searchspace.tables import complete


class Kind(Enum):
    """What flows between operations."""

    STREAM = "stream"
    MEMORY = "memory"
    PICK = "pick"
    DELTA = "delta"
    GATE = "gate"
    LOGITS = "logits"
    LOSS = "loss"


class Port(NamedTuple):
    """An input: its name and kind."""

    name: str
    kind: Kind
    optional: bool
    many: bool
    """Any number of inputs, one at least."""


def ports(kinds: Mapping[str, Kind]) -> tuple[Port, ...]:
    """Ports from their kinds by name; ``recall?`` is optional, ``states*`` are many."""
    return tuple(
        Port(name.rstrip("?*"), kind, optional=name.endswith("?"), many=name.endswith("*"))
        for name, kind in kinds.items()
    )


class Work(NamedTuple):
    """What one operation does at each position of ``level``."""

    level: Level
    per_position: int
    """FLOPs of matrix products at one position."""
    per_pair: int = 0
    """FLOPs of attention for one (query, key) pair."""
    cached: int = 0
    """Elements kept in the key-value cache for one position."""


class PartName(NamedTuple):
    """A class of `spiralformer` (``pooling.MeanPool``), of torch (``nn.Embedding``), or of a module (``mine:Pool``)."""

    path: str

    def __str__(self) -> str:
        return self.path if self.path.startswith("nn.") else self.path.replace(":", ".").rpartition(".")[2]

    @property
    def module(self) -> str:
        """Of a plugin's class; empty for ours and torch's."""
        return self.path.partition(":")[0] if ":" in self.path else ""


def named(part: str | type) -> PartName:
    """A class by its name, or a plugin's by itself."""
    return PartName(part if isinstance(part, str) else f"{part.__module__}:{part.__qualname__}")


@dataclass(frozen=True, slots=True)
class PartCall:
    """How a module is made; arguments may be such calls and names themselves."""

    name: PartName
    args: tuple[object, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def part(path: str | type, *args: object, **settings: object) -> PartCall:
    """``path(*args, **settings)``, later."""
    return PartCall(named(path), args, settings)


@dataclass(frozen=True, slots=True)
class Drawing:
    """How an operation stands in the picture of an architecture."""

    form: Literal["box", "sign", "lane", "bus"]
    """A box with a name; a small sign on the line; a change of lane; a bus over the loop."""
    shape: str = ""
    """Of a sign: a path around (0, 0)."""
    style: Literal["sign", "solid"] = "sign"
    half: int = 0
    """Half a sign's width, pixels."""
    space: int = 0
    """Least space before a sign, pixels."""
    words: str = ""
    """For the legend; of a bus: above it, with its attributes by name."""
    follows: bool = False
    """Whether a sign stands with the box before it, rather than lead to the next."""
    over_drop: bool = False
    """Whether a sign stands over the wire that drops into the next box."""
    hides: tuple[str, ...] = ()
    """Ports whose wires are left out."""
    dashes: tuple[str, ...] = ()
    """Ports whose wires are dashed."""


LevelRule: TypeAlias = Callable[[Node, Sequence[Level]], str]
"""(node, input levels) -> what is wrong and what would be right, or ''."""
LookaheadRule: TypeAlias = Callable[[Graph, Node, Sequence[Level], Sequence[float]], float]
ParamsRule: TypeAlias = Callable[[Graph, Node, Sequence[Level]], int]
WorkRule: TypeAlias = Callable[[Graph, Node, Sequence[Level]], "Work | tuple[Work, ...]"]
PartRule: TypeAlias = Callable[[Graph, Node, Sequence[Level]], PartCall]
IdentityRule: TypeAlias = Callable[[Node, Sequence[Level]], bool]
CallRule: TypeAlias = Callable[[Graph, Node], Mapping[str, str]]
Sees: TypeAlias = Literal["", "own", "source"]
Decode: TypeAlias = Literal["plain", "remembers", "no"]
Init: TypeAlias = Literal["nothing", "small", "own"]


@complete
@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: a part that is not said is an error at import."""

    name: str
    ports: tuple[Port, ...]
    gives: Kind
    attrs: Mapping[str, type]
    """Attributes with their types; ``front?`` may be missing."""
    level: LevelRule
    lookahead: LookaheadRule
    params: ParamsRule
    """Parameters. A node owns what it has of them, under its own name unless it shares."""
    work: WorkRule
    part: PartRule | None
    """How its module is made; None: it is the sum of its inputs."""
    decode: Decode
    """plain: as in the forward. remembers: its module opens a memory (`spiralformer.decoding`). no: it has no such
    form, and neither has a graph that uses it."""
    draw: Drawing
    init: Init
    """nothing: it has no parameters. small: matrices small, vectors zero. own: its module's ``starts`` says."""
    identity: IdentityRule = lambda node, levels: False
    """Whether it gives its first input as it is."""
    call: CallRule = lambda graph, node: {}
    """Keywords that its module is called with beside its inputs, and the code of their values."""
    sees: Sees = ""
    """Whose padding its module must be told of in a model that sees its whole input: its own level's or its source's.
    A causal model needs nothing of the kind (`spiralformer.padding`)."""

    @property
    def family(self) -> str:
        """``pool`` of ``pool.mean``."""
        return self.name.partition(".")[0]

    def works(self, graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[Work, ...]:
        """What it does, by the levels at which it does it."""
        work = self.work(graph, node, levels)
        return (work,) if isinstance(work, Work) else work
