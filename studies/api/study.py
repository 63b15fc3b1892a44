"""A study's folder as an object: trials, the best, the front, tables, exports."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.pricing.cost import COSTS
from studies.config import StudyConfig, most_trials
from studies.data.dataset import Headline
from studies.records.folder import REPORT, is_driven
from studies.records.reading import read_study
from studies.records.trial import TrialRecord
from studies.report.ranking import best_of, front
from studies.show.summary import summarize

if TYPE_CHECKING:
    import pandas


class Study:
    """What a search has found so far. It reads the folder, and may be made while the search runs.

    Args:
        folder: that ``spiralformer search`` or `studies.search` made.

    Raises:
        SpecError: if it is no study's folder, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._trials, self._data, self._settings = read_study(self.folder)

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}: {len(self._trials)} trials)"

    @property
    def settings(self) -> StudyConfig:
        """What was searched, and how."""
        return self._settings

    @property
    def headline(self) -> Headline:
        """How a trial's score is told: ``study.headline.text(trial.score)``."""
        return self._data.headline

    @property
    def trials(self) -> list[TrialRecord]:
        """Every trial, by number: baselines, searched ones, those trained again, and a ladder's runs."""
        return list(self._trials)

    @property
    def best(self) -> TrialRecord | None:
        """The lowest score among searched trials that spent the full budget; None as long as there is none.

        Where the best were trained again with other seeds, their average counts.
        """
        return best_of(self._trials)

    @property
    def baseline(self) -> TrialRecord | None:
        """The lowest score among the baselines; None as long as none is complete."""
        return best_of(self._trials, purpose="baseline")

    @property
    def source(self) -> str:
        """What its data are."""
        return self._data.facts.source

    @property
    def content(self) -> str:
        """Digest of its data."""
        return self._data.facts.content

    @property
    def front(self) -> list[TrialRecord]:
        """Complete trials, baselines among them, that no other beats in every objective."""
        return front(self._trials, self._settings.objectives)

    def reload(self) -> Study:
        """The same folder, read again."""
        self._trials, self._data, self._settings = read_study(self.folder)
        return self

    def to_dict(self) -> dict[str, Any]:
        """How far it is and what it has found, as plain data."""
        driven = is_driven(self.folder)
        states = Counter[str](record.state for record in self._trials)
        if not driven and "running" in states:
            states["interrupted"] = states.pop("running")
        return {
            "name": self._settings.name,
            "folder": str(self.folder),
            "driven": driven,
            "trials": {"total": max(most_trials(self._settings), len(self._trials)), **states},
            "training_flops": sum(record.flops for record in self._trials),
            "metric": self.headline.metric.name,
            **{
                what: None if record is None else self._row(record)
                for what, record in (("best", self.best), ("baseline", self.baseline))
            },
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a trial: what it is, what it measured last, its cost, and as ``params_NAME`` what was decided."""
        rows = [self._row(record) for record in self._trials]
        frame: pandas.DataFrame = import_module("pandas").DataFrame(rows)
        return frame.set_index("number") if rows else frame

    def _row(self, record: TrialRecord) -> dict[str, Any]:
        row: dict[str, Any] = {
            "number": record.number,
            "purpose": record.purpose,
            "state": record.state,
            "name": record.name,
            "architecture": summarize(record.arch_spec()),
            "arch_id": record.arch_id,
            "seed": record.seed,
            **{name: getattr(record.cost, name) for name in COSTS},
            "training_flops": record.flops,
            "tokens": record.tokens,
            "steps": record.steps,
            "seconds": record.seconds,
            "reason": record.reason,
            **{f"params_{name}": value for name, value in record.choices.items()},
        }
        measured = record.rungs[-1].metrics if record.rungs else {}
        return {**row, **{f"metric_{name}" if name in row else name: value for name, value in measured.items()}}

    def export(self, out: str | Path, *, trial: int | None = None, format: str = "bundle") -> Path:
        """Write a trained model, as ``spiralformer export`` does.

        Args:
            out: folder or file to write.
            trial: number of a complete trial; None: the best.
            format: ``bundle``, ``hf`` or ``torch``.

        Raises:
            SpecError: if there is no such trial, format or place, or its weights were trained by a function of one's
                own, which alone knows where they are.
        """
        from rich.console import Console

        from studies.commands.export import run_export

        run_export(self.folder, Console(quiet=True), number=trial, form=format, out=Path(out))
        return Path(out)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page with ranking, plots and diagrams; by default ``report.html`` in the folder."""
        from studies.report.page import write_html

        return write_html(self._trials, self._settings, self._data, Path(out) if out else self.folder / REPORT)


def open_study(folder: str | Path) -> Study:
    """A study's folder as `Study`. Raises `SpecError` if it is none."""
    return Study(folder)
