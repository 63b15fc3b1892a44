"""Decisions as Optuna's distributions."""

from __future__ import annotations

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from searchspace.choices import Categorical, Decision, Integer


def distribution_of(decision: Decision) -> BaseDistribution:
    """The full range of a decision, whatever is still allowed of it: what a name means never changes."""
    if isinstance(decision, Categorical):
        return CategoricalDistribution(decision.options)
    kind = IntDistribution if isinstance(decision, Integer) else FloatDistribution
    return kind(decision.low, decision.high, log=decision.log, step=decision.step)  # type: ignore[arg-type]
