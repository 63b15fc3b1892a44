"""Loading plugins: rows that somebody else's module adds to our tables.

A plugin is a file, a folder or an installed module that defines ``PLUGIN``. Loading it runs its code, so it is named by
whoever runs a command, or by an installed package's entry point, and never by a YAML file: that names what a plugin
adds, and says which plugins it needs (`searchspace.plugins`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from searchspace.errors import SpecError, show
from searchspace.tables import OPEN, Row, TableError

API = 1
"""Raised when a plugin that was written for an older one would be misread."""
HOME = "spiralformer_plugins"
"""Package of the modules of files, which have none of their own: pickles name it."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_ROW_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


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
class Loaded:
    """A plugin whose rows are in the tables."""

    plugin: Plugin
    record: PluginRecord
    module: ModuleType
    places: frozenset[str]


LOADED: dict[str, Loaded] = {}
OWNERS: dict[str, str] = {}
"""Name of the plugin behind each ``kind:name``."""


def load_plugin(source: str | os.PathLike[str]) -> Plugin:
    """Run a plugin's code and take its rows into the tables; once, however often it is asked for.

    Args:
        source: a Python file, a folder with an ``__init__.py``, or the name of a module.

    Raises:
        SpecError: if it can't be loaded, or adds what is there already; nothing of it is kept then.
    """
    text = os.fspath(source)
    is_path = text.endswith(".py") or os.sep in text or os.path.exists(text)
    return _load_path(Path(os.path.realpath(os.path.expanduser(text)))) if is_path else load_module(text)


def _load_path(path: Path) -> Plugin:
    """Of a file or a folder."""
    code = path / "__init__.py" if path.is_dir() else path
    if not code.is_file():
        what = "is a folder without __init__.py" if path.is_dir() else "no such file"
        raise SpecError("--plugin", what, "give a Python file, a folder with __init__.py, or a module", str(path))
    if not path.stem.isidentifier():
        raise SpecError("--plugin", f"{show(path.stem)} is no name of a module", "rename it, as my_pool.py", str(path))
    name = f"{HOME}.{path.stem}"
    if (there := sys.modules.get(name)) is not None:
        if there.__file__ != str(code):
            what = f"has the name of {there.__file__}, which is loaded already"
            raise SpecError("--plugin", what, "rename one of them", str(path))
        return next(one.plugin for one in LOADED.values() if one.module is there)
    spec = importlib.util.spec_from_file_location(
        name, code, submodule_search_locations=[str(path)] if path.is_dir() else None
    )
    if spec is None:
        raise SpecError("--plugin", "is no Python file", "give one that ends in .py, a folder, or a module", str(path))
    sys.modules.setdefault(HOME, ModuleType(HOME, "Plugins that were loaded from files."))
    for folder in (path, *path.rglob("*/")) if path.is_dir() else ():
        sys.path_importer_cache[str(folder)] = FileFinder(str(folder), (_FromSource, [".py"]))
    digest = _digest(path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _told(str(code)):
            exec(compile(code.read_bytes(), str(code), "exec"), module.__dict__)
        return _take(module, PluginRecord(name="", version="", sha256=digest, where=str(path)))
    except BaseException:
        for own in [other for other in sys.modules if is_within(other, name)]:
            del sys.modules[own]
        raise


class _FromSource(SourceFileLoader):
    """Modules of a plugin's folder: never from a compiled file, which may be older than what the digest is of."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = compile(self.get_data(path), path, "exec", dont_inherit=True)
        return code


def load_module(name: str) -> Plugin:
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


def is_within(module: str, package: str) -> bool:
    """Whether a module is a package's, or it."""
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
    one = LOADED[record.name]
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
    if (there := LOADED.get(plugin.name)) is not None:
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
                if place in OWNERS:
                    raise TableError(f"adds {place}, which plugin {OWNERS[place]} adds too")
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
    LOADED[plugin.name] = Loaded(plugin, record, module, frozenset(places))
    OWNERS.update(dict.fromkeys(places, plugin.name))
    return plugin


def _places_of_new(row: Any) -> list[str]:
    """Where a file is to name a row. Raises `TableError` if none can."""
    home = OPEN.get(type(row))
    if home is None or home.places is None:
        what = f"has a row of {type(row).__name__}, which belongs to no table that plugins may add to"
        raise TableError(f"{what}: {', '.join(sorted(kind.__name__ for kind in OPEN))}")
    places = list(home.places(row))
    if odd := [place for place in places if not _ROW_NAME.fullmatch(name_of(place))]:
        raise TableError(f"{show(odd[0])} can't be written in a file: use letters, digits and '_'")
    return places


def loaded_plugins() -> list[Plugin]:
    """Those whose rows are in the tables, in the order in which they came."""
    return [one.plugin for one in LOADED.values()]


def record_of(plugin: str) -> PluginRecord:
    """Of a plugin that is loaded."""
    return LOADED[plugin].record


def plugin_of(module: str) -> PluginRecord | str:
    """Of the plugin that a module belongs to; the module's own name if it is imported otherwise."""
    for one in LOADED.values():
        own = one.module.__name__ if not one.record.module else one.record.module.partition(".")[0]
        if is_within(module, own):
            return one.record
    return module


def places_of(row: Row) -> tuple[str, ...]:
    """Where a file names a plugin's row, as ``pool:blend``."""
    home = OPEN[type(row)]
    assert home.places is not None
    return tuple(home.places(row))


def owner(kind: str, name: str) -> str:
    """The plugin behind a name; empty if it is ours."""
    return OWNERS.get(f"{kind}:{name}", "")


def loaded_names(kind: str) -> list[str]:
    """What loaded plugins add to a kind of names."""
    return [name for of, _, name in (place.partition(":") for place in OWNERS) if of == kind]


def name_of(place: str) -> str:
    """What stands in a file of ``kind:name``."""
    return place.partition(":")[2]
