"""Sudoku of any box, made and rated by a SAT solver, or read from a CSV: trained on easy boards, tried on harder ones.

A board is harder the more cells are empty, and harder still where a solver that knows only which digits exclude each
other runs into conflicts: its rating is ``100 * conflicts + empty cells``. A CSV brings ratings of its own, as
Sudoku-Extreme does (columns question, answer, rating).

Needs ``python-sat`` (the extra ``puzzles``) to make boards.

Shape legend: B batch, L cells of a board, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchspace.errors import SpecError
from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import Headline, Metric
from studies.tasks.graded import HARDER
from studies.tasks.pairs import LEFT_OUT, shares_right
from studies.tasks.rated import Puzzle, Rated, RatedData, csv_lines, rating_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_RATINGS = {(2, 2): (8, 9, 10, 12), (2, 3): (20, 23, 25, 100, 10_000), (3, 3): (50, 54, 200, 1000, 100_000)}
"""By box: the highest rating to train on, then of each harder level."""
_CONFLICT = 100
_TRIES = 3_000  # boards made in vain before a level counts as empty
_SIGNS = ".123456789ABCDEFGHIJKLMNOPQ"


@dataclass(frozen=True, kw_only=True, slots=True)
class SudokuData(RatedData):
    """Sudoku boards, made as they are asked for and the same every time; or those of a CSV."""

    kind: Literal["sudoku"] = key("Source: sudoku boards.", default="sudoku")
    path: str | None = key("A CSV with the columns question, answer, rating; default: boards are made.", default=None)
    box: tuple[int, ...] = key("Rows and columns of a box; [3, 3] is 9 x 9 cells, seq_len 81.", default=(2, 3))
    ratings: tuple[int, ...] = key(
        "The highest rating to train on, then of each harder level, the hardest last; default: by the box. A board's "
        "rating is its empty cells, and 100 for each conflict of a simple solver; a CSV has its own.",
        default=(),
    )
    augment: bool = key("Digits, rows, columns and boxes of a training board change places at random.", default=True)

    def __post_init__(self) -> None:
        RatedData.__post_init__(self)
        if len(self.box) != 2 or min(self.box) < 1 or not 4 <= self.box[0] * self.box[1] <= len(_SIGNS) - 1:
            raise SpecError("data.box", f"{[*self.box]} is no box of 4 to 26 cells", "give e.g. [3, 3]")
        if not self.ratings and self.box not in _RATINGS:
            what = f"are not known for a box of {[*self.box]}"
            raise SpecError("data.ratings", what, "give some, e.g. [40, 60, 200]")

    @property
    def levels(self) -> tuple[int, ...]:
        return self.ratings or _RATINGS[self.sides]

    @property
    def sides(self) -> tuple[int, int]:
        """Of a box."""
        return self.box[0], self.box[1]

    @property
    def positions(self) -> int:
        return (self.box[0] * self.box[1]) ** 2

    @property
    def tokens(self) -> int:
        return self.box[0] * self.box[1] + 1

    def make(self, low: int, high: int, seed: int) -> Iterator[Puzzle]:
        return make_boards(self.sides, low, high, seed)

    def read(self, file: Path) -> Iterator[Puzzle]:
        return read_boards(file, self.sides)


class Sudoku(Rated):
    """Prepared boards; a cell that is given is not asked for."""

    config = SudokuData
    nothing = 0

    metrics = table(
        "a metric",
        (
            Metric("solved", "solved", "share of held-out boards without a mistake", better="higher"),
            *HARDER,
            Metric("cells", "cells right", "share of held-out empty cells that are right", better="higher"),
            Metric("loss", "nats/cell", "held-out loss, nats per empty cell", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["solved"], -1.0)

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        import numpy as np

        rows = self.rows(self.train)
        draw = np.random.Generator(np.random.Philox(key=[seed, step]))
        boards = rows[draw.integers(0, len(rows), size=batch_size)]
        told = self.told
        assert isinstance(told, SudokuData)
        return self.pairs(shuffled(boards, told.sides, draw) if told.augment else boards)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        solved, right = shares_right(logits_BLV, targets_BL)
        return {"solved": solved, "cells": right, "loss": self.loss(logits_BLV, targets_BL)}

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        """Empty cells in brackets, ``x`` where the model is wrong."""
        side = round(len(inputs_L) ** 0.5)
        cells = []
        for given, said, right in zip(inputs_L.tolist(), said_L.tolist(), targets_L.tolist(), strict=True):
            sign = _SIGNS[said] if said < len(_SIGNS) else "?"
            cells.append(f" {_SIGNS[given]} " if right == LEFT_OUT else f"({sign if said == right else 'x'})")
        return "\n".join("".join(cells[first : first + side]) for first in range(0, len(cells), side))


# -- boards ----------------------------------------------------------------------------------------


def make_boards(box: tuple[int, int], low: int, high: int, seed: int) -> Iterator[Puzzle]:
    """Boards with one solution and a rating in (low, high], one after another. Raises `SpecError` if there are none."""
    solver, side = _solver(box, whole=True), box[0] * box[1]  # its own: what it has learned decides what it finds
    draw = random.Random(f"sudoku {box} {low} {high} {seed}")
    vain = 0
    while vain < _TRIES:
        solved = _solution(solver, side, draw)
        wanted = draw.randint(low + 1, high) if high < _CONFLICT else side * side
        given = list(solved)
        for cell in draw.sample(range(side * side), side * side):
            if given.count(0) == wanted:
                break
            others = [_variable(at, digit, side) for at, digit in enumerate(given) if digit and at != cell]
            if not solver.solve(assumptions=[*others, -_variable(cell, solved[cell], side)]):
                given[cell] = 0  # no other digit stands there
        if low < (rated := rating(given, box)) <= high:
            vain = 0
            yield _puzzle(given, solved, rated)
        vain += 1
    raise SpecError(
        "data.ratings", f"no board of {side} x {side} has a rating from {low + 1} to {high}", "leave it out"
    )


def rating(given: list[int] | tuple[int, ...], box: tuple[int, int]) -> int:
    """Empty cells, and 100 for each conflict of a solver that knows only which digits exclude each other."""
    side = box[0] * box[1]
    with _solver(box, whole=False) as solver:  # one that has learned nothing yet
        solver.solve(assumptions=[_variable(at, digit, side) for at, digit in enumerate(given) if digit])
        return int(_CONFLICT * solver.accum_stats()["conflicts"] + list(given).count(0))


def _solution(solver: Any, side: int, draw: random.Random) -> list[int]:
    """A full board: digits at random places, one in each row, and what a solver makes of them."""
    fixed: list[int] = []
    for cell in draw.sample(range(side * side), side):
        tried = [*fixed, _variable(cell, draw.randint(1, side), side)]
        fixed = tried if solver.solve(assumptions=tried) else fixed
    solver.solve(assumptions=fixed)
    true = sorted(number for number in solver.get_model() if number > 0)
    renamed = draw.sample(range(1, side + 1), side)
    return [renamed[(number - 1) % side] for number in true]


def _variable(cell: int, digit: int, side: int) -> int:
    """Of the solver: whether a digit stands in a cell."""
    return cell * side + digit


def _solver(box: tuple[int, int], *, whole: bool) -> Any:
    """A new solver; not ``whole``: one that does not know that each digit stands somewhere in each unit."""
    try:
        from pysat.solvers import Minisat22
    except ImportError as error:
        raise SpecError(
            "data", "making sudoku boards needs python-sat", "pip install 'spiralformer[puzzles]'"
        ) from error
    return Minisat22(bootstrap_with=_clauses(box, whole))


@lru_cache(maxsize=32)
def _clauses(box: tuple[int, int], whole: bool) -> list[list[int]]:
    side = box[0] * box[1]
    clauses = [[_variable(cell, digit, side) for digit in range(1, side + 1)] for cell in range(side * side)]
    for cell in range(side * side):
        clauses += [[-_variable(cell, a, side), -_variable(cell, b, side)] for a, b in _two(range(1, side + 1))]
    for unit in units(box):
        for digit in range(1, side + 1):
            clauses += [[-_variable(a, digit, side), -_variable(b, digit, side)] for a, b in _two(unit)]
            if whole:
                clauses.append([_variable(cell, digit, side) for cell in unit])
    return clauses


def _two(of: Any) -> Iterator[tuple[int, int]]:
    return itertools.combinations(of, 2)


def units(box: tuple[int, int]) -> list[list[int]]:
    """The cells of every row, column and box."""
    high, wide = box
    side = high * wide
    lines = range(side)
    rows = [[row * side + column for column in lines] for row in lines]
    columns = [[row * side + column for row in lines] for column in lines]
    corners = itertools.product(range(0, side, high), range(0, side, wide))
    boxes = [
        [(top + i) * side + left + j for i, j in itertools.product(range(high), range(wide))] for top, left in corners
    ]
    return [*rows, *columns, *boxes]


def shuffled(boards: NDArray[Any], box: tuple[int, int], draw: Any) -> NDArray[Any]:
    """Boards (B, 2 L) with digits, bands, rows within them, stacks and columns within them at other places."""
    import numpy as np

    high, wide = box
    side = high * wide
    found = np.empty_like(boards)
    for i, board in enumerate(boards):
        rows = np.concatenate([high * band + draw.permutation(high) for band in draw.permutation(wide)])
        columns = np.concatenate([wide * stack + draw.permutation(wide) for stack in draw.permutation(high)])
        digits = np.concatenate(([0], 1 + draw.permutation(side))).astype(boards.dtype)
        parts = board.reshape(2, side, side)[:, rows][:, :, columns]
        found[i] = digits[parts].reshape(-1)
    return found


def read_boards(file: Path, box: tuple[int, int]) -> Iterator[Puzzle]:
    """Boards of a CSV. Raises `SpecError` for one that is none."""
    for number, line in csv_lines(file, ("question", "answer", "rating")):
        try:
            given, solved = ([_digit(sign) for sign in line[name]] for name in ("question", "answer"))
            rated = rating_of(line["rating"])
        except ValueError as error:
            raise SpecError("data.path", f"line {number} is no board and rating", "mend it", str(file)) from error
        if wrong := _what_is_wrong(given, solved, box):
            raise SpecError("data.path", f"line {number}: {wrong}", "mend it, or give data.box", str(file))
        yield _puzzle(given, solved, rated)


def _digit(sign: str) -> int:
    return 0 if sign in ".0" else _SIGNS.index(sign)


def _puzzle(given: Sequence[int], solved: Sequence[int], rated: int) -> Puzzle:
    """A board; what is given is not asked for."""
    asked = tuple(0 if digit else right for digit, right in zip(given, solved, strict=True))
    return Puzzle(tuple(given), asked, rated)


def _what_is_wrong(given: Sequence[int], solved: Sequence[int], box: tuple[int, int]) -> str:
    side = box[0] * box[1]
    if len(given) != side * side or len(solved) != side * side:
        return f"has {len(given)} and {len(solved)} cells, not {side * side}"
    if any(digit not in (0, right) for digit, right in zip(given, solved, strict=True)):
        return "its answer is another board's"
    if any({solved[cell] for cell in unit} != set(range(1, side + 1)) for unit in units(box)):
        return "its answer breaks the rules"
    return "" if 0 in given else "has no empty cell"
