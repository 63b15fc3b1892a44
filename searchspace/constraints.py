"""Constraint expressions: a small language, parsed once, evaluated without `eval`.

Names are dotted paths into the decided file (``blocks.core.layers``). Besides them: numbers, text,
lists, arithmetic, comparisons, ``and``, ``or``, ``not``, ``in``, ``a if c else b`` and the functions
of `_FUNCTIONS`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from searchspace.errors import SpecError, one_of, show

Tree: TypeAlias = Mapping[str, Any]
_Eval: TypeAlias = Callable[[Tree], Any]

_MAX_LENGTH = 500  # characters: Python's parser recurses over an expression
_MAX_NUMBER = 1e30  # beyond it sums and products may overflow to infinity


def _bounded_power(base: float, exponent: float) -> float:
    if abs(exponent) > 64 or abs(base) > 1e9:
        raise ValueError("power is out of range")
    return float(base**exponent) if isinstance(base, float) or exponent < 0 else base**exponent


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _bounded_power,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


def _schedule(tree: Tree, node: str) -> list[Any]:
    loop = tree.get("graph", {}).get(node)
    if not isinstance(loop, dict) or "schedule" not in loop:
        loops = [name for name, spec in tree.get("graph", {}).items() if isinstance(spec, dict) and "loop" in spec]
        raise SpecError("", f"{show(node)} is not a loop of the graph", one_of(loops, node))
    return list(loop["schedule"])


def _level_name(entry: object) -> object:
    return entry["level"] if isinstance(entry, dict) else entry


def _count(tree: Tree, node: str, level: str) -> int:
    return [_level_name(entry) for entry in _schedule(tree, node)].count(level)


_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Any]]] = {
    # name: fewest arguments, most arguments, function of (tree, *arguments)
    "iterations": (1, 1, lambda tree, node: len(_schedule(tree, node))),
    "count": (2, 2, _count),
    "first": (1, 1, lambda tree, node: _level_name(_schedule(tree, node)[0])),
    "last": (1, 1, lambda tree, node: _level_name(_schedule(tree, node)[-1])),
    "exists": (1, 1, lambda tree, path: _find(tree, path.split("."))[1]),
    "min": (1, 16, lambda tree, *args: min(*args) if len(args) > 1 else min(args[0])),
    "max": (1, 16, lambda tree, *args: max(*args) if len(args) > 1 else max(args[0])),
    "sum": (1, 1, lambda tree, values: sum(values)),
    "len": (1, 1, lambda tree, values: len(values)),
    "abs": (1, 1, lambda tree, value: abs(value)),
}

_OF_NAMES = {
    "iterations": "('h')",
    "count": "('h', 'word')",
    "first": "('h')",
    "last": "('h')",
    "exists": "('vars.width')",
}
"""What takes the name of a loop, or a path, as text."""


def _find(tree: Tree, parts: list[str]) -> tuple[Any, bool]:
    value: Any = tree
    for part in parts:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None, False
    return value, True


class Constraint:
    """One parsed expression. ``names`` are the dotted paths it reads."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.names: set[str] = set()
        if len(text) > _MAX_LENGTH:
            raise SpecError(path, f"expression of {len(text)} characters", f"use at most {_MAX_LENGTH}")
        try:
            parsed = ast.parse(text.strip(), mode="eval")
            self._eval = self._compile(parsed.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(
                path, f"can't read the expression {show(text)}", 'write e.g. "d_model % 64 == 0"'
            ) from error

    def holds(self, tree: Tree) -> bool:
        """Whether the decided tree satisfies the constraint.

        Raises:
            SpecError: if a name is missing or an operation has no result.
        """
        try:
            return bool(self._eval(tree))
        except SpecError as error:
            raise SpecError(self.path, f"in {show(self.text)}: {error.problem}", error.remedy) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise SpecError(
                self.path, f"{show(self.text)} has no value: {error}", "check the types of what it reads"
            ) from error

    def _refuse(self, what: str) -> SpecError:
        return SpecError(
            self.path,
            f"{what} is not allowed in a constraint ({show(self.text)})",
            "use paths, numbers, arithmetic, comparisons, and/or/not, and " + ", ".join(_FUNCTIONS),
        )

    def _compile(self, node: ast.expr) -> _Eval:
        if isinstance(node, ast.Constant):
            return self._constant(node.value)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._name(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._binary(_BINARY[type(node.op)], self._compile(node.left), self._compile(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            unary, operand = _UNARY[type(node.op)], self._compile(node.operand)
            return lambda tree: unary(operand(tree))
        if isinstance(node, ast.BoolOp):
            parts = [self._compile(value) for value in node.values]
            if isinstance(node.op, ast.And):
                return lambda tree: all(part(tree) for part in parts)
            return lambda tree: any(part(tree) for part in parts)
        if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
            return self._compare(node)
        if isinstance(node, ast.IfExp):
            test, then, other = (self._compile(part) for part in (node.test, node.body, node.orelse))
            return lambda tree: then(tree) if test(tree) else other(tree)
        if isinstance(node, ast.List | ast.Tuple):
            items = [self._compile(item) for item in node.elts]
            return lambda tree: [item(tree) for item in items]
        if isinstance(node, ast.Call):
            return self._call(node)
        raise self._refuse(type(node).__name__)

    def _constant(self, value: object) -> _Eval:
        if not isinstance(value, int | float | str | bool) or (
            isinstance(value, int | float) and abs(value) > _MAX_NUMBER
        ):
            raise self._refuse(show(value))
        return lambda tree: value

    def _binary(self, function: Callable[[Any, Any], Any], left: _Eval, right: _Eval) -> _Eval:
        def evaluate(tree: Tree) -> Any:
            a, b = left(tree), right(tree)
            if not all(isinstance(x, int | float) for x in (a, b)):
                raise TypeError(f"arithmetic needs numbers, got {show(a)} and {show(b)}")
            value = function(a, b)
            if abs(value) > _MAX_NUMBER:
                raise ValueError("a number is out of range")
            return value

        return evaluate

    def _compare(self, node: ast.Compare) -> _Eval:
        functions = [_COMPARE[type(op)] for op in node.ops]
        operands = [self._compile(part) for part in (node.left, *node.comparators)]

        def evaluate(tree: Tree) -> bool:
            left = operands[0](tree)
            for function, operand in zip(functions, operands[1:], strict=True):
                right = operand(tree)
                if not function(left, right):
                    return False
                left = right
            return True

        return evaluate

    def _call(self, node: ast.Call) -> _Eval:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in _FUNCTIONS or node.keywords:
            called = name or ast.unparse(node.func)
            raise SpecError(self.path, f"unknown function {show(called)}", one_of(_FUNCTIONS, called))
        low, high, function = _FUNCTIONS[name]
        if not low <= len(node.args) <= high:
            raise SpecError(self.path, f"{name} takes {low} to {high} arguments, got {len(node.args)}", "")
        for argument in node.args if name in _OF_NAMES else ():
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                what = f"{name} wants names in quotes, got {ast.unparse(argument)}"
                raise SpecError(self.path, what, f"write e.g. {name}{_OF_NAMES[name]}")
        arguments = [self._compile(argument) for argument in node.args]
        return lambda tree: function(tree, *(argument(tree) for argument in arguments))

    def _name(self, node: ast.expr) -> _Eval:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or any(part.startswith("__") for part in (*parts, node.id)):
            raise self._refuse(
                ast.unparse(node) if not isinstance(node, ast.Name) else ".".join([node.id, *parts[::-1]])
            )
        path = [node.id, *reversed(parts)]
        self.names.add(".".join(path))

        def evaluate(tree: Tree) -> Any:
            value, found = _find(tree, path)
            if not found:
                raise SpecError("", f"there is no {'.'.join(path)}", "guard it with exists('...') if it is conditional")
            return value

        return evaluate
