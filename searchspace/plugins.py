"""Plugins: rows that somebody else's module adds to our tables.

A plugin is a file, a folder or an installed module that defines ``PLUGIN``. Loading it runs its code, so it is named by
whoever runs a command, or by an installed package's entry point, and never by a YAML file: that names what a plugin
adds, and says which plugins it needs.

An entry point of the group ``spiralformer.plugins`` is called by what it adds (``pool:blend = "blend_plugin"``). It is
read without importing anything; the module is imported when a file names that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.machinery import FileFinder, SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from searchspace.errors import SpecError, one_of, show
from searchspace.tables import OPEN, Row, TableError, kind_of

API = 1
"""Raised when a plugin that was written for an older one would be misread."""
GROUP, SWITCH = "spiralformer.plugins", "SPIRALFORMER_PLUGINS"
HINT = ", or load the plugin that adds it (--plugin)"
"""Behind the names to choose from."""
_HOME = "spiralformer_plugins"
"""Package of the modules of files, which have none of their own: pickles name it."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_ROW_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a plugin's module defines as ``PLUGIN``."""

    name: str
    version: str
    api: int
    """`API` of the version that it was written for."""
    rows: tuple[Row, ...] = field(repr=False)
    """Of the tables, as ``builder.pool`` and the like make them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginRecord:
    """Which plugin something was made with."""

    name: str
    version: str
    sha256: str
    """Of its file, or of the Python files of its package."""
    module: str = field(default="", compare=False)
    """That it was imported as; empty for a file. One that is installed is found by it."""
    where: str = field(default="", compare=False)
    """What to load it from again; told to workers, and not kept."""

    def __str__(self) -> str:
        return f"{self.name} {self.version} (SHA-256 {self.sha256[:12]})"

    def to_plain(self) -> dict[str, str]:
        """As it is kept."""
        facts = {"name": self.name, "version": self.version, "sha256": self.sha256}
        return {**facts, "module": self.module} if self.module else facts


@dataclass(frozen=True, slots=True)
class _Loaded:
    plugin: Plugin
    record: PluginRecord
    module: ModuleType
    places: frozenset[str]


_LOADED: dict[str, _Loaded] = {}
_OWNERS: dict[str, str] = {}
"""Name of the plugin behind each ``kind:name``."""


# -- loading ---------------------------------------------------------------------------------------


def load_plugin(source: str | os.PathLike[str]) -> Plugin:
    """Run a plugin's code and take its rows into the tables; once, however often it is asked for.

    Args:
        source: a Python file, a folder with an ``__init__.py``, or the name of a module.

    Raises:
        SpecError: if it can't be loaded, or adds what is there already; nothing of it is kept then.
    """
    text = os.fspath(source)
    is_path = text.endswith(".py") or os.sep in text or os.path.exists(text)
    return _load_path(Path(os.path.realpath(os.path.expanduser(text)))) if is_path else _load_module(text)


def _load_path(path: Path) -> Plugin:
    """Of a file or a folder."""
    code = path / "__init__.py" if path.is_dir() else path
    if not code.is_file():
        what = "is a folder without __init__.py" if path.is_dir() else "no such file"
        raise SpecError("--plugin", what, "give a Python file, a folder with __init__.py, or a module", str(path))
    if not path.stem.isidentifier():
        raise SpecError("--plugin", f"{show(path.stem)} is no name of a module", "rename it, as my_pool.py", str(path))
    name = f"{_HOME}.{path.stem}"
    if (there := sys.modules.get(name)) is not None:
        if there.__file__ != str(code):
            what = f"has the name of {there.__file__}, which is loaded already"
            raise SpecError("--plugin", what, "rename one of them", str(path))
        return next(one.plugin for one in _LOADED.values() if one.module is there)
    spec = importlib.util.spec_from_file_location(
        name, code, submodule_search_locations=[str(path)] if path.is_dir() else None
    )
    if spec is None:
        raise SpecError("--plugin", "is no Python file", "give one that ends in .py, a folder, or a module", str(path))
    sys.modules.setdefault(_HOME, ModuleType(_HOME, "Plugins that were loaded from files."))
    for folder in (path, *path.rglob("*/")) if path.is_dir() else ():
        sys.path_importer_cache[str(folder)] = FileFinder(str(folder), (_FromSource, [".py"]))
    digest = _digest(path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _told(str(code)):
            exec(compile(code.read_bytes(), str(code), "exec"), module.__dict__)
        return _take(module, PluginRecord(name="", version="", sha256=digest, where=str(path)))
    except BaseException:
        for own in [other for other in sys.modules if _is_within(other, name)]:
            del sys.modules[own]
        raise


class _FromSource(SourceFileLoader):
    """Modules of a plugin's folder: never from a compiled file, which may be older than what the digest is of."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = compile(self.get_data(path), path, "exec", dont_inherit=True)
        return code


