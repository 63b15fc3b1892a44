"""What one change is worth: trials that differ from the first in a single decision, as an ablation's do."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.box import SIMPLE
from rich.table import Table

from searchspace.choices import Scalar
from studies.data.dataset import Dataset
from studies.records.trial import TrialRecord, budget_of
from studies.show.summary import summarize

_FEWEST = 3  # changes that make a table


@dataclass(frozen=True, slots=True)
class Change:
    """One decision taken otherwise."""

    decision: str
    record: TrialRecord
    """The trial of the change."""
    scores: tuple[float, ...]
    """Against the first trial of the same seed, a seed each."""

    @property
    def effect(self) -> float:
        """Mean over seeds; below 0 is better."""
        return mean(self.scores)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one seed."""
        return stdev(self.scores) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else None


def changes_of(records: Sequence[TrialRecord]) -> tuple[TrialRecord, list[Change]] | None:
    """The first searched trial, and those that differ from it in one decision; None if they are not most of a study."""
    done = [r for r in records if r.state == "complete" and r.purpose == "search" and r.choices]
    if len(done) <= _FEWEST:
        return None
    common = min(done, key=lambda record: record.number)
    found = [(o, name) for o in done if (name := _changed(common.choices, o.choices)) is not None]
    if len(found) < max(_FEWEST, (len(done) - 1) / 2):
        return None
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        again = record.purpose == "promotion" and budget_of(record) == budget_of(common)
        if record.state == "complete" and (again or record in done):
            scores[record.arch_id].setdefault(record.seed, record.rungs[-1].score)
    base = scores[common.arch_id]
    changes = []
    for record, name in found:
        own = scores[record.arch_id]
        changes.append(Change(name, record, tuple(own[s] - base[s] for s in sorted(base.keys() & own.keys()))))
    return common, sorted(
        (c for c in changes if c.scores), key=lambda c: (list(common.choices).index(c.decision), c.effect)
    )


def _changed(a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> str | None:
    """The one decision of both that differs; what only one of them decides hangs on it."""
    differ = [name for name in a if name in b and a[name] != b[name]]
    return differ[0] if len(differ) == 1 else None


def same_of(common: TrialRecord) -> str:
    """The trial that all are compared with."""
    return f"trial {common.number}, {summarize(common.arch_spec())}"


def change_row(change: Change, corpus: Dataset) -> tuple[str, str, str, str, str]:
    """Decision, what was decided, effect, its standard error, seeds."""
    error = "" if change.error is None else f"{corpus.headline.spread(change.error):.3f}"
    effect = f"{corpus.headline.value(change.effect):+.3f}"
    return change.decision, _taken(change), effect, error, f"{len(change.scores)}"


def _taken(change: Change) -> str:
    """What was decided; of a whole section or schedule, the architecture that it makes."""
    value = change.record.choices[change.decision]
    return summarize(change.record.arch_spec()) if str(value).startswith(("{", "[")) else f"{value}"


def changes_table(records: Sequence[TrialRecord], corpus: Dataset) -> Table | None:
    """What each change is worth; None of a study that does not change one thing at a time."""
    if (told := changes_of(records)) is None:
        return None
    common, changes = told
    table = Table(title=f"One change at a time, against {same_of(common)}", title_justify="left", box=SIMPLE)
    for name in ("decision", "changed to"):
        table.add_column(name, overflow="fold")
    for name in (corpus.headline.label, "± error", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    for change in changes:
        table.add_row(*change_row(change, corpus))
    return table
