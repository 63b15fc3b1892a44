"""Decisions, and who takes them.

A space asks its chooser one decision at a time, in the order of the file. What a name may mean never
changes within a space (samplers learn by name), so a decision that an earlier one has narrowed keeps
its full range and says beside it what is still allowed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from searchspace.errors import SpecError, one_of, show

Scalar: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Categorical:
    """One of several named alternatives."""

    name: str
    options: tuple[Scalar, ...]
    weights: tuple[float, ...] | None = None
    """How often a random draw takes each option, relative; None: equally often."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What the author of a range believes: random draws are normal around ``value``, cut at the bounds."""

    value: float
    spread: float
    """Standard deviation, as a share of the range (of its logarithm, for a log range)."""


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number, bounds inclusive."""

    name: str
    low: int
    high: int
    step: int = 1
    log: bool = False
    limit: int | None = None
    """Largest value still allowed after earlier decisions; None: all of them."""
    weights: tuple[int, ...] | None = None
    """Number of completions behind low .. limit, for choosers that draw uniformly."""
    prior: Prior | None = None


@dataclass(frozen=True, slots=True)
class Real:
    """A real number, bounds inclusive."""

    name: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    prior: Prior | None = None

    @property
    def num_values(self) -> int:
        """How many values a stepped range has."""
        return 1 if self.step is None else int((self.high - self.low) / self.step + 1e-9) + 1

    def at(self, index: int) -> float:
        """A stepped range's value, without the dust of adding steps."""
        return min(self.high, float(f"{self.low + index * (self.step or 0.0):.12g}"))


Decision: TypeAlias = Categorical | Integer | Real


class Chooser(Protocol):
    """Takes every decision of a space. It must answer within the decision's range and limit."""

    def choose(self, decision: Decision) -> Scalar: ...


class RandomChooser:
    """Independent uniform decisions; log-uniform, or by its prior, where the decision says so."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, decision: Decision) -> Scalar:
        draw = self._random
        if isinstance(decision, Categorical):
            if decision.weights is not None:
                return draw.choices(decision.options, decision.weights)[0]
            return draw.choice(decision.options)
        if decision.prior is not None:
            return self._around(decision, decision.prior)
        if isinstance(decision, Integer):
            high = decision.high if decision.limit is None else min(decision.high, decision.limit)
            if decision.log:
                value = math.exp(draw.uniform(math.log(decision.low), math.log(high + 1)))
                return max(decision.low, min(high, int(value)))
            values = range(decision.low, high + 1, decision.step)
            if decision.weights is not None:
                return draw.choices(values, decision.weights)[0]
            return draw.choice(values)
        if decision.log:
            value = math.exp(draw.uniform(math.log(decision.low), math.log(decision.high)))
            return max(decision.low, min(decision.high, value))
        if decision.step is not None:
            return decision.at(draw.randrange(decision.num_values))
        return draw.uniform(decision.low, decision.high)

    def _around(self, decision: Integer | Real, prior: Prior) -> Scalar:
        low, high, middle = float(decision.low), float(decision.high), prior.value
        if decision.log:
            low, high, middle = math.log(low), math.log(high), math.log(middle)
        value = math.nan
        while not low <= value <= high:
            value = self._random.gauss(middle, prior.spread * (high - low))
        value = math.exp(value) if decision.log else value
        if decision.step is None:
            return max(decision.low, min(decision.high, value))
        steps = round((value - decision.low) / decision.step)
        return decision.low + steps * decision.step if isinstance(decision, Integer) else decision.at(steps)


class FixedChooser:
    """Replays decisions by name, as they stand in a record or an export."""

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        self.values = dict(values)

    def choose(self, decision: Decision) -> Scalar:
        if decision.name not in self.values:
            raise SpecError(decision.name, "this decision is not given", f"give a value, e.g. {example(decision)!r}")
        value = self.values[decision.name]
        check_value(decision, value)
        return value


class MissingChooser:
    """For files that must be concrete: any decision is an error."""

    def choose(self, decision: Decision) -> Scalar:
        raise SpecError(
            decision.name,
            "is an open choice, but an architecture has none left",
            "write one value, or draw one with `spiralformer sample`",
        )


def example(decision: Decision) -> Scalar:
    """One value that fits."""
    return decision.options[0] if isinstance(decision, Categorical) else decision.low


def check_value(decision: Decision, value: Scalar) -> None:
    """Raise `SpecError` unless ``value`` is among the decision's."""
    if isinstance(decision, Categorical):
        if not any(type(value) is type(option) and value == option for option in decision.options):
            raise SpecError(decision.name, f"{show(value)} is not an option", one_of(map(str, decision.options), value))
        return
    numeric = (int,) if isinstance(decision, Integer) else (int, float)
    high = decision.high
    if isinstance(decision, Integer) and decision.limit is not None:
        high = min(decision.high, decision.limit)
    if isinstance(value, bool) or not isinstance(value, numeric) or not decision.low <= value <= high:
        kind = "a whole number" if isinstance(decision, Integer) else "a number"
        raise SpecError(decision.name, f"{show(value)} is out of range", f"use {kind} from {decision.low} to {high}")
    if isinstance(decision, Integer) and (value - decision.low) % decision.step:
        raise SpecError(
            decision.name, f"{show(value)} is between steps", f"use {decision.low} plus a multiple of {decision.step}"
        )


def label_of(value: object) -> Scalar:
    """How an alternative is called in records: itself if a scalar, else a short text."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, dict) and "level" in value:
        rest = ",".join(f"{k}={v}" for k, v in value.items() if k != "level")
        return f"{value['level']}({rest})" if rest else str(value["level"])
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value)))
    return json.dumps(value, separators=(",", ":"))


def labels_of(values: list[object]) -> tuple[Scalar, ...]:
    """Distinct labels for a list of alternatives; a repeated label gets the alternative's index."""
    labels = [label_of(value) for value in values]
    return tuple(
        f"{label}#{i}" if isinstance(values[i], dict | list) and labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    )