def _load_module(name: str) -> Plugin:
    """Of an installed module, or one on Python's path."""
    with _told(name):
        try:
            found = importlib.util.find_spec(name)
        except (ModuleNotFoundError, ValueError):
            found = None
    if found is None or found.origin is None:
        raise SpecError("--plugin", f"there is no module {show(name)}", "give a Python file, or install it")
    root = importlib.util.find_spec(name.partition(".")[0])
    packages = list(root.submodule_search_locations or ()) if root is not None else []
    digest = _digest(Path(packages[0]) if packages else Path(found.origin))
    with _told(name):
        module = importlib.import_module(name)
    return _take(module, PluginRecord(name="", version="", sha256=digest, module=name, where=name))


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say what a plugin's own code raised, and in which line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == where]
        what = f"can't be loaded: {type(error).__name__}: {error}"
        at = line or (frames[-1].lineno if frames else None)
        raise SpecError("--plugin", what, "mend it, or leave it out", where, at) from error


def _digest(path: Path) -> str:
    """Of a file; of a folder, of the names and texts of its Python files."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    if len(files) == 1:  # a file that became a package is what it was
        return hashlib.sha256(files[0].read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        total.update(f"{file.relative_to(path).as_posix()} {len(data)}\n".encode() + data)
    return total.hexdigest()


def check_unchanged(record: PluginRecord) -> None:
    """Raise `SpecError` if a plugin's files are no more those that were loaded."""
    one = _LOADED[record.name]
    file = Path(str(one.module.__file__))
    if record.module:
        root = sys.modules[record.module.partition(".")[0]]
        file = Path(next(iter(root.__path__))) if hasattr(root, "__path__") else file
    elif hasattr(one.module, "__path__"):
        file = file.parent
    if not file.exists() or _digest(file) != record.sha256:
        raise SpecError("plugins", f"{record} has changed since it was loaded", "run the command again", str(file))


def _take(module: ModuleType, record: PluginRecord) -> Plugin:
    """Check ``PLUGIN``, and add its rows. Raises `SpecError`."""

    def wrong(what: str, remedy: str) -> SpecError:
        return SpecError("--plugin", what, remedy, record.where)

    plugin = getattr(module, "PLUGIN", None)
    if not isinstance(plugin, Plugin):
        what = "defines no PLUGIN" if plugin is None else f"its PLUGIN is {type(plugin).__name__}"
        raise wrong(what, "give PLUGIN = searchspace.Plugin(name=..., version=..., api=1, rows=(...))")
    if not isinstance(plugin.name, str) or not _NAME.fullmatch(plugin.name):
        raise wrong(f"{show(plugin.name)} can't be a plugin's name", "use letters, digits, '_', '-' and '.'")
    if not isinstance(plugin.version, str) or not plugin.version.strip():
        raise wrong(f"its version is {show(plugin.version)}", "give a text, as '1.0'")
    if plugin.api != API:
        raise wrong(f"was written for version {plugin.api} of the interface", f"this is version {API}: update it")
    if (there := _LOADED.get(plugin.name)) is not None:
        if there.module is module:
            return plugin
        raise wrong(f"is called {plugin.name}, as another one from {there.record.where}", "load one of them")
    if type(plugin.rows) in OPEN:
        raise wrong("its rows are one row, no tuple", "write rows=(row,), with a comma")
    if not isinstance(plugin.rows, tuple | list) or not plugin.rows:
        raise wrong("its rows are none", "give a tuple of what builder.pool and the like make")
    places: list[str] = []
    added: list[Row] = []
    try:
        for row in plugin.rows:
            for place in _places_of_new(row):
                if place in places:
                    raise TableError(f"adds {place} twice")
                if place in _OWNERS:
                    raise TableError(f"adds {place}, which plugin {_OWNERS[place]} adds too")
                places.append(place)
            home = OPEN[type(row)]
            if row.name in home or (taken := home.refuses(row)):
                what = f"{home.what} '{row.name}' is built in" if row.name in home else taken
                raise TableError(f"{what}: give it another name")
            OPEN[type(row)].add(row)
            added.append(row)
    except Exception as error:  # a row's own functions are asked what it costs, say
        for row in reversed(added):
            OPEN[type(row)].drop(row)
        told = str(error) if isinstance(error, TableError) else f"has a row that fails: {type(error).__name__}: {error}"
        raise wrong(told, "mend it") from error
    record = replace(record, name=plugin.name, version=plugin.version)
    _LOADED[plugin.name] = _Loaded(plugin, record, module, frozenset(places))
    _OWNERS.update(dict.fromkeys(places, plugin.name))
    return plugin


def _places_of_new(row: Any) -> list[str]:
    """Where a file is to name a row. Raises `TableError` if none can."""
    home = OPEN.get(type(row))
    if home is None or home.places is None:
        what = f"has a row of {type(row).__name__}, which belongs to no table that plugins may add to"
        raise TableError(f"{what}: {', '.join(sorted(kind.__name__ for kind in OPEN))}")
    places = list(home.places(row))
    if odd := [place for place in places if not _ROW_NAME.fullmatch(_name_of(place))]:
        raise TableError(f"{show(odd[0])} can't be written in a file: use letters, digits and '_'")
    return places


