"""Boards are held to a brute-force solver; made, rated, read from a CSV, trained on, searched and exported."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import run_cli

from builder.laws import breaches
from searchspace import SpecError
from spiralformer.rope import Rotary
from studies.config import load_study
from studies.records.reading import read_study
from studies.tasks.rated import facts_of, prepare_rated
from studies.tasks.sudoku import (
    Sudoku,
    SudokuData,
    make_boards,
    rating,
    read_boards,
    shuffled,
    units,
)

SMALL = {"box": (2, 2), "puzzles": 60, "held_out": 20}


def solutions(given, box):
    """All of them, cell by cell."""
    if 0 not in given:
        yield tuple(given)
        return
    side, cell = box[0] * box[1], given.index(0)
    taken = {given[at] for unit in units(box) if cell in unit for at in unit}
    for digit in {*range(1, side + 1)} - taken:
        yield from solutions([*given[:cell], digit, *given[cell + 1 :]], box)


def filled(puzzle):
    return tuple(given or right for given, right in zip(puzzle.given, puzzle.answer, strict=True))


def test_units_are_rows_columns_and_boxes():
    found = units((2, 3))
    assert len(found) == 18
    for cell in range(36):
        row, column, box = (unit for unit in found if cell in unit)
        assert {at // 6 for at in row} == {cell // 6}
        assert {at % 6 for at in column} == {cell % 6}
        assert {(at // 6 // 2, at % 6 // 3) for at in box} == {(cell // 6 // 2, cell % 6 // 3)}
    assert all(len(set(unit)) == 6 for unit in found)


@pytest.mark.parametrize(
    ("box", "low", "high"), [((2, 2), 0, 8), ((2, 2), 10, 12), ((2, 3), 20, 23), ((2, 3), 100, 9999)]
)
def test_boards_have_one_solution_and_the_rating_that_was_asked(box, low, high):
    boards = list(itertools.islice(make_boards(box, low, high, 3), 12))
    assert boards == list(itertools.islice(make_boards(box, low, high, 3), 12))
    assert len({board.given for board in boards}) == 12
    for board in boards:
        assert list(solutions(list(board.given), box)) == [filled(board)]
        assert low < board.rating <= high
        assert board.rating == rating(board.given, box)
        assert board.rating % 100 == board.given.count(0)


def test_a_level_without_boards_says_so():
    with pytest.raises(SpecError, match="no board of 4 x 4 has a rating from 101 to 120"):
        next(make_boards((2, 2), 100, 120, 0))


@pytest.mark.parametrize("box", [(2, 2), (2, 3), (3, 3)])
def test_shuffled_boards_are_boards(box):
    side = box[0] * box[1]
    boards = list(itertools.islice(make_boards(box, 0, 8, 0), 20))
    rows = np.array([[*b.given, *filled(b)] for b in boards], np.uint8)
    found = shuffled(rows, box, np.random.default_rng(0))
    assert (found != rows).any(axis=1).all()
    for row in found.tolist():
        given, solved = row[: side * side], row[side * side :]
        assert all({solved[at] for at in unit} == {*range(1, side + 1)} for unit in units(box))
        assert all(g in (0, s) for g, s in zip(given, solved, strict=True))


def test_levels_answers_and_pictures(tmp_path):
    data = prepare_rated(Sudoku, SudokuData(**SMALL), tmp_path / "data")
    inputs, targets = data.batch(0, 0, 8, 16)
    assert ((inputs == 0) == (targets != -100)).all()
    assert [data.name(level) for level in data.facts.levels] == ["1-8", "9-9", "10-10", "11-12"]
    assert data.make(12, 5, 2).shape == (5, 32)

    class Knows(torch.nn.Module):
        def __init__(self, most):
            super().__init__()
            self.most, self.weight = most, torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens_BL):
            found = []
            for row in tokens_BL.tolist():
                board = next(solutions(row, (2, 2))) if row.count(0) <= self.most else row
                found.append(torch.nn.functional.one_hot(torch.tensor(board), 5))
            return torch.stack(found).float()

    assert data.measure_model(Knows(16), 320, {}) == {"hard_accuracy": 1.0, "extrapolation": 1.0}
    assert data.measure_model(Knows(9), 320, {})["extrapolation"] == pytest.approx(1 / 3)
    examined = Sudoku.of(facts_of(SudokuData(**SMALL))).examine(Knows(8), 320, {})
    assert [row[1] for row in examined.rows] == [1.0, 0.0, 0.0, 0.0]
    _, text = data.show(Knows(8))
    solved, failed = text.split("\n\n")
    assert "x" not in solved.partition(":")[2]
    assert failed.startswith("level 9-9, failed:")
    assert failed.count("(x)") == 9


def write_csv(file, boards):
    with file.open("w", newline="") as opened:
        lines = csv.writer(opened)
        lines.writerow(["source", "question", "answer", "rating"])
        for board in boards:
            given = "".join(map(str, board.given)).replace("0", ".")
            lines.writerow(["here", given, "".join(map(str, filled(board))), board.rating])
    return file


def test_a_csv_as_sudoku_extreme_has_it(tmp_path):
    made = [
        board
        for low, high in ((0, 8), (8, 10), (10, 12))
        for board in itertools.islice(make_boards((2, 2), low, high, 0), 30)
    ]
    file = write_csv(tmp_path / "boards.csv", made)
    assert list(read_boards(file, (2, 2))) == made
    config = SudokuData(path="boards.csv", box=(2, 2), ratings=(8, 10, 12))
    data = prepare_rated(Sudoku, config, tmp_path / "data", tmp_path)
    assert (data.facts.train_tokens, data.facts.val_tokens) == (27 * 32, 3 * 32)
    file.write_text("question,answer,rating\n")  # what was prepared stays
    data = prepare_rated(Sudoku, config, tmp_path / "data", tmp_path)
    hard = {tuple(row[:16]) for row in data.make(12, 99, 2).tolist()}
    assert hard == {board.given for board in made if board.rating > 10}
    easy = {tuple(row[:16]) for row in data.make(8, 99, 2).tolist()}
    assert easy == {tuple(row[:16]) for row in data.rows(data.val).tolist()}, "what was held out"


def test_a_csv_is_read_once_and_its_puzzles_count_once(tmp_path, monkeypatch):
    easy, hard = (list(itertools.islice(make_boards((2, 2), *at, 0), 30)) for at in ((0, 8), (8, 12)))
    write_csv(tmp_path / "boards.csv", [*easy, *easy, *hard])
    reads = []
    monkeypatch.setattr("studies.tasks.sudoku.read_boards", lambda *at: reads.append(at) or read_boards(*at))
    config = SudokuData(path="boards.csv", box=(2, 2), ratings=(8, 12))
    data = prepare_rated(Sudoku, config, tmp_path / "data", tmp_path)
    data.make(12, 9, 2), data.make(8, 9, 2), facts_of(config, tmp_path)
    assert len(reads) == 1
    assert data.facts.train_tokens + data.facts.val_tokens == 30 * 32


def test_another_file_of_its_name_is_refused(tmp_path):
    boards = list(itertools.islice(make_boards((2, 2), 0, 12, 0), 60))
    write_csv(tmp_path / "boards.csv", boards)
    facts = facts_of(SudokuData(path="boards.csv", box=(2, 2), ratings=(8, 12)), tmp_path)
    assert Sudoku.of(facts).make(12, 3, 2).shape[1] == 32
    write_csv(tmp_path / "boards.csv", boards[1:])
    with pytest.raises(SpecError, match="is not the file that was read before"):
        Sudoku.of(facts).make(12, 3, 2)


def test_a_level_of_a_csv_without_boards_is_told_before_anything_runs(tmp_path):
    write_csv(tmp_path / "boards.csv", list(itertools.islice(make_boards((2, 2), 0, 8, 0), 30)))
    with pytest.raises(SpecError, match="no line has a rating from 9 to 12"):
        facts_of(SudokuData(path="boards.csv", box=(2, 2), ratings=(8, 12)), tmp_path)
    for _ in range(2):
        with pytest.raises(SpecError, match="no board of 4 x 4 has a rating from 17 to 40"):
            prepare_rated(Sudoku, SudokuData(**SMALL, ratings=(16, 40)), tmp_path / "data")


@pytest.mark.parametrize("form", ["bom", "spaces", "windows", "blank"])
def test_a_csv_as_others_write_it(form, tmp_path):
    boards = list(itertools.islice(make_boards((2, 2), 0, 8, 0), 3))
    text = write_csv(tmp_path / "boards.csv", boards).read_text()
    changed = {"bom": "\ufeff" + text, "spaces": text.replace(",", " , "), "windows": text.replace("\n", "\r\n"), "blank": text.replace("\n", "\n\n")}  # fmt: skip
    (tmp_path / "boards.csv").write_text(changed[form], encoding="utf-8", newline="")
    assert list(read_boards(tmp_path / "boards.csv", (2, 2))) == boards


def test_what_is_no_csv_is_told(tmp_path):
    file = tmp_path / "boards.csv"
    for content in ("question,answer,rating\n\xe9".encode("latin-1"), b"question,answer,rating\n" + b"1" * 200_000):
        file.write_bytes(content)
        with pytest.raises(SpecError, match="is no CSV in UTF-8"):
            list(read_boards(file, (2, 2)))
    file.write_text("question,answer,rating\n\n\n1,2,1e400\n")
    with pytest.raises(SpecError, match="line 4 is no board"):
        list(read_boards(file, (2, 2)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("..3434122143432,1234341221434321,3", "line 2: has 15 and 16 cells, not 16"),
        ("..34341221434322,1234341221434321,3", "line 2: its answer is another board's"),
        ("..34341221434311,1234341221434311,3", "line 2: its answer breaks the rules"),
        ("1234341221434321,1234341221434321,3", "line 2: has no empty cell"),
        ("..34341221434321,1234341221434321,easy", "line 2 is no board and rating"),
        ("..34341221434321,1234341221434321", "line 2 is no board and rating"),
    ],
)
def test_a_csv_that_is_wrong_says_where(line, told, tmp_path):
    (tmp_path / "boards.csv").write_text(f"question,answer,rating\n{line}\n")
    with pytest.raises(SpecError) as caught:
        list(read_boards(tmp_path / "boards.csv", (2, 2)))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"box": (3,)}, r"data.box: \[3\] is no box"),
        ({"box": (6, 6)}, "is no box of 4 to 26 cells"),
        ({"box": (2, 4)}, r"data.ratings: are not known for a box of \[2, 4\]"),
        ({"ratings": (9, 8)}, r"data.ratings: \[9, 8\] are not in order"),
        ({"path": "x.csv"}, "data.ratings: are missing"),
    ],
)
def test_settings_that_can_not_be_are_refused(over, told):
    with pytest.raises(SpecError, match=told):
        SudokuData(**over)


def test_without_the_solver_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysat.solvers", None)
    with pytest.raises(SpecError, match=r"needs python-sat; pip install 'spiralformer\[puzzles\]'"):
        rating((0,) * 16, (2, 2))


def test_axes_tell_rows_and_columns_apart():
    rotary = Rotary(8, 100.0, 30, (5, 6))
    cos, _ = rotary(30, 1, 0, torch.device("cpu"))
    for position in range(30):
        row, column = divmod(position, 6)
        for place, at in ((0, row), (1, row * 100.0**-0.5), (2, column), (3, column * 100.0**-0.5)):
            assert cos[position, place] == pytest.approx(np.cos(at), abs=1e-6)
            assert cos[position, place + 4] == pytest.approx(np.cos(at), abs=1e-6)


def test_from_search_to_export(tmp_path):
    over = ["data.box=[2, 2]", "data.puzzles=100", "data.held_out=20", "space.vocab_size=5", "space.seq_len=16",
            "space.d_model=16", "space.blocks.core.axes=[4, 4]", "space.graph.h.iterations.test=[2, 4]"]  # fmt: skip
    faster = ["training.tokens=9600", "training.batch_tokens=160", "training.eval_tokens=160", "search.num_trials=2"]
    run = tmp_path / "run"
    said = run_cli("search", "sudoku", *over, *faster, "--dir", run, "--serial")
    assert "level 1-8" in said or "level 9-9" in said
    records, _, settings = read_study(run)
    assert [o.name for o in settings.objectives] == ["loss", "extrapolation"]
    assert all({"solved", "extrapolation", "norm_ratio"} <= set(r.rungs[-1].metrics) for r in records)
    found = json.loads(run_cli("eval", run / "best", "--tokens", 320, "--json"))
    assert found["columns"] == ["level", "solved", "2 iterations", "4 iterations"]
    assert list(breaches(records[0].arch_spec(), slow=False)) == []


def test_the_shipped_study_is_the_papers_grid():
    assert load_study("sudoku").space.count().high == 6
