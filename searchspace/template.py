"""A file with open choices, compiled once into a tree that is decided thousands of times.

A template knows nothing of architectures but one thing: an ordered `sequence` sorts its levels by
``levels.NAME.chunk``. Sub-trees without a choice or a reference are kept as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from searchspace.choices import Categorical, Chooser, Decision, Integer, Scalar, check_value
from searchspace.constraints import Constraint
from searchspace.errors import ConstraintError, SpecError, one_of, show
from searchspace.open_values import (
    Choice,
    Leaf,
    List,
    Map,
    Number,
    Part,
    Reference,
    Sequence,
    compile_part,
    decisions_of,
    may_exist,
    references_of,
    sequences_of,
    size_of,
)

_MOST_CONSTRAINTS = 200  # each is evaluated at every decision that it names
_MOST_PENDING = 100  # constraints that wait for later decisions
_MOST_STEPS = 150_000  # decisions in one walk: under a second
_REFERENCE_STEPS = 5  # a reference costs about as much as this many plain values
_LONGEST_TEXT = 100_000  # references can double a text at every step


@dataclass(frozen=True, slots=True)
class Decided:
    """A template with every decision taken."""

    tree: dict[str, Any]
    choices: dict[str, Scalar]


class Template:
    """Plain data in which any value may be an open choice or a ``${path}``."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        if not isinstance(data, Mapping):
            raise SpecError("", f"expected a mapping, got {show(data)}", "write it as 'key: value' pairs")
        constraints = data.get("constraints", [])
        if not isinstance(constraints, list) or not all(isinstance(text, str) for text in constraints):
            raise SpecError("constraints", "expected a list of expressions", 'write - "d_model % 64 == 0"')
        if len(constraints) > _MOST_CONSTRAINTS:
            what = f"there are {len(constraints)} of them"
            raise SpecError("constraints", what, f"keep to {_MOST_CONSTRAINTS}; join some with 'and'")
        self.constraints = tuple(Constraint(text, f"constraints.{i}") for i, text in enumerate(constraints))
        self._root = compile_part({k: v for k, v in data.items() if k != "constraints"}, "")
        self._check_references()
        self._constraint_steps = sum(len(constraint.text) for constraint in self.constraints) // 4
        self.weight = _count_values(data) + self._constraint_steps
        """Values in the file, and its constraints: what one candidate costs."""
        self.work = 0
        """Steps taken by all decisions so far: what listing candidates has cost."""

    def decide(self, chooser: Chooser, build: Callable[[dict[str, Any]], object] | None = None) -> Decided:
        """Take every decision.

        Args:
            chooser: takes them.
            build: is given the decided tree, ``vars`` left out, before the constraints are looked at.

        Raises:
            ConstraintError: if the decisions break a constraint.
            SpecError: if a reference leads nowhere under these decisions.
        """
        resolution = _Resolution(self._root, chooser)
        try:
            tree: dict[str, Any] = resolution.value(self._root)
        finally:
            self.work += resolution.steps + self._constraint_steps
        if build is not None:
            build({name: value for name, value in tree.items() if name != "vars"})
        for constraint in self.constraints:
            if not constraint.holds(tree):
                raise ConstraintError(constraint.path, f"does not hold: {constraint.text}", "decide otherwise")
        tree.pop("vars", None)
        return Decided(tree, resolution.choices)

    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that may come up, in the order of the file."""
        return tuple(decisions_of(self._root))

    def schedules(self) -> tuple[Sequence, ...]:
        """Every open sequence, in the order of the file."""
        return tuple(sequences_of(self._root))

    def size(self) -> float:
        """Number of ways to decide, constraints left aside; infinite with a continuous range."""
        return size_of(self._root)

    def _check_references(self) -> None:
        targets: set[str] = set()
        for reference in references_of(self._root):
            for target in reference.pieces[1::2]:
                targets.add(target)
                if not may_exist(self._root, target.split(".")):
                    head = target.split(".")[0]
                    known = [k for k, _ in self._root.items] if isinstance(self._root, Map) else []
                    raise SpecError(reference.path, f"${{{target}}} refers to nothing", one_of(known, head))
        for constraint in self.constraints:
            targets |= constraint.names
            for name in constraint.names:
                if not may_exist(self._root, name.split(".")):
                    raise SpecError(constraint.path, f"there is no {name} ({show(constraint.text)})", "check the path")
        for decision in decisions_of(self._root):
            if decision.name.startswith("vars.") and not any(
                decision.name == t or decision.name.startswith(f"{t}.") or t.startswith(f"{decision.name}.")
                for t in targets
            ):
                raise SpecError(
                    decision.name, "is decided, but nothing refers to it", f"use ${{{decision.name}}}, or drop it"
                )


def _child(part: object, name: str) -> object:
    """What stands below a part under a name; None if nothing does, or it depends on a decision."""
    inside = dict(part.items) if isinstance(part, Map) else part.value if isinstance(part, Leaf) else part
    return inside.get(name) if isinstance(inside, dict) else None


class _Resolution:
    """One walk over a template with one chooser; references pull decisions forward."""

    def __init__(self, root: Part, chooser: Chooser) -> None:
        self._root = root
        self._chooser = chooser
        self._decided: dict[int, Any] = {}
        self._pending: list[str] = []
        self.steps = 0
        """Values walked, which references may double at each."""
        self.choices: dict[str, Scalar] = {}

    def value(self, part: Part) -> Any:
        if isinstance(part, Leaf):
            return part.value
        if isinstance(part, Map):
            self.steps += len(part.items)
            return {name: self.value(child) for name, child in part.items}
        if isinstance(part, List):
            self.steps += len(part.items)
            return [self.value(item) for item in part.items]
        if isinstance(part, Reference):
            return self._reference(part)
        if isinstance(part, Choice):
            return self.value(self._alternative(part))
        if id(part) not in self._decided:
            self._decided[id(part)] = self._choose(part.decision) if isinstance(part, Number) else self._sequence(part)
        return self._decided[id(part)]

    def _choose(self, decision: Decision) -> Any:
        value = self._chooser.choose(decision)
        check_value(decision, value)
        self.choices[decision.name] = value
        return value

    def _alternative(self, part: Choice) -> Part:
        if id(part) not in self._decided:
            label = self._choose(part.decision)
            self._decided[id(part)] = part.alternatives[part.decision.options.index(label)]
        chosen: Part = self._decided[id(part)]
        return chosen

    def _reference(self, part: Reference) -> Any:
        values = [self._target(target, part.path) for target in part.pieces[1::2]]
        if len(values) == 1 and not part.pieces[0] and not part.pieces[2]:
            return values[0]
        texts = [*map(_as_text, values), ""]
        text = "".join(text + value for text, value in zip(part.pieces[::2], texts, strict=True))
        if len(text) > _LONGEST_TEXT:
            raise SpecError(part.path, f"grows to {len(text):,} characters", "refer to less")
        return text

    def _target(self, target: str, path: str) -> Any:
        if target in self._pending:
            cycle = " -> ".join([*self._pending[self._pending.index(target) :], target])
            raise SpecError(path, f"references go in a circle: {cycle}", "make one of them a value")
        self.steps += _REFERENCE_STEPS
        if len(self._pending) >= _MOST_PENDING or self.steps > _MOST_STEPS:
            raise SpecError(path, f"${{{show(target)}}} refers on and on", "refer to the value itself")
        self._pending.append(target)
        part, rest = self._root, target.split(".")
        while rest and not isinstance(part, Leaf | Reference | Number | Sequence):
            if isinstance(part, Choice):
                part = self._alternative(part)
                continue
            step, rest = rest[0], rest[1:]
            inner = (
                dict(part.items).get(step)
                if isinstance(part, Map)
                else (part.items[int(step)] if step.isdigit() and int(step) < len(part.items) else None)
            )
            if inner is None:
                raise SpecError(
                    path, f"${{{target}}} does not exist under these decisions", "refer to what always exists"
                )
            part = inner
        value = self.value(part)
        for step in rest:
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise SpecError(
                    path, f"${{{target}}} does not exist under these decisions", "refer to what always exists"
                )
        self._pending.pop()
        return value

    def _sequence(self, part: Sequence) -> list[Any]:
        length = part.low
        if part.low < part.high:
            length = self._choose(Integer(f"{part.path}.length", part.low, part.high))
        if part.order == "any":
            labels = [self._choose(Categorical(f"{part.path}.{i}", part.labels)) for i in range(length)]
            return [part.entries[part.labels.index(label)] for label in labels]
        # Counts per level instead of places: every candidate has one way to be decided.
        counts, left = [], length
        for i, label in enumerate(part.labels[:-1]):
            others = len(part.labels) - i - 1
            weights = tuple(math.comb(left - c + others - 1, others - 1) for c in range(left + 1))
            decision = Integer(f"{part.path}.count.{label}", 0, part.high, limit=left, weights=weights)
            counts.append(self._choose(decision))
            left -= counts[-1]
        counts.append(left)
        chunks = [self._chunk(entry, part.path) for entry in part.entries]
        sign = -1 if part.order == "coarse_to_fine" else 1
        ranked = sorted(range(len(chunks)), key=lambda i: sign * chunks[i])
        return [part.entries[i] for i in ranked for _ in range(counts[i])]

    def _chunk(self, entry: Any, path: str) -> int:
        name = entry.get("level") if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise SpecError(path, f"{show(entry)} names no level", "write a level's name, or {level: NAME, offset: 0}")
        levels = dict(self._root.items).get("levels") if isinstance(self._root, Map) else None
        known = (
            [k for k, _ in levels.items]
            if isinstance(levels, Map)
            else list(levels.value)
            if isinstance(levels, Leaf) and isinstance(levels.value, dict)
            else []
        )
        if known and name not in known:
            raise SpecError(path, f"no level is called {show(name)}", one_of(known, name))
        level = _child(levels, name)
        if isinstance(level, Map | Leaf | dict) and _child(level, "chunk") is None:
            raise SpecError(f"levels.{name}", "has no chunk", "give it one, e.g. chunk: 4")
        chunk = self._target(f"levels.{name}.chunk", path)
        if type(chunk) is not int:
            raise SpecError(f"levels.{name}.chunk", f"expected a whole number, got {show(chunk)}", "write e.g. 4")
        return chunk


def _count_values(data: object) -> int:
    inner = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    return 1 + sum(map(_count_values, inner))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else show(value, limit=_LONGEST_TEXT)