def loaded_plugins() -> list[Plugin]:
    """Those whose rows are in the tables, in the order in which they came."""
    return [one.plugin for one in _LOADED.values()]


def record_of(plugin: str) -> PluginRecord:
    """Of a plugin that is loaded."""
    return _LOADED[plugin].record


def plugin_of(module: str) -> PluginRecord | str:
    """Of the plugin that a module belongs to; the module's own name if it is imported otherwise."""
    for one in _LOADED.values():
        own = one.module.__name__ if not one.record.module else one.record.module.partition(".")[0]
        if _is_within(module, own):
            return one.record
    return module


def places_of(row: Row) -> tuple[str, ...]:
    """Where a file names a plugin's row, as ``pool:blend``."""
    home = OPEN[type(row)]
    assert home.places is not None
    return tuple(home.places(row))


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
    every = dict.fromkeys((*_OWNERS, *installed()))
    return [name for of, _, name in (place.partition(":") for place in every) if of == kind]


def loaded_names(kind: str) -> list[str]:
    """What loaded plugins add to a kind of names."""
    return [name for of, _, name in (place.partition(":") for place in _OWNERS) if of == kind]


def provided(kind: str, name: object) -> bool:
    """Whether a plugin gives this name; one that is installed is loaded now. Raises `SpecError` if that fails."""
    if not isinstance(name, str):
        return False
    place = f"{kind}:{name}"
    if place in _OWNERS:
        return True
    if (points := installed().get(place)) is None:
        return False
    if len(points) > 1:
        told = " and ".join(f"{point.value} of {_package(point)}" for point in points)
        raise SpecError("", f"{place} is given by {told}", f"uninstall one of them, or set {SWITCH}=0")
    module = points[0].module
    _load_module(module)
    if place not in _OWNERS:
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
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            for kind in places.get(item, ()):
                provided(kind, item)
        elif isinstance(item, Mapping):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a package"


def owner(kind: str, name: str) -> str:
    """The plugin behind a name; empty if it is ours."""
    return _OWNERS.get(f"{kind}:{name}", "")


def tell() -> list[str]:
    """Lines on the plugins that are loaded and installed."""
    lines = [f"plugin {one.record}: {', '.join(sorted(one.places))}" for one in _LOADED.values()]
    if is_off():
        return [*lines, f"installed plugins are off ({SWITCH}={os.environ[SWITCH]})"]
    for place, points in sorted(installed().items()):
        lines += [f"installed plugin {point.value} of {_package(point)}: {place}" for point in points]
    return lines


# -- records ---------------------------------------------------------------------------------------


def records() -> tuple[PluginRecord, ...]:
    """Of every plugin that is loaded."""
    return tuple(one.record for one in _LOADED.values())


def named_in(data: object, *places: str) -> tuple[PluginRecord, ...]:
    """Of the plugins that add a name which stands in plain data, or one of ``places``; by name."""
    found, waiting = set[str](), [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, Mapping):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    used = [one for one in _LOADED.values() if any(_name_of(p) in found or p in places for p in one.places)]
    return tuple(sorted((one.record for one in used), key=lambda record: record.name))


def _name_of(place: str) -> str:
    return place.partition(":")[2]


def used_by(value: object, *places: str) -> tuple[PluginRecord, ...]:
    """Of the plugins that give a name which a spec uses, and of those behind ``places``."""
    wanted = {_OWNERS.get(place) for place in (*_places_in(value), *places)}
    return tuple(one.record for name, one in _LOADED.items() if name in wanted)


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
        if record.name not in _LOADED and record.module in known:
            _load_module(record.module)
    try:
        yield
    except SpecError as error:
        _check_loaded(every, file, exact=True, cause=error)
        raise
    _check_loaded(every, file, exact=exact)


def _check_loaded(every: Iterable[PluginRecord], file: str, *, exact: bool, cause: SpecError | None = None) -> None:
    for record in every:
        found = _LOADED.get(record.name)
        if found is None:
            raise _lacks(record, file) from cause
        if exact and found.record != record:
            what = f"was made with plugin {record}, and {found.record} is loaded from {found.record.where}"
            raise SpecError("plugins", what, "load the one it was made with, or make it anew", file) from cause


def changed(wanted: Iterable[PluginRecord]) -> list[str]:
    """What to say of plugins that are loaded in another version than something was made with."""
    found = ((record, _LOADED[record.name].record) for record in wanted if record.name in _LOADED)
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
        if record.name not in _LOADED:
            try:
                _load_module(record.module) if record.module else load_plugin(record.where)
            except SpecError as error:
                what = f"needs plugin {record}, which can't be loaded here: {error}"
                raise SpecError("plugins", what, "put it where every worker finds it") from error
    with needing(every):
        pass


def forget_plugins() -> None:
    """Take every plugin out again."""
    for one in _LOADED.values():
        for row in one.plugin.rows:
            OPEN[type(row)].drop(row)
    for name in [name for name in sys.modules if name.startswith(f"{_HOME}.")]:
        del sys.modules[name]
    _LOADED.clear()
    _OWNERS.clear()
    _installed.cache_clear()
