"""The parts a template is compiled to, and what can be told of them before anything is decided."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from searchspace.choices import Categorical, Decision, Integer, Prior, Real, Scalar, check_value, labels_of
from searchspace.errors import SpecError, one_of, show

CHOICE_KEYS = ("choice", "int", "float", "sequence")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_ORDERS = ("any", "coarse_to_fine", "fine_to_coarse")
_PRIOR_KEYS = ("prior", "confidence")
_FAVOUR = {"low": 2.0, "medium": 4.0, "high": 8.0}
_SPREAD = {"low": 0.5, "medium": 0.25, "high": 0.125}
_MAX_OPTIONS = 1000  # each becomes an Optuna category, compared one by one
_MAX_SEQUENCE = 64  # each place is a decision of its own
_MOST_STEPS = 1_000_000_000  # whole numbers that floats still hold exactly
_FINEST = 1e-11  # values of a range keep twelve digits


@dataclass(frozen=True, slots=True)
class Leaf:
    """A plain value, of any depth."""

    value: Any


@dataclass(frozen=True, slots=True)
class Map:
    """A mapping with something open in it."""

    items: tuple[tuple[str, Part], ...]


@dataclass(frozen=True, slots=True)
class List:
    """A list with something open in it."""

    items: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """``${path}``, perhaps within a text."""

    pieces: tuple[str, ...]
    """Alternating text and target path; a lone target stands as ('', target, '')."""
    path: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several alternatives."""

    decision: Categorical
    alternatives: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Number:
    """A number from a range."""

    decision: Integer | Real


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list of levels, its length and entries open."""

    path: str
    entries: tuple[Any, ...]
    labels: tuple[Scalar, ...]
    low: int
    high: int
    order: str


Part: TypeAlias = Leaf | Map | List | Reference | Choice | Number | Sequence


def compile_part(data: Any, path: str) -> Part:
    """Plain data as a tree of parts. Raises `SpecError` at the first choice that can't be read."""
    if isinstance(data, str):
        return _compile_text(data, path)
    if isinstance(data, list):
        items = tuple(compile_part(item, f"{path}.{i}") for i, item in enumerate(data))
        return Leaf(data) if all(isinstance(item, Leaf) for item in items) else List(items)
    if not isinstance(data, dict):
        return Leaf(data)
    kinds = [kind for kind in CHOICE_KEYS if kind in data]
    if kinds and path:
        return _compile_choice(kinds, data, path)
    parts = tuple((k, compile_part(v, f"{path}.{k}" if path else k)) for k, v in data.items())
    return Leaf(data) if path and all(isinstance(part, Leaf) for _, part in parts) else Map(parts)


def _compile_text(text: str, path: str) -> Part:
    pieces = tuple(_REFERENCE.split(text))
    if "${" in "".join(pieces[::2]):
        raise SpecError(path, f"can't read the reference in {show(text)}", "write ${path.to.value}")
    for target in pieces[1::2]:
        if ":" in target:
            raise SpecError(
                path, f"${{{target}}}: resolvers such as {show(target.split(':')[0])} are off", "write the value itself"
            )
        if not _PATH.fullmatch(target):
            raise SpecError(
                path, f"can't read the reference ${{{target}}}", "write ${path.to.value}, from the root of the file"
            )
    return Reference(pieces, path) if len(pieces) > 1 else Leaf(text)


def _compile_choice(kinds: list[str], data: dict[str, Any], path: str) -> Part:
    kind = kinds[0]
    numeric = ("log", "step", *_PRIOR_KEYS)
    allowed: tuple[str, ...] = {"choice": _PRIOR_KEYS, "int": numeric, "float": numeric, "sequence": ()}[kind]
    for other in data:
        if other != kind and other not in allowed:
            raise SpecError(f"{path}.{other}", f"does not belong beside {kind}", one_of([kind, *allowed], other))
    if kind == "choice":
        return _compile_alternatives(data, path)
    if kind == "sequence":
        return _compile_sequence(data["sequence"], path)
    return Number(_number(kind, data, path))


def _compile_alternatives(data: dict[str, Any], path: str) -> Choice:
    options = data["choice"]
    if not isinstance(options, list) or not 1 <= len(options) <= _MAX_OPTIONS:
        what = f"{len(options)} options" if isinstance(options, list) else show(options)
        raise SpecError(
            f"{path}.choice", f"expected a list of options, got {what}", f"give 1 to {_MAX_OPTIONS} options: [a, b]"
        )
    labels = labels_of(options)
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise SpecError(f"{path}.choice.{i}", f"the option {show(label)} stands twice", "drop one of them")
        if isinstance(label, float) and not math.isfinite(label):
            raise SpecError(f"{path}.choice.{i}", f"{show(label)} is not a finite number", "give a finite one")
    alternatives = tuple(compile_part(option, f"{path}.choice.{i}") for i, option in enumerate(options))
    weights = None
    if (confidence := _confidence(data, path)) is not None:
        check_value(Categorical(f"{path}.prior", labels), data["prior"])
        weights = tuple(_FAVOUR[confidence] if label == data["prior"] else 1.0 for label in labels)
    return Choice(Categorical(path, labels, weights), alternatives)


