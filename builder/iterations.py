"""How often loops run in training: what is drawn for each step, and what that costs.

A draw is a function of (seed, step, loop) alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from searchspace.arch import ArchSpec
from searchspace.nodes import MOST_MEANS, IterationSampling, IterationsSpec, LoopNode
from searchspace.tables import complete, options, table

TRAINING_FACTOR = 3
"""Forward once, backward twice."""
_SIGMA = 0.5  # of the log-normal mean (arXiv 2502.05171)
_NODES = 64  # at which its density is summed


class Run(NamedTuple):
    """One step's number of iterations, and how many of them, the first, pass no gradient."""

    total: int
    held: int


Distribution: TypeAlias = Iterator[tuple[float, int, int]]
"""Probabilities of turns, and of how many of them come first and pass no gradient."""


@complete
@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How the number of turns is drawn."""

    name: str
    turns: Callable[[int], Distribution]
    """Of the number in `IterationsSpec.train`, in turns."""


def _fixed(train: int) -> Distribution:
    yield 1.0, train, 0


def _uniform(train: int) -> Distribution:
    yield from ((1 / train, n, 0) for n in range(1, train + 1))


def _progressive(train: int) -> Distribution:
    for held in range(train):
        yield from ((1 / train / (train - held), held + n, held) for n in range(1, train - held + 1))


def _poisson_lognormal(train: int) -> Distribution:
    """1 + a Poisson number whose mean is log-normal about ``train``; four times as many at most."""
    most = MOST_MEANS * train
    normal = [(z, math.exp(-z * z / 2)) for z in (-4 + 8 * (i + 0.5) / _NODES for i in range(_NODES))]
    whole = sum(weight for _, weight in normal)
    mass = [0.0] * (most - 1)
    for z, weight in normal:
        mean = train * math.exp(_SIGMA * z - _SIGMA**2 / 2)
        for n in range(most - 1):
            mass[n] += weight / whole * math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))
    mass.append(max(0.0, 1 - sum(mass)))
    yield from ((share, n + 1, 0) for n, share in enumerate(mass))


SAMPLINGS = table(
    "a sampling of iterations",
    (
        SamplingRow("fixed", _fixed),
        SamplingRow("uniform", _uniform),
        SamplingRow("poisson_lognormal", _poisson_lognormal),
        SamplingRow("progressive", _progressive),
    ),
    options(IterationSampling),
)


@lru_cache(maxsize=256)
def _runs(given: IterationsSpec, own: int, turn: int) -> tuple[tuple[float, Run], ...]:
    found = []
    for share, turns, first in SAMPLINGS[given.sample].turns((given.train or own) // turn):
        total = turns * turn
        held = max(first * turn, total - given.gradient_through if given.gradient_through else 0)
        found.append((share, Run(total, held)))
    return tuple(found)


def runs_of(loop: LoopNode) -> tuple[tuple[float, Run], ...]:
    """What a step of training may draw for a loop, with probabilities; empty if each is the schedule's."""
    if loop.iterations is None or loop.iterations.trains_as_scheduled:
        return ()
    return _runs(loop.iterations, len(loop.schedule), loop.turn)


def drawn(arch: ArchSpec, seed: int, step: int) -> dict[str, Run]:
    """The runs of one step of training, by the name of the loop; of loops alone whose iterations are drawn."""
    found = {}
    for name, node in arch.graph.items():
        if isinstance(node, LoopNode) and (runs := runs_of(node)):
            at = random.Random(f"iterations of {name}: seed {seed}, step {step}").random()
            shares = itertools.accumulate(share for share, _ in runs)
            found[name] = next((run for share, (_, run) in zip(shares, runs, strict=True) if at < share), runs[-1][1])
    return found


def segments_of(arch: ArchSpec) -> int:
    """How many steps of training one batch is for."""
    return max((node.segments for node in arch.graph.values() if isinstance(node, LoopNode)), default=1)


def training_weights(arch: ArchSpec) -> dict[str, tuple[float, ...]]:
    """For each entry of a loop's schedule, how many forwards of it a step of training takes in the mean.

    A forward counts 1, with its backward 3. Of loops alone whose iterations are drawn.
    """
    found = {}
    for name, node in arch.graph.items():
        if isinstance(node, LoopNode) and (runs := runs_of(node)):
            weights = [0.0] * len(node.schedule)
            for share, run in runs:
                for t in range(run.total):
                    weights[t % len(weights)] += share * (1 if t < run.held else TRAINING_FACTOR)
            found[name] = tuple(weights)
    return found
