"""A ladder's losses as a table of candidates at a larger size."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from rich.console import Console

from searchspace.disk import read_bytes
from searchspace.errors import SpecError, one_of, printable, show
from studies.commands.results import show_answer
from studies.records.reading import read_study
from studies.report.scaling import tell, tell_study
from studies.scale.law import Run

_NEEDED = ("candidate", "size", "tokens", "loss")
_OPTIONAL = ("seed", "rung")
_MAX_BYTES = 1 << 24
_DIGITS = 18  # of a seed


def read_runs(file: Path) -> list[Run]:
    """Runs of a ladder from a CSV file: candidate, size, tokens, loss; seed and rung may be there.

    Runs of one rung and seed saw the same batches; without the column, those of one size and number of tokens.

    Raises:
        SpecError: for a file that is none, a column that is missing, a value that is no number: with its line.
    """
    try:
        text = read_bytes(file, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError("", f"is not UTF-8 text (byte {error.start})", "save it as UTF-8", file=str(file)) from error
    rows = csv.DictReader(io.StringIO(text))
    try:
        names = [name.strip() for name in rows.fieldnames or ()]
        rows.fieldnames = names
        lines = [(row, rows.line_num) for row in rows]
    except csv.Error as error:
        raise SpecError("", f"is no CSV: {error}", "separate values by commas", str(file), rows.line_num) from error
    for name in _NEEDED:
        if name not in names:
            raise SpecError(name, "is no column", f"give {', '.join(_NEEDED)} in its first line", file=str(file))
    for name in names:
        if name not in (*_NEEDED, *_OPTIONAL):
            raise SpecError(name, "unknown column", one_of((*_NEEDED, *_OPTIONAL), name), file=str(file))
    runs = [_run(row, line, file) for row, line in lines]
    if not runs:
        raise SpecError("", "holds no runs", "give one line for each", file=str(file))
    return runs


def _run(row: dict[str, str | None], line: int, file: Path) -> Run:
    def number(name: str) -> float:
        text = row[name] or ""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise SpecError(name, f"{show(text)} is no positive number", "write it as 1.5e6", str(file), line)
        return value

    if None in row or None in row.values():
        raise SpecError("", "has more or fewer values than columns", "give one for each", str(file), line)
    seed = (row.get("seed") or "0").strip()
    if not (seed.isascii() and seed.isdecimal() and len(seed) <= _DIGITS):
        raise SpecError("seed", f"{show(seed)} is no whole number", "write 0, 1, ...", str(file), line)
    candidate = printable((row["candidate"] or "").strip())
    if not candidate:
        raise SpecError("candidate", "is empty", "name it", str(file), line)
    size, tokens = number("size"), number("tokens")
    rung = (row.get("rung") or "").strip() or f"{size:g}-{tokens:g}"
    return Run(candidate, size, tokens, number("loss"), rung, int(seed))


def scale_ladder(
    ladder: Path,
    console: Console,
    *,
    baseline: str | None,
    size: float | None,
    tokens: float | None,
    confidence: float,
) -> None:
    """Print what a ladder says at a target.

    Args:
        ladder: a study's folder, or its runs as CSV.
        console: to print on.
        baseline: candidate that others are held against; None: the first.
        size: of the target, in parameters; None: the study's, or ten times the largest.
        tokens: that it sees; None: as many for each parameter as the largest had.
        confidence: of the intervals.

    Raises:
        SpecError: if it can't be read, or is too short.
    """
    for option, given in (("--size", size), ("--tokens", tokens)):
        if given is not None and not math.isfinite(given):
            raise SpecError(option, f"{given} is no number to reach", "write it as 1e9")
    study = read_study(ladder) if ladder.is_dir() else None
    runs = read_runs(ladder) if study is None else []
    with console.status("fitting"):
        if study is None:
            told = tell(runs, baseline=baseline, size=size, tokens=tokens, confidence=confidence)
        else:
            records, corpus, settings = study
            told = tell_study(
                records, settings, corpus, baseline=baseline, size=size, tokens=tokens, confidence=confidence
            )
    show_answer(told, console)