def _confidence(data: dict[str, Any], path: str) -> str | None:
    """How sure the author is of the prior; None where there is none."""
    confidence = data.get("confidence", "medium")
    if not isinstance(confidence, str) or confidence not in _FAVOUR:
        raise SpecError(f"{path}.confidence", f"unknown confidence {show(confidence)}", one_of(_FAVOUR, confidence))
    if "prior" in data:
        return str(confidence)
    if "confidence" in data:
        raise SpecError(f"{path}.confidence", "stands without a prior", "add prior: VALUE, or drop it")
    return None


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
    if step is not None and high - low > _MOST_STEPS * step:
        raise SpecError(f"{path}.step", f"{show(step)} gives too many values", f"at most {_MOST_STEPS:,}")
    if step is not None and step < _FINEST * max(abs(low), abs(high)):
        raise SpecError(
            f"{path}.step", f"{show(step)} is lost beside its bounds", f"at least {_FINEST:g} of the larger"
        )
    if step is not None and log:
        raise SpecError(f"{path}.step", "log and step exclude each other", "keep one of them")
    decision: Integer | Real
    if is_int:
        step = 1 if step is None else step
        decision = Integer(path, low, low + (high - low) // step * step, step, log)
    else:
        if step is not None:
            high = min(high, float(f"{low + math.floor((high - low) / step + 1e-9) * step:.12g}"))
        decision = Real(path, float(low), float(high), None if step is None else float(step), log)
    if (confidence := _confidence(data, path)) is not None:
        check_value(replace(decision, name=f"{path}.prior"), data["prior"])
        decision = replace(decision, prior=Prior(data["prior"], _SPREAD[confidence]))
    return decision


def _compile_sequence(settings: Any, path: str) -> Sequence:
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
        if not isinstance(compile_part(entry, f"{where}.of.{i}"), Leaf):
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
        raise SpecError(
            f"{where}.length", f"[{low}, {high}] is not a range", f"use 1 <= low <= high <= {_MAX_SEQUENCE}"
        )
    if order not in _ORDERS:
        raise SpecError(f"{where}.order", f"unknown order {show(order)}", one_of(_ORDERS, order))
    if order != "any" and len(entries) > _MAX_SEQUENCE:  # each is a decision, narrowed by all before it
        raise SpecError(f"{where}.of", f"has {len(entries)} entries in order", f"use at most {_MAX_SEQUENCE}")
    return Sequence(path, tuple(entries), labels, low, high, order)


def _children(part: Part) -> tuple[Part, ...]:
    if isinstance(part, Map):
        return tuple([child for _, child in part.items])
    if isinstance(part, List):
        return part.items
    return part.alternatives if isinstance(part, Choice) else ()


def decisions_of(part: Part) -> Iterator[Decision]:
    """Every decision that may come up, in order."""
    if isinstance(part, Choice | Number):
        yield part.decision
    if isinstance(part, Sequence):
        if part.low < part.high:
            yield Integer(f"{part.path}.length", part.low, part.high)
        if part.order == "any":
            yield from (Categorical(f"{part.path}.{i}", part.labels) for i in range(part.high))
        else:
            yield from (Integer(f"{part.path}.count.{label}", 0, part.high) for label in part.labels[:-1])
    for child in _children(part):
        yield from decisions_of(child)


def sequences_of(part: Part) -> Iterator[Sequence]:
    """Every open sequence."""
    if isinstance(part, Sequence):
        yield part
    for child in _children(part):
        yield from sequences_of(child)


def references_of(part: Part) -> Iterator[Reference]:
    """Every reference."""
    if isinstance(part, Reference):
        yield part
    for child in _children(part):
        yield from references_of(child)


def may_exist(part: Part, path: list[str]) -> bool:
    """Whether some way to decide has a value at ``path``."""
    if not path or isinstance(part, Reference):
        return True
    head, rest = path[0], path[1:]
    if isinstance(part, Map):
        return any(may_exist(child, rest) for name, child in part.items if name == head)
    if isinstance(part, List):
        return head.isdigit() and int(head) < len(part.items) and may_exist(part.items[int(head)], rest)
    if isinstance(part, Choice):
        return any(may_exist(alternative, path) for alternative in part.alternatives)
    if isinstance(part, Sequence):
        return head.isdigit() and int(head) < part.high
    if isinstance(part, Leaf):
        value = part.value
        if isinstance(value, dict):
            return head in value and may_exist(Leaf(value[head]), rest)
        if isinstance(value, list):
            return head.isdigit() and int(head) < len(value) and may_exist(Leaf(value[int(head)]), rest)
    return False


def size_of(part: Part) -> float:
    """Number of ways to decide; infinite too where it is beyond what a float holds."""
    try:
        size = _size_of(part)
    except OverflowError:
        return math.inf
    return size if size < 1e300 else math.inf


def _size_of(part: Part) -> float:
    if isinstance(part, Choice):
        return sum(size_of(alternative) for alternative in part.alternatives)
    if isinstance(part, Number):
        d = part.decision
        if isinstance(d, Real):
            if d.low == d.high:
                return 1
            return math.inf if d.step is None else d.num_values
        return (d.high - d.low) // d.step + 1
    if isinstance(part, Sequence):
        k = len(part.entries)
        lengths = range(part.low, part.high + 1)
        return sum(k**n if part.order == "any" else math.comb(n + k - 1, k - 1) for n in lengths)
    return math.prod(size_of(child) for child in _children(part))
