"""Optuna samplers by name, and regularised evolution as one more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler

from searchspace.open_values import Sequence as ScheduleChoice
from studies.config import SamplerName
from studies.search.evolution import EvolutionSampler
from studies.search.history import Complete
from studies.search.predictor_sampler import PredictorSampler
from studies.search.surrogate import Surrogate


def startup_trials(num_trials: int) -> int:
    """How many trials are drawn at random before a sampler is asked."""
    return max(4, min(10, num_trials // 4))


def make_sampler(
    name: SamplerName,
    seed: int,
    num_trials: int,
    schedules: Sequence[ScheduleChoice],
    complete: Complete,
    surrogate: Surrogate | None = None,
) -> BaseSampler:
    """The sampler for one proposal, seeded for it alone: resuming needs no replay.

    There is none for ``random`` and ``grid``, which learn nothing: the proposer draws for them. While a predictor is
    not worth following, TPE stands in for it.
    """
    if name == "predictor":
        if surrogate is not None and surrogate.trusted:
            return PredictorSampler(schedules, seed, complete, surrogate)
        name = "tpe"
    startup = startup_trials(num_trials)
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(
            multivariate=True, group=True, constant_liar=True, n_startup_trials=startup, seed=seed
        ),
        "nsga2": lambda: NSGAIISampler(seed=seed),
        "gp": lambda: GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False),
        "evolution": lambda: EvolutionSampler(schedules, seed, complete),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[name]()
