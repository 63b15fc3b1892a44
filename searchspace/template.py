"""A file with open choices, compiled once into a tree that is decided thousands of times.

A template knows nothing of architectures but one thing: an ordered `sequence` sorts its levels by
``levels.NAME.chunk``. Sub-trees without a choice or a reference are kept as plain values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from searchspace.choices import Categorical, Chooser, Decision, Integer, Real, Scalar, check_value, labels_of
from searchspace.constraints import Constraint
from searchspace.errors import ConstraintError, SpecError, one_of, show

CHOICE_KEYS = ("choice", "int", "float", "sequence")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_ORDERS = ("any", "coarse_to_fine", "fine_to_coarse")
_MAX_OPTIONS = 1000
_MAX_SEQUENCE = 64


@dataclass(frozen=True, slots=True)
class _Leaf:
    value: Any


@dataclass(frozen=True, slots=True)
class _Map:
    items: tuple[tuple[str, _Part], ...]


@dataclass(frozen=True, slots=True)
class _List:
    items: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Reference:
    pieces: tuple[str, ...]
    """Alternating text and target path; a lone target stands as ('', target, '')."""
    path: str


@dataclass(frozen=True, slots=True)
class _Choice:
    decision: Categorical
    alternatives: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Number:
    decision: Integer | Real


@dataclass(frozen=True, slots=True)
class _Sequence:
    path: str
    entries: tuple[Any, ...]
    labels: tuple[Scalar, ...]
    low: int
    high: int
    order: str


_Part: TypeAlias = _Leaf | _Map | _List | _Reference | _Choice | _Number | _Sequence


@dataclass(frozen=True, slots=True)
class Decided:
    """A template with every decision taken."""

    tree: dict[str, Any]
    choices: dict[str, Scalar]


class Template:
    """Plain data in which any value may be an open choice or a ``${path}``."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        constraints = data.get("constraints", [])
        if not isinstance(constraints, list) or not all(isinstance(text, str) for text in constraints):
            raise SpecError("constraints", "expected a list of expressions", 'write - "d_model % 64 == 0"')
        self.constraints = tuple(Constraint(text, f"constraints.{i}") for i, text in enumerate(constraints))
        self._root = _compile({k: v for k, v in data.items() if k != "constraints"}, "")
        self._check_references()

    def decide(self, chooser: Chooser) -> Decided:
        """Take every decision.

        Raises:
            ConstraintError: if the decisions break a constraint.
            SpecError: if a reference leads nowhere under these decisions.
        """
        resolution = _Resolution(self._root, chooser)
        tree: dict[str, Any] = resolution.value(self._root)
        for constraint in self.constraints:
            if not constraint.holds(tree):
                raise ConstraintError(constraint.path, f"does not hold: {constraint.text}", "decide otherwise")
        tree.pop("vars", None)
        return Decided(tree, resolution.choices)

    @property
    def is_open(self) -> bool:
        """Whether any decision is left."""
        return next(_decisions(self._root), None) is not None

    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that may come up, in the order of the file."""
        return tuple(_decisions(self._root))

    def size(self) -> float:
        """Number of ways to decide, constraints left aside; infinite with a continuous range."""
        return _size(self._root)

    def _check_references(self) -> None:
        targets: set[str] = set()
        for reference in _references(self._root):
            for target in reference.pieces[1::2]:
                targets.add(target)
                if not _may_exist(self._root, target.split(".")):
                    head = target.split(".")[0]
                    known = [k for k, _ in self._root.items] if isinstance(self._root, _Map) else []
                    raise SpecError(reference.path, f"${{{target}}} refers to nothing", one_of(known, head))
        for constraint in self.constraints:
            targets |= constraint.names
            for name in constraint.names:
                if not _may_exist(self._root, name.split(".")):
                    raise SpecError(constraint.path, f"there is no {name} ({show(constraint.text)})", "check the path")
        for decision in _decisions(self._root):
            if decision.name.startswith("vars.") and not any(
                decision.name == t or decision.name.startswith(f"{t}.") or t.startswith(f"{decision.name}.")
                for t in targets
            ):
                raise SpecError(decision.name, "is decided, but nothing refers to it", f"use ${{{decision.name}}}, or drop it")


def _compile(data: Any, path: str) -> _Part:
    if isinstance(data, str):
        return _compile_text(data, path)
    if isinstance(data, list):
        items = tuple(_compile(item, f"{path}.{i}") for i, item in enumerate(data))
        return _Leaf(data) if all(isinstance(item, _Leaf) for item in items) else _List(items)
    if not isinstance(data, dict):
        return _Leaf(data)
    kinds = [kind for kind in CHOICE_KEYS if kind in data]
    if kinds and path:
        return _compile_choice(kinds, data, path)
    parts = tuple((k, _compile(v, f"{path}.{k}" if path else k)) for k, v in data.items())
    return _Leaf(data) if path and all(isinstance(part, _Leaf) for _, part in parts) else _Map(parts)


def _compile_text(text: str, path: str) -> _Part:
    pieces = tuple(_REFERENCE.split(text))
    if "${" in "".join(pieces[::2]):
        raise SpecError(path, f"can't read the reference in {show(text)}", "write ${path.to.value}")
    for target in pieces[1::2]:
        if ":" in target:
            raise SpecError(path, f"${{{target}}}: resolvers such as {show(target.split(':')[0])} are off", "write the value itself")
        if not _PATH.fullmatch(target):
            raise SpecError(path, f"can't read the reference ${{{target}}}", "write ${path.to.value}, from the root of the file")
    return _Reference(pieces, path) if len(pieces) > 1 else _Leaf(text)


def _compile_choice(kinds: list[str], data: dict[str, Any], path: str) -> _Part:
    kind = kinds[0]
    allowed = {"choice": (), "int": ("log", "step"), "float": ("log", "step"), "sequence": ()}[kind]
    for other in data:
        if other != kind and other not in allowed:
            raise SpecError(f"{path}.{other}", f"does not belong beside {kind}", one_of([kind, *allowed], other))
    if kind == "choice":
        return _compile_alternatives(data["choice"], path)
    if kind == "sequence":
        return _compile_sequence(data["sequence"], path)
    return _Number(_number(kind, data, path))


def _compile_alternatives(options: Any, path: str) -> _Choice:
    if not isinstance(options, list) or not 1 <= len(options) <= _MAX_OPTIONS:
        what = f"{len(options)} options" if isinstance(options, list) else show(options)
        raise SpecError(f"{path}.choice", f"expected a list of options, got {what}", f"give 1 to {_MAX_OPTIONS} options: [a, b]")
    labels = labels_of(options)
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise SpecError(f"{path}.choice.{i}", f"the option {show(label)} stands twice", "drop one of them")
        if isinstance(label, float) and not math.isfinite(label):
            raise SpecError(f"{path}.choice.{i}", f"{show(label)} is not a finite number", "give a finite one")
    alternatives = tuple(_compile(option, f"{path}.choice.{i}") for i, option in enumerate(options))
    return _Choice(Categorical(path, labels), alternatives)


def _number(kind: str, data: dict[str, Any], path: str) -> Integer | Real:
    bounds, log, step = data[kind], data.get("log", False), data.get("step")
    is_int = kind == "int"
    wanted: tuple[type, ...] = (int,) if is_int else (int, float)
    where = f"{path}.{kind}"
    remedy = "write e.g. {int: [1, 4]}" if is_int else "write e.g. {float: [1.0e-4, 1.0e-2], log: true}"
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise SpecError(where, f"expected [low, high], got {show(bounds)}", remedy)
    for i, bound in enumerate(bounds):
        if type(bound) not in wanted or not abs(bound) < 1e18:
            raise SpecError(f"{where}.{i}", f"{show(bound)} is not a {'whole' if is_int else 'finite'} number", remedy)
    low, high = bounds
    if low > high:
        raise SpecError(where, f"low ({low}) is above high ({high})", "swap them")
    if type(log) is not bool:
        raise SpecError(f"{path}.log", f"expected true or false, got {show(log)}", "write log: true")
    if log and low <= 0:
        raise SpecError(where, f"a log range can't start at {low}", "start above 0")
    if step is not None and (type(step) not in wanted or not 0 < step < 1e18):
        raise SpecError(f"{path}.step", f"{show(step)} can't be a step", "use a number above 0")
    if step is not None and log:
        raise SpecError(f"{path}.step", "log and step exclude each other", "keep one of them")
    if is_int:
        step = 1 if step is None else step
        return Integer(path, low, low + (high - low) // step * step, step, log)
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Real(path, float(low), float(high), None if step is None else float(step), log)


def _compile_sequence(settings: Any, path: str) -> _Sequence:
    where = f"{path}.sequence"
    if not isinstance(settings, dict):
        raise SpecError(where, f"expected a mapping, got {show(settings)}", "write {of: [word, token], length: [2, 6]}")
    for name in settings:
        if name not in ("of", "length", "order"):
            raise SpecError(f"{where}.{name}", "unknown key", one_of(("of", "length", "order"), name))
    entries, length = settings.get("of"), settings.get("length")
    order = settings.get("order", "any")
    if not isinstance(entries, list) or not 1 <= len(entries) <= _MAX_OPTIONS:
        raise SpecError(f"{where}.of", f"expected a list of levels, got {show(entries)}", "write of: [word, token]")
    for i, entry in enumerate(entries):
        if not isinstance(_compile(entry, f"{where}.of.{i}"), _Leaf):
            raise SpecError(f"{where}.of.{i}", "an entry must be concrete", "move the choice into the level itself")
    labels = labels_of(entries)
    if len(set(map(str, labels))) < len(labels):
        raise SpecError(f"{where}.of", "the same entry stands twice", "drop one of them")
    if type(length) is int:
        length = [length, length]
    if not isinstance(length, list) or len(length) != 2 or any(type(n) is not int for n in length):
        raise SpecError(f"{where}.length", f"expected [low, high], got {show(length)}", "write length: [2, 6]")
    low, high = length
    if not 1 <= low <= high <= _MAX_SEQUENCE:
        raise SpecError(f"{where}.length", f"[{low}, {high}] is not a range", f"use 1 <= low <= high <= {_MAX_SEQUENCE}")
    if order not in _ORDERS:
        raise SpecError(f"{where}.order", f"unknown order {show(order)}", one_of(_ORDERS, order))
    return _Sequence(path, tuple(entries), labels, low, high, order)


def _children(part: _Part) -> Sequence[_Part]:
    if isinstance(part, _Map):
        return [child for _, child in part.items]
    if isinstance(part, _List):
        return part.items
    return part.alternatives if isinstance(part, _Choice) else ()


def _decisions(part: _Part) -> Iterator[Decision]:
    if isinstance(part, _Choice | _Number):
        yield part.decision
    if isinstance(part, _Sequence):
        if part.low < part.high:
            yield Integer(f"{part.path}.length", part.low, part.high)
        if part.order == "any":
            yield from (Categorical(f"{part.path}.{i}", part.labels) for i in range(part.high))
        else:
            yield from (Integer(f"{part.path}.{label}", 0, part.high) for label in part.labels[:-1])
    for child in _children(part):
        yield from _decisions(child)


def _references(part: _Part) -> Iterator[_Reference]:
    if isinstance(part, _Reference):
        yield part
    for child in _children(part):
        yield from _references(child)


def _may_exist(part: _Part, path: list[str]) -> bool:
    """Whether some way to decide has a value at ``path``."""
    if not path or isinstance(part, _Reference):
        return True
    head, rest = path[0], path[1:]
    if isinstance(part, _Map):
        return any(_may_exist(child, rest) for name, child in part.items if name == head)
    if isinstance(part, _List):
        return head.isdigit() and int(head) < len(part.items) and _may_exist(part.items[int(head)], rest)
    if isinstance(part, _Choice):
        return any(_may_exist(alternative, path) for alternative in part.alternatives)
    if isinstance(part, _Sequence):
        return head.isdigit() and int(head) < part.high
    if isinstance(part, _Leaf):
        value = part.value
        if isinstance(value, dict):
            return head in value and _may_exist(_Leaf(value[head]), rest)
        if isinstance(value, list):
            return head.isdigit() and int(head) < len(value) and _may_exist(_Leaf(value[int(head)]), rest)
    return False


def _size(part: _Part) -> float:
    if isinstance(part, _Choice):
        return sum(_size(alternative) for alternative in part.alternatives)
    if isinstance(part, _Number):
        d = part.decision
        if isinstance(d, Real):
            if d.low == d.high:
                return 1
            return math.inf if d.step is None else int((d.high - d.low) / d.step + 1e-9) + 1
        return (d.high - d.low) // d.step + 1
    if isinstance(part, _Sequence):
        k = len(part.entries)
        lengths = range(part.low, part.high + 1)
        return sum(k**n if part.order == "any" else math.comb(n + k - 1, k - 1) for n in lengths)
    return math.prod(_size(child) for child in _children(part))


class _Resolution:
    """One walk over a template with one chooser; references pull decisions forward."""

    def __init__(self, root: _Part, chooser: Chooser) -> None:
        self._root = root
        self._chooser = chooser
        self._decided: dict[int, Any] = {}
        self._pending: list[str] = []
        self.choices: dict[str, Scalar] = {}

    def value(self, part: _Part) -> Any:
        if isinstance(part, _Leaf):
            return part.value
        if isinstance(part, _Map):
            return {name: self.value(child) for name, child in part.items}
        if isinstance(part, _List):
            return [self.value(item) for item in part.items]
        if isinstance(part, _Reference):
            return self._reference(part)
        if isinstance(part, _Choice):
            return self.value(self._alternative(part))
        if id(part) not in self._decided:
            self._decided[id(part)] = (
                self._choose(part.decision) if isinstance(part, _Number) else self._sequence(part)
            )
        return self._decided[id(part)]

    def _choose(self, decision: Decision) -> Any:
        value = self._chooser.choose(decision)
        check_value(decision, value)
        self.choices[decision.name] = value
        return value

    def _alternative(self, part: _Choice) -> _Part:
        if id(part) not in self._decided:
            label = self._choose(part.decision)
            self._decided[id(part)] = part.alternatives[part.decision.options.index(label)]
        chosen: _Part = self._decided[id(part)]
        return chosen

    def _reference(self, part: _Reference) -> Any:
        values = [self._target(target, part.path) for target in part.pieces[1::2]]
        if len(values) == 1 and not part.pieces[0] and not part.pieces[2]:
            return values[0]
        texts = [str(value) for value in values] + [""]
        return "".join(text + value for text, value in zip(part.pieces[::2], texts, strict=True))

    def _target(self, target: str, path: str) -> Any:
        if target in self._pending:
            cycle = " -> ".join([*self._pending[self._pending.index(target) :], target])
            raise SpecError(path, f"references go in a circle: {cycle}", "make one of them a value")
        self._pending.append(target)
        part, rest = self._root, target.split(".")
        while rest and not isinstance(part, _Leaf | _Reference | _Number | _Sequence):
            if isinstance(part, _Choice):
                part = self._alternative(part)
                continue
            step, rest = rest[0], rest[1:]
            inner = dict(part.items).get(step) if isinstance(part, _Map) else (
                part.items[int(step)] if step.isdigit() and int(step) < len(part.items) else None
            )
            if inner is None:
                raise SpecError(path, f"${{{target}}} does not exist under these decisions", "refer to what always exists")
            part = inner
        value = self.value(part)
        for step in rest:
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise SpecError(path, f"${{{target}}} does not exist under these decisions", "refer to what always exists")
        self._pending.pop()
        return value

    def _sequence(self, part: _Sequence) -> list[Any]:
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
            decision = Integer(f"{part.path}.{label}", 0, part.high, limit=left, weights=weights)
            counts.append(self._choose(decision))
            left -= counts[-1]
        counts.append(left)
        chunks = [self._chunk(entry, part.path) for entry in part.entries]
        sign = -1 if part.order == "coarse_to_fine" else 1
        ranked = sorted(range(len(chunks)), key=lambda i: sign * chunks[i])
        return [part.entries[i] for i in ranked for _ in range(counts[i])]

    def _chunk(self, entry: Any, path: str) -> int:
        name = entry["level"] if isinstance(entry, dict) else entry
        chunk = self._target(f"levels.{name}.chunk", path)
        if type(chunk) is not int:
            raise SpecError(f"levels.{name}.chunk", f"expected a whole number, got {show(chunk)}", "write e.g. 4")
        return chunk
