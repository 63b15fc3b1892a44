"""Plain YAML data to frozen dataclasses and back, with the path of every value in its errors.

Decoders are built once per type from its annotations and cached, because a search decodes thousands
of candidates a second.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, Union

import yaml

from searchspace import plugins
from searchspace.errors import SpecError, one_of, show
from searchspace.tables import kind_of, options

T = TypeVar("T")
Decoder: TypeAlias = Callable[[object, str], Any]

NO_VALUE: Any = dataclasses.MISSING


def key(
    doc: str,
    *,
    default: Any = NO_VALUE,
    name: str | None = None,
    low: float | None = None,
    high: float | None = None,
    decoder: Decoder | None = None,
) -> Any:
    """A dataclass field that is a YAML key.

    Args:
        doc: one sentence for people, shown in the key reference.
        default: value when the key is absent; without one the key is required.
        name: the key's name in YAML where it differs from the field's (``in`` is a Python keyword).
        low: smallest value allowed, inclusive.
        high: largest value allowed, inclusive.
        decoder: how to read it, where the annotation does not say enough.
    """
    metadata = {"doc": doc, "key": name, "low": low, "high": high, "decoder": decoder}
    if callable(default) and default is not NO_VALUE:
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def decode(cls: type[T], data: object, path: str = "") -> T:
    """Turn plain data (dicts, lists, scalars) into ``cls``.

    Raises:
        SpecError: at the first value that does not fit, with its dotted path.
    """
    decoder: Decoder = decoder_for(typing.cast(typing.Any, cls))
    value: T = decoder(data, path)
    return value


def encode(value: object) -> Any:
    """The inverse of `decode`: plain data, values equal to their default left out."""
    if hasattr(value, "__encode__"):
        return value.__encode__()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if f.default is not dataclasses.MISSING and item == f.default:
                continue
            if f.default_factory is not dataclasses.MISSING and item == f.default_factory():
                continue
            plain[f.metadata.get("key") or f.name] = encode(item)
        return plain
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return value


def join_path(path: str, part: object) -> str:
    """Append one key or index to a dotted path."""
    return f"{path}.{part}" if path else str(part)


def expect_mapping(data: object, path: str, what: str = "a mapping") -> dict[str, object]:
    """Check that ``data`` is a mapping with text keys."""
    if not isinstance(data, dict):
        raise SpecError(path, f"expected {what}, got {show(data)}", "write it as 'key: value' pairs")
    return data


@cache
def decoder_for(annotation: Any) -> Decoder:
    """The function that decodes one annotated type."""
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if (kind := kind_of(annotation)) is not None:
        return _literal_decoder(options(annotation), kind)
    if hasattr(annotation, "__decode__"):
        return typing.cast(Decoder, annotation.__decode__)
    if dataclasses.is_dataclass(annotation):
        return dataclass_decoder(typing.cast(type, annotation))
    if origin is Literal:
        return _literal_decoder(args)
    if origin in (Union, types.UnionType):
        return _union_decoder(args)
    if origin is tuple:
        return _tuple_decoder(args[0])
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        return _mapping_decoder(args[1])
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    raise TypeError(f"no decoder for {annotation!r}")


def _choice_hint(data: object) -> str:
    """The remedy for a misspelt open choice where a value was expected."""
    if not isinstance(data, dict):
        return ""
    return one_of(("choice", "int", "float", "sequence"), next(iter(data), None))


def _decode_int(data: object, path: str) -> int:
    if type(data) is int:
        return data
    raise SpecError(
        path, f"expected a whole number, got {show(data)}", _choice_hint(data) or "write it without quotes, e.g. 8"
    )


def _decode_float(data: object, path: str) -> float:
    if type(data) in (int, float):
        try:
            number = float(typing.cast(float, data))
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise SpecError(path, f"expected a finite number, got {show(data)}", "write e.g. 0.1 or 4.0e11")
    raise SpecError(path, f"expected a number, got {show(data)}", "write e.g. 0.1 or 4.0e11, without quotes")


def _decode_bool(data: object, path: str) -> bool:
    if type(data) is bool:
        return data
    raise SpecError(path, f"expected true or false, got {show(data)}", "write true or false, without quotes")


def _decode_str(data: object, path: str) -> str:
    if isinstance(data, str):
        return data
    raise SpecError(path, f"expected text, got {show(data)}", "put it in quotes if it is meant as text")


def _decode_none(data: object, path: str) -> None:
    if data is not None:
        raise SpecError(path, f"expected null, got {show(data)}", "write null, or leave the key out")


_SCALARS: dict[Any, Decoder] = {
    int: _decode_int,
    float: _decode_float,
    bool: _decode_bool,
    str: _decode_str,
    type(None): _decode_none,
}


def _literal_decoder(names: tuple[Any, ...], kind: str = "") -> Decoder:
    """Of one of these names, or of one of its kind that a plugin adds."""
    known = frozenset(names)

    def decode_literal(data: object, path: str) -> object:
        if isinstance(data, str | int) and not isinstance(data, bool) and data in known:
            return data
        if kind and plugins.provided(kind, data):
            return data
        known_names = [*map(str, names), *(plugins.names(kind) if kind else ())]
        remedy = one_of(known_names, data) + (plugins.HINT if kind and isinstance(data, str) else "")
        raise SpecError(path, f"unknown value {show(data)}", remedy)

    return decode_literal


def _union_decoder(args: tuple[Any, ...]) -> Decoder:
    """Null, or the first alternative that fits; the error is that of the likeliest alternative."""
    optional = type(None) in args
    members = [a for a in args if a is not type(None)]
    decoders = [decoder_for(a) for a in members]

    def likeliest(data: object) -> int:
        for i, member in enumerate(members):
            structured = dataclasses.is_dataclass(member) or hasattr(member, "__decode__")
            if isinstance(data, dict) == structured and not (isinstance(data, str) and member in (int, float, bool)):
                return i
        return 0

    def decode_union(data: object, path: str) -> object:
        if data is None and optional:
            return None
        errors: list[SpecError] = []
        for decoder in decoders:
            try:
                return decoder(data, path)
            except SpecError as error:
                errors.append(error)
        best = errors[likeliest(data)]
        if len(errors) > 1 and not isinstance(data, dict | list):
            remedy = "; or ".join(dict.fromkeys(e.remedy for e in errors if e.remedy))
            raise SpecError(path, f"{show(data)} does not fit", remedy)
        raise best

    return decode_union


def _tuple_decoder(item: Any) -> Decoder:
    decode_item = decoder_for(item)

    def decode_tuple(data: object, path: str) -> tuple[Any, ...]:
        if not isinstance(data, list | tuple):
            raise SpecError(path, f"expected a list, got {show(data)}", "write it as [a, b]")
        return tuple([decode_item(value, f"{path}.{i}") for i, value in enumerate(data)])

    return decode_tuple


def _mapping_decoder(item: Any) -> Decoder:
    decode_item = decoder_for(item)

    def decode_mapping(data: object, path: str) -> dict[str, Any]:
        return {k: decode_item(v, f"{path}.{k}") for k, v in expect_mapping(data, path).items()}

    return decode_mapping


def _bounded(decoder: Decoder, low: float | None, high: float | None) -> Decoder:
    def decode_bounded(data: object, path: str) -> object:
        value = decoder(data, path)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if low is not None and value < low:
                raise SpecError(path, f"{show(value)} is too small", f"use {low:g} or more")
            if high is not None and value > high:
                raise SpecError(path, f"{show(value)} is too large", f"use {high:g} or less")
        return value

    return decode_bounded


@cache
def dataclass_decoder(cls: type) -> Decoder:
    """The decoder of a dataclass written as a mapping, its own ``__decode__`` left aside."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows: dict[str, tuple[str, Decoder]] = {}
    required: list[str] = []
    for f in dataclasses.fields(cls):
        name = f.metadata.get("key") or f.name
        decoder = f.metadata.get("decoder") or decoder_for(hints[f.name])
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if low is not None or high is not None:
            decoder = _bounded(decoder, low, high)
        rows[name] = (f.name, decoder)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            required.append(name)

    def decode_dataclass(data: object, path: str) -> object:
        mapping = expect_mapping(data, path, f"a mapping with the keys {', '.join(rows)}")
        values: dict[str, object] = {}
        for name, value in mapping.items():
            row = rows.get(name)
            if row is None:
                raise SpecError(join_path(path, name), "unknown key", one_of(rows, name))
            values[row[0]] = row[1](value, f"{path}.{name}" if path else name)
        for name in required:
            if name not in mapping:
                raise SpecError(path, f"the key '{name}' is missing", f"add '{name}: ...'")
        return cls(**values)

    return decode_dataclass


def plain_copy(data: object, path: str = "") -> Any:
    """What a program hands over as a file would hold it: mappings, lists, numbers and text. Raises `SpecError`."""
    if isinstance(data, Mapping):
        copied = {}
        for name, value in data.items():
            if not isinstance(name, str):
                raise SpecError(path, f"has the key {show(name)}", "name keys by text")
            copied[name] = plain_copy(value, join_path(path, name))
        return copied
    if isinstance(data, list | tuple):
        return [plain_copy(value, join_path(path, i)) for i, value in enumerate(data)]
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if data is None or isinstance(data, bool | int | float | str):
        return data
    raise SpecError(path, f"expected plain data, got {type(data).__name__}", "give mappings, lists, numbers and text")


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML: one line for each innermost mapping."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes texts that OmegaConf would read as numbers, though PyYAML would not."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    like_a_number = re.fullmatch(r"[-+.\d][-+.\d_:eExXoO]*", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if like_a_number else None)


_Dumper.add_representer(str, _represent_text)
