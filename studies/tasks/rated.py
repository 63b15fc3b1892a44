"""Puzzles with a rating: trained up to one, tried beyond; made as they are needed, or read from a CSV that rates them.

Shape legend: B batch, L positions.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

from searchspace.errors import SpecError
from searchspace.plain import decode, key
from studies.data.corpus import find_path
from studies.data.dataset import DataFacts, Examination
from studies.data.settings import DataConfig
from studies.tasks.graded import Graded
from studies.tasks.pairs import prepare_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

RatedType = TypeVar("RatedType", bound="Rated")


class Puzzle(NamedTuple):
    """What is given, and the answer, a number for each position; and how hard it is."""

    given: tuple[int, ...]
    answer: tuple[int, ...]
    rating: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedData(DataConfig):
    """Settings that all such tasks share."""

    path: str | None = key("A CSV that brings ratings of its own; default: they are made.", default=None)
    ratings: tuple[int, ...] = key(
        "The highest rating to train on, then of each harder level, the hardest last; default: by the task.",
        default=(),
    )
    puzzles: int = key("Of them to train on.", default=5_000, low=16, high=10_000_000)
    held_out: int = key("More of them, to evaluate on.", default=500, low=16, high=1_000_000)

    def __post_init__(self) -> None:
        if self.path is not None and not self.ratings:
            raise SpecError("data.ratings", "are missing", "say up to which rating of the file to train, then try")
        if list(self.ratings) != sorted({*self.ratings}) or any(rating < 1 for rating in self.ratings):
            raise SpecError("data.ratings", f"{[*self.ratings]} are not in order", "give them from easy to hard")

    @property
    def levels(self) -> tuple[int, ...]:
        """Highest ratings, that of training first."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """Of a puzzle."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Different ones."""
        raise NotImplementedError

    def make(self, low: int, high: int, seed: int) -> Iterator[Puzzle]:
        """Puzzles rated in (low, high], the same every time. Raises `SpecError` if there are none."""
        raise NotImplementedError

    def read(self, file: Path) -> Iterator[Puzzle]:
        """Those of a CSV. Raises `SpecError` for one that is none."""
        raise NotImplementedError

    def easy(self, file: Path) -> tuple[list[Puzzle], list[Puzzle]]:
        """Those of a CSV to train on, and those held out: the last tenth."""
        found = [puzzle for puzzle in self.read(file) if puzzle.rating <= self.levels[0]]
        if len(found) < 2:
            what = f"{len(found)} lines have a rating up to {self.levels[0]}"
            raise SpecError("data.ratings", what, "raise the first", file=str(file))
        first = len(found) - max(1, len(found) // 10)
        return found[:first], found[first:]


class Rated(Graded):
    """Prepared puzzles of a task."""

    config: ClassVar[type[RatedData]]

    @property
    def told(self) -> RatedData:
        """The settings that they were made with."""
        return decode(self.config, dict(self.facts.settings))

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        return _rows(list(itertools.islice(_at_level(self.told, level, seed), count)))

    def name(self, level: int) -> str:
        return f"{_below(self.told, level) + 1}-{level}"


def _below(config: RatedData, level: int) -> int:
    """The highest rating of the level before."""
    at = config.levels.index(level)
    return config.levels[at - 1] if at else 0


def _at_level(config: RatedData, level: int, seed: int) -> Iterator[Puzzle]:
    low = _below(config, level)
    if config.path is None:
        kept = _kept(config, low, level, seed)
        for i in itertools.count():
            if i == len(kept.made):
                kept.made.append(next(kept.rest))
            yield kept.made[i]
    if level == config.levels[0]:
        yield from config.easy(Path(cast(str, config.path)))[1]
        return
    found = [puzzle for puzzle in config.read(Path(cast(str, config.path))) if low < puzzle.rating <= level]
    if not found:
        raise SpecError("data.ratings", f"no line has a rating from {low + 1} to {level}", "leave it out")
    yield from found


@dataclass
class _Kept:
    """Puzzles that were made, and those to come."""

    made: list[Puzzle]
    rest: Iterator[Puzzle]


@lru_cache(maxsize=64)
def _kept(config: RatedData, low: int, high: int, seed: int) -> _Kept:
    """Each is made once in a process."""
    return _Kept([], config.make(low, high, seed))


atexit.register(_kept.cache_clear)  # while what frees their solvers is there


def _rows(puzzles: list[Puzzle]) -> NDArray[Any]:
    """Rows (N, 2 L) of uint8: what is given, then the answers."""
    import numpy as np

    return np.array([[*puzzle.given, *puzzle.answer] for puzzle in puzzles], np.uint8)


def prepare_rated(kind: type[RatedType], config: RatedData, folder: Path, base: Path) -> RatedType:
    """Write puzzles under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""
    facts = facts_of(config, base)

    def make(part: str) -> NDArray[Any]:
        count, seed = (config.puzzles, 0) if part == "train" else (config.held_out, 1)
        if config.path is None:
            return _rows(list(itertools.islice(config.make(0, config.levels[0], seed), count)))
        train, held_out = config.easy(Path(facts.settings["path"]))
        return _rows((train if part == "train" else held_out)[:count])

    return prepare_pairs(kind, config, facts, folder, make)


def examine(kind: type[Rated], model: Any, config: RatedData, positions: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh puzzles, by their rating."""
    return kind.of(facts_of(config)).examine(model, positions, tried)


def facts_of(config: RatedData, base: Path = Path()) -> DataFacts:
    """What the data of these settings are, before they are made."""
    puzzles, held_out = config.puzzles, config.held_out
    if config.path is not None:
        config = replace(config, path=str(find_path(config.path, base).absolute()))
        train, rest = config.easy(Path(cast(str, config.path)))
        puzzles, held_out = min(puzzles, len(train)), min(held_out, len(rest))
    return DataFacts(
        kind=config.kind,
        task=config.kind,
        vocab_size=config.tokens,
        dtype="uint8",
        train_tokens=2 * config.positions * puzzles,
        val_tokens=2 * config.positions * held_out,
        positions=config.positions,
        levels=config.levels,
        settings=config.settings(),
        source=f"{puzzles} puzzles of {config.kind}, ratings up to {config.levels[0]}",
    )
