"""Two studies beside each other."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from studies.api.study import Study
from studies.records.trial import TrialRecord
from studies.show.summary import short, summarize
from studies.show.terminal import say

_FEWEST = 4  # architectures in both: a rank correlation of fewer says nothing


def compare_studies(first: Path, second: Path, console: Console) -> None:
    """What each asked, spent and found, and how what both trained came out. Raises `SpecError` for what is no study."""
    studies = [Study(first), Study(second)]
    table = Table(box=SIMPLE)
    table.add_column("")
    for study in studies:
        table.add_column(str(study.folder), overflow="fold")
    rows = [dict(_facts(study)) for study in studies]
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        values = [row.get(name, "") for row in rows]
        table.add_row(name, *values)
    console.print(table)
    for line in _verdict(*studies):
        say(console, line)


def _facts(study: Study) -> list[tuple[str, str]]:
    settings, records = study.settings, study.trials
    training = settings.plain.get("training", {})
    budget = next((f"{name} {training[name]}" for name in ("flops", "tokens") if name in training), "")
    told = [
        ("data", study.source),
        ("task", settings.task.name),
        ("training", budget),
        ("sampler", settings.search.sampler),
        ("objectives", ", ".join(each.name for each in settings.objectives)),
        ("trials", f"{sum(r.state == 'complete' for r in records)} complete of {len(records)}"),
        ("training FLOPs", short(sum(record.flops for record in records))),
    ]
    for what, record in (("baseline", study.baseline), ("best", study.best)):
        if record is not None and record.score is not None:
            told.append((what, f"{study.headline.text(record.score)}: {summarize(record.arch_spec())}"))
            told.append((f"{what}, parameters", short(record.cost.params)))
    return told


def _verdict(first: Study, second: Study) -> list[str]:
    if first.settings.task.name != second.settings.task.name:
        return ["their tasks differ: nothing else compares"]
    if first.settings.train != second.settings.train:
        return ["they were trained by different functions: nothing else compares"]
    lines = []
    if first.content != second.content:
        lines.append("their data differ: values do not compare, orders may")
    elif first.settings.plain.get("training") != second.settings.plain.get("training"):
        lines.append("their training differs: values compare as results of both, architecture and training")
    ours, theirs = _by_architecture(first), _by_architecture(second)
    shared = sorted(ours.keys() & theirs.keys())
    lines.append(f"{len(shared)} architectures are complete in both")
    if len(shared) >= _FEWEST:
        pairs = [(ours[key].score or 0.0, theirs[key].score or 0.0) for key in shared]
        tau = kendalltau(*zip(*pairs, strict=True)).statistic
        lines[-1] += f"; Kendall's tau of their orders {tau:+.2f}" if math.isfinite(tau) else ""
    best = [study.best for study in (first, second)]
    if first.content == second.content and all(record is not None and record.score is not None for record in best):
        a, b = (record.score for record in best if record is not None and record.score is not None)
        winner, gap = (first, second) if a < b else (second, first), abs(first.headline.value(a - b))
        lines.append(f"the best of {winner[0].folder} is {gap:.3f} {first.headline.label} better")
    return lines


def _by_architecture(study: Study) -> dict[str, TrialRecord]:
    """Complete trials of the search and baselines, one for each architecture."""
    return {record.arch_id: record for record in study.trials if record.ranks and record.score is not None}
