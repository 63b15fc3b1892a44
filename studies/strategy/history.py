"""What finished trials tell a sampler that learns from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from searchspace.choices import Scalar
from studies.candidates.proposal import Proposal

Complete: TypeAlias = Callable[[Mapping[str, Scalar], int], Proposal | None]
"""A candidate that keeps the given decisions; the number seeds the others. None: it may not be launched."""


def fitness(trial: FrozenTrial) -> tuple[float, ...] | None:
    """Less is better: trials that came further first, then by loss. None for what was never trained."""
    if trial.state == OptunaState.COMPLETE:
        return (0.0, trial.values[0])
    rungs = [name for name in trial.user_attrs if name.startswith("rung.")]
    if trial.state != OptunaState.PRUNED or not rungs:
        return None
    return (1.0 / len(rungs), trial.user_attrs[f"rung.{len(rungs) - 1}"]["score"])


def choices_of(trial: FrozenTrial) -> dict[str, Scalar]:
    """A trial's decisions as they were decoded; a trial of another study has only what was asked."""
    launch = trial.user_attrs.get("launch")
    return dict(launch["choices"] if launch else trial.params)


def chunks_of(trial: FrozenTrial) -> dict[str, int]:
    """The chunk of each of its levels, by name."""
    launch = trial.user_attrs.get("launch")
    levels = launch["arch"].get("levels", {}) if launch else {}
    return {name: level.get("chunk", 1) for name, level in levels.items()}


def contains(distribution: BaseDistribution, value: Scalar) -> bool:
    """Whether the value may be suggested, of exactly its type."""
    if isinstance(distribution, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return bool(distribution._contains(distribution.to_internal_repr(value)))
