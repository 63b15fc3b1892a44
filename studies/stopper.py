"""When a trial is ended early: pure functions over journaled rungs."""

from __future__ import annotations

from collections.abc import Sequence

from studies.config import StopperConfig


def rung_shares(config: StopperConfig) -> tuple[float, ...]:
    """Shares of the training budget at which trials are evaluated; the last is 1."""
    if config.asha is None:
        return (1.0,)
    return tuple(float(config.asha.reduction) ** -i for i in reversed(range(config.asha.rungs)))


def should_stop(config: StopperConfig, loss: float, others: Sequence[float]) -> bool:
    """Asynchronous successive halving (arXiv 1810.05934), stopping form.

    Args:
        config: of the study.
        loss: of the trial at this rung.
        others: losses of all other trials that have passed this rung, at the same training FLOPs.

    Returns:
        True unless the trial is among the best 1 / reduction so far.
    """
    if config.asha is None:
        return False
    better = sum(other < loss for other in others)
    return better >= -(-(len(others) + 1) // config.asha.reduction)


def expected_share(config: StopperConfig) -> float:
    """Mean share of the full budget that a trial spends if the rungs rank at random."""
    shares = rung_shares(config)
    if config.asha is None:
        return 1.0
    spent, alive = 0.0, 1.0
    for i, share in enumerate(shares):
        spent += alive * (share - (shares[i - 1] if i else 0.0))
        alive /= config.asha.reduction
    return spent
