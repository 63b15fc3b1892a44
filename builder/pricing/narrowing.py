"""Steering decisions into a budget while they are taken, before anything is priced.

Which way each decision moves each limited cost is learned once, from a few hundred priced candidates. Then two
corners are known under any decisions taken so far: the completion that costs least and the one that costs most.
A value whose cheapest completion is over a limit, or whose dearest is under it, can lead nowhere; another takes
its place. Where a decision's direction depends on other decisions, the bound is loosened by what was lost on it,
so that little that fits is ever shut out; what still does not fit is rejected when it is priced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from builder.graph.passes import simplify
from builder.graph.unroll import lower_arch
from builder.pricing.budget import Budget, metric_of
from builder.pricing.cost import Cost, estimate
from searchspace.choices import Categorical, Chooser, Decision, Integer, RandomChooser, Real, Scalar
from searchspace.errors import SpecError
from searchspace.space import SpaceSpec

_BASES = 16  # random candidates in which each decision is varied: a few hundred prices, a quarter of a second
_MOST_VALUES = 24  # of one decision that are priced; wider ranges are spread over
_CAUTION = 2.0  # bounds are loosened by this much of what was lost, so that little that fits is shut out
_REMEMBERED = 50_000  # corners kept: some ten MiB

Side: TypeAlias = Literal["least", "most"]
_Taken: TypeAlias = dict[str, Scalar]


@dataclass(slots=True)
class _Effect:
    """What one decision does to one cost."""

    mean: dict[Scalar, float] = field(default_factory=dict)
    """Logarithm of the cost by value, relative to the decision's other values."""
    slack: dict[Side, float] = field(default_factory=dict)
    """How far (in logarithms) another value was once better than the one that is best on average."""

    def best(self, values: Sequence[Scalar], side: Side) -> Scalar:
        sign = 1.0 if side == "least" else -1.0
        return min(values, key=lambda value: sign * self.mean.get(value, math.inf))


@dataclass(frozen=True, slots=True)
class _Corner:
    """The cheapest or dearest completion of some decisions."""

    bound: float
    """Logarithm of its cost, loosened."""
    choices: _Taken


