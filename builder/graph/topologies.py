"""How each topology unrolls: one row for each of `searchspace.topologies`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeAlias

from builder.graph.emit import Emitter, Value
from searchspace.errors import SpecError
from searchspace.nodes import LoopNode
from searchspace.tables import complete, options, table
from searchspace.topologies import (
    TOPOLOGIES,
    HyperConnectionsSettings,
    MeshSettings,
    MixSettings,
    RungeKuttaSettings,
    Settings,
    TopologyKind,
    TopologyRow,
    VelocitySettings,
)

_AUTO_SLOTS_BEYOND_ITERATIONS = 3  # MeSH: B = N_loop + 3


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop that is being written out; the state stays at the input's level."""

    to: Emitter
    name: str
    spec: LoopNode
    start: Value
    embedding: Value
    """The start itself in a loop that does not use the embedding."""

    @property
    def settings(self) -> Any:
        """Of its topology."""
        return self.spec.topology.settings

    @property
    def key(self) -> str:
        """The topology's key in the file."""
        return f"graph.{self.name}.topology"

    @property
    def iterations(self) -> range:
        return range(len(self.spec.schedule))

    def owner(self, t: int, part: str) -> str:
        """Who owns the weights of an iteration's part (``per``); empty where each iteration has its own."""
        if self.spec.per == "iteration":
            return ""
        chunk = self.to.level_of(self.spec.schedule[t]).chunk
        where = f"chunk{chunk}" if self.spec.per == "level" or part in ("pool", "upscale") else "all"
        return f"sites.{self.name}.{where}.{part}"

    def initial(self) -> Value:
        """The first state: the input, or noise; in training perhaps the state that an earlier run ended with."""
        to, key, state = self.to, f"graph.{self.name}", self.start
        if self.spec.start == "noise":
            state = to.noise(f"{self.name}.start", state, 1.0, replaces=True, key=f"{key}.start")
        if self.spec.segments > 1:
            state = to.carry(f"{self.name}.carry", state, self.name, key=f"{key}.iterations.segments")
        return state

    def iterate(self, t: int, state: Value) -> Value:
        """One pass of the core: noise, step, recall, pool, block, upscale. Gives the update."""
        to, spec, at, key = self.to, self.spec, f"{self.name}.t{t}", f"graph.{self.name}"
        use, place = spec.schedule[t], f"{key}.schedule.{t}"
        entered = state
        if spec.noise:
            entered = to.noise(f"{at}.noise", entered, spec.noise, replaces=False, key=f"{key}.noise")
        if spec.step is not None:
            entered = to.step(f"{at}.step", spec.step, entered, owner=self.owner(t, "step"), key=f"{key}.step")
        if spec.recall is not None:
            owner = f"sites.{self.name}.recall"
            entered = to.recall(f"{at}.recall", spec.recall, entered, self.start, owner=owner, key=f"{key}.recall")
        latents = to.pool(f"{at}.pool", entered, use, owner=self.owner(t, "pool"), key=place)
        recalled = None
        if to.arch.blocks[spec.loop].recall is not None:
            recalled = to.pool(f"{at}.recalled", self.start, replace(use, pool="mean"), key=place)
        latents = to.block(f"{at}.block", spec.loop, latents, recalled, key=f"{key}.loop")
        own = self.owner(t, "upscale")
        return to.upscale(f"{at}.upscale", latents, state, use.delay, "auto", owner=own, key=place)

    def normalise(self, t: int, state: Value) -> Value:
        """The state after iteration t, normalised if the loop says so."""
        if self.spec.norm is None:
            return state
        owner, key = f"sites.{self.name}.norm", f"graph.{self.name}.norm"
        return self.to.norm(f"{self.name}.t{t}.norm", self.spec.norm, state, owner=owner, key=key)


Unroll: TypeAlias = Callable[[Loop], Value]


@complete
@dataclass(frozen=True, slots=True)
class Unrolling:
    """What a topology makes of a loop."""

    name: str
    unroll: Unroll


def _added_to(support: Callable[[Loop, Value], Sequence[Value]]) -> Unroll:
    """Each update is added to one support: of the loop and its state."""

    def unroll(loop: Loop) -> Value:
        state = loop.initial()
        for t in loop.iterations:
            update = loop.iterate(t, state)
            state = loop.to.sum(f"{loop.name}.t{t}.join", update, support(loop, state), key=loop.key)
            state = loop.normalise(t, state)
        return state

    return unroll


