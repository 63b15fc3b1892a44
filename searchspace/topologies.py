"""How a loop's updates meet its state: the closed table of topologies, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from searchspace.errors import SpecError, one_of, show
from searchspace.plain import decode, decoder_for, encode, expect_mapping, join_path, key
from searchspace.plugins import provided
from searchspace.tables import Open, TableError, complete, options, table

TopologyKind: TypeAlias = Annotated[
    Literal[
        "base",
        "residual",
        "anchor",
        "anchor_star",
        "mesh",
        "mix",
        "runge_kutta",
        "velocity",
        "hyper_connections",
        "lstm",
    ],
    Open("topology"),
]
Support: TypeAlias = Literal["residual", "anchor", "anchor_star"]
MixWeights: TypeAlias = Literal["sum", "static", "dynamic"]
Tableau: TypeAlias = Literal["euler", "midpoint", "rk4"]
MeshEntry: TypeAlias = Literal["state", "embedding"]


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

    def check(self, path: str) -> None:
        """Raise `SpecError` for no support, or one named twice."""
        if not 1 <= len(self.of) == len(set(self.of)):
            raise SpecError(f"{path}.of", f"{list(self.of)} is not a set of supports", "name each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class VelocitySettings:
    """Updates with momentum: v <- momentum v + update, state <- state + v (arXiv 2604.15259, code)."""

    momentum: float = key("Share of the velocity that is kept; with 0 it is residual.", default=0.9, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperConnectionsSettings:
    """Lanes of state side by side, mixed by a doubly stochastic matrix (arXiv 2409.19606; 2604.15259, code)."""

    lanes: int = key("Streams side by side.", default=4, low=2, high=16)


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

    def check(self, path: str) -> None:
        """Raise `SpecError` unless it is one scheme."""
        if (self.tableau is None) == (self.stages is None):
            raise SpecError(path, "has no scheme, or two", "give one of tableau and stages")

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


Settings: TypeAlias = Any
"""Of a topology: a frozen dataclass of keys. Its method ``check(path)``, if it has one, raises `SpecError` for what the
keys alone don't rule out."""


@complete
@dataclass(frozen=True, slots=True)
class TopologyRow:
    """A topology as files write it; `builder.graph.topologies` says what it unrolls to."""

    name: str
    settings: type[Settings] | None
    bare: bool
    """Whether its name may stand alone."""
    reads_embedding: Callable[[Any], bool]
    """Whether it uses the embedding; of its settings."""
    stages: Callable[[Any], int]
    """How many iterations make a step; of its settings."""
    carries: bool = False
    """Whether its state is one stream, `builder.graph.topologies.Loop.initial`, with which another run may go on."""
    unroll: Callable[[Any], Any] | None = None
    """Of a plugin's: what it makes of a `builder.Loop`; of ours, `builder.graph.topologies` says."""


def _places(row: TopologyRow) -> tuple[str, ...]:
    if row.unroll is None:
        raise TableError(f"topology '{row.name}' does not say: unroll")
    return (f"topology:{row.name}",)


def _plain(name: str, *, reads_embedding: bool = False) -> TopologyRow:
    return TopologyRow(name, None, True, lambda s: reads_embedding, lambda s: 1, carries=True)


TOPOLOGIES = table(
    "a topology",
    (
        _plain("base"),
        _plain("residual"),
        _plain("anchor"),
        _plain("anchor_star", reads_embedding=True),
        TopologyRow("mesh", MeshSettings, bare=True, reads_embedding=lambda s: True, stages=lambda s: 1),
        TopologyRow(
            "mix",
            MixSettings,
            bare=False,
            reads_embedding=lambda s: "anchor_star" in s.of,
            stages=lambda s: 1,
            carries=True,
        ),
        TopologyRow(
            "runge_kutta",
            RungeKuttaSettings,
            bare=False,
            reads_embedding=lambda s: False,
            stages=lambda s: s.scheme.stages,
        ),
        TopologyRow("velocity", VelocitySettings, bare=True, reads_embedding=lambda s: False, stages=lambda s: 1),
        TopologyRow("hyper_connections", HyperConnectionsSettings, True, lambda s: False, lambda s: 1),
        TopologyRow("lstm", None, True, lambda s: False, lambda s: 1),
    ),
    options(TopologyKind),
    places=_places,
)


def _row(name: str) -> TopologyRow | None:
    """Ours, or a plugin's."""
    return TOPOLOGIES[name] if name in TOPOLOGIES or provided("topology", name) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologySpec:
    """How an iteration's update meets the loop state and older states."""

    kind: TopologyKind
    settings: Settings | None = None

    @property
    def row(self) -> TopologyRow:
        """What the table says of it."""
        return TOPOLOGIES[self.kind]

    @staticmethod
    def __decode__(data: object, path: str) -> TopologySpec:
        if isinstance(data, str) and ((row := _row(data)) is None or row.bare):
            kind: TopologyKind = decoder_for(TopologyKind)(data, path)
            settings = TOPOLOGIES[kind].settings
            return TopologySpec(kind=kind, settings=settings() if settings else None)
        mapping = expect_mapping(data, path, "a topology: a name or {mesh: {slots: auto}}")
        name = next(iter(mapping), "")
        _row(name)
        known = {row.name: row.settings for row in TOPOLOGIES.values() if row.settings}
        if len(mapping) > 1:
            raise SpecError(path, f"names {len(mapping)} topologies: {', '.join(map(str, mapping))}", "keep one")
        if name in TOPOLOGIES and name not in known:
            raise SpecError(join_path(path, str(name)), "takes no settings", f"write topology: {name}")
        if name not in known:
            raise SpecError(path, f"unknown topology {show(mapping)}", "write a name, or " + one_of(known, name))
        decoded: Any = decode(known[name], mapping[name], join_path(path, name))
        if callable(check := getattr(decoded, "check", None)):
            check(join_path(path, name))
        return TopologySpec(kind=decoder_for(TopologyKind)(name, path), settings=decoded)

    def __encode__(self) -> object:
        plain = self.row.bare and (self.row.settings is None or self.settings == self.row.settings())
        return self.kind if plain else {self.kind: encode(self.settings)}
