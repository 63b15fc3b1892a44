"""Optuna samplers by name, and regularised evolution as one more."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from builder.cost import Cost
from builder.ir import Graph
from searchspace.choices import Scalar
from searchspace.parts import Sequence as ScheduleChoice
from searchspace.space import Candidate
from studies.config import SamplerName

if TYPE_CHECKING:
    from studies.surrogate import Surrogate


@dataclass(frozen=True, slots=True)
class Proposal:
    """A priced candidate with decided training settings."""

    candidate: Candidate
    graph: Graph
    cost: Cost
    training: dict[str, object]
    choices: dict[str, Scalar]
    """All decisions as decoded: the architecture's and the training's. What was asked for stays in Optuna's params."""


Complete: TypeAlias = Callable[[Mapping[str, Scalar], int], Proposal | None]
"""A candidate that keeps the given decisions; the number seeds the others. None: it may not be launched."""

_POPULATION = 32
_TOURNAMENT = 8
_TRIES = 30
_POOL = 64
_RANDOM_SHARE = 0.1


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


class EvolutionSampler(BaseSampler):
    """Regularised evolution (arXiv 1802.01548): mutates the best of a random few of the newest trials.

    A mutation draws one decision anew, or edits a schedule: insert, drop or swap levels, coarsen or refine one.

    Args:
        schedules: the open sequences of the space.
        seed: of this proposal.
        complete: makes a mutant whole, or says that it may not run (then another is tried).
    """

    def __init__(self, schedules: Sequence[ScheduleChoice], seed: int, complete: Complete) -> None:
        self._schedules, self._complete = schedules, complete
        self._random = random.Random(seed)
        self._independent = RandomSampler(seed=seed)
        self._child: dict[str, Scalar] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._child = {}
        newest = [t for t in study.get_trials(deepcopy=False) if _fitness(t) is not None][-_POPULATION:]
        if not newest:
            return
        for _ in range(_TRIES):
            rivals = self._random.sample(newest, min(_TOURNAMENT, len(newest)))
            parent = min(rivals, key=lambda t: _fitness(t) or ())
            mutant = mutate(_choices(parent), self._schedules, _chunks(parent), self._random)
            child = self._complete(mutant, self._random.getrandbits(32))
            if child is not None:
                self._child = child.choices
                return

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        value = self._child.get(param_name, ...)
        if value is not ... and _contains(param_distribution, value):
            return value
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


class PredictorSampler(EvolutionSampler):
    """Draws many candidates, half of them mutants of the best, and takes the one of greatest expected improvement.

    One in ten is taken at random, so that the predictor does not only see what it likes.
    """

    def __init__(
        self, schedules: Sequence[ScheduleChoice], seed: int, complete: Complete, surrogate: Surrogate
    ) -> None:
        super().__init__(schedules, seed, complete)
        self._surrogate = surrogate

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._child = {}
        parents = sorted(
            (t for t in study.get_trials(deepcopy=False) if _fitness(t) is not None), key=lambda t: _fitness(t) or ()
        )[:_TOURNAMENT]
        pool: dict[str, Proposal] = {}
        for i in range(_POOL):
            given: Mapping[str, Scalar] = {}
            if parents and i % 2:
                parent = self._random.choice(parents)
                given = mutate(_choices(parent), self._schedules, _chunks(parent), self._random)
            proposal = self._complete(given, self._random.getrandbits(32))
            if proposal is not None:
                pool[f"{proposal.graph.arch_id} {proposal.training}"] = proposal
        if not pool:
            return
        candidates = list(pool.values())
        if self._random.random() < _RANDOM_SHARE:
            self._child = self._random.choice(candidates).choices
            return
        gains = self._surrogate.expected_improvement(candidates)
        self._child = candidates[max(range(len(candidates)), key=gains.__getitem__)].choices


