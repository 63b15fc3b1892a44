"""The source of the model parts, definition by definition, for code that must stand alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from graphlib import TopologicalSorter
from types import ModuleType
from typing import TypeAlias

import spiralformer
from searchspace.errors import SpecError

_NOT_SHIPPED = ("checkpointing", "generate", "init", "model", "starts")
_STARTS = "starts"  # a method that an export has no use for: it holds the values themselves
_OURS = ("spiralformer", "builder", "searchspace", "studies")


Name: TypeAlias = tuple[str, str]
"""A module of a plugin, or nothing for ours, and a name in it."""


@dataclass(frozen=True, slots=True)
class _Definition:
    """A class, function or constant at the top of a module of parts."""

    place: tuple[int, int]
    source: str
    uses: frozenset[str]


@dataclass(frozen=True, slots=True)
class Library:
    """What the modules of parts define, and what they import from elsewhere."""

    definitions: dict[Name, _Definition] = field(default_factory=dict)
    links: dict[Name, Name] = field(default_factory=dict)
    """What a plugin's module imports of our parts, or of another module of the plugin."""
    foreign: dict[Name, str] = field(default_factory=dict)
    """What a plugin's module imports that can't travel, as from `builder`."""
    imports: dict[str, str] = field(default_factory=dict)
    """From elsewhere, by the name that is bound."""

    def sources_of(self, roots: Iterable[Name]) -> str:
        """The source of these definitions and of all they use, in the library's order.

        Raises:
            SpecError: for a plugin's that uses what can't travel, or has the name of another one.
        """
        known = self.definitions
        wanted, waiting = set[Name](), [name for name in roots if name in known]
        while waiting:
            name = waiting.pop()
            if name in wanted:
                continue
            wanted.add(name)
            home = name[0]
            for used in known[name].uses:
                if (line := self.foreign.get((home, used))) is not None:
                    what = f"{name[1]} uses {used}, which '{line}' gives: an export must stand alone"
                    raise SpecError("", what, f"write what it needs into {home}", home)
                other = self.links.get((home, used), (home, used))
                if other in known:
                    waiting.append(other)
        by_name: dict[str, str] = {}
        for home, bare in sorted(wanted):
            if by_name.setdefault(bare, home) != home:
                other_home = by_name[bare] or "spiralformer"
                raise SpecError("", f"defines {bare}, which {other_home} defines too", "give it another name", home)
        kept = sorted({known[name] for name in wanted}, key=lambda definition: definition.place)
        return "\n\n\n".join(definition.source for definition in kept)


@lru_cache(maxsize=8)
def library(*, decodes: bool, plugins: tuple[ModuleType, ...] = ()) -> Library:
    """The parts of `spiralformer`, and of modules of plugins.

    Args:
        decodes: whether parts are to open memories.
        plugins: modules that classes come from.
    """
    left_out = (_STARTS,) if decodes else (_STARTS, "open")
    found = Library()
    for number, (name, tree) in enumerate([*_own_modules(), *_plugin_modules(plugins)]):
        lines = inspect.getsource(importlib.import_module(name)).splitlines()
        home = "" if name.startswith("spiralformer.") else name
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                _note_import(found, home, node)
                continue
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            kept = list(range(first - 1, node.end_lineno or first))
            if isinstance(node, ast.ClassDef):
                for method in [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in left_out]:
                    node.body.remove(method)
                    begins = min([method.lineno, *(d.lineno for d in method.decorator_list)])
                    gone = range(begins - 2, method.end_lineno or 0)  # and the empty line before it
                    kept = [line for line in kept if line not in gone]
            uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            source = "\n".join(lines[line] for line in kept)
            for defined in _defined(node):
                found.definitions[home, defined] = _Definition((number, first), source, uses)
    return found


def _note_import(found: Library, module: str, node: ast.Import | ast.ImportFrom) -> None:
    """Keep an import from elsewhere; a plugin's module is told what it has of our parts, and of the plugin's others."""
    home = _home_of(node, module) if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        bound = alias.asname or alias.name.split(".")[0]
        line = ast.unparse(type(node)(**{**{name: getattr(node, name) for name in node._fields}, "names": [alias]}))
        package, _, part = home.partition(".")
        if home == "__future__" or (not module and package == "spiralformer"):
            continue
        if module and bound == alias.name and package == "spiralformer" and part and part not in _NOT_SHIPPED:
            found.links[module, bound] = ("", alias.name)
        elif module and bound == alias.name and home and _is_within(home, _root_of(module)):
            found.links[module, bound] = (home, alias.name)
        elif module and (
            (home or alias.name).split(".")[0] in _OURS or _is_within(home or alias.name, _root_of(module))
        ):
            found.foreign[module, bound] = line
        else:
            found.imports[bound] = line


def _own_modules() -> list[tuple[str, ast.Module]]:
    """The modules of parts, those that others import first."""
    names = [f"spiralformer.{module.name}" for module in pkgutil.iter_modules(spiralformer.__path__)]
    return _in_order([name for name in sorted(names) if name.partition(".")[2] not in _NOT_SHIPPED])


def _plugin_modules(plugins: Iterable[ModuleType]) -> list[tuple[str, ast.Module]]:
    """Modules of plugins, and those of the same package that they import."""
    found, waiting = set[str](), [module.__name__ for module in plugins]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(other for other in _imported(name) if _is_within(other, _root_of(name)))
    return _in_order(sorted(found))


def _in_order(names: list[str]) -> list[tuple[str, ast.Module]]:
    imports = {name: _imported(name) & set(names) for name in names}
    return [(name, _tree(name)) for name in TopologicalSorter(imports).static_order()]


def _tree(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(name)))


def _imported(name: str) -> set[str]:
    return {_home_of(node, name) for node in _tree(name).body if isinstance(node, ast.ImportFrom)} - {name}


def _home_of(node: ast.ImportFrom, module: str) -> str:
    """The full name of what is imported from."""
    if not node.level:
        return node.module or ""
    package = importlib.import_module(module).__package__ or ""
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _root_of(module: str) -> str:
    """Of a module's package: what it shares with its own modules. A file's is itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "spiralformer_plugins" else parts[0]


def _is_within(module: str, root: str) -> bool:
    return module == root or module.startswith(f"{root}.")


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def names_in(code: str) -> set[str]:
    """Every name that a piece of code reads or binds."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
