"""Live view of a running study: a line for each trial that ends, and a bar where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from searchspace.errors import show
from studies.data.dataset import Dataset
from studies.records.trial import Report, TrialRecord, budget_of
from studies.show.summary import short, summarize
from studies.show.terminal import say
from studies.strategy.driver import StudyDriver

_EVERY_S = 0.25  # faster than an eye follows
_MOST_SHOWN = 12  # trials that run: half a terminal


def failure_of(record: TrialRecord) -> str:
    """Why a trial failed, in a line."""
    lines = record.error.strip().splitlines()
    return f"{record.reason}: {show(lines[-1], 200).strip(chr(39))}" if lines else record.reason or "no reason"


class _Bar(Progress):
    """The bar, below a table of what runs."""

    running: Sequence[tuple[TrialRecord, Report]] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.running:
            yield running_table(self.running)
        yield self.make_tasks_table(self.tasks)


def running_table(live: Sequence[tuple[TrialRecord, Report]]) -> Table:
    """Trials that run: how far, how fast, and the training loss."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("running", "right"), ("", "left"), ("done", "right"), ("step", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("train loss", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for record, report in live[:_MOST_SHOWN]:
        spent = report.flops if record.training.get("flops") else report.tokens
        speed = report.tokens / report.seconds if report.seconds else 0.0
        table.add_row(
            str(record.number),
            summarize(record.arch_spec()),
            f"{spent / budget_of(record):.0%}" if budget_of(record) else "",
            f"{report.steps:,}",
            "" if report.train_loss is None else f"{report.train_loss:.3f}",
            short(speed) if speed else "",
        )
    if len(live) > _MOST_SHOWN:
        table.add_row("", f"and {len(live) - _MOST_SHOWN} more")
    return table


class StudyView:
    """Context manager; its instance is the `execution.Watcher`."""

    def __init__(self, driver: StudyDriver, corpus: Dataset, console: Console) -> None:
        self._driver, self._corpus, self._console = driver, corpus, console
        self._bar = _Bar(
            TextColumn("{task.completed}/{task.total} trials"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[flops]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._shown = 0.0
        self._start = time.monotonic()
        self._ended_before = 0
        self._flops_before = 0.0
        self._predictor = ""
        self._reasons: set[str] = set()

    def __enter__(self) -> StudyView:
        now = self._driver.progress()
        self._ended_before = now.complete + now.stopped + now.failed
        self._flops_before = now.flops_spent
        self._task = self._bar.add_task("", total=now.total, best="", flops="", left="")
        self._bar.start()
        self()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown = 0.0
        self()
        self._bar.stop()

    def __call__(self) -> None:
        if time.monotonic() - self._shown < _EVERY_S or self._task is None:
            return
        self._shown = time.monotonic()
        now = self._driver.progress()
        for record in now.events:
            say(self._console, self._line(record))
        if now.predictor != self._predictor:
            self._predictor = now.predictor
            say(self._console, now.predictor)
        self._bar.running = now.live
        ended = now.complete + now.stopped + now.failed
        headline = self._corpus.headline
        best = f"best {headline.text(now.best.rungs[-1].score)}" if now.best else "no result yet"
        self._bar.update(
            self._task,
            completed=ended,
            total=now.total,
            best=best,
            flops=f"{now.flops_spent:.2g} FLOPs",
            left=self._time_left(ended, now.total, now.flops_spent),
        )

    def _time_left(self, ended: int, total: int, flops: float) -> str:
        """By FLOPs: trials to come are taken to spend what ended ones did on average."""
        elapsed = time.monotonic() - self._start
        new, rate = ended - self._ended_before, (flops - self._flops_before) / max(elapsed, 1e-9)
        if new < 2 or rate <= 0:
            return ""
        seconds = (total - ended) * (flops / max(ended, 1)) / rate
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def _line(self, record: TrialRecord) -> str:
        study = self._driver.study
        alone = not study.search.num_trials and study.scale is None and len(study.baselines) == 1
        baseline = "trained" if alone else "baseline"
        who = {"baseline": baseline, "search": "trial", "promotion": "again", "ladder": "ladder"}[record.purpose]
        if record.state == "failed" and record.reason not in self._reasons:  # once for each reason
            self._reasons.add(record.reason)
            return f"{who:>8} {record.number:>4}  {summarize(record.arch_spec()):<31} failed: {failure_of(record)}"
        bits = self._corpus.headline.text(record.rungs[-1].score) if record.rungs else "no result"
        end = {
            "complete": bits,
            "stopped": f"{bits}, stopped",
            "failed": f"failed: {record.reason}",
        }[record.state]
        what = summarize(record.arch_spec())
        baselines = {arch.name for arch in self._driver.study.baselines}
        is_baseline = record.purpose != "search" and record.name in baselines
        what = f"{record.name}: {what}" if is_baseline else what
        what = f"{what}, size {record.size}" if record.purpose == "ladder" else what
        what = what if record.ranks else f"{what}, seed {record.seed}"
        return f"{who:>8} {record.number:>4}  {what:<31} {end}"
