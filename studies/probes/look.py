"""Everything that probes see inside one model, gathered over slices of examples: what the page of probes draws.

Shape legend: B batch, L positions, V vocabulary, N heads, P positions sampled, D model, T iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from builder.graph.compiler import compile_arch
from searchspace.arch import ArchSpec
from searchspace.nodes import LoopNode
from spiralformer.model import SpiralFormer
from spiralformer.threads import one_thread
from studies.probes.inside import (
    SAMPLED,
    Attended,
    Routed,
    ablated,
    loop_calls,
    most_changed,
    moved,
    routed,
    sampled,
    similarity,
    spectra,
    watched,
)
from studies.probes.table import ProbeName, probe
from studies.probes.trace import Trace

MEASURES = ("entropy", "distance", "local")
STABILITY: tuple[ProbeName, ...] = ("reachability", "input_dependence", "geometry", "robustness")
_MOST_STATES = 33  # of a loop that are compared, evenly spaced: a picture shows no more
_STABILITY_ROWS, _STABILITY_POSITIONS, _ABLATED_ROWS = 2, 128, 32
_SMALL = 1 << 26  # multiplications of a matrix and a state
_TRACED_BYTES = 1 << 26  # a trace keeps every value


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSeen:
    """One layer's attention at one of its calls, by head."""

    call: str
    """The node that calls its block: ``h.t0.core``."""
    layer: int
    """Of the block, from 0."""
    chunk: int
    entropy: list[float]
    distance: list[float]
    local: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSeen:
    """One loop, iteration by iteration."""

    name: str
    chunks: list[int]
    """Of each iteration's level."""
    heads: dict[str, list[list[float]]]
    """By `MEASURES`: iteration by iteration, every head's; empty if one attends otherwise than this library's."""
    changed: list[bool]
    """Which heads are of the 40 % whose entropy changes most between iterations."""
    core: list[float]
    """Relative update from what the core reads to what it gives (`Moved`)."""
    state: list[float]
    """From the loop's state to the next one."""
    states: list[int]
    """The iterations after which states are compared; 0 is before the first."""
    similarity: list[list[float]]
    """Kernel alignment of each pair of them."""
    spectra: list[list[float]]
    """Their leading singular values over the first."""
    ranks: list[float]
    """Their effective ranks."""
    worth: dict[int, float] = field(default_factory=dict)
    """By iteration, from 1: nats that the loss rises without its update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inside:
    """What was seen inside one model."""

    name: str
    arch_id: str
    rows: int
    positions: int
    loss: float
    """Nats, on the rows that were looked at."""
    layers: list[LayerSeen]
    """In the order of calls."""
    loops: list[LoopSeen]
    routers: list[dict[str, Any]]
    """Of memories and mixtures: ``name``, ``loop``, ``iteration`` (from 1) and ``weights`` (`Routed`)."""
    stability: dict[str, float]
    """Of the loop of most iterations (`studies.probes.stability`)."""

    def to_plain(self) -> dict[str, Any]:
        """For JSON, which has no infinities: what is no number is null."""
        found: dict[str, Any] = _plain(self)
        return found

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Inside:
        """What `to_plain` gave; null stays None. Raises TypeError, KeyError or ValueError if it is something else."""
        loops = [
            LoopSeen(**{**loop, "worth": {int(t): worth for t, worth in loop["worth"].items()}})
            for loop in data["loops"]
        ]
        return cls(**{**data, "layers": [LayerSeen(**layer) for layer in data["layers"]], "loops": loops})


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {f"{name}": _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def rows_at_once(arch: ArchSpec, length: int) -> int:
    """Of how many rows a trace keeps no more than 64 MiB; at least one."""
    values = len(compile_arch(arch).nodes) * arch.d_model + 2 * arch.vocab_size
    return max(1, _TRACED_BYTES // (4 * length * values))


def look(
    model: SpiralFormer,
    arch: ArchSpec,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    name: str = "",
    stability: bool = True,
    tick: Callable[[int], None] = lambda rows: None,
) -> Inside:
    """Look inside a model.

    Args:
        model: in evaluation mode.
        arch: of it.
        batches: inputs and targets, each (B, L), on the model's device; `rows_at_once` says how large they may be.
        loss: of logits (B, L, V) and targets, in nats, mean.
        name: to be shown; default: the architecture's.
        stability: measure it too; a Jacobian's radius takes some hundred products, whatever the examples are.
        tick: told how many rows are done.
    """
    gathered = _Gathered(model, arch, math.ceil(SAMPLED / len(batches)))
    inputs_BL, targets_BL = batches[0]
    few_BL, their_BL = inputs_BL[:_ABLATED_ROWS], targets_BL[:_ABLATED_ROWS]
    with _threads(inputs_BL, arch):
        for inputs_BL, targets_BL in batches:
            trace, calls = watched(model, arch, inputs_BL)
            gathered.add(trace, calls, loss(trace.logits, targets_BL).item())
            tick(gathered.rows)
    return gathered.seen(
        name or arch.name, few_BL, lambda logits_BLV: loss(logits_BLV, their_BL).item(), stability=stability
    )


def _threads(tokens_BL: Tensor, arch: ArchSpec) -> AbstractContextManager[None]:
    return one_thread() if tokens_BL.numel() * arch.d_model**2 < _SMALL else nullcontext()


class _Gathered:
    """Sums over slices, by rows."""

    def __init__(self, model: SpiralFormer, arch: ArchSpec, sampled: int) -> None:
        self.model, self.arch, self.sampled = model, arch, sampled
        self.loops = [name for name, node in arch.graph.items() if isinstance(node, LoopNode)]
        self.rows, self.loss = 0, 0.0
        self.calls: list[Attended] = []
        self.attended: list[Tensor] = []  # of each call, (3, layers, N)
        self.routers: list[Routed] = []
        self.routed: list[Tensor] = []
        self.moved: dict[str, Tensor] = {}  # of each loop, (2, T)
        self.states: dict[str, list[list[Tensor]]] = {name: [] for name in self.loops}

    def add(self, trace: Trace, calls: list[Attended], loss: float) -> None:
        rows = len(trace.values["tokens"])
        self.rows += rows
        self.loss += rows * loss
        self.calls = calls
        self.attended = _summed(
            self.attended, [rows * torch.stack([c.entropy, c.distance, c.local]) for c in self.calls]
        )
        self.routers = routed(trace)
        self.routed = _summed(self.routed, [rows * torch.tensor(router.weights) for router in self.routers])
        for name in self.loops:
            loop = trace.loop(name)
            assert loop is not None
            steps = moved(trace, loop)
            found_2T = rows * torch.tensor([[m.core for m in steps], [m.state for m in steps]], dtype=torch.float64)
            self.moved[name] = found_2T + self.moved.get(name, 0)
            states = sampled(loop, self.sampled)
            self.states[name].append([states[t] for t in _shown(len(states))])

    def seen(self, name: str, few_BL: Tensor, judge: Callable[[Tensor], float], *, stability: bool) -> Inside:
        means = [total / self.rows for total in self.attended]
        calls = [Attended(c.step, *mean) for c, mean in zip(self.calls, means, strict=True)]
        return Inside(
            name=name,
            arch_id=compile_arch(self.arch).arch_id,
            rows=self.rows,
            positions=few_BL.shape[1],
            loss=self.loss / self.rows,
            layers=[
                LayerSeen(
                    call=call.step.node.name,
                    layer=i,
                    chunk=call.step.node.level.chunk,
                    **{measure: getattr(call, measure)[i].tolist() for measure in MEASURES},
                )
                for call in calls
                for i in range(len(call.entropy))
            ],
            loops=self._loops(calls, few_BL, judge) if self.loops else [],
            routers=[
                {
                    "name": router.name,
                    "loop": router.iteration[0],
                    "iteration": None if router.iteration[1] is None else 1 + router.iteration[1],
                    "weights": (total / self.rows).tolist(),
                }
                for router, total in zip(self.routers, self.routed, strict=True)
            ],
            stability=self._stability(few_BL) if stability else {},
        )

    def _stability(self, few_BL: Tensor) -> dict[str, float]:
        """Of causal models on the first positions: a Jacobian's eigenvalues there are eigenvalues of the whole."""
        start_BL = few_BL[:_STABILITY_ROWS, : _STABILITY_POSITIONS if self.arch.causal else None]
        with _threads(start_BL, self.arch):
            return dict(probe(STABILITY, self.model, self.arch, start_BL))

    def _loops(self, calls: Sequence[Attended], few_BL: Tensor, judge: Callable[[Tensor], float]) -> list[LoopSeen]:
        with _threads(few_BL, self.arch):
            small = Trace(self.model, self.arch, few_BL, judge)
            return [self._loop(name, calls, small) for name in self.loops]

    def _loop(self, name: str, calls: Sequence[Attended], small: Trace) -> LoopSeen:
        loop = small.loop(name)
        assert loop is not None
        node = self.arch.graph[name]
        assert isinstance(node, LoopNode)
        heads, changed = _heads(loop_calls(calls, name))
        core, state = (self.moved[name] / self.rows).tolist()
        shown = _shown(len(loop.states))
        parts = self.states[name]
        states_PD = [torch.cat([part[i] for part in parts])[:SAMPLED] for i in range(len(shown))]
        values, ranks = spectra(states_PD)
        worth = ablated(small, loop, [t - 1 for t in shown[1:]])
        return LoopSeen(
            name=name,
            chunks=[self.arch.levels[use.level].chunk for use in node.schedule],
            heads=heads,
            changed=changed,
            core=core,
            state=state,
            states=shown,
            similarity=similarity(states_PD).tolist(),
            spectra=values.tolist(),
            ranks=ranks.tolist(),
            worth=dict(zip(shown[1:], worth, strict=True)),
        )


def _summed(before: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(before, more, strict=True)] if before else more


def _shown(states: int) -> list[int]:
    """Evenly spaced, the first and the last among them."""
    if states <= _MOST_STATES:
        return list(range(states))
    return [round(i * (states - 1) / (_MOST_STATES - 1)) for i in range(_MOST_STATES)]


def _heads(iterations: Sequence[Sequence[Attended]]) -> tuple[dict[str, list[list[float]]], list[bool]]:
    """Of the first block that each iteration calls, as `most_changed` compares them."""
    if not iterations or not all(iterations):
        return {}, []
    firsts = [calls[0] for calls in iterations]
    if len({call.entropy.shape for call in firsts}) > 1:
        return {}, []
    heads = {measure: [getattr(call, measure).flatten().tolist() for call in firsts] for measure in MEASURES}
    return heads, most_changed(firsts).flatten().tolist()
