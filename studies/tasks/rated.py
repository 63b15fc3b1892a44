"""Puzzles with a rating: trained up to one, tried beyond; made as they are needed, or read from a CSV that rates them.

A CSV is read once, when the data are prepared, and what its levels are tried on is kept beside them: a file that
changes or moves later changes nothing.

Shape legend: B batch, L positions.
"""

from __future__ import annotations

import atexit
import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

from searchspace.disk import sha256_of, write_file
from searchspace.errors import SpecError, one_of
from searchspace.plain import decode, key
from studies.data.corpus import find_path
from studies.data.dataset import DataFacts, Examination, prepare_once
from studies.data.settings import DataConfig
from studies.tasks.graded import Graded

if TYPE_CHECKING:
    from numpy.typing import NDArray

RatedType = TypeVar("RatedType", bound="Rated")
LEVELS = "levels.npz"
_TRIED = 500  # puzzles of a level that are kept
_EVERY = 10  # of the easy lines of a CSV one is held out


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
    sha256: str | None = key("Of the CSV, which must be this one; noted when it is read.", default=None)

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

    def below(self, level: int) -> int:
        """The highest rating of the level before."""
        at = self.levels.index(level)
        return self.levels[at - 1] if at else 0


@dataclass
class _Kept:
    """Puzzles that were made, those to come, and why there are no more."""

    rest: Iterator[Puzzle]
    puzzles: list[Puzzle] = field(default_factory=list)
    error: SpecError | None = None


@dataclass
class _File:
    """What is taken of a CSV."""

    train: list[Puzzle] = field(default_factory=list)
    held_out: list[Puzzle] = field(default_factory=list)
    levels: dict[int, list[Puzzle]] = field(default_factory=dict)


