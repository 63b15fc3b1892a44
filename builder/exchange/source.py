"""The source of the model parts, definition by definition, for code that must stand alone."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

_PARTS = (
    *("norm", "rope", "attention", "recall", "block", "pooling", "upscale", "joins", "memory", "embedding"),
    "decoding",
)


@dataclass(frozen=True, slots=True)
class _Definition:
    """A class, function or constant at the top of one of `spiralformer`'s modules."""

    place: tuple[int, int]
    source: str
    uses: frozenset[str]


@lru_cache(maxsize=1)
def library() -> tuple[dict[str, _Definition], dict[str, str]]:
    """What the parts' modules define, and what they import from elsewhere, by name."""
    found: dict[str, _Definition] = {}
    imports: dict[str, str] = {}
    for number, name in enumerate(_PARTS):
        module: ModuleType = importlib.import_module(f"spiralformer.{name}")
        text = inspect.getsource(module)
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
            names = _defined(node)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            source = "\n".join(lines[first - 1 : node.end_lineno])
            uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            for defined in names:
                found[defined] = _Definition((number, first), source, uses)
    return found, imports


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def names_in(code: str) -> set[str]:
    """Every name that a piece of code reads or binds."""
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def sources_of(roots: Iterable[str]) -> str:
    """The source of these definitions and of all they use, in the library's order."""
    known, _ = library()
    wanted, waiting = set[str](), [name for name in roots if name in known]
    while waiting:
        name = waiting.pop()
        if name not in wanted and name != "KeyValueCache":  # replaced by one that grows
            wanted.add(name)
            waiting.extend(used for used in known[name].uses if used in known)
    kept = sorted({known[name] for name in wanted}, key=lambda definition: definition.place)
    return "\n\n\n".join(definition.source for definition in kept)
