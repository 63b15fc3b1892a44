"""Regularised evolution over decisions and schedules."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from searchspace.choices import Scalar
from searchspace.open_values import Sequence as ScheduleChoice
from studies.strategy.history import Complete, choices_of, chunks_of, contains, fitness

_POPULATION = 32  # newest trials that may be parents; the paper's 100 suit thousands of trials


TOURNAMENT = 8  # a quarter of them, as in the paper


_TRIES = 30  # mutants until one may run


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
        newest = [t for t in study.get_trials(deepcopy=False) if fitness(t) is not None][-_POPULATION:]
        if not newest:
            return
        for _ in range(_TRIES):
            rivals = self._random.sample(newest, min(TOURNAMENT, len(newest)))
            parent = min(rivals, key=lambda t: fitness(t) or ())
            mutant = mutate(choices_of(parent), self._schedules, chunks_of(parent), self._random)
            child = self._complete(mutant, self._random.getrandbits(32))
            if child is not None:
                self._child = child.choices
                return

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        value = self._child.get(param_name, ...)
        if value is not ... and contains(param_distribution, value):
            return value
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


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
    if not choices:  # it came from outside the space
        return child
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
