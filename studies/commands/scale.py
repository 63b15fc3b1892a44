"""A ladder's losses as a table of candidates at a larger size."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from searchspace.disk import read_bytes
from searchspace.errors import SpecError, one_of, printable, show
from studies.scale.law import Run
from studies.scale.pairs import FARTHEST, Answer, rate
from studies.show.summary import short
from studies.show.terminal import say

_NEEDED = ("candidate", "size", "tokens", "loss")
_OPTIONAL = ("seed", "rung")
_MAX_BYTES = 1 << 24
_FURTHER = 10.0  # times the largest size, where no target is given
_DIGITS = 18  # of a seed
_LIKELY, _SURE = 0.5, 0.9


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
    file: Path,
    console: Console,
    *,
    baseline: str | None,
    size: float | None,
    tokens: float | None,
    confidence: float,
) -> None:
    """Print what a ladder says at a target.

    Args:
        file: its runs, as CSV.
        console: to print on.
        baseline: candidate that others are held against; None: the first.
        size: of the target, in parameters; None: ten times the largest.
        tokens: that it sees; None: as many for each parameter as the largest had.
        confidence: of the intervals.

    Raises:
        SpecError: if the file can't be read, or its ladder is too short.
    """
    runs = read_runs(file)
    names = list(dict.fromkeys(run.candidate for run in runs))
    for option, given in (("--size", size), ("--tokens", tokens)):
        if given is not None and not math.isfinite(given):
            raise SpecError(option, f"{given} is no number to reach", "write it as 1e9")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise SpecError("--baseline", f"{show(baseline)} is no candidate of {file}", one_of(names, baseline))
    largest = max(runs, key=lambda run: (run.size, run.tokens))
    size = size or _FURTHER * largest.size
    tokens = tokens or largest.tokens / largest.size * size
    with console.status("fitting"):
        answer = rate(runs, baseline, size, tokens, confidence=confidence)
    console.print(_table(answer))
    for line in _sentences(answer, runs):
        say(console, line)


def _table(answer: Answer) -> Table:
    target = f"{short(answer.size)} parameters and {short(answer.tokens)} tokens"
    table = Table(
        title=f"At {target}, against {escape(answer.baseline)}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("candidate", overflow="fold", min_width=12)
    level = f"{answer.confidence:.0%}"
    for name in ("loss", level, "worth", level, "best", "top"):
        table.add_column(name, justify="right", no_wrap=True)
    for rated in answer.rated:
        is_baseline = rated.candidate == answer.baseline
        (low, high), (less, more) = rated.interval, rated.multiplier_interval
        values = (
            ["baseline", "", "1.00x", ""]
            if is_baseline
            else [
                f"{rated.difference:+.4f}",
                f"{low:+.4f} {high:+.4f}",
                f"{_times(rated.multiplier)}",
                f"{_times(less)} {_times(more)}",
            ]
        )
        at_top = "" if is_baseline else f"{rated.at_top:+.4f}"
        table.add_row(
            escape(rated.candidate), *values, f"{rated.best:.0%}", at_top, style="bold" if is_baseline else ""
        )
    return table


def _times(multiplier: float) -> str:
    if multiplier >= FARTHEST:
        return f">{FARTHEST:.0f}x"
    return f"<{1 / FARTHEST:g}x" if multiplier <= 1 / FARTHEST else f"{multiplier:.2f}x"


def _sentences(answer: Answer, runs: list[Run]) -> list[str]:
    best = max(answer.rated, key=lambda rated: rated.best)
    first = (
        f"{best.candidate} is the best with a probability of {best.best:.0%}"
        if best.best >= _LIKELY
        else f"No candidate is the best with a probability of {_LIKELY:.0%}: this ladder cannot tell"
    )
    lines = [first + ("." if best.best >= _SURE or best.best < _LIKELY else ": likely, not sure.")]
    if best.candidate != answer.baseline:
        low, high = best.multiplier_interval
        lines.append(
            f"{answer.baseline} would need {_times(best.multiplier)} the compute for its loss "
            f"({answer.confidence:.0%} interval {_times(low)} to {_times(high)})."
        )
    crossing = [f"{r.candidate} at {short(r.crosses)} parameters" for r in answer.rated if r.crosses is not None]
    if crossing:
        lines.append(f"The fitted difference to {answer.baseline} changes its sign for {', '.join(crossing)}.")
    between = "between seeds" if answer.seeds else "between seeds, it is assumed: no rung has two"
    lines.append(
        f"{len(runs)} runs at {len({run.size for run in runs})} sizes; a difference varies by {answer.seed_spread:.4f} "
        f"{between}, and the law errs by about {answer.form:.4f}. Under 'top' is what the largest size measured."
    )
    return lines
