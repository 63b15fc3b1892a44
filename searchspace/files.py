"""YAML files in, specs out; the only place that knows OmegaConf.

OmegaConf reads (duplicate keys, alias bombs and Python tags are refused there); references stay text
and are resolved by `searchspace.template`, so no resolver (`oc.env`, ...) ever runs.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from searchspace.arch import ArchSpec
from searchspace.choices import MissingChooser
from searchspace.disk import read_bytes
from searchspace.errors import SpecError, show
from searchspace.nodes import NODE_TYPES
from searchspace.open_values import CHOICE_KEYS
from searchspace.plain import decode, plain_copy
from searchspace.space import SpaceSpec
from searchspace.template import Template

PACKAGE = Path(__file__).parent
_MAX_BYTES = 256 * 1024  # hand-written YAML takes kilobytes; parsing takes a second for this much
_MAX_VALUES = 5_000  # aliases can make a small file huge
_MAX_DEPTH = 64  # OmegaConf and the decoders recurse
_MAX_EXTENDS = 16  # a longer chain is a circle or a mistake
_COMMAND_LINE = "command line"
_INT = "tag:yaml.org,2002:int"
_Events = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_arch(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> ArchSpec:
    """Read one concrete architecture.

    Args:
        path: a file, the name of a shipped one (``architectures/plain_4.yaml``, ``plain_4``), or what such a file
            would hold.
        overrides: ``dotted.path=value`` texts laid over it.

    Raises:
        SpecError: with file, line, path, and what would be right.
    """
    if isinstance(path, Mapping):
        return arch_from_data(_given(path, overrides))
    file = find_file(path, folder="architectures")
    with located(file, overrides):
        data = read_data(file, overrides)
        _expect_architecture(data)
        return arch_from_data(data)


def arch_from_data(data: Mapping[str, Any]) -> ArchSpec:
    """An architecture from plain data without open choices. Raises `SpecError`."""
    return decode(ArchSpec, Template(data).decide(MissingChooser()).tree)


def load_space(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> SpaceSpec:
    """Read an architecture file with open choices, or what such a file would hold. Raises `SpecError`."""
    if isinstance(path, Mapping):
        return SpaceSpec(_given(path, overrides))
    file = find_file(path, folder="spaces")
    with located(file, overrides):
        data = read_data(file, overrides)
        _expect_architecture(data)
        return SpaceSpec(data, file=str(file))


def _given(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What a file would hold, the file that it extends read, and overrides laid over it."""
    whole: dict[str, Any] = merge(extend(plain_copy(data), Path.cwd()), parse_overrides(overrides))
    _expect_architecture(whole)
    return whole