def _mix(loop: Loop) -> Value:
    """Several supports at once (MeSH, arXiv 2510.07739, appendix E.2)."""
    settings, state = loop.settings, loop.initial()
    assert isinstance(settings, MixSettings)
    for t in loop.iterations:
        update, name = loop.iterate(t, state), f"{loop.name}.t{t}.join"
        known = {"residual": state, "anchor": loop.start, "anchor_star": loop.embedding}
        supports = [known[support] for support in settings.of]
        if settings.weights == "dynamic":
            own = loop.owner(t, "join")
            state = loop.to.mixture(name, update, state, supports, owner=own, key=loop.key)
        elif settings.weights == "static":
            factors = [1.0, *[1.0 / len(supports)] * len(supports)]
            own, terms = loop.owner(t, "join"), [update, *supports]
            state = loop.to.weighted(name, terms, factors, learned=True, owner=own, key=loop.key)
        else:
            state = loop.to.sum(name, update, supports, key=loop.key)
        state = loop.normalise(t, state)
    return state


def _mesh(loop: Loop) -> Value:
    """Every update is written to the memory, every state read from it; one write and read before the first."""
    settings, name, to, key = loop.settings, loop.name, loop.to, loop.key
    assert isinstance(settings, MeshSettings)
    slots = len(loop.iterations) + _AUTO_SLOTS_BEYOND_ITERATIONS if settings.slots == "auto" else settings.slots
    first = {"first": loop.embedding}
    memory = to.emit(f"{name}.memory", "memory", first, loop.embedding.level, {"slots": slots}, key=key)
    asked = loop.start if settings.entry == "state" else loop.embedding
    if asked.level != loop.start.level:
        raise SpecError(f"{key}.mesh.entry", "the embedding is at another level", "use entry: state")
    memory = to.write(f"{name}.start.write", memory, loop.start, asked, key=key)
    state = to.read(f"{name}.start.read", memory, asked, key=key)
    for t in loop.iterations:
        update = loop.iterate(t, state)
        memory = to.write(f"{name}.t{t}.write", memory, update, state, owner=loop.owner(t, "write"), key=key)
        read = to.read(f"{name}.t{t}.read", memory, state, owner=loop.owner(t, "read"), key=key)
        state = loop.normalise(t, read)
    return state


def _velocity(loop: Loop) -> Value:
    """A heavy ball: v <- mu v + update, state <- state + v; the first velocity is the first update."""
    settings, name, state = loop.settings, loop.name, loop.initial()
    assert isinstance(settings, VelocitySettings)
    velocity: Value | None = None
    for t in loop.iterations:
        update = loop.iterate(t, state)
        if velocity is not None:
            terms, factors = [update, velocity], [1.0, settings.momentum]
            update = loop.to.weighted(f"{name}.t{t}.velocity", terms, factors, learned=False, key=loop.key)
        velocity = update
        state = loop.normalise(t, loop.to.sum(f"{name}.t{t}.join", velocity, [state], key=loop.key))
    return state


def _hyper_connections(loop: Loop) -> Value:
    """Each update goes to every lane, each state is a sum of them that begins with one, each lane in its turn.

    Where iterations share their weights, that is always the first.
    """
    settings, name, to, key = loop.settings, loop.name, loop.to, loop.key
    assert isinstance(settings, HyperConnectionsSettings)
    state, lanes = loop.initial(), {"lanes": settings.lanes}
    held = to.emit(f"{name}.lanes", "lanes", {"first": state}, state.level, lanes, key=key)

    def read(at: str, t: int, owner: str) -> Value:
        first = {"first": 0 if owner else t % settings.lanes}
        made = to.emit(at, "lanes.read", {"memory": held}, state.level, {**lanes, **first}, owner=owner, key=key)
        return replace(state, node=made.node)

    current = read(f"{name}.start.read", 0, "")
    for t in loop.iterations:
        update = loop.iterate(t, current)
        inputs, own = {"memory": held, "update": update}, loop.owner(t, "write")
        held = to.emit(f"{name}.t{t}.write", "lanes.write", inputs, state.level, lanes, owner=own, key=key)
        current = loop.normalise(t, read(f"{name}.t{t}.read", t + 1, loop.owner(t, "read")))
    return current


