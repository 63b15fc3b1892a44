"""Ranking of a study, and notes on it, from its journal alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from builder.pricing.cost import COSTS
from studies.data.dataset import Dataset
from studies.records.trial import TrialRecord
from studies.report.finalists import final_lines, promotions
from studies.sections import LOSS, Objective
from studies.show.summary import labels, short, span, summarize
from studies.training.plan import FEW_STEPS

_MIN_FOR_NOTE = 8  # trials: with fewer, a rank correlation is noise
_MORE_SEEN = 1.05  # times the data: less is no reason for a better loss
_FAR_MORE = 1.5  # a ratio of tokens that can explain a gap by itself


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials by loss, then stopped ones by how far they came and their last loss; promotions stand apart."""
    records = [record for record in records if record.ranks]
    complete = sorted((r for r in records if r.state == "complete"), key=lambda r: r.rungs[-1].score)
    stopped = sorted((r for r in records if r.state == "stopped"), key=lambda r: (-len(r.rungs), r.rungs[-1].score))
    return [*complete, *stopped]


def best_of(records: Sequence[TrialRecord], *, purpose: str = "search") -> TrialRecord | None:
    """The lowest loss among trials of one purpose that spent the full budget.

    Where the best were trained again, the best on average of these counts, by its best run.
    """
    if purpose == "search" and (found := [g for g in promotions(records) if not g.is_baseline]):
        return min(found[0].runs, key=lambda run: run.rungs[-1].score)
    return next((r for r in ranked(records) if r.state == "complete" and r.purpose == purpose), None)


def leader(records: Sequence[TrialRecord]) -> TrialRecord:
    """The best of all, baselines too: on average where the best were trained again, of what was searched else."""
    if again := promotions(records):
        return min(again[0].runs, key=lambda run: run.rungs[-1].score)
    return ranked(records)[0]


