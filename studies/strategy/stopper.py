"""When a trial is ended early: pure functions over journaled rungs, one row for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from searchspace.tables import complete, options, table
from studies.sections import StopperConfig, StopperName

Values: TypeAlias = tuple[float, ...]
"""Of a trial's objectives, each to be minimised."""


@complete
@dataclass(frozen=True, slots=True)
class Stopper:
    """A rule."""

    name: str
    words: str
    stops: Callable[[StopperConfig, int, int], bool]
    """(settings, how many others are better, how many others there are) -> whether a trial ends."""
    kept: Callable[[StopperConfig], float]
    """Share of the trials that go on at a rung, if rungs rank at random."""


STOPPERS = table(
    "a stopper",
    (
        Stopper("none", "no trial is ended early", lambda c, better, others: False, lambda c: 1.0),
        Stopper(
            "asha",
            "a trial ends unless it is among the best 1 / reduction so far (arXiv 1810.05934, stopping form)",
            lambda c, better, others: better >= -(-(others + 1) // c.reduction),
            lambda c: 1.0 / c.reduction,
        ),
        Stopper(
            "median",
            "a trial ends if it is worse than half of the others (Golovin et al. 2017, at rungs)",
            lambda c, better, others: others >= c.startup and 2 * better > others,
            lambda c: 0.5,
        ),
    ),
    options(StopperName),
)


def rung_shares(config: StopperConfig) -> tuple[float, ...]:
    """Shares of the training budget at which trials are evaluated; the last is 1."""
    return tuple(float(config.reduction) ** -i for i in reversed(range(config.rungs)))


def should_stop(config: StopperConfig, values: Values, others: Sequence[Values]) -> bool:
    """Whether a trial ends at this rung.

    With several objectives, a trial is better than another that it dominates: no worse in any, better in one.

    Args:
        config: of the study.
        values: of the trial at this rung.
        others: of all other trials that have passed this rung, at the same training FLOPs.
    """
    better = sum(dominates(other, values) for other in others)
    return STOPPERS[config.kind].stops(config, better, len(others))


def dominates(a: Values, b: Values) -> bool:
    """Whether ``a`` is no worse in any objective, and better in one."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def expected_work(config: StopperConfig) -> tuple[float, float]:
    """Mean share of the full budget that a trial spends, and evaluations, if the rungs rank at random."""
    shares, kept = rung_shares(config), STOPPERS[config.kind].kept(config)
    spent, evaluations, alive = 0.0, 0.0, 1.0
    for i, share in enumerate(shares):
        spent += alive * (share - (shares[i - 1] if i else 0.0))
        evaluations += alive
        alive *= kept
    return spent, evaluations
