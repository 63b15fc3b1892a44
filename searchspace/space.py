"""A search space: an architecture file with open choices, seen as a set of architectures."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from searchspace.arch import ArchSpec
from searchspace.choices import Categorical, Chooser, Decision, FixedChooser, Integer, RandomChooser, Real, Scalar
from searchspace.errors import ConstraintError, SpecError, one_of
from searchspace.open_values import Sequence as ScheduleChoice
from searchspace.plain import decode
from searchspace.template import Template

_ENUMERABLE = 20_000  # ways that are walked to count a space exactly
_ENUMERATION_STEPS = 1_000_000  # decisions taken in that walk: about a second
_PATIENCE = 1000  # draws in a row that break a constraint before the space is walked instead
_LEAST_PATIENCE = 20  # the same, for files so large that each draw is slow
_DRAWN_VALUES = 60_000  # values decided in all draws together: some seconds
_CONTRADICTIONS = 100  # draws that keep the constraints and are no architecture
_KEYS = (*(field.name for field in fields(ArchSpec)), "vars", "constraints")
_LISTED_VALUES = 2_000_000  # values decided to list every way: some ten seconds


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of a space: the architecture, and the decisions that lead to it."""

    arch: ArchSpec
    choices: dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class SpaceSize:
    """Number of ways to decide a space: between ``low`` and ``high``, equal where it is known."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "infinitely many (a range is continuous)"
        if self.exact:
            return f"{int(self.high):,}"
        return f"{int(self.low):,} to {int(self.high):,}"


class SpaceSpec:
    """A template whose every decision leads to an `ArchSpec`."""

    def __init__(self, data: Mapping[str, Any], file: str = "") -> None:
        unknown = [name for name in data if name not in _KEYS] if isinstance(data, Mapping) else []
        if unknown:  # before references are followed, whose errors would hide this one
            raise SpecError(str(unknown[0]), "unknown key", one_of(_KEYS, str(unknown[0])), file=file)
        self.template = Template(data)
        self.data = data
        """As a file holds it."""
        self._file = file
        self.name = str(data.get("name", "unnamed"))
        self.valid: list[dict[str, Scalar]] | None = None
        """Every way that satisfies the constraints, once random draws have failed to find one: they are rare."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that may come up, in the order of the file."""
        return self.template.decisions()

    @property
    def schedules(self) -> tuple[ScheduleChoice, ...]:
        """The open sequences of levels."""
        return self.template.schedules()

    def resolve(self, chooser: Chooser) -> ArchSpec:
        """Take every decision by the chooser. Raises `ConstraintError` or `SpecError`."""
        return self.draw(chooser).arch

    def draw(self, chooser: Chooser) -> Candidate:
        """`resolve`, with the decisions taken."""
        try:
            return self._draw(chooser)
        except SpecError as error:
            error.file = error.file or self._file
            raise

    def _draw(self, chooser: Chooser) -> Candidate:
        built: list[ArchSpec] = []  # before the constraints, whose errors would hide simpler ones
        decided = self.template.decide(chooser, lambda tree: built.append(decode(ArchSpec, tree)))
        if isinstance(chooser, FixedChooser):
            for name in chooser.values:
                if name not in decided.choices:
                    raise SpecError(name, "is not a decision of this candidate", one_of(decided.choices, name))
        return Candidate(built[0], decided.choices)

    def build(self, chooser: Chooser) -> ArchSpec:
        """`resolve` with the constraints left aside: what holds for all of these holds for the space."""
        built: list[ArchSpec] = []
        with contextlib.suppress(ConstraintError):
            self.template.decide(chooser, lambda tree: built.append(decode(ArchSpec, tree)))
        return built[0]

    def sample(self, seed: int) -> Candidate:
        """One random candidate that satisfies the constraints and is an architecture.

        Raises:
            SpecError: if none of 1,000 draws in a row does (fewer for a large file), or 100 give no architecture.
        """
        if self.valid is None:
            try:
                return self._first_valid(RandomChooser(seed))
            except ConstraintError:
                if self.template.size() * self.template.weight > _LISTED_VALUES:
                    raise
                self.valid = list(assignments(self.template))
                if not self.valid:
                    raise
        draw = random.Random(seed)
        for choices in draw.sample(self.valid, len(self.valid)):
            with contextlib.suppress(SpecError):  # decisions that contradict each other
                return self.draw(FixedChooser(choices))
        return self.draw(FixedChooser(self.valid[0]))

    def _first_valid(self, chooser: Chooser) -> Candidate:
        """Draw until a candidate holds; decisions that contradict each other are drawn again."""
        contradictions = 0
        patience = max(_LEAST_PATIENCE, min(_PATIENCE, _DRAWN_VALUES // self.template.weight))
        for _ in range(patience):
            try:
                return self.draw(chooser)
            except ConstraintError as error:
                last = error
            except SpecError:
                contradictions += 1
                if contradictions in (_CONTRADICTIONS, patience) or not self.decisions:
                    raise
        raise ConstraintError(
            "constraints", f"no draw of {patience} satisfies them, last: {last.problem}", "loosen them"
        )

    def enumerate(self) -> Iterator[Candidate]:
        """Every candidate that is an architecture, in file order. Raises `SpecError` on a continuous range."""
        for choices in assignments(self.template):
            try:
                yield self.draw(FixedChooser(choices))
            except SpecError:  # decisions that contradict each other
                continue

    def count(self) -> SpaceSize:
        """How many candidates there are: exact up to 20,000 ways to decide (fewer for a large file), else bounds."""
        ways = self.template.size()
        if not self.template.constraints:
            return SpaceSize(ways, ways)
        if self.valid is not None:
            return SpaceSize(len(self.valid), len(self.valid))
        if ways > _ENUMERABLE:
            return SpaceSize(0, ways)
        last = self.template.work + _ENUMERATION_STEPS
        valid = sum(1 for _ in assignments(self.template, last))
        return SpaceSize(valid, valid if self.template.work <= last else ways)

    def check(self) -> None:
        """Decide every choice each way at least once; raise `SpecError` at the first that can't be read."""
        for decision in self.decisions:
            for option in _extremes(decision):
                with contextlib.suppress(ConstraintError):
                    self._first_valid(_Insisting(decision.name, option))
        self.sample(seed=0)


def assignments(template: Template, last_step: float = math.inf) -> Iterator[dict[str, Scalar]]:
    """Every set of decisions that satisfies the constraints, depth first, until ``template.work`` is past the last.

    Replays a prefix of decisions and takes the first value of all behind it; then steps the last.

    Raises:
        SpecError: on a continuous range.
    """
    prefix: list[Scalar] = []
    while template.work <= last_step:
        chooser = _Scripted(prefix)
        with contextlib.suppress(ConstraintError):
            yield template.decide(chooser).choices
        while chooser.options and chooser.positions[-1] + 1 >= len(chooser.options[-1]):
            chooser.options.pop()
            chooser.positions.pop()
        if not chooser.options:
            return
        chooser.positions[-1] += 1
        prefix = [options[i] for options, i in zip(chooser.options, chooser.positions, strict=True)]


def values_of(decision: Decision) -> Sequence[Scalar]:
    """All values of a decision, its limit respected. Raises `SpecError` if it is continuous."""
    if isinstance(decision, Categorical):
        return decision.options
    if isinstance(decision, Integer):
        high = decision.high if decision.limit is None else min(decision.high, decision.limit)
        return range(decision.low, high + 1, decision.step)
    if decision.step is None and decision.low < decision.high:
        raise SpecError(decision.name, "is continuous, so its values can't be listed", "give it a step, or sample")
    return tuple(decision.at(i) for i in range(decision.num_values))


def _extremes(decision: Decision) -> tuple[Scalar, ...]:
    return decision.options if isinstance(decision, Categorical) else (decision.low, decision.high)


class _Scripted:
    """Replays a prefix of values, then takes the first value of everything."""

    def __init__(self, prefix: list[Scalar]) -> None:
        self._prefix = prefix
        self.options: list[Sequence[Scalar]] = []
        self.positions: list[int] = []

    def choose(self, decision: Decision) -> Scalar:
        options = values_of(decision)
        i = len(self.options)
        position = options.index(self._prefix[i]) if i < len(self._prefix) else 0
        self.options.append(options)
        self.positions.append(position)
        return options[position]


class _Insisting:
    """Random decisions but one, which it insists on where it is allowed."""

    def __init__(self, name: str, value: Scalar) -> None:
        self._name, self._value = name, value
        self._random = RandomChooser(seed=0)

    def choose(self, decision: Decision) -> Scalar:
        if decision.name == self._name and self._value in (
            values_of(decision) if not isinstance(decision, Real) else (self._value,)
        ):
            return self._value
        return self._random.choose(decision)
