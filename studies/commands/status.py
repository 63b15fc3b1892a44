"""Following a study that another process drives."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from studies.config import most_trials
from studies.records.folder import is_driven
from studies.records.reading import read_study
from studies.report.ranking import best_of, notes, ranking_table
from studies.show.summary import summarize

_STATUS_EVERY_S = 2.0  # reading a journal of 10,000 trials takes a second
_REPORT_EVERY_S = 10.0  # a page takes a second to write, and as long to load


def show_status(folder: Path, console: Console) -> None:
    """A few lines. Raises `SpecError` if the folder holds no study."""
    console.print(_status(folder, table=False))


def watch_status(folder: Path, console: Console) -> None:
    """Lines and the best ten, until nothing drives the study."""
    with Live(_status(folder, table=True), console=console, auto_refresh=False) as live:
        while is_driven(folder):
            time.sleep(_STATUS_EVERY_S)
            live.update(_status(folder, table=True), refresh=True)


def watch_report(folder: Path, console: Console) -> None:
    """Write ``report.html``, which loads itself again, until nothing drives the study."""
    from studies.report.page import write_html

    while is_driven(folder):
        records, corpus, settings = read_study(folder)
        start = time.monotonic()
        page = folder / "report.html"
        file = write_html(records, settings, corpus, page, refresh_s=int(_REPORT_EVERY_S), driven=True)
        ended = sum(record.state != "running" for record in records)
        console.print(f"{time.strftime('%H:%M:%S')}  {ended} trials ended; wrote {file}", highlight=False)
        time.sleep(max(_REPORT_EVERY_S, 10 * (time.monotonic() - start)))  # a tenth of the time, however large it is


def _status(folder: Path, *, table: bool) -> RenderableType:
    records, corpus, settings = read_study(folder)
    driven = is_driven(folder)
    total = max(most_trials(settings), len(records))
    ended = sum(record.state != "running" for record in records)
    lines: list[RenderableType] = [Text.from_markup(f"[bold]{settings.name}[/]: {ended} of {total} trials ended")]
    if table:
        lines.append(Padding(ProgressBar(total=total, completed=ended, width=60), 0))  # on a line of its own
    for purpose in ("search", "baseline"):
        if (best := best_of(records, purpose=purpose)) is not None:
            told = corpus.headline.text(best.rungs[-1].score)
            label = "best" if purpose == "search" else f"baseline {best.name}"
            lines.append(Text(f"{label}: trial {best.number}, {summarize(best.arch_spec())}, {told}"))
    lines.append(Text(notes(records, corpus, driven=driven)[0]))
    if settings.scale is not None and settings.scale.allot:
        lines.append(Text("its ladder may need fewer runs: what can't change the answer is left out"))
    if ended < total and not driven:
        lines.append(Text("nobody drives it now; the same search command goes on"))
    if table and ended:
        lines.append(ranking_table(records, corpus, objectives=settings.objectives, top=10))
    return Group(*lines)