def _lstm(loop: Loop) -> Value:
    """A cell beside the state, which begins as it does, gated by update and state."""
    name, to, state = loop.name, loop.to, loop.initial()
    cell = state
    for t in loop.iterations:
        inputs = {"update": loop.iterate(t, state), "state": state}
        for part in ("cell", "state"):
            given, own = {**inputs, "cell": cell}, loop.owner(t, part)
            made = to.emit(f"{name}.t{t}.{part}", f"lstm.{part}", given, state.level, owner=own, key=loop.key)
            if part == "cell":
                cell = replace(state, node=made.node)
        state = loop.normalise(t, replace(state, node=made.node))
    return state


def _runge_kutta(loop: Loop) -> Value:
    """Iterations are stages v_j = f(x + sum of theta_jl v_l); a step is x + sum of theta_j v_j (arXiv 2211.12386)."""
    settings, name, state = loop.settings, loop.name, loop.start
    assert isinstance(settings, RungeKuttaSettings)
    tableau = settings.scheme
    for first in range(0, len(loop.iterations), tableau.stages):
        stages: list[Value] = []
        for j, factors in enumerate(tableau.stage_factors):
            owner = f"sites.{name}.stage{j}" if settings.trains else ""
            before = max(first, first + j - 1)  # the state after an iteration is where the next one begins
            point = _combine(loop, f"{name}.t{before}.stage", state, stages, factors, owner)
            stages.append(loop.iterate(first + j, point))
        t = first + tableau.stages - 1
        owner = f"sites.{name}.step" if settings.trains else ""
        state = _combine(loop, f"{name}.t{t}.join", state, stages, tableau.step_factors, owner)
        state = loop.normalise(t, state)
    return state


def _combine(loop: Loop, name: str, state: Value, stages: list[Value], factors: Sequence[float], owner: str) -> Value:
    """The state plus the stages, with factors that ``owner`` learns; else those of factor 0 are left out."""
    used = [(stage, f) for stage, f in zip(stages, factors, strict=True) if f or owner]
    if not used:
        return state
    terms, own = [state, *[stage for stage, _ in used]], [factor for _, factor in used]
    if owner:
        return loop.to.weighted(name, terms, own, learned=True, owner=owner, key=loop.key)
    return loop.to.weighted(name, terms, [1.0, *own], learned=False, key=loop.key)


UNROLLINGS = table(
    "a topology",
    (
        Unrolling("base", _added_to(lambda loop, state: ())),
        Unrolling("residual", _added_to(lambda loop, state: (state,))),
        Unrolling("anchor", _added_to(lambda loop, state: (loop.start,))),
        Unrolling("anchor_star", _added_to(lambda loop, state: (loop.embedding,))),
        Unrolling("mesh", _mesh),
        Unrolling("mix", _mix),
        Unrolling("runge_kutta", _runge_kutta),
        Unrolling("velocity", _velocity),
        Unrolling("hyper_connections", _hyper_connections),
        Unrolling("lstm", _lstm),
    ),
    options(TopologyKind),
)
UNROLLINGS.follow(TOPOLOGIES, lambda row: Unrolling(row.name, row.unroll))


def topology(
    name: str,
    unroll: Unroll,
    *,
    settings: type[Settings] | None = None,
    reads_embedding: bool = False,
    stages: Callable[[Any], int] = lambda settings: 1,
) -> TopologyRow:
    """A plugin's topology.

    Args:
        name: in files.
        unroll: writes a loop out: from `Loop.start`, each `Loop.iterate` gives an update, `Loop.normalise` follows
            each, and ``Loop.to`` joins streams (`builder.graph.emit.Emitter`). Gives the last state.
        settings: a frozen dataclass of ``searchspace.key``, for ``topology: {NAME: {...}}``, which `Loop.settings`
            gives; its keys have defaults if the name may stand alone. A method ``check(path)`` may raise `SpecError`.
        reads_embedding: whether it uses `Loop.embedding`.
        stages: how many iterations make a step; of its settings.
    """
    bare = settings is None or all(
        f.default is not MISSING or f.default_factory is not MISSING for f in fields(settings)
    )
    return TopologyRow(name, settings, bare, lambda _: reads_embedding, stages, unroll=unroll)
