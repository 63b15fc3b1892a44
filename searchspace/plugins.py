"""Names that plugins give: those that are loaded, those that installed packages offer, and what was made with which.

An entry point of the group ``spiralformer.plugins`` is called by what it adds (``pool:blend = "blend_plugin"``). It is
read without importing anything; the module is imported when a file names that.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from searchspace.errors import SpecError, one_of, show
from searchspace.plugin_loading import HOME, LOADED, OWNERS, PluginRecord, load_module, load_plugin, name_of
from searchspace.tables import OPEN, kind_of

GROUP, SWITCH = "spiralformer.plugins", "SPIRALFORMER_PLUGINS"
HINT = ", or load the plugin that adds it (--plugin)"
"""Behind the names to choose from."""
_HASH = re.compile(r"[0-9a-f]{64}")


# -- installed ones --------------------------------------------------------------------------------


def is_off() -> bool:
    """Whether installed plugins are left alone; those that a command names are not."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "false", "no")


def installed() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Entry points by what they add, as ``pool:blend``; nothing is imported."""
    return {} if is_off() else _installed()


@cache
def _installed() -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {})[point.value] = point
    return {place: tuple(points.values()) for place, points in found.items()}


def names(kind: str) -> list[str]:
    """What plugins add to a kind of names: those that are loaded, and those that are installed."""
    every = dict.fromkeys((*OWNERS, *installed()))
    return [name for of, _, name in (place.partition(":") for place in every) if of == kind]


def provided(kind: str, name: object) -> bool:
    """Whether a plugin gives this name; one that is installed is loaded now. Raises `SpecError` if that fails."""
    if not isinstance(name, str):
        return False
    place = f"{kind}:{name}"
    if place in OWNERS:
        return True
    if (points := installed().get(place)) is None:
        return False
    if len(points) > 1:
        told = " and ".join(f"{point.value} of {_package(point)}" for point in points)
        raise SpecError("", f"{place} is given by {told}", f"uninstall one of them, or set {SWITCH}=0")
    module = points[0].module
    load_module(module)
    if place not in OWNERS:
        what = f"is said to add {place} ({_package(points[0])}), and does not"
        raise SpecError("", what, "mend its entry points", module)
    return True


def load_named(data: object) -> None:
    """Load the installed plugins that add a name which stands in plain data: a choice not taken yet, too.

    Raises:
        SpecError: if one can't be loaded.
    """
    places: dict[str, list[str]] = {}
    for place in installed():
        kind, _, name = place.partition(":")
        places.setdefault(name, []).append(kind)
    if not places:
        return
    for name in sorted(_texts(data) & places.keys()):
        for kind in places[name]:
            provided(kind, name)


def _texts(data: object) -> set[str]:
    """Every text in plain data, keys too."""
    found, waiting = set[str](), [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, Mapping):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return found


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a package"


def tell() -> list[str]:
    """Lines on the plugins that are loaded and installed."""
    lines = [f"plugin {one.record}: {', '.join(sorted(one.places))}" for one in LOADED.values()]
    if is_off():
        return [*lines, f"installed plugins are off ({SWITCH}={os.environ[SWITCH]})"]
    for place, points in sorted(installed().items()):
        lines += [f"installed plugin {point.value} of {_package(point)}: {place}" for point in points]
    return lines


# -- records ---------------------------------------------------------------------------------------


def records() -> tuple[PluginRecord, ...]:
    """Of every plugin that is loaded."""
    return tuple(one.record for one in LOADED.values())


def named_in(data: object, *places: str) -> tuple[PluginRecord, ...]:
    """Of the plugins that add a name which stands in plain data, or one of ``places``; by name."""
    found = _texts(data)
    used = [one for one in LOADED.values() if any(name_of(p) in found or p in places for p in one.places)]
    return tuple(sorted((one.record for one in used), key=lambda record: record.name))


def used_by(value: object, *places: str) -> tuple[PluginRecord, ...]:
    """Of the plugins that give a name which a spec uses, and of those behind ``places``."""
    wanted = {OWNERS.get(place) for place in (*_places_in(value), *places)}
    return tuple(one.record for name, one in LOADED.items() if name in wanted)


def _places_in(value: object) -> Iterator[str]:
    """``kind:name`` for every name in a spec that a plugin could give."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, kind in _open_fields(type(value)).items():
            given = getattr(value, name)
            if kind is not None and isinstance(given, str):
                yield f"{kind}:{given}"
            else:
                yield from _places_in(given)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _places_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _places_in(item)