def read_data(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file as plain data, its ``extends`` chain merged and overrides laid over it."""
    data = _read_chain(file, [])
    return merge(data, parse_overrides(overrides)) if overrides else data


def is_of_study(data: Mapping[str, Any]) -> bool:
    """Whether plain data are a study's, not an architecture's or a space's."""
    return "space" in data or ("graph" not in data and ("training" in data or "scale" in data))


def _expect_architecture(data: Mapping[str, Any]) -> None:
    if "graph" not in data and is_of_study(data):
        raise SpecError("", "is a study, not an architecture or a space", "give search or check the study")


def find_file(path: str | Path, *, folder: str = "", base: Path | None = None) -> Path:
    """Find a file: as given, beside ``base``, or among those that the package ships."""
    given = Path(path)
    if not given.name or len(given.name) > 255:
        raise SpecError("", f"{show(str(path))} is not a file name", "name a YAML file")
    places = [given] if base is None else [base / given, given]
    names = [given] if given.suffix else [given, given.with_suffix(".yaml")]
    for place in [*places, PACKAGE / given, PACKAGE / folder / given]:
        for candidate in (place, place.with_name(place.name + ".yaml")) if not given.suffix else (place,):
            if _is_file(candidate):
                return candidate
    if any(os.path.isdir(place) for place in places):
        raise SpecError("", "is a folder", "name a YAML file", file=str(names[0]))
    shipped = sorted(p.stem for p in (PACKAGE / folder).glob("*.yaml")) if folder else []
    raise not_found(names[0], shipped, folder)


def not_found(path: Path, shipped: Sequence[str], what: str) -> SpecError:
    """What to say of a file that does not exist, where some are shipped by name or lie beside it."""
    around = sorted(file.name for file in path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, around, n=1) or difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    more = f"; `spiralformer list` names the shipped {what}" if shipped else ""
    for other in PACKAGE.glob(f"*/{path.stem}.yaml") if shipped and re.fullmatch(r"\w{1,99}", str(path)) else ():
        remedy = f"name one of the shipped {what}, or a file{more}"
        return SpecError("", f"'{path.stem}' is shipped among the {other.parent.name}, not the {what}", remedy)
    return SpecError("", "no such file", f"{hint}check the path{more}", file=str(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


_DOLLAR, _BRACE = (
    rf"(?:{re.escape(sign)}|\\(?:x|u00|U000000){code})" for sign, code in (("$", "24"), ("{", "7[bB]"))
)  # double-quoted YAML may write them as escapes
_UNCLOSED = re.compile(rf"({_DOLLAR}{_BRACE}[^}}\n]*){{4}}")
_LONG = re.compile(rf"{_DOLLAR}{_BRACE}[^}}]{{500}}")
_NESTING = re.compile(r"[\[{]|[-?][ \t]")
_ODD_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:0[0-9_]+(?![\w.])|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?(?!\w))")


def read_file(file: Path) -> dict[str, Any]:
    """One YAML file as plain data: a mapping with text keys, of bounded size and depth."""
    raw = read_bytes(file, _MAX_BYTES)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError("", f"is not UTF-8 text (byte {error.start})", "save it as UTF-8", file=str(file)) from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, file: str = "") -> dict[str, Any]:
    """YAML text as plain data."""
    return deepcopy(_parse_yaml(text, file))


@lru_cache(maxsize=64)  # a command meets the same files several times; OmegaConf takes 10 ms for each
def _parse_yaml(text: str, file: str) -> dict[str, Any]:
    too_deep = SpecError("", f"is nested deeper than {_MAX_DEPTH} levels", "flatten it", file=file)
    if (values := text.count("\n") + text.count(",")) > _MAX_VALUES:  # more than a second for OmegaConf
        raise SpecError("", f"has {values:,} lines and commas", f"keep it under {_MAX_VALUES:,}", file)
    if _UNCLOSED.search(text):  # OmegaConf takes a time that grows with their square
        raise SpecError("", "holds references within references", "references are written ${path.to.value}", file)
    if _LONG.search(text):  # the same
        raise SpecError("", "holds a reference of over 500 characters", "references are written ${path.to.value}", file)
    _check_events(text, file, too_deep)
    try:
        loaded = OmegaConf.load(io.StringIO(text))
        data = OmegaConf.to_container(loaded, resolve=False)
    except RecursionError as error:
        raise too_deep from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark else None
        raise SpecError(
            "", f"is not valid YAML: {problem}", "check indentation and brackets there", file, line
        ) from error
    except OmegaConfBaseException as error:
        path = str(getattr(error, "full_key", "") or "")
        reason = str(error).splitlines()[0]
        raise SpecError(path, f"can't be read: {reason}", "references are written ${path.to.value}", file) from error
    # PyYAML's constructors raise whatever Python does: `!!int ''`, `!!bool x`, `!!timestamp x`
    except (AssertionError, ValueError, TypeError, OSError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else "its root is not a mapping"
        raise SpecError(
            "", f"is not an architecture, space or study: {reason}", "start with 'key: value' lines", file
        ) from error
    if isinstance(data, dict) and list(data.values()) == [None] and ":" not in text:  # how OmegaConf reads a scalar
        data = text
    if not isinstance(data, dict):
        raise SpecError("", f"its root is a {type(data).__name__}", "start with 'key: value' lines", file)
    _check_plain(data, "", 0, too_deep)
    return {str(k): v for k, v in data.items()}


def _check_events(text: str, file: str, too_deep: SpecError) -> None:
    """Raise `SpecError` for nesting that would overflow libyaml's stack, and for numbers that YAML 1.1 reads otherwise.

    The parser itself does not recurse; it is asked only where the text looks as if it mattered.
    """
    numbers = _ODD_NUMBER.search(text) is not None
    if not numbers and sum(1 for _ in _NESTING.finditer(text)) <= _MAX_DEPTH:
        return
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Events):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif numbers and isinstance(event, yaml.ScalarEvent) and (event.implicit[0] or event.tag == _INT):
                _check_number(event, file)
            if depth > 2 * _MAX_DEPTH:
                raise too_deep
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        return  # OmegaConf says what is wrong


def _check_number(event: yaml.ScalarEvent, file: str) -> None:
    if not _ODD_NUMBER.fullmatch(event.value):
        return
    line = event.start_mark.line + 1 if event.start_mark else None
    if ":" in event.value:
        what, remedy = "is read as a number in base 60", "write it as one number, or put it in quotes"
    else:
        what, remedy = "begins with a zero, which YAML reads in base 8", "leave the zero out, or put it in quotes"
    raise SpecError("", f"{show(event.value)} {what}", remedy, file, None if file == _COMMAND_LINE else line)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``a.b=value`` texts as plain data, values read as YAML."""
    tree: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise SpecError(path, f"can't read the override {show(text)}", "write dotted.path=value")
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise SpecError(path, "is overridden twice, as a value and as a mapping", "keep one")
        node[last] = parse_yaml(f"value: {value}", _COMMAND_LINE)["value"]
    return tree


def merge(base: Any, over: Any, path: tuple[str, ...] = ()) -> Any:
    """Lay ``over`` on ``base``: mappings merge key by key, everything else is replaced.

    A mapping that names an operation, a kind (as `topology` and `stopper` do) or a choice is replaced whole; null
    removes a named level, block or node.
    """
    if not isinstance(base, dict) or not isinstance(over, dict) or _is_whole(base, over, path):
        return over
    merged = dict(base)
    for name, value in over.items():
        if value is None and len(path) == 1 and path[0] in ("levels", "blocks", "graph", "vars"):
            merged.pop(name, None)
        else:
            merged[name] = merge(base[name], value, (*path, name)) if name in base else value
    return merged


class located:
    """Context manager that adds file and line to a `SpecError` raised inside, or says that an override is to blame."""

    def __init__(self, file: Path, overrides: Sequence[str] = ()) -> None:
        self._file = file
        self._given = tuple(text.partition("=")[0] for text in overrides)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SpecError) and error.file in ("", str(self._file)):
            if any(f"{error.path}.".startswith(f"{given}.") for given in self._given):
                error.file, error.line = _COMMAND_LINE, None
                return
            error.file = str(self._file)
            add_line(error)


def purpose_of(file: Path) -> str:
    """What a shipped file says it is: the first sentence of the comment that it begins with; empty if it has none."""
    lines = takewhile(lambda line: line.startswith("#"), read_bytes(file, _MAX_BYTES).decode().splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0]


def add_line(error: SpecError) -> None:
    """Find the line of an error that knows its file."""
    if error.file and error.path and error.line is None and Path(error.file).is_file():
        error.line = _line_of(Path(error.file), error.path)


def _is_whole(base: dict[str, Any], over: dict[str, Any], path: tuple[str, ...]) -> bool:
    if path and ("kind" in over or any(name in base or name in over for name in CHOICE_KEYS)):
        return True
    if path[-1:] in (("topology",), ("stopper",)):  # named by their only key
        return base.keys() != over.keys()
    if len(path) != 2 or path[0] != "graph":
        return False
    inner = ("norm", "recall", "step") if "loop" in base or "head" in base else ()
    return any(op in over for op in NODE_TYPES if op not in inner)


def _read_chain(file: Path, seen: list[Path]) -> dict[str, Any]:
    if file.resolve() in seen or len(seen) >= _MAX_EXTENDS:
        chain = " -> ".join(p.name for p in [*seen, file])
        raise SpecError("extends", f"files extend each other in a circle: {chain}", "break the circle", str(file))
    try:
        return extend(read_file(file), file.parent, [*seen, file.resolve()])
    except SpecError as error:
        error.file = error.file or str(file)
        raise


def extend(data: dict[str, Any], base: Path, seen: list[Path] | None = None) -> dict[str, Any]:
    """Lay a mapping over the file its ``extends`` names, looked for beside ``base`` and among those shipped."""
    if "extends" not in data:
        return data
    data = dict(data)
    parent = data.pop("extends")
    if not isinstance(parent, str):
        raise SpecError("extends", f"expected a file name, got {show(parent)}", "write extends: other.yaml")
    try:
        found = find_file(parent, folder="architectures", base=base)
    except SpecError as error:
        raise SpecError("extends", f"no such file: {show(parent)}", error.remedy) from error
    _check_within(found, base, parent)
    merged: dict[str, Any] = merge(_read_chain(found, seen or []), data)
    return merged


def _check_within(found: Path, base: Path, name: str) -> None:
    """What a received file extends is no other file of the reader's: it lies below it, below here, or is shipped."""
    place = found.resolve()
    if found.suffix not in (".yaml", ".yml"):
        raise SpecError("extends", f"{show(name)} is not named as YAML", "name a .yaml file")
    if not any(place.is_relative_to(root.resolve()) for root in (base, Path(), PACKAGE)):
        what = f"{show(name)} lies outside the file's folder and the working folder"
        raise SpecError("extends", what, "copy it there, or run the command in a folder above both")


def _check_plain(data: Any, path: str, depth: int, too_deep: SpecError) -> None:
    if depth > _MAX_DEPTH:
        raise too_deep
    if isinstance(data, dict):
        for name, value in data.items():
            if not isinstance(name, str):
                raise SpecError(
                    path, f"the key {show(name)} is not text", "put it in quotes, or rename it", too_deep.file
                )
            if value == "???":
                raise SpecError(f"{path}.{name}".lstrip("."), "has no value yet (???)", "give it one", too_deep.file)
            _check_plain(value, f"{path}.{name}" if path else name, depth + 1, too_deep)
    elif isinstance(data, list):
        for i, value in enumerate(data):
            _check_plain(value, f"{path}.{i}", depth + 1, too_deep)
    elif not isinstance(data, str | int | float | bool | None):
        raise SpecError(
            path, f"a {type(data).__name__} has no meaning here", "write text, a number or true/false", too_deep.file
        )


def _line_of(file: Path, path: str) -> int | None:
    """Line of the deepest part of ``path`` that stands in the file itself."""
    try:
        text = read_bytes(file, _MAX_BYTES).decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None
    line: int | None = None
    for part in path.split(".") if path else ():
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line