def csv_lines(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a CSV with their numbers, each with these columns. Raises `SpecError` if it can't be read."""
    if not file.is_file():
        raise SpecError("data.path", f"no such file: {file}", f"give a CSV with the columns {', '.join(columns)}")
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            lines = csv.reader(opened)
            head = [name.strip() for name in next(lines, [])]
            if lacks := [name for name in columns if name not in head]:
                what = f"has no column {lacks[0]} in its first line"
                raise SpecError("data.path", what, one_of(head, lacks[0]), str(file))
            at = {name: head.index(name) for name in columns}
            for line in lines:
                if line:
                    found = {name: line[place].strip() if place < len(line) else "" for name, place in at.items()}
                    yield lines.line_num, found
    except (UnicodeDecodeError, csv.Error) as error:
        what = f"is no CSV in UTF-8: {error}"
        raise SpecError("data.path", what, "save it as one", str(file)) from error


def rating_of(text: str) -> int:
    """A rating of a CSV, as a whole number. Raises ValueError if it is none."""
    try:
        return round(float(text))
    except OverflowError as error:
        raise ValueError(f"{text} is no rating") from error


@lru_cache(maxsize=4)
def _take(config: RatedData, file: Path, stamp: tuple[int, int]) -> _File:
    """Read a CSV up to what is needed; each puzzle counts once. ``stamp``: its size and time of change."""
    found, seen = _File(levels={level: [] for level in config.levels[1:]}), set[tuple[int, ...]]()
    easy = 0
    for puzzle in config.read(file):
        if puzzle.given in seen or puzzle.rating > config.levels[-1]:
            continue
        level = next(level for level in config.levels if puzzle.rating <= level)
        if level == config.levels[0]:
            easy += 1
            part, most = (found.held_out, config.held_out) if easy % _EVERY == 2 else (found.train, config.puzzles)
        else:
            part, most = found.levels[level], _TRIED
        if len(part) < most:
            seen.add(puzzle.given)
            part.append(puzzle)
        full = len(found.train) == config.puzzles and len(found.held_out) == config.held_out
        if full and all(len(each) == _TRIED for each in found.levels.values()):
            break
    if not found.train or not found.held_out:
        what = f"{easy} lines have a rating up to {config.levels[0]}"
        raise SpecError("data.ratings", what, "raise the first", file=str(file))
    for level, puzzles in found.levels.items():
        if not puzzles:
            what = f"no line has a rating from {config.below(level) + 1} to {level}"
            raise SpecError("data.ratings", what, "leave it out", file=str(file))
    return found


def _file_of(config: RatedData) -> _File:
    file = Path(cast(str, config.path))
    if not file.is_file():
        raise SpecError("data.path", f"no such file: {file}", "give the CSV that it was trained on")
    if config.sha256 is not None and _digest(file, _stamp(file)) != config.sha256:
        raise SpecError("data.path", "is not the file that was read before", "restore it", file=str(file))
    return _take(replace(config, sha256=None), file, _stamp(file))


def _stamp(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


@lru_cache(maxsize=8)
def _digest(file: Path, stamp: tuple[int, int]) -> str:
    return sha256_of(file)


class Rated(Graded):
    """Prepared puzzles of a task."""

    config: ClassVar[type[RatedData]]

    @property
    def told(self) -> RatedData:
        """The settings that they were made with."""
        return decode(self.config, dict(self.facts.settings))

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        import numpy as np

        folder: Path | None = getattr(self, "folder", None)
        if folder is not None and (folder / LEVELS).is_file():
            if level == self.facts.levels[0]:
                return self.rows(self.val)[:count]
            with np.load(folder / LEVELS) as kept:
                found: NDArray[Any] = kept[str(level)][:count]
            return found
        return _rows(list(itertools.islice(_at_level(self.told, level, seed), count)))

    def name(self, level: int) -> str:
        return f"{self.told.below(level) + 1}-{level}"


def _at_level(config: RatedData, level: int, seed: int) -> Iterator[Puzzle]:
    if config.path is not None:
        file = _file_of(config)
        yield from file.held_out if level == config.levels[0] else file.levels[level]
        return
    kept = _kept(config, config.below(level), level, seed)
    for i in itertools.count():
        if i == len(kept.puzzles):
            if kept.error is not None:
                raise kept.error
            try:
                kept.puzzles.append(next(kept.rest))
            except SpecError as error:
                kept.error = error
                raise
        yield kept.puzzles[i]


@lru_cache(maxsize=64)
def _kept(config: RatedData, low: int, high: int, seed: int) -> _Kept:
    """Each is made once in a process."""
    return _Kept(rest=config.make(low, high, seed))


atexit.register(_kept.cache_clear)  # while what frees their solvers is there


def _rows(puzzles: list[Puzzle]) -> NDArray[Any]:
    """Rows (N, 2 L) of uint8: what is given, then the answers."""
    import numpy as np

    return np.array([[*puzzle.given, *puzzle.answer] for puzzle in puzzles], np.uint8)


def prepare_rated(kind: type[RatedType], config: RatedData, folder: Path, base: Path = Path()) -> RatedType:
    """Write puzzles under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""

    def write(work: Path) -> DataFacts:
        import numpy as np

        facts = facts_of(config, base)
        told = decode(type(config), dict(facts.settings))
        if told.path is None:
            for level in told.levels[1:]:
                next(_at_level(told, level, 2))  # or it says now that there is none
            train, held_out = (
                list(itertools.islice(told.make(0, told.levels[0], seed), count))
                for seed, count in enumerate((told.puzzles, told.held_out))
            )
        else:
            file = _file_of(told)
            train, held_out = file.train, file.held_out
            levels: dict[str, Any] = {str(level): _rows(found) for level, found in file.levels.items()}
            np.savez(packed := io.BytesIO(), **levels)
            write_file(work / LEVELS, packed.getvalue())
        for part, puzzles in (("train", train), ("val", held_out)):
            write_file(work / f"{part}.bin", _rows(puzzles).tobytes())
        return facts

    return prepare_once(kind, config, folder, write)


def examine(kind: type[Rated], model: Any, config: RatedData, positions: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh puzzles, by their rating."""
    return kind.of(facts_of(config)).examine(model, positions, tried)


def facts_of(config: RatedData, base: Path = Path()) -> DataFacts:
    """What the data of these settings are, before they are made."""
    puzzles, held_out = config.puzzles, config.held_out
    if config.path is not None:
        config = replace(config, path=str(find_path(config.path, base).absolute()))
        file, path = _file_of(config), Path(cast(str, config.path))
        puzzles, held_out = len(file.train), len(file.held_out)
        config = replace(config, sha256=_digest(path, _stamp(path)))
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