def mutate(
    choices: Mapping[str, Scalar],
    schedules: Sequence[ScheduleChoice],
    chunks: Mapping[str, int],
    draw: random.Random,
) -> dict[str, Scalar]:
    """Change one decision, or edit one schedule. A decision to be drawn anew is left out.

    Args:
        choices: all decisions of the parent.
        schedules: the open sequences of the space.
        chunks: chunk size by level, for coarsening and refining.
        draw: source of chance.
    """
    child = dict(choices)
    open_schedules = [s for s in schedules if f"{s.path}.0" in choices or f"{s.path}.count.{s.labels[0]}" in choices]
    if open_schedules and draw.random() < 0.5:
        schedule = draw.choice(open_schedules)
        edits = [_insert, _drop, _swap, _coarsen, _refine]
        draw.shuffle(edits)
        before = _read(schedule, choices)
        by_chunk = sorted(schedule.labels, key=lambda label: chunks.get(str(label).partition("(")[0], 1))
        for edit in edits:
            after = edit(list(before), by_chunk, draw)
            if schedule.order != "any":
                after.sort(key=by_chunk.index)
                before = sorted(before, key=by_chunk.index)
            if after != before and schedule.low <= len(after) <= schedule.high:
                _write(schedule, after, child)
                return child
    inside = tuple(f"{schedule.path}." for schedule in open_schedules)
    others = [name for name in choices if not name.startswith(inside)] if inside else list(choices)
    child.pop(draw.choice(others or list(choices)))
    return child


def _insert(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random) -> list[Scalar]:
    places.insert(draw.randrange(len(places) + 1), draw.choice(by_chunk))
    return places


def _drop(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random) -> list[Scalar]:
    places.pop(draw.randrange(len(places)))
    return places


def _swap(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random) -> list[Scalar]:
    i, j = draw.randrange(len(places)), draw.randrange(len(places))
    places[i], places[j] = places[j], places[i]
    return places


def _coarsen(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random) -> list[Scalar]:
    return _shift(places, by_chunk, draw, +1)


def _refine(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random) -> list[Scalar]:
    return _shift(places, by_chunk, draw, -1)


def _shift(places: list[Scalar], by_chunk: list[Scalar], draw: random.Random, step: int) -> list[Scalar]:
    i = draw.randrange(len(places))
    rank = by_chunk.index(places[i]) + step
    if 0 <= rank < len(by_chunk):
        places[i] = by_chunk[rank]
    return places


def _read(schedule: ScheduleChoice, choices: Mapping[str, Scalar]) -> list[Scalar]:
    """The levels of a decided schedule; in the order of the entries where it is decided by counts."""
    length = choices.get(f"{schedule.path}.length", schedule.low)
    assert isinstance(length, int)
    if schedule.order == "any":
        return [choices[f"{schedule.path}.{i}"] for i in range(length)]
    counts = [choices[f"{schedule.path}.count.{label}"] for label in schedule.labels[:-1]]
    whole = [count for count in counts if isinstance(count, int)]
    whole.append(length - sum(whole))
    return [label for label, count in zip(schedule.labels, whole, strict=True) for _ in range(count)]


def _write(schedule: ScheduleChoice, places: list[Scalar], choices: dict[str, Scalar]) -> None:
    for name in [name for name in choices if name.startswith(f"{schedule.path}.")]:
        del choices[name]
    if schedule.low < schedule.high:
        choices[f"{schedule.path}.length"] = len(places)
    if schedule.order == "any":
        choices.update({f"{schedule.path}.{i}": label for i, label in enumerate(places)})
    else:
        choices.update({f"{schedule.path}.count.{label}": places.count(label) for label in schedule.labels[:-1]})


def _fitness(trial: FrozenTrial) -> tuple[float, ...] | None:
    """Less is better: trials that came further first, then by loss. None for what was never trained."""
    if trial.state == OptunaState.COMPLETE:
        return (0.0, trial.values[0])
    rungs = [name for name in trial.user_attrs if name.startswith("rung.")]
    if trial.state != OptunaState.PRUNED or not rungs:
        return None
    return (1.0 / len(rungs), trial.user_attrs[f"rung.{len(rungs) - 1}"]["loss"])


def _choices(trial: FrozenTrial) -> dict[str, Scalar]:
    """A trial's decisions as they were decoded; a trial of another study has only what was asked."""
    launch = trial.user_attrs.get("launch")
    return dict(launch["choices"] if launch else trial.params)


def _chunks(trial: FrozenTrial) -> dict[str, int]:
    launch = trial.user_attrs.get("launch")
    levels = launch["arch"].get("levels", {}) if launch else {}
    return {name: level.get("chunk", 1) for name, level in levels.items()}


def _contains(distribution: BaseDistribution, value: Scalar) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return bool(distribution._contains(distribution.to_internal_repr(value)))
