"""A study as one page of HTML."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from searchspace.disk import read_json
from searchspace.errors import SpecError, show
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.probes.look import Inside
from studies.records.folder import PROBED, SHOWN
from studies.records.trial import TrialRecord
from studies.report.changes import change_row, changes_of, same_of
from studies.report.figures import Figures, figures_of
from studies.report.finalists import final_lines, promotions
from studies.report.html import write_page
from studies.report.inside import inside_figures
from studies.report.ranking import (
    baseline_beside,
    best_of,
    counts_of,
    front,
    labels_of,
    names_of,
    notes,
    other_objectives,
    ranked,
)
from studies.report.scaling import answer_lines, ladder_answer, scale_figure, scale_rows, target_of
from studies.sections import Objective
from studies.show.summary import cost_lines, cost_rows, short, summarize
from studies.show.svg import draw_svg

_BEST = 5  # with a ladder each: a screen or two
_PROBED_BYTES = 1 << 26
_MOST_ROWS = 500  # of a table: browsers grow slow

_WHY = {
    "importance": "Bars: share of the loss's variance that each decision explains (PED-ANOVA), over complete trials.",
    "effects": "Measured: mean loss of trials with a level at an iteration, against all that go so far; blue: better.",
    "predicted": "Predicted: the same as a predictor sees it, over candidates that nobody trained.",
}


def write_html(
    records: Sequence[TrialRecord],
    settings: StudyConfig,
    corpus: Dataset,
    file: Path,
    *,
    refresh_s: int = 0,
    driven: bool = False,
) -> Path:
    """Write the report.

    Args:
        records: of the study.
        settings: of the study.
        corpus: its data, which say how a score is told.
        file: to be written, whole or not at all.
        refresh_s: seconds after which a browser loads it again; 0 never.
        driven: whether a process drives the study now.
    """
    figures = figures_of(records, settings, corpus, file.parent)
    told, _missing = ladder_answer(records, settings, corpus)
    if told is not None:
        figures["scale"] = scale_figure(told)
    pictures, seen = _inside(file.parent, best_of(records))
    figures |= pictures
    headline = _headline(records, corpus)
    return write_page(
        file,
        "report.html",
        figures,
        name=settings.name,
        answer=[] if told is None else answer_lines(told),
        scale=[] if told is None else scale_rows(told),
        target="" if told is None else target_of(told),
        headline=headline,
        facts=_facts(records, settings, corpus, driven=driven),
        notes=[note for note in notes(records, corpus, driven=driven) if note not in headline],
        metric=corpus.headline.label,
        why=" ".join(text for name, text in _WHY.items() if name in figures),
        again=_again(records, corpus),
        changes=_changes(records, corpus),
        failures=_failures(records),
        seen=seen,
        best=_best(records, corpus, _shown(file.parent)),
        ranking=_ranking(records, corpus, settings.objectives),
        others=list(other_objectives(settings.objectives).values()),
        front_of=names_of(settings.objectives, corpus) if settings.objectives[1:] else "",
        unlisted=max(0, len(ranked(records)) - _MOST_ROWS),
        study=settings.to_yaml(),
        plugins=settings.plugins,
        folder=file.parent.name,
        refresh_s=refresh_s,
    )


def _headline(records: Sequence[TrialRecord], corpus: Dataset) -> str:
    best = best_of(records)
    baseline = baseline_beside(best, records)
    if best is None:
        alone = records and all(record.purpose == "ladder" for record in records)
        return (
            "The baselines went up the ladder at once." if alone else "No searched trial has spent its full budget yet."
        )
    if again := final_lines(records, corpus):
        return " ".join(again)
    told = corpus.headline.text(best.rungs[-1].score)
    text = f"Best: {summarize(best.arch_spec())}, {told} at {short(best.flops)} training FLOPs"
    if baseline is not None:
        verdict = corpus.headline.verdict(best.rungs[-1].score, baseline.rungs[-1].score)
        text += f", {verdict} than the baseline {baseline.name}"
    return f"{text}."


def _facts(
    records: Sequence[TrialRecord], settings: StudyConfig, corpus: Dataset, *, driven: bool
) -> list[tuple[str, str]]:
    training, search = settings.plain.get("training", {}), settings.search
    budget = settings.plain.get("budget", {})
    spent = sum(record.flops for record in records)
    limits = [
        f"{name} {' to '.join(map(str, limit.values()))}" if isinstance(limit, Mapping) else f"{name} ≤ {limit}"
        for name, limit in budget.items()
    ]
    decided = {**(records[0].training if records else {}), **training}  # what the size decides differs by trial
    given = {name: decided[name] for name in ("flops", "tokens", "batch_tokens", "lr", "beta2") if name in decided}
    searched = [
        ("space", f"{settings.space.count()} candidates, {len(settings.space.decisions)} decisions"),
        ("budget", "; ".join(limits) or "none"),
        ("training", ", ".join(f"{name} {_plain(value)}" for name, value in given.items())),
        ("search", f"{search.sampler}, stopper {search.stopper.kind}, seed {search.seed}"),
        ("objectives", names_of(settings.objectives, corpus)),
    ]
    ladder = []
    if (scale := settings.scale) is not None:
        sizes, horizons = (", ".join(each) for each in ([s.label for s in scale.sizes], map(show, scale.horizons)))
        ladder = [
            ("ladder", f"widths {sizes}; horizons {horizons}; {scale.seeds} seed{'s' if scale.seeds > 1 else ''}")
        ]
    facts = corpus.facts
    return [
        *(searched if search.num_trials else []),
        *ladder,
        ("data", f"{facts.source}, {short(facts.train_tokens)} tokens" if facts.train_tokens else facts.source),
        ("trials", counts_of(records, driven=driven)),
        ("training FLOPs spent", short(spent)),
    ]


def _plain(value: object) -> str:
    """Large numbers in short."""
    is_large = isinstance(value, int | float) and not isinstance(value, bool) and value >= 10_000
    return short(value) if is_large else show(value)  # type: ignore[arg-type]


def _again(records: Sequence[TrialRecord], corpus: Dataset) -> list[dict[str, Any]]:
    found = promotions(records)
    return [
        {
            "what": label + (" (baseline)" if group.is_baseline else ""),
            "runs": len(group.runs),
            "bits": f"{corpus.headline.value(group.mean):.3f}",
            "spread": "" if group.spread is None else f"{corpus.headline.spread(group.spread):.3f}",
            "is_baseline": group.is_baseline,
        }
        for group, label in zip(found, labels_of([group.runs[0] for group in found]), strict=True)
    ]


def _changes(records: Sequence[TrialRecord], corpus: Dataset) -> dict[str, Any]:
    if (told := changes_of(records)) is None:
        return {}
    common, changes = told
    return {"common": same_of(common), "rows": [change_row(change, corpus) for change in changes]}


def _failures(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    failed = [record for record in records if record.state == "failed"]
    rows = []
    for reason, count in Counter(record.reason or "unknown" for record in failed).most_common():
        last = next(record for record in reversed(failed) if (record.reason or "unknown") == reason)
        lines = last.error.strip().splitlines()
        rows.append({"reason": reason, "count": count, "error": f"trial {last.number}: {lines[-1] if lines else ''}"})
    return rows


def _shown(folder: Path) -> dict[str, Any]:
    """What the best was seen to do when its search ended."""
    try:
        found = read_json(folder / SHOWN)
    except SpecError:
        return {}
    known = isinstance(found, dict) and isinstance(found.get("title"), str) and isinstance(found.get("text"), str)
    return found if known else {}


def _inside(folder: Path, best: TrialRecord | None) -> tuple[Figures, dict[str, Any]]:
    """What probes saw in the best and in the baseline when the search ended; nothing once another is the best."""
    try:
        seen = [Inside.from_plain(each) for each in read_json(folder / PROBED, _PROBED_BYTES)["models"]]
        return inside_figures(seen) if best is not None and seen[0].arch_id == best.arch_id else ({}, {})
    except (SpecError, TypeError, KeyError, ValueError, AttributeError, IndexError):
        return {}, {}


def _best(records: Sequence[TrialRecord], corpus: Dataset, shown: Mapping[str, Any]) -> list[dict[str, Any]]:
    complete = [r for r in ranked(records) if r.state == "complete" and r.purpose == "search"]
    baseline = best_of(records, purpose="baseline")
    rows = []
    for record in complete[:_BEST]:
        arch = record.arch_spec()
        graph = compile_arch(arch)
        rows.append(
            {
                "number": record.number,
                "what": summarize(arch),
                "bits": f"{corpus.headline.value(record.rungs[-1].score):.3f}",
                "versus": "" if baseline is None else f"{_versus(record, baseline, corpus)} against the baseline",
                "svg": base64.b64encode(draw_svg(arch).encode()).decode(),
                "parts": cost_rows(graph),
                "totals": [(what.strip(), value) for what, value in cost_lines(estimate(graph))],
                "yaml": arch.to_yaml(),
                "shown": shown if shown.get("trial") == record.number else None,
            }
        )
    return rows


def _versus(record: TrialRecord, baseline: TrialRecord, corpus: Dataset) -> str:
    return corpus.headline.change(record.rungs[-1].score, baseline.rungs[-1].score)


def _ranking(records: Sequence[TrialRecord], corpus: Dataset, objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    baseline = best_of(records, purpose="baseline")
    rungs = max((len(record.rungs) for record in records), default=1)
    rows = []
    on_front = {r.number for r in front(records, objectives)} if len(objectives) > 1 else set()
    shown, others = ranked(records)[:_MOST_ROWS], other_objectives(objectives)
    for place, (record, label) in enumerate(zip(shown, labels_of(shown), strict=True), start=1):
        complete = record.state == "complete"
        versus = f"stopped at rung {len(record.rungs)} of {rungs}"
        if complete:
            versus = "" if baseline is None or record is baseline else _versus(record, baseline, corpus)
        is_baseline = record.purpose == "baseline"
        rows.append(
            {
                "place": place if complete else "",
                "number": f"{record.number}" + ("*" if record.number in on_front else ""),
                "what": (f"{record.name}: " if is_baseline else "") + label,
                "others": [short(record.value(name)) for name in others],
                "tokens": short(record.rungs[-1].tokens),
                "steps": f"{record.steps:,}" if record.steps else "",
                "params": short(record.cost.params),
                "flops": short(record.cost.flops_per_token),
                "bits": f"{corpus.headline.value(record.rungs[-1].score):.3f}",
                "versus": versus,
                "kind": "baseline" if is_baseline else "" if complete else "stopped",
            }
        )
    return rows
