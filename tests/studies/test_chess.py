"""Chess puzzles are held to the rules; made, read from a CSV, trained on, searched and exported."""

import itertools
import json

import chess
import pytest
import torch
from helpers import run_cli

from searchspace import SpecError
from studies.config import load_study
from studies.records.reading import read_study
from studies.tasks.chess_puzzles import FROM, TO, Chess, ChessData, make_mates, read_puzzles, rules, said
from studies.tasks.rated import prepare_rated

SMALL = {"puzzles": 40, "held_out": 16, "ratings": (36, 60)}
LICHESS = """PuzzleId,FEN,Moves,Rating
a,r1bqkbnr/pppp1ppp/2n5/4p3/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 1,f1c4 g8f6 d1h5,700
b,rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR w KQkq - 0 1,a2a3 d8h4,900
c,6k1/5ppp/8/8/8/8/5PPP/R5K1 b - - 0 1,h7h6 a1a8,1800
d,6k1/5ppp/8/8/8/8/5PPP/1R4K1 b - - 0 1,g8h8 b1b8,500
"""


def board_of(puzzle):
    """The position, white to move, and its move; castling and en passant are not told."""
    board = chess.Board(None)
    for square, token in enumerate(puzzle.given):
        if token:
            board.set_piece_at(square, chess.Piece((token - 1) % 6 + 1, token <= 6))
    move = chess.Move(puzzle.answer.index(FROM), puzzle.answer.index(TO))
    if board.piece_type_at(move.from_square) == chess.PAWN and move.to_square >= 56:
        move.promotion = chess.QUEEN
    return board, move


def test_mates_are_mates():
    made = list(itertools.islice(make_mates(0, 40, 1), 30))
    assert made == list(itertools.islice(make_mates(0, 40, 1), 30))
    mates = 0
    for puzzle in made:
        board, move = board_of(puzzle)
        assert puzzle.rating <= 40
        assert board.is_legal(move)
        board.push(move)
        mates += board.is_checkmate()
    assert mates >= 28, "the few others promote to another piece"


def test_a_csv_as_lichess_has_it(tmp_path):
    (tmp_path / "puzzles.csv").write_text(LICHESS)
    found = list(read_puzzles(tmp_path / "puzzles.csv"))
    assert [puzzle.rating for puzzle in found] == [700, 900, 1800, 500]
    board, move = board_of(found[1])
    assert (board.piece_at(move.from_square).symbol(), chess.square_name(move.to_square)) == ("Q", "h5"), (
        "seen by black"
    )
    board.push(move)
    assert board.is_checkmate()
    board, move = board_of(found[2])
    assert move == chess.Move.from_uci("a1a8")
    data = prepare_rated(Chess, ChessData(path=str(tmp_path / "puzzles.csv"), ratings=(1000, 2000)), tmp_path / "data")
    assert (data.facts.train_tokens, data.facts.val_tokens) == (2 * 128, 128), "of 700, 900 and 500"
    assert data.make(2000, 5, 2).shape == (1, 128)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a,8/8/8,e2e4 e7e5,1", "line 2 is no puzzle"),
        ("a,rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1,e2e5 e7e5,1", "illegal uci"),
        ("a,rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1,e2e4 0000,1", "0000 moves nothing"),
        ("a,rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1,e2e4,1", "line 2 is no puzzle"),
        ("a,rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1,e2e4 e7e5,", "line 2 is no puzzle"),
    ],
)
def test_a_csv_that_is_wrong_says_where(line, told, tmp_path):
    (tmp_path / "puzzles.csv").write_text(f"PuzzleId,FEN,Moves,Rating\n{line}\n")
    with pytest.raises(SpecError) as caught:
        list(read_puzzles(tmp_path / "puzzles.csv"))
    assert told in str(caught.value)
    (tmp_path / "puzzles.csv").write_text("FEN,Moves\n")
    with pytest.raises(SpecError, match="has no column Rating"):
        list(read_puzzles(tmp_path / "puzzles.csv"))


def test_a_move_is_two_squares():
    logits = torch.zeros(2, 64, 13)
    logits[0, 5, FROM], logits[0, 9, TO] = 1.0, 1.0
    logits[1, 7, FROM], logits[1, 7, TO], logits[1, 8, TO] = 3.0, 2.0, 1.0
    found = said(logits)
    assert found[0].nonzero().flatten().tolist() == [5, 9]
    assert (found[1, 7], found[1, 8]) == (FROM, TO), "it can not stay where it is"


class Plays(torch.nn.Module):
    """Finds mates."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 13)
        for row, tokens in zip(logits, tokens_BL.tolist(), strict=True):
            board, _ = board_of(type("P", (), {"given": tokens, "answer": [0] * 62 + [FROM, TO]}))
            for move in board.legal_moves:
                board.push(move)
                if board.is_checkmate():
                    row[move.from_square, FROM], row[move.to_square, TO] = 9.0, 9.0
                board.pop()
        return logits


def test_who_finds_mates_is_right(tmp_path):
    data = prepare_rated(Chess, ChessData(**SMALL), tmp_path / "data")
    assert data.measure_model(Plays(), 64 * 20, {})["hard_accuracy"] > 0.85
    inputs, targets = data.batch(0, 0, 8, 64)
    right, guessed = Plays()(inputs), torch.zeros(8, 64, 13)
    assert data.measure(right, targets)["solved"] > 0.8
    assert data.loss(guessed, targets) == pytest.approx(2 * torch.tensor(64.0).log())
    assert data.loss(right, targets) < data.loss(guessed, targets)
    title, text = data.show(Plays())
    assert title
    assert "says" in text


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "chess", None)
    with pytest.raises(SpecError, match=r"chess needs the package chess; pip install 'spiralformer\[chess\]'"):
        rules()


def test_from_search_to_export(tmp_path):
    over = ["data.puzzles=40", "data.held_out=16", "data.ratings=[36, 60]", "space.d_model=16",
            "space.graph.h.iterations={sample: progressive, test: [2]}"]  # fmt: skip
    faster = ["training.tokens=2560", "training.batch_tokens=256", "training.eval_tokens=640", "search.num_trials=1"]
    run = tmp_path / "run"
    run_cli("search", "chess", *over, *faster, "--dir", run, "--serial")
    records, _, settings = read_study(run)
    assert [o.name for o in settings.objectives] == ["loss", "hard_accuracy"]
    assert {"solved", "from_right", "extrapolation"} <= records[0].rungs[-1].metrics.keys()
    found = json.loads(run_cli("eval", run / "best", "--tokens", 1024, "--json"))
    assert [row[0] for row in found["rows"]] == ["1-36", "37-60"]


def test_the_shipped_study():
    assert load_study("chess").space.count().high == 6
