"""The source of the model parts, definition by definition, for code that must stand alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from graphlib import TopologicalSorter

import spiralformer

_NOT_SHIPPED = ("checkpointing", "generate", "init", "model", "starts")
_STARTS = "starts"  # a method that an export has no use for: it holds the values themselves


@dataclass(frozen=True, slots=True)
class _Definition:
    """A class, function or constant at the top of one of `spiralformer`'s modules."""

    place: tuple[int, int]
    source: str
    uses: frozenset[str]


@lru_cache(maxsize=2)
def library(*, decodes: bool) -> tuple[dict[str, _Definition], dict[str, str]]:
    """What the parts' modules define, and what they import from elsewhere, by name.

    Args:
        decodes: whether parts are to open memories.
    """
    left_out = (_STARTS,) if decodes else (_STARTS, "open")
    found: dict[str, _Definition] = {}
    imports: dict[str, str] = {}
    for number, name in enumerate(_modules()):
        text = inspect.getsource(importlib.import_module(f"spiralformer.{name}"))
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if isinstance(node, ast.Import) or str(node.module).split(".")[0] not in ("spiralformer", "__future__"):
                    for alias in node.names:
                        single = type(node)(
                            **{**{name: getattr(node, name) for name in node._fields}, "names": [alias]}
                        )
                        imports[alias.asname or alias.name.split(".")[0]] = ast.unparse(single)
                continue
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            kept = list(range(first - 1, node.end_lineno or first))
            if isinstance(node, ast.ClassDef):
                for method in [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in left_out]:
                    node.body.remove(method)
                    gone = range(method.lineno - 2, method.end_lineno or 0)  # and the empty line before it
                    kept = [line for line in kept if line not in gone]
            uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            source = "\n".join(lines[line] for line in kept)
            for defined in _defined(node):
                found[defined] = _Definition((number, first), source, uses)
    return found, imports


def _modules() -> list[str]:
    """Names of the modules of parts, those that others import first."""
    imports: dict[str, set[str]] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(spiralformer.__path__)):
        if name not in _NOT_SHIPPED:
            tree = ast.parse(inspect.getsource(importlib.import_module(f"spiralformer.{name}")))
            named = [str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)]
            imports[name] = {m.removeprefix("spiralformer.") for m in named if m.startswith("spiralformer.")}
            imports[name] -= set(_NOT_SHIPPED)
    return list(TopologicalSorter(imports).static_order())


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def names_in(code: str) -> set[str]:
    """Every name that a piece of code reads or binds."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def sources_of(roots: Iterable[str], *, decodes: bool) -> str:
    """The source of these definitions and of all they use, in the library's order."""
    known, _ = library(decodes=decodes)
    wanted, waiting = set[str](), [name for name in roots if name in known]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting.extend(used for used in known[name].uses if used in known)
    kept = sorted({known[name] for name in wanted}, key=lambda definition: definition.place)
    return "\n\n\n".join(definition.source for definition in kept)
