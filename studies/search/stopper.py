"""When a trial is ended early: pure functions over journaled rungs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from studies.config import StopperConfig


def rung_shares(config: StopperConfig) -> tuple[float, ...]:
    """Shares of the training budget at which trials are evaluated; the last is 1."""
    return tuple(float(config.reduction) ** -i for i in reversed(range(config.rungs)))


def should_stop(config: StopperConfig, loss: float, others: Sequence[float]) -> bool:
    """Whether a trial ends at this rung.

    ``asha``: asynchronous successive halving (arXiv 1810.05934), stopping form: unless it is among the best
    1 / reduction so far. ``median``: if it is worse than half of the others (Golovin et al. 2017, at rungs).

    Args:
        config: of the study.
        loss: of the trial at this rung.
        others: losses of all other trials that have passed this rung, at the same training FLOPs.
    """
    if config.kind == "asha":
        better = sum(other < loss for other in others)
        return better >= -(-(len(others) + 1) // config.reduction)
    if config.kind == "median":
        return len(others) >= config.startup and loss > median(others)
    return False


def expected_work(config: StopperConfig) -> tuple[float, float]:
    """Mean share of the full budget that a trial spends, and evaluations, if the rungs rank at random."""
    shares = rung_shares(config)
    kept = {"none": 1.0, "asha": 1.0 / config.reduction, "median": 0.5}[config.kind]
    spent, evaluations, alive = 0.0, 0.0, 1.0
    for i, share in enumerate(shares):
        spent += alive * (share - (shares[i - 1] if i else 0.0))
        evaluations += alive
        alive *= kept
    return spent, evaluations
