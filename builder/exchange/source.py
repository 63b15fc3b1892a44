"""The source of the model parts, definition by definition, for code that must stand alone."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
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
    inner: str = ""
    """An import inside it that finds nothing in an export."""


@dataclass(frozen=True, slots=True)
class Library:
    """What the modules of parts define, and what they import from elsewhere."""

    definitions: dict[Name, _Definition] = field(default_factory=dict)
    links: dict[Name, Name] = field(default_factory=dict)
    """What a plugin's module imports of our parts, or of another module of the plugin."""
    foreign: dict[Name, str] = field(default_factory=dict)
    """What a plugin's module binds in a way that can't travel, and how."""
    imports: dict[Name, str] = field(default_factory=dict)
    """From elsewhere, by the name that is bound."""

    def travelling(self, roots: Iterable[Name], taken: Iterable[str] = ()) -> tuple[str, dict[str, str]]:
        """The source of these definitions and of all they use, in the library's order, and what they import.

        Args:
            roots: names of ours and of plugins.
            taken: names that stand beside them.

        Raises:
            SpecError: for a plugin's that uses what can't travel, or has the name of another one.
        """
        known = self.definitions
        wanted, waiting = set[Name](), [name for name in roots if name in known]
        imports: dict[str, tuple[str, str]] = {}
        while waiting:
            name = waiting.pop()
            if name in wanted:
                continue
            wanted.add(name)
            home = name[0]
            if home and known[name].inner:
                raise _stays(home, name[1], known[name].inner)
            for used in known[name].uses:
                if (line := self.foreign.get((home, used))) is not None:
                    raise _stays(home, name[1], line)
                if (line := self.imports.get((home, used))) is not None:
                    there = imports.setdefault(used, (line, home))
                    if there[0] != line or (used in _BOUND and line != _BOUND[used]):
                        what = f"imports {used} otherwise than the export: '{line}'"
                        raise SpecError("", what, "import it under another name", home or there[1])
                other = self.links.get((home, used), (home, used))
                if other in known:
                    waiting.append(other)
        beside = {**dict.fromkeys(taken, "the export"), **dict.fromkeys(dir(builtins), "Python")}
        by_name: dict[str, str] = {}
        for home, bare in sorted(wanted):
            other_home = by_name.setdefault(bare, home)
            if other_home != home or (home and bare in beside):
                by = beside.get(bare) or other_home or "spiralformer"
                raise SpecError("", f"defines {bare}, which {by} defines too", "give it another name", home)
        kept = sorted({known[name] for name in wanted}, key=lambda definition: definition.place)
        text = "\n\n\n".join(definition.source for definition in kept)
        return text, {name: line for name, (line, _) in imports.items()}


_BOUND = {
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "nn": "from torch import nn",
    "Tensor": "from torch import Tensor",
}
"""What these names mean in an export."""


def _stays(module: str, name: str, how: str) -> SpecError:
    what = f"{name} uses what an export can't carry: '{how}'"
    remedy = (
        "use plain classes, functions and NAME = value of the plugin's own, names of spiralformer's parts, and packages"
    )
    return SpecError("", what, remedy, module)


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
        lines = inspect.getsource(importlib.import_module(name)).split("\n")  # as Python counts them
        home = "" if name.startswith("spiralformer.") else name
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                _note_import(found, home, node)
                continue
            names = list(_defined(node))
            if home and not names:
                for bound in _bound_in(node):
                    found.foreign[home, bound] = ast.unparse(node).split("\n")[0][:60]
                continue
            inner = _inner_import(node, home) if home else ""
            source = _source(node, lines, left_out)
            uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            first = _first_line(node)
            for defined in names:
                found.definitions[home, defined] = _Definition((number, first), source, uses, inner)
    return found


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min(node.lineno, *(d.lineno for d in decorators)) if decorators else node.lineno


def _source(node: ast.stmt, lines: list[str], left_out: tuple[str, ...]) -> str:
    """A definition's lines, without the methods that are left out, which are taken out of ``node`` too."""
    kept = list(range(_first_line(node) - 1, node.end_lineno or node.lineno))
    if isinstance(node, ast.ClassDef):
        for method in [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in left_out]:
            node.body.remove(method)
            gone = list(range(_first_line(method) - 1, method.end_lineno or 0))
            if not lines[gone[0] - 1].strip():
                gone.append(gone[0] - 1)
            kept = [line for line in kept if line not in gone]
        if not node.body:
            return "\n".join([*(lines[line] for line in kept), f"{' ' * (node.col_offset + 4)}pass"])
    return "\n".join(lines[line] for line in kept)


def _bound_in(node: ast.stmt) -> set[str]:
    """Names that a statement binds, or whose values it changes, in a way that no export carries."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.ctx, ast.Store):
            found |= {name.id for name in ast.walk(part.value) if isinstance(name, ast.Name)}
        elif isinstance(part, ast.ClassDef | ast.FunctionDef):
            found.add(part.name)
    return found


def _inner_import(node: ast.stmt, module: str) -> str:
    """The first import inside a definition that finds nothing in an export; empty if there is none."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            homes = [_home_of(part, module)] if isinstance(part, ast.ImportFrom) else [a.name for a in part.names]
            if any(_is_within(home, root) for home in homes for root in (*_OURS, _root_of(module))):
                return ast.unparse(part)
    return ""


def _note_import(found: Library, module: str, node: ast.Import | ast.ImportFrom) -> None:
    """Keep an import from elsewhere; a plugin's module is told what it has of our parts, and of the plugin's others."""
    home = _home_of(node, module) if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        bound = alias.asname or alias.name.split(".")[0]
        line = ast.unparse(type(node)(**{**{name: getattr(node, name) for name in node._fields}, "names": [alias]}))
        package, _, part = home.partition(".")
        if home == "__future__" or (not module and package == "spiralformer"):
            continue
        is_module = bool(home) and f"{home}.{alias.name}" in sys.modules
        if not module:
            found.imports[module, bound] = line
        elif package == "spiralformer" and part and part not in _NOT_SHIPPED and bound == alias.name and not is_module:
            found.links[module, bound] = ("", alias.name)
        elif home and _is_within(home, _root_of(module)) and bound == alias.name and not is_module:
            found.links[module, bound] = (home, alias.name)
        elif any(_is_within(home or alias.name, root) for root in (*_OURS, _root_of(module))):
            found.foreign[module, bound] = line
        else:
            found.imports[module, bound] = line


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
    imports = {name: sorted(_imported(name) & set(names)) for name in names}  # the same in every process
    try:
        order = list(TopologicalSorter(imports).static_order())
    except CycleError:  # a package and its modules
        order = names
    return [(name, _tree(name)) for name in order]


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
    if all(isinstance(target, ast.Name) for target in targets):
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def names_in(code: str) -> set[str]:
    """Every name that a piece of code reads or binds."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
