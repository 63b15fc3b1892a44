"""The one error family for everything a user can get wrong in a file or a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class SpecError(ValueError):
    """Something in a YAML file, an override or an argument is wrong.

    The text says where (file, line, dotted path), what (the problem and the value found), and what
    would be right.
    """

    path: str
    """Dotted path of the offending value, e.g. ``graph.h.schedule.0``; empty for the whole file."""
    problem: str
    remedy: str = ""
    """What would be right, as a full clause: ``choose one of: mean, last``."""
    file: str = ""
    line: int | None = field(default=None)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        path = ".".join(_cut(part, 60) for part in self.path.split("."))
        where = ": ".join(part for part in (place, _cut(path, 240)) if part)
        what = f"{where}: {self.problem}" if where else self.problem
        return printable(f"{what}; {self.remedy}" if self.remedy else what)


class CausalityError(SpecError):
    """A causal architecture whose logits would depend on later tokens."""


class ConstraintError(SpecError):
    """The decisions taken break one of the space's constraints."""


def printable(text: str) -> str:
    """A text without what steers a terminal or hides: control characters, and marks that turn the reading direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show(value: object, limit: int = 60) -> str:
    """A value as it is quoted in messages: YAML-like, on one line, at most ``limit`` characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes out no integer of thousands of digits
        return "a number of thousands of digits"
    text = printable(_cut(" ".join(text.split()), limit))
    return f"'{text}'" if isinstance(value, str) else text


def one_of(known: Iterable[str], given: object = None) -> str:
    """The remedy for a wrong name: the nearest known one first, then all of them."""
    names = list(map(str, known))
    near = difflib.get_close_matches(show(given).strip("'"), names, n=1) if given is not None else []
    hint = f"did you mean '{near[0]}'? " if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{hint}choose one of: {shown}" if names else f"{hint}there are none to choose from"
