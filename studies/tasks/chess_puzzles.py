"""Chess: which piece moves where; mates in one of random games, or the puzzles of a CSV as Lichess has it.

The rules are those of the package ``chess`` (the extra ``chess``; its licence is the GPL 3, ours is another). A puzzle
that is made is harder the more moves are legal; a CSV rates its own. A model sees 64 squares from the side of whoever
is to move, rank by rank from its own, and says of each how likely the move is from there, and to there.

Shape legend: B batch, L squares, V outputs of a square.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchspace.errors import SpecError
from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import Headline, Metric
from studies.tasks.graded import HARDER
from studies.tasks.rated import Puzzle, Rated, RatedData, csv_lines, rating_of

if TYPE_CHECKING:
    from torch import Tensor

FROM, TO = 1, 2
"""Answers of the two squares of a move, and the outputs that score them; of other squares, 0."""
_SIGNS = ".PNBRQKpnbrqk"
"""An empty square, own pieces, the other side's: tokens by their place."""
_MADE = (34, 40, 46, 218)
_PLIES = 120  # of a random game
_TRIES = 2_000  # games in vain before a level counts as empty


@dataclass(frozen=True, kw_only=True, slots=True)
class ChessData(RatedData):
    """Mates in one of random games, the same every time; or the puzzles of a CSV."""

    kind: Literal["chess"] = key("Source: chess puzzles.", default="chess")
    path: str | None = key(
        "A CSV with the columns FEN, Moves, Rating, as Lichess has it: the first move leads to the puzzle, the second "
        "solves it; default: mates in one are made.",
        default=None,
    )
    ratings: tuple[int, ...] = key(
        "The highest rating to train on, then of each harder level, the hardest last; default: by the legal moves of a "
        "made puzzle. Of Lichess: [1600, 2000].",
        default=(),
    )

    @property
    def levels(self) -> tuple[int, ...]:
        return self.ratings or _MADE

    @property
    def positions(self) -> int:
        return 64

    @property
    def tokens(self) -> int:
        return len(_SIGNS)

    def make(self, low: int, high: int, seed: int) -> Iterator[Puzzle]:
        return make_mates(low, high, seed)

    def read(self, file: Path) -> Iterator[Puzzle]:
        return read_puzzles(file)


