"""Closed tables: everything of a kind stands in one row, and a name without its row is an error at import."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar, cast

RowType = TypeVar("RowType", bound=type)


class TableError(TypeError):
    """A table lacks a row, or a row lacks a part."""


class Row(Protocol):
    """What a table holds: frozen, with a name."""

    @property
    def name(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def complete(cls: RowType) -> RowType:
    """Decorate a dataclass of rows: what a row does not say is told by the row's own name.

    Raises:
        TableError: when a row is made without one of its parts.
    """
    make = cls.__init__  # type: ignore[misc]
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    required = [f.name for f in dataclasses.fields(cls) if (f.default, f.default_factory) == absent]

    def checked(self: Any, *values: Any, **parts: Any) -> None:
        missing = [name for name in required[len(values) :] if name not in parts]
        if missing:
            name = values[0] if values else parts.get("name", "?")
            raise TableError(f"{cls.__name__} '{name}' does not say: {', '.join(missing)}")
        make(self, *values, **parts)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def table(what: str, rows: Iterable[AnyRow], names: Iterable[str] | None = None) -> Mapping[str, AnyRow]:
    """Rows by name, in their order.

    Args:
        what: the table is of, for its errors: "a pool".
        rows: all there are.
        names: that files may use; every one has a row, and every row is one of them.

    Raises:
        TableError: for a name that has two rows, or none, and for a row that no file can name.
    """
    found: dict[str, AnyRow] = {}
    for row in rows:
        if row.name in found:
            raise TableError(f"{what} '{row.name}' has two rows")
        found[row.name] = row
    if names is not None:
        wanted = list(names)
        if missing := [name for name in wanted if name not in found]:
            raise TableError(f"{what} '{missing[0]}' can be written in a file, but has no row")
        if extra := [name for name in found if name not in wanted]:
            raise TableError(f"{what} '{extra[0]}' has a row, but can't be written in a file")
    return cast(Mapping[str, AnyRow], found)
