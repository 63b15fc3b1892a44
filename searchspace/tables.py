"""Tables: everything of a kind stands in one row, and a name without its row is an error at import.

They are closed but to plugins (`searchspace.plugins`), which add rows to those that say where a file names them.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

RowType = TypeVar("RowType", bound=type)


class TableError(TypeError):
    """A table lacks a row, or a row lacks a part."""


class Row(Protocol):
    """What a table holds: frozen, with a name."""

    @property
    def name(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)
Places: TypeAlias = Callable[[Any], Iterable[str]]
"""Of a row: where a file names it, as ``pool:mean``."""


class Open(NamedTuple):
    """Marks a `Literal` whose names plugins may add to: ``Annotated[Literal["mean"], Open("pool")]``."""

    kind: str


def options(annotation: Any) -> tuple[Any, ...]:
    """The names that a `Literal` lists, without those that plugins add."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return typing.get_args(annotation)


def kind_of(annotation: Any) -> str | None:
    """The kind of the names that an annotation takes, where plugins may add some."""
    marks = getattr(annotation, "__metadata__", ())
    return next((mark.kind for mark in marks if isinstance(mark, Open)), None)


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

    checked.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    checked.__doc__ = "Fields, in order: " + ", ".join(f.name for f in dataclasses.fields(cls)) + "."
    cls.__init__ = checked  # type: ignore[misc]
    return cls


class Table(Mapping[str, AnyRow]):
    """Rows by name, in their order; made by `table`."""

    def __init__(self, what: str, places: Places | None) -> None:
        self.what, self.places = what, places
        self.refuses: Callable[[AnyRow], str] = lambda row: ""
        """Why a plugin's row may not be added, or nothing."""
        self._rows: dict[str, AnyRow] = {}
        self._added: list[AnyRow] = []
        self._followers: list[tuple[Callable[[Any], Any], Table[Any]]] = []

    def __getitem__(self, name: str) -> AnyRow:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: AnyRow) -> None:
        """One more row. Raises `TableError` where there is one of its name."""
        if row.name in self._rows:
            raise TableError(f"{self.what} '{row.name}' has two rows")
        self._rows[row.name] = row

    def add(self, row: AnyRow) -> None:
        """A plugin's row, told to those that follow; all or nothing. Raises `TableError`."""
        follow = [(other, made(row)) for made, other in self._followers]
        self.put(row)
        self._added.append(row)
        for other, its_own in follow:
            other.add(its_own)

    def follow(self, other: Table[Any], made: Callable[[Any], AnyRow]) -> None:
        """Every row that a plugin adds to ``other`` adds one here, made of it."""
        other._followers.append((made, self))
        for row in other._added:
            self.add(made(row))

    def drop(self, row: AnyRow) -> None:
        """Take a plugin's row out again."""
        del self._rows[row.name]
        self._added.remove(row)
        for made, other in self._followers:
            other.drop(other[made(row).name])


OPEN: dict[type, Table[Any]] = {}
"""Tables that plugins may add to, by the class of their rows."""


def table(
    what: str,
    rows: Iterable[AnyRow],
    names: Iterable[str] | None = None,
    *,
    places: str | Places | None = None,
    of: type | None = None,
) -> Table[AnyRow]:
    """Rows by name, in their order.

    Args:
        what: the table is of, for its errors: "a pool".
        rows: all there are, but for those of plugins.
        names: that files may use; every one has a row, and every row is one of them.
        places: where a file names a row, of a table that plugins may add to; ``"pool"`` for ``pool:NAME``.
        of: class of the rows of such a table; default: the first's.

    Raises:
        TableError: for a name that has two rows, or none, and for a row that no file can name.
    """
    prefix = places if isinstance(places, str) else ""
    found: Table[AnyRow] = Table(what, (lambda row: (f"{prefix}:{row.name}",)) if prefix else places)  # type: ignore[arg-type]
    for row in rows:
        found.put(row)
    if names is not None:
        wanted = list(names)
        if missing := [name for name in wanted if name not in found]:
            raise TableError(f"{what} '{missing[0]}' can be written in a file, but has no row")
        if extra := [name for name in found if name not in wanted]:
            raise TableError(f"{what} '{extra[0]}' has a row, but can't be written in a file")
    if places is not None:
        OPEN[of or type(next(iter(found.values())))] = found
    return found