class Chess(Rated):
    """Prepared puzzles; an answer has one square to move from, and one to move to."""

    config = ChessData

    metrics = table(
        "a metric",
        (
            Metric("solved", "solved", "share of held-out puzzles whose move is right", better="higher"),
            *HARDER,
            Metric("from_right", "piece right", "share of held-out puzzles whose piece is right", better="higher"),
            Metric("loss", "nats/move", "held-out loss, nats per move, both squares", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["solved"], -1.0)

    def loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """Cross-entropy over the squares, of both ends of the move."""
        from torch.nn import functional

        scores_BLV = logits_BLV.float()
        ends = [(scores_BLV[..., end], (targets_BL == end).long().argmax(dim=1)) for end in (FROM, TO)]
        return functional.cross_entropy(*ends[0]) + functional.cross_entropy(*ends[1])

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        right_BL = said(logits_BLV) == targets_BL
        piece_B = (right_BL | (targets_BL != FROM)).all(dim=1)
        return {
            "solved": right_BL.all(dim=1).float().mean(),
            "from_right": piece_B.float().mean(),
            "loss": self.loss(logits_BLV, targets_BL),
        }

    def answers(self, model: Any, level: int, positions: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        import torch

        device = next(model.parameters()).device
        with torch.no_grad():
            return [
                (inputs_BL, said(model(inputs_BL.to(device))).cpu(), targets_BL)
                for inputs_BL, targets_BL in self.tried(level, positions)
            ]

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        """The mover's own pieces are capitals, at the bottom; then both moves."""
        cells = [_SIGNS[token] for token in inputs_L.tolist()]
        ranks = ["  ".join((str(rank + 1), *cells[8 * rank : 8 * rank + 8])) for rank in range(7, -1, -1)]
        given, right = (_move(squares) for squares in (said_L, targets_L))
        told = f"says {given}" + ("" if given == right else f" x, it is {right}")
        return "\n".join([*ranks, "   a  b  c  d  e  f  g  h", told])


def said(logits_BLV: Tensor) -> Tensor:
    """The best square to move from, and the best other one to move to, (B, L) of 0, `FROM` and `TO`."""
    import torch

    start_B = logits_BLV[..., FROM].argmax(dim=1, keepdim=True)
    to_BL = logits_BLV[..., TO].scatter(1, start_B, -torch.inf)
    found_BL = torch.zeros(logits_BLV.shape[:2], dtype=torch.long, device=logits_BLV.device)
    return found_BL.scatter(1, start_B, FROM).scatter(1, to_BL.argmax(dim=1, keepdim=True), TO)


def _move(squares_L: Tensor) -> str:
    names = (int((squares_L == end).long().argmax()) for end in (FROM, TO))
    return "".join(f"{'abcdefgh'[at % 8]}{at // 8 + 1}" for at in names)


def rules() -> Any:
    """The package that knows them. Raises `SpecError` if it is not there."""
    try:
        import chess
    except ImportError as error:
        raise SpecError("data", "chess needs the package chess", "pip install 'spiralformer[chess]'") from error
    return chess


def make_mates(low: int, high: int, seed: int) -> Iterator[Puzzle]:
    """Positions of random games with one mate in one, and a number of legal moves in (low, high].

    Raises:
        SpecError: if game after game has none.
    """
    chess = rules()
    draw, vain = random.Random(f"chess {low} {high} {seed}"), 0
    while vain < _TRIES:
        vain += 1
        board = chess.Board()
        for _ in range(_PLIES):
            moves = list(board.legal_moves)
            if not moves:
                break
            if low < len(moves) <= high:
                mates = [move for move in moves if board.gives_check(move) and _is_mate(board, move)]
                if len(mates) == 1:
                    vain = 0
                    yield puzzle_of(board, mates[0], len(moves))
            board.push(draw.choice(moves))
    what = f"no random game has a mate in one out of {low + 1} to {high} legal moves"
    raise SpecError("data.ratings", what, "leave it out")


def _is_mate(board: Any, move: Any) -> bool:
    board.push(move)
    found = bool(board.is_checkmate())
    board.pop()
    return found


def puzzle_of(board: Any, move: Any, rating: int) -> Puzzle:
    """A position and its move, seen from the side that is to move."""
    flip = 0 if board.turn else 56  # ranks change places, as in a mirror
    given = [0] * 64
    for square, piece in board.piece_map().items():
        given[square ^ flip] = piece.piece_type + (0 if piece.color == board.turn else 6)
    answer = [0] * 64
    answer[move.from_square ^ flip], answer[move.to_square ^ flip] = FROM, TO
    return Puzzle(tuple(given), tuple(answer), rating)


def read_puzzles(file: Path) -> Iterator[Puzzle]:
    """Puzzles of a CSV. Raises `SpecError` for one that is none."""
    chess = rules()
    for number, line in csv_lines(file, ("FEN", "Moves", "Rating")):
        try:
            board = chess.Board(line["FEN"])
            first, second, *_ = line["Moves"].split()
            board.push(_legal(board, first))
            yield puzzle_of(board, _legal(board, second), rating_of(line["Rating"]))
        except ValueError as error:
            what = f"line {number} is no puzzle: {error}"
            raise SpecError("data.path", what, "mend it, or leave it out", str(file)) from error


def _legal(board: Any, text: str) -> Any:
    """A move as UCI writes it. Raises ValueError if it can't be made."""
    move = board.parse_uci(text)
    if not move:
        raise ValueError(f"{text} moves nothing")
    return move