class Narrower:
    """Knows which values of a decision can still lead into the budget.

    Args:
        space: whose decisions are taken.
        budget: absolute limits.
    """

    def __init__(self, space: SpaceSpec, budget: Budget) -> None:
        self._space = space
        self._sides: list[tuple[str, Side, float]] = []
        """Metric, corner that must be looked at, logarithm of the limit."""
        for limit in budget.limits:
            if limit.max is not None:
                self._sides.append((limit.metric, "least", math.log(limit.max)))
            if limit.min is not None and limit.min > 0:
                self._sides.append((limit.metric, "most", math.log(limit.min)))
        metrics = sorted({metric for metric, _, _ in self._sides})
        self._effects = _learn(space, metrics) if metrics else {}
        self._corners: dict[tuple[object, ...], _Corner | None] = {}
        self._sides = [side for side in self._sides if self._binds(*side)]

    def wrap(self, chooser: Chooser) -> Chooser:
        """A chooser that asks ``chooser`` and takes the nearest thing to its answer that can still fit."""
        return _Narrowed(chooser, self) if self._sides else chooser

    def nearest(self, decision: Decision, value: Scalar, taken: _Taken) -> Scalar:
        """``value`` if it can lead into the budget after ``taken``; else one that can, by rank; else ``value``."""
        if not any(decision.name in effects for effects in self._effects.values()):
            return value
        if self._fits(decision.name, value, taken):
            return value
        options = _values(decision)
        fitting = [option for option in options if self._fits(decision.name, option, taken)]
        if not fitting:
            return value
        place = sum(_before(option, value, options) for option in options)
        return fitting[place * len(fitting) // len(options)]  # by rank: the nearest would pile up at the border

    def _binds(self, metric: str, side: Side, limit: float) -> bool:
        """Whether some candidate may be on the wrong side of a limit at all."""
        worst = self._price({}, metric, "most" if side == "least" else "least")
        return worst is None or (worst.bound > limit if side == "least" else worst.bound < limit)

    def _fits(self, name: str, value: Scalar, taken: _Taken) -> bool:
        for metric, side, limit in self._sides:
            if name not in self._effects[metric]:
                continue
            corner = self._corner(metric, side, taken, name, value)
            if corner is None:
                continue
            if corner.bound > limit + 1e-9 if side == "least" else corner.bound < limit - 1e-9:
                return False
        return True

    def _corner(self, metric: str, side: Side, taken: _Taken, name: str, value: Scalar) -> _Corner | None:
        """The corner after ``taken`` and one more decision; None where it can't be priced."""
        before = self._corners.get((metric, side, *taken.items()))
        if before is not None and before.choices.get(name, ...) == value:
            return before
        key = (metric, side, *taken.items(), (name, value))
        if key not in self._corners:
            if len(self._corners) > _REMEMBERED:
                self._corners.clear()
            self._corners[key] = self._price({**taken, name: value}, metric, side)
        return self._corners[key]

    def _price(self, taken: _Taken, metric: str, side: Side) -> _Corner | None:
        effects = self._effects[metric]
        chooser = _CornerChooser(taken, effects, side)
        cost = _cost(self._space, chooser)
        if cost is None:
            return None
        slack = sum(effects[name].slack[side] for name in chooser.choices if name not in taken and name in effects)
        sign = -1.0 if side == "least" else 1.0
        return _Corner(_log(cost, metric) + sign * _CAUTION * slack, chooser.choices)


class _Narrowed:
    """Passes decisions on to a chooser, and its answers through a `Narrower`."""

    def __init__(self, chooser: Chooser, narrower: Narrower) -> None:
        self._chooser, self._narrower = chooser, narrower
        self._taken: _Taken = {}

    def choose(self, decision: Decision) -> Scalar:
        value = self._narrower.nearest(decision, self._chooser.choose(decision), self._taken)
        self._taken[decision.name] = value
        return value


class _CornerChooser:
    """Repeats decisions taken; takes the rest so that one cost is least, or most."""

    def __init__(self, taken: Mapping[str, Scalar], effects: Mapping[str, _Effect], side: Side) -> None:
        self._taken, self._effects, self._side = taken, effects, side
        self.choices: _Taken = {}

    def choose(self, decision: Decision) -> Scalar:
        if decision.name in self._taken:
            value = self._taken[decision.name]
        else:
            values = _values(decision)
            effect = self._effects.get(decision.name)
            value = values[0] if effect is None else effect.best(values, self._side)
        self.choices[decision.name] = value
        return value


class _Variation:
    """Repeats a candidate's decisions but one; what only exists after the change is drawn at random."""

    def __init__(self, base: Mapping[str, Scalar], name: str, value: Scalar) -> None:
        self._given = {**base, name: value}
        self._random = RandomChooser(seed=0)

    def choose(self, decision: Decision) -> Scalar:
        value = self._given.get(decision.name, ...)
        if value is ...:
            return self._random.choose(decision)
        if isinstance(decision, Integer) and decision.limit is not None and isinstance(value, int):
            return min(value, decision.limit)
        return value


class _Noting:
    """Random decisions, noted."""

    def __init__(self, seed: int) -> None:
        self._random = RandomChooser(seed)
        self.decisions: list[tuple[Decision, Scalar]] = []

    def choose(self, decision: Decision) -> Scalar:
        self.decisions.append((decision, self._random.choose(decision)))
        return self.decisions[-1][1]


def _learn(space: SpaceSpec, metrics: Sequence[str]) -> dict[str, dict[str, _Effect]]:
    """The effect of every decision on every metric, from random candidates changed in one decision at a time."""
    seen: dict[str, dict[str, list[dict[Scalar, float]]]] = {metric: {} for metric in metrics}
    for seed in range(_BASES):
        base = _Noting(seed)
        if _cost(space, base) is None:
            continue
        choices = {decision.name: value for decision, value in base.decisions}
        for decision, _ in base.decisions:
            costs = {v: _cost(space, _Variation(choices, decision.name, v)) for v in _values(decision)}
            for metric in metrics:
                logs = {value: _log(cost, metric) for value, cost in costs.items() if cost is not None}
                seen[metric].setdefault(decision.name, []).append(logs)
    effects: dict[str, dict[str, _Effect]] = {}
    for metric, decisions in seen.items():
        learned = {name: _effect(tables) for name, tables in decisions.items()}
        effects[metric] = {name: effect for name, effect in learned.items() if effect is not None}
    return effects


def _effect(tables: Sequence[Mapping[Scalar, float]]) -> _Effect | None:
    """None for a decision that this cost does not depend on."""
    tables = [table for table in tables if len(table) > 1]
    if not any(max(table.values()) - min(table.values()) > 1e-12 for table in tables):
        return None
    effect, sums = _Effect(), dict[Scalar, list[float]]()
    for table in tables:
        middle = sum(table.values()) / len(table)
        for value, cost in table.items():
            sums.setdefault(value, []).append(cost - middle)
    effect.mean = {value: sum(costs) / len(costs) for value, costs in sums.items()}
    effect.slack = {
        "least": max(table[effect.best(list(table), "least")] - min(table.values()) for table in tables),
        "most": max(max(table.values()) - table[effect.best(list(table), "most")] for table in tables),
    }
    return effect


def _values(decision: Decision) -> Sequence[Scalar]:
    """All values that are allowed, or an even selection of many."""
    if isinstance(decision, Categorical):
        return decision.options
    if isinstance(decision, Real):
        if decision.step is not None and decision.num_values <= _MOST_VALUES:
            return [decision.at(i) for i in range(decision.num_values)]
        if decision.step is None:
            return [decision.low + (decision.high - decision.low) * i / 7 for i in range(8)]
        return [decision.at(i * (decision.num_values - 1) // 7) for i in range(8)]
    high = decision.high if decision.limit is None else min(decision.high, decision.limit)
    values = range(decision.low, high + 1, decision.step)
    if len(values) <= _MOST_VALUES:
        return values
    return sorted({values[i * (len(values) - 1) // (_MOST_VALUES - 1)] for i in range(_MOST_VALUES)})


def _before(option: Scalar, value: Scalar, options: Sequence[Scalar]) -> bool:
    """Whether an option stands before the value, by size or by place in the file."""
    if isinstance(options, tuple):
        return options.index(option) < options.index(value)
    return option < value  # type: ignore[operator]


def _cost(space: SpaceSpec, chooser: Chooser) -> Cost | None:
    try:
        return estimate(simplify(lower_arch(space.build(chooser))))
    except SpecError:
        return None


def _log(cost: Cost, metric: str) -> float:
    return math.log(max(metric_of(cost, metric), 1e-9))