@cache
def _open_fields(cls: type) -> dict[str, str | None]:
    """Fields of a dataclass, with the kind of names that each takes."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for each in dataclasses.fields(cls):
        parts = (hints[each.name], *typing.get_args(hints[each.name]))
        found[each.name] = next((kind for part in parts if (kind := kind_of(part))), None)
    return found


def decode_records(data: object, path: str) -> tuple[PluginRecord, ...]:
    """What `PluginRecord.to_plain` wrote. Raises `SpecError`."""
    if not isinstance(data, list | tuple):
        raise SpecError(path, f"expected a list, got {show(data)}", "write [{name: ..., version: ..., sha256: ...}]")
    found = []
    for i, item in enumerate(data):
        at = f"{path}.{i}" if path else str(i)
        if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
            raise SpecError(at, f"{show(item)} is no plugin's record", "write {name: ..., version: ..., sha256: ...}")
        known = [each.name for each in dataclasses.fields(PluginRecord)]
        if wrong := [name for name in item if name not in known]:
            raise SpecError(f"{at}.{wrong[0]}", "unknown key", one_of(known[:4], wrong[0]))
        if lacks := [name for name in known[:3] if name not in item]:
            raise SpecError(at, f"the key '{lacks[0]}' is missing", f"add '{lacks[0]}: ...'")
        if not _HASH.fullmatch(item["sha256"]):
            raise SpecError(f"{at}.sha256", f"{show(item['sha256'])} is no SHA-256", "write 64 hexadecimal digits")
        found.append(PluginRecord(**item))
    return tuple(found)


@contextmanager
def needing(wanted: Iterable[PluginRecord], *, file: str = "", exact: bool = True) -> Iterator[None]:
    """Read what was made with plugins: that one is missing, or is another, is said before anything else that is wrong.

    Args:
        wanted: those it was made with; installed ones are loaded.
        file: that is read, for errors.
        exact: refuse one of another version too, with which results would differ.

    Raises:
        SpecError: naming the plugin.
    """
    every = tuple(wanted)
    known = {point.module for points in installed().values() for point in points} if every else set[str]()
    for record in every:
        if record.name not in LOADED and record.module in known:
            load_module(record.module)
    try:
        yield
    except SpecError as error:
        _check_loaded(every, file, exact=True, cause=error)
        raise
    _check_loaded(every, file, exact=exact)


def _check_loaded(every: Iterable[PluginRecord], file: str, *, exact: bool, cause: SpecError | None = None) -> None:
    for record in every:
        found = LOADED.get(record.name)
        if found is None:
            raise _lacks(record, file) from cause
        if exact and found.record != record:
            what = f"was made with plugin {record}, and {found.record} is loaded from {found.record.where}"
            raise SpecError("plugins", what, "load the one it was made with, or make it anew", file) from cause


def changed(wanted: Iterable[PluginRecord]) -> list[str]:
    """What to say of plugins that are loaded in another version than something was made with."""
    found = ((record, LOADED[record.name].record) for record in wanted if record.name in LOADED)
    return [
        f"note: it was made with plugin {record}; what is shown is computed with {now}"
        for record, now in found
        if now != record
    ]


def _lacks(record: PluginRecord, file: str) -> SpecError:
    remedy = "give it with --plugin FILE_OR_MODULE, or install its package"
    if is_off():
        remedy += f" and unset {SWITCH}"
    return SpecError("plugins", f"needs plugin {record}, which is not loaded", remedy, file)


def load_for(wanted: Iterable[PluginRecord]) -> None:
    """Load what a driver says that it uses, from the same places, perhaps on another machine. Raises `SpecError`."""
    every = tuple(wanted)
    for record in every:
        if record.name not in LOADED:
            try:
                load_module(record.module) if record.module else load_plugin(record.where)
            except SpecError as error:
                what = f"needs plugin {record}, which can't be loaded here: {error}"
                raise SpecError("plugins", what, "put it where every worker finds it") from error
    with needing(every):
        pass


def forget_plugins() -> None:
    """Take every plugin out again."""
    for one in LOADED.values():
        for row in one.plugin.rows:
            OPEN[type(row)].drop(row)
    for name in [name for name in sys.modules if name.startswith(f"{HOME}.")]:
        del sys.modules[name]
    LOADED.clear()
    OWNERS.clear()
    _installed.cache_clear()
