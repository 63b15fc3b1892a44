"""The closed table of samplers: Optuna's, regularised evolution, and the predictor's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler

from searchspace.open_values import Sequence as ScheduleChoice
from searchspace.tables import complete, options, table
from studies.sections import SamplerName
from studies.strategy.evolution import EvolutionSampler
from studies.strategy.history import Complete
from studies.strategy.predictor_sampler import PredictorSampler
from studies.strategy.surrogate import Surrogate


def startup_trials(num_trials: int) -> int:
    """How many trials are drawn at random before a sampler is asked."""
    return max(4, min(10, num_trials // 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a sampler is made for: one proposal, for which alone it is seeded, so that resuming needs no replay."""

    seed: int
    num_trials: int
    schedules: Sequence[ScheduleChoice]
    complete: Complete
    surrogate: Surrogate | None


@complete
@dataclass(frozen=True, slots=True)
class Sampler:
    """Who proposes."""

    name: str
    words: str
    make: Callable[[Asked], BaseSampler] | None
    """None: it learns nothing, and the proposer draws for it."""


def _tpe(asked: Asked) -> BaseSampler:
    startup = startup_trials(asked.num_trials)
    return TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=startup, seed=asked.seed)


def _gp(asked: Asked) -> BaseSampler:
    startup = startup_trials(asked.num_trials)
    return GPSampler(seed=asked.seed, n_startup_trials=startup, warn_independent_sampling=False)


def _predictor(asked: Asked) -> BaseSampler:
    """While the predictor is not worth following, TPE stands in for it."""
    if asked.surrogate is None or not asked.surrogate.trusted:
        return _tpe(asked)
    return PredictorSampler(asked.schedules, asked.seed, asked.complete, asked.surrogate)


SAMPLERS = table(
    "a sampler",
    (
        Sampler("tpe", "Optuna's tree-structured Parzen estimator, multivariate", _tpe),
        Sampler("random", "draws at random", None),
        Sampler("nsga2", "Optuna's NSGA-II", lambda asked: NSGAIISampler(seed=asked.seed)),
        Sampler("gp", "Optuna's Gaussian process", _gp),
        Sampler(
            "evolution",
            "regularised evolution over schedules and decisions",
            lambda asked: EvolutionSampler(asked.schedules, asked.seed, asked.complete),
        ),
        Sampler("grid", "every candidate once, in one order for all seeds", None),
        Sampler("one_change", "the first option of every decision, then every other of one of them alone", None),
        Sampler("predictor", "what a predictor fitted on the study's own trials expects most of", _predictor),
    ),
    options(SamplerName),
    places="sampler",
)


def make_sampler(name: SamplerName, asked: Asked) -> BaseSampler:
    """The sampler for one proposal; of one that learns."""
    make = SAMPLERS[name].make
    assert make is not None, f"{name} learns nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make(asked)