def baseline_beside(best: TrialRecord | None, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The baseline's run that a result is held against: at the same budget, so trained again if the result was."""
    if best is not None and best.purpose == "promotion":
        again = next((group for group in promotions(records) if group.is_baseline), None)
        return None if again is None else min(again.runs, key=lambda run: run.rungs[-1].score)
    return best_of(records, purpose="baseline")


def promotion_table(records: Sequence[TrialRecord], corpus: Dataset) -> Table | None:
    """Mean and spread over seeds of what was trained again; None if nothing was."""
    found = promotions(records)
    if not found:
        return None
    baseline = next((group for group in found if group.is_baseline), None)
    table = Table(
        title="Trained again, with other seeds; mean and standard deviation", title_justify="left", box=SIMPLE
    )
    for name, justify in (
        ("trials", "left"),
        ("architecture", "left"),
        ("runs", "right"),
        (corpus.headline.label, "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("vs base", justify="right")
    for group, label in zip(found, labels_of([group.runs[0] for group in found]), strict=True):
        first = group.runs[0]
        bits, spread = corpus.headline.value(group.mean), group.spread
        versus = ""
        if baseline is not None and group is not baseline:
            versus = corpus.headline.change(group.mean, baseline.mean)
        table.add_row(
            ", ".join(str(run.number) for run in group.runs),
            f"{first.name}: {label}" if group.is_baseline else label,
            str(len(group.runs)),
            f"{bits:.3f}" + (f" ± {corpus.headline.spread(spread):.3f}" if spread is not None else ""),
            "baseline" if group is baseline else versus,
            style="bold" if group.is_baseline else "",
        )
    return table


def front(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Complete trials that no other beats in every objective, by the first; baselines take part."""
    complete = [record for record in ranked(records) if record.state == "complete"]
    points = {record.number: record.objectives(objectives) for record in complete}

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points.values()
        )

    return [record for record in complete if not beaten(points[record.number])]


def rest_of_front(records: Sequence[TrialRecord], objectives: Sequence[Objective], number: int, corpus: Dataset) -> str:
    """Which other trials are as good as the one that is exported, each in its way; '' with one objective."""
    others = [record for record in front(records, objectives) if record.number != number]
    if len(objectives) < 2 or not others:
        return ""
    numbers = ", ".join(f"{record.number} ({summarize(record.arch_spec())})" for record in others)
    return f"the best by {corpus.headline.metric.name}; on the front too: {numbers}; export one with --trial"


def ranking_table(
    records: Sequence[TrialRecord], corpus: Dataset, *, objectives: Sequence[Objective] = (LOSS,), top: int = 20
) -> Table:
    """The terminal ranking, baselines in their places and marked; with several objectives, the front too."""
    on_front = {record.number for record in front(records, objectives)} if len(objectives) > 1 else set()
    baseline = best_of(records, purpose="baseline")
    rungs = max((len(record.rungs) for record in records), default=1)
    spent = "tokens" if any(record.training.get("tokens") for record in records) else "FLOPs"
    raised = " (↑: higher)" if any(objective.is_raised for objective in objectives) else ""
    table = Table(
        title=f"At equal training {spent} (to a step); {corpus.headline.metric.better} is better{raised}. "
        "Rung: stopped there." + (f" *: front of {names_of(objectives, corpus)}." if on_front else ""),
        title_justify="left",
        expand=True,
        box=SIMPLE,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("#", justify="right")
    table.add_column("trial", justify="right")
    table.add_column("architecture", overflow="fold", ratio=1)
    # A terminal is narrow: with objectives beside the loss, their columns stand for the usual costs.
    asked = {o.name: _column(o) for o in objectives if o != LOSS}
    beside = asked or {name: COSTS[name].label for name in ("params", "flops_per_token")}
    last = "" if baseline is None else "vs base"  # or where it stopped
    for name in (*beside.values(), "tokens", corpus.headline.label, last):
        narrow = re.sub(r" |(?=/)", "\n", name, count=1) if name != last else name
        table.add_column(narrow, justify="right", no_wrap=True)
    shown = ranked(records)[:top]
    if not shown:
        table.title = "No results yet."
    for place, (record, label) in enumerate(zip(shown, labels_of(shown), strict=True), start=1):
        bits = corpus.headline.value(record.rungs[-1].score)
        is_baseline = record.purpose == "baseline"
        versus = ""
        if record.state == "stopped":
            versus = f"rung {len(record.rungs)}/{rungs}"
        elif baseline is not None and record is not baseline:
            versus = corpus.headline.change(record.rungs[-1].score, baseline.rungs[-1].score)
        table.add_row(
            str(place) if record.state == "complete" else "",
            f"{record.number}" + ("*" if record.number in on_front else ""),
            f"{record.name}: {label}" if is_baseline else label,
            *(short(record.value(name)) for name in beside),
            short(record.rungs[-1].tokens),
            f"{bits:.3f}",
            "baseline" if record is baseline else versus,
            style="bold" if is_baseline else "dim" if record.state == "stopped" else "",
        )
    return table


def names_of(objectives: Sequence[Objective], corpus: Dataset) -> str:
    """Their names, the score by the metric that tells it."""
    return ", ".join([corpus.headline.metric.name, *(o.name for o in objectives[1:])])


def other_objectives(objectives: Sequence[Objective]) -> dict[str, str]:
    """Objectives beside loss, parameters and FLOPs per token, and a column's name for each."""
    return {o.name: _column(o) for o in objectives if o.name not in ("loss", "params", "flops_per_token")}


def _column(objective: Objective) -> str:
    """Its name; with an arrow if more is better."""
    return f"{objective.label} ↑" if objective.is_raised else objective.label


def labels_of(records: Sequence[TrialRecord]) -> list[str]:
    """`labels` of records."""
    return labels([(record.arch_spec(), record.choices) for record in records])


def counts_of(records: Sequence[TrialRecord], *, driven: bool) -> str:
    """How many trials there are in each state. What runs while nobody drives the study was interrupted."""
    states = Counter(record.state for record in records)
    names = {"complete": "complete", "stopped": "stopped", "failed": "failed"}
    names["running"] = "running" if driven else "interrupted"
    return ", ".join(f"{states[state]} {name}" for state, name in names.items() if states[state]) or "none yet"  # type: ignore[index]


def notes(records: Sequence[TrialRecord], corpus: Dataset, *, driven: bool) -> list[str]:
    """What a reader should know before believing the ranking.

    Args:
        records: of the study.
        corpus: its data.
        driven: whether a process drives the study now.
    """
    lines = []
    spent = sum(record.flops for record in records)
    lines.append(f"{len(records)} trials: {counts_of(records, driven=driven)}; {short(spent)} training FLOPs spent.")
    if steps := [record.steps for record in records if record.state == "complete" and record.ranks]:
        lines.append(f"A full training took {span(min(steps), max(steps))} steps.")
    for reason, count in Counter(record.reason for record in records if record.state == "failed").items():
        lines.append(f"{count} failed: {reason or 'unknown reason'}.")
    best = best_of(records)
    baseline = baseline_beside(best, records)
    if again := final_lines(records, corpus):
        lines += again
    elif best is not None and baseline is not None:
        verdict = corpus.headline.verdict(best.rungs[-1].score, baseline.rungs[-1].score)
        lines.append(
            f"The best found is {verdict} than the baseline; one seed each, so mind the "
            "spread between seeds (search.promote measures it)."
        )
    if best is not None and baseline is not None:
        saw, base_saw = best.rungs[-1].tokens, baseline.rungs[-1].tokens
        if saw > _FAR_MORE * base_saw:
            lines.append(
                f"The best saw {saw / base_saw:.1f} times the data that the baseline saw ({short(saw)} against "
                f"{short(base_saw)} tokens): at this budget a smaller model sees more, and the gap can't be put down "
                "to the architecture alone."
            )
        if 0 < min(best.steps, baseline.steps) < FEW_STEPS:
            lines.append(
                f"Under {FEW_STEPS} steps (the best took {best.steps}, the baseline {baseline.steps}) losses tell "
                "little of longer training: give more flops, or smaller batch_tokens."
            )
        settings = [name for name in best.choices if name.startswith("training.")]
        for name in settings:
            key = name.removeprefix("training.")
            lines.append(f"{name} is {best.training[key]} for the best, {baseline.training[key]} for the baseline.")
        if settings:
            lines.append("The baseline takes the middle of every open training choice: the gap may be partly tuning.")
    if best is not None and best.rungs[-1].metrics.get("loss", 0.0) > math.log(best.arch_spec().vocab_size):
        lines.append("The best is worse than guessing evenly: lower the learning rate, or train longer.")
    first = [record for record in records if record.rungs and record.ranks]
    if len(first) >= _MIN_FOR_NOTE:
        rho = _rank_correlation([r.cost.flops_per_token for r in first], [r.rungs[0].score for r in first])
        seen = [r.rungs[0].tokens for r in first]
        if rho > 0.6 and max(seen) > _MORE_SEEN * min(seen):
            lines.append(
                f"Loss follows FLOPs per token (rank correlation {rho:.2f} at the first rung): at this budget, seeing "
                "more tokens matters more than the schedule. Narrow the budget's band, or train longer."
            )
    return lines


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties by average rank; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> NDArray[Any]:
        _unique, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])

    x, y = ranks(a), ranks(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
