"""What a ladder says, as a table, sentences and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import plotly.graph_objects as go
from plotly.colors import qualitative
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from builder.graph.compiler import compile_arch
from searchspace.errors import SpecError, one_of, show
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.records.trial import TrialRecord
from studies.report.ranking import labels_of
from studies.scale.ladder import Ladder, key_of, ladder_of, runs_of, size_of_rung
from studies.scale.law import Run
from studies.scale.pairs import FARTHEST, FURTHER, Answer, rate
from studies.scale.recurrence import Point, exponent, phi_of, shared_of
from studies.show.summary import short

_LIKELY, _SURE = 0.5, 0.9
_SMALL = 0.02  # differences that need a fourth digit
_APART = 1.04  # intervals stand beside each other


@dataclass(frozen=True, slots=True)
class Told:
    """A ladder's answer, and what it was made of."""

    answer: Answer
    runs: tuple[Run, ...]
    unit: str
    """Of losses."""
    notes: tuple[str, ...] = ()
    """What it cost, and whom it leaves out."""


def tell(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    size: float | None = None,
    tokens: float | None = None,
    confidence: float = 0.8,
    unit: str = "nats",
) -> Told:
    """A ladder's answer at a target.

    Args:
        runs: of all candidates.
        baseline: candidate that others are held against; None: the first.
        size: of the target, in parameters; None: ten times the largest.
        tokens: that it sees; None: as many for each parameter as the largest had.
        confidence: of the intervals.
        unit: of losses.

    Raises:
        SpecError: if the ladder is too short, or has no such baseline.
    """
    names = list(dict.fromkeys(run.candidate for run in runs))
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise SpecError("--baseline", f"{show(baseline)} is no candidate of this ladder", one_of(names, baseline))
    largest = max(runs, key=lambda run: (run.size, run.tokens))
    size = size or FURTHER * largest.size
    tokens = tokens or largest.tokens / largest.size * size
    return Told(rate(runs, baseline, size, tokens, confidence=confidence), tuple(runs), unit)


def tell_study(
    records: Sequence[TrialRecord],
    settings: StudyConfig,
    corpus: Dataset,
    *,
    baseline: str | None = None,
    size: float | None = None,
    tokens: float | None = None,
    confidence: float = 0.8,
) -> Told:
    """The answer of a study's ladder, as far as it has come. Arguments and errors are those of `tell`."""
    if settings.scale is None:
        what = "the study has no ladder"
        raise SpecError("scale", what, "search again with scale.sizes=[...], three or more widths")
    names, headline = names_of(records), corpus.headline
    lower = headline.metric.better == "lower"
    runs = [
        replace(run, candidate=names[run.candidate], loss=headline.value(run.loss) if lower else run.loss)
        for run in runs_of(records, settings.task)
    ]
    ladder = ladder_of(settings, records, corpus.facts)
    first = names.get(ladder.candidates[0].origin) if ladder.candidates else None
    known = list(names.values())
    if baseline is not None and baseline not in known:
        raise SpecError("--baseline", f"{show(baseline)} is no candidate of this ladder", one_of(known, baseline))
    baseline = first if baseline is None else baseline
    there = {(run.rung, run.seed) for run in runs if run.candidate == baseline}
    paired = {run.candidate for run in runs if (run.rung, run.seed) in there}
    failed = {r.reason for r in records if r.purpose == "ladder" and names[r.origin] == baseline and r.reason}
    if failed and not there:
        what = f"no run of {baseline} has ended ({', '.join(sorted(failed))}), and all are held against it"
        raise SpecError("scale", what, "list another baseline first, or change what makes it fail")
    if not paired - {baseline}:
        raise SpecError("scale", "no two of its runs can be compared yet", "search again to go on")
    told = tell(
        [run for run in runs if run.candidate in paired],
        baseline=baseline,
        size=size or settings.scale.target,
        tokens=tokens,
        confidence=confidence,
        unit=headline.label if lower else "nats",
    )
    notes = _notes(ladder, records, {name for name in names.values() if name not in paired})
    return replace(told, notes=(*_recurrence(told, records, names), *notes))


def points_of(
    runs: Sequence[Run], records: Sequence[TrialRecord], names: Mapping[str, str], baseline: str, *, by_tokens: bool
) -> dict[str, list[Point]]:
    """Differences to the baseline, with what each model's parameters are used for, by candidate that shares weights."""
    graphs = {
        (names[record.origin], record.size): compile_arch(record.arch_spec())
        for record in records
        if record.purpose == "ladder" and record.origin in names
    }
    shared = {at: shared_of(graph, by_tokens=by_tokens) for at, graph in graphs.items()}
    losses = {(run.candidate, run.rung, run.seed): run.loss for run in runs}
    found: dict[str, list[Point]] = {}
    for (name, rung, seed), loss in losses.items():
        size, base = size_of_rung(rung), losses.get((baseline, rung, seed))
        if name != baseline and base is not None and shared[name, size].often:
            point = Point(size, seed, shared[name, size], shared[baseline, size], loss - base)
            found.setdefault(name, []).append(point)
    return found


def _recurrence(told: Told, records: Sequence[TrialRecord], names: Mapping[str, str]) -> list[str]:
    """What further uses of a block were worth, by candidate."""
    law, baseline = told.answer.law, told.answer.baseline
    points = points_of(told.runs, records, names, baseline, by_tokens=False)
    each = []
    for name, own in points.items():
        phi, low, high = phi_of(own, law, law.factors[baseline], confidence=told.answer.confidence)
        each.append(f"{name} {exponent(phi)} ({exponent(low)} to {exponent(high)})")
    level = f"{told.answer.confidence:.0%} interval"
    return [f"A block used r times was worth r^phi of its own, phi ({level}): {', '.join(each)}."] if each else []


def _notes(ladder: Ladder, records: Sequence[TrialRecord], missing: set[str]) -> list[str]:
    """What a ladder cost, and whom its answer leaves out."""
    own = [record for record in records if record.purpose == "ladder"]
    spent = sum(record.flops for record in own)
    searched = sum(record.flops for record in records if record.purpose != "ladder")
    begun = {key_of(record) for record in own}
    skipped = [cell for cell in ladder.cells if ladder.key(cell) not in begun]
    lines = [f"The ladder took {short(spent)} training FLOPs" + (f", the search {short(searched)}" if searched else "")]
    if skipped:
        saved = sum(ladder.flops(cell) for cell in skipped)
        lines[0] += f"; {len(skipped)} of its {len(ladder.cells)} runs, {short(saved)}, were left out or are to come"
    lines[0] += "."
    lines += [f"{name} is not in the answer: no run of it ended beside the baseline's." for name in sorted(missing)]
    return [*lines, *ladder.left_out]


def names_of(records: Sequence[TrialRecord]) -> dict[str, str]:
    """What a ladder's candidates are called, by their architecture's id: baselines by name, others by their trial."""
    found = {record.arch_id: record for record in reversed(records) if record.purpose == "search"}
    origins = list(dict.fromkeys(record.origin for record in records if record.purpose == "ladder"))
    searched = [found[origin] for origin in origins if origin in found]
    labels = {
        record.arch_id: f"{label} (trial {record.number})"
        for record, label in zip(searched, labels_of(searched), strict=True)
    }
    own = {record.origin: record.name for record in records if record.purpose == "ladder"}
    taken: dict[str, str] = {}
    for origin in origins:
        name = labels.get(origin, own[origin])
        taken[origin] = name if name not in taken.values() else f"{name} {origin[:6]}"
    return taken


def ladder_answer(records: Sequence[TrialRecord], settings: StudyConfig, corpus: Dataset) -> tuple[Told | None, str]:
    """The answer of a study's ladder, or why there is none yet; neither where nobody asked for one."""
    if settings.scale is None:
        return None, ""
    try:
        return tell_study(records, settings, corpus), ""
    except SpecError as error:
        return None, f"no answer from the ladder: {error.problem}; {error.remedy}"


def scale_rows(told: Told) -> list[list[str]]:
    """Candidates at the target, the one that is worth most first, under a row of headers."""
    answer = told.answer
    level = f"{answer.confidence:.0%}"
    digits = 4 if max(abs(rated.difference) for rated in answer.rated) < _SMALL else 3
    rows = [["candidate", told.unit, level, "FLOPs", "worth", level, "best", "top"]]
    for rated in answer.rated:
        (low, high), (less, more) = rated.interval, rated.multiplier_interval
        if rated.candidate == answer.baseline:
            rows.append([rated.candidate, "baseline", "", "1.00x", "1.00x", "", f"{rated.best:.0%}", ""])
            continue
        rows.append(
            [
                rated.candidate,
                f"{rated.difference:+.{digits}f}",
                f"{low:+.{digits}f} {high:+.{digits}f}",
                f"{rated.cost:.2f}x",
                times(rated.multiplier),
                f"{times(less)} {times(more)}",
                f"{rated.best:.0%}",
                "" if rated.at_top is None else f"{rated.at_top:+.{digits}f}",
            ]
        )
    if all(rated.cost == 1.0 for rated in answer.rated):
        rows = [row[:3] + row[4:] for row in rows]
    return rows


def target_of(told: Told) -> str:
    """The size that the answer is about."""
    answer = told.answer
    return f"At {short(answer.size)} parameters and {short(answer.tokens)} tokens, against {answer.baseline}"


def scale_table(told: Told) -> Table:
    """`scale_rows` for a terminal."""
    (first, *headers), *rows = scale_rows(told)
    table = Table(title=escape(target_of(told)), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=12)
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for name, *values in rows:
        table.add_row(escape(name), *values, style="bold" if name == told.answer.baseline else "")
    return table


def times(multiplier: float) -> str:
    """A compute multiplier."""
    if multiplier >= FARTHEST:
        return f">{FARTHEST:.0f}x"
    return f"<{1 / FARTHEST:g}x" if multiplier <= 1 / FARTHEST else f"{multiplier:.2f}x"


def answer_lines(told: Told) -> list[str]:
    """Who is best, how sure, and how far it reaches."""
    answer, runs = told.answer, told.runs
    best = max(answer.rated, key=lambda rated: rated.best)
    target = f"at {short(answer.size)} parameters"
    first = (
        f"{best.candidate} is the best {target} with a probability of {best.best:.0%}"
        if best.best >= _LIKELY
        else f"No candidate is the best {target} with a probability of {_LIKELY:.0%}: this ladder cannot tell"
    )
    lines = [first + ("." if best.best >= _SURE or best.best < _LIKELY else ": likely, not sure.")]
    if best.candidate != answer.baseline:
        low, high = best.multiplier_interval
        lines.append(
            f"{best.candidate} is worth {times(best.multiplier)} its compute ({answer.confidence:.0%} interval "
            f"{times(low)} to {times(high)}): so much would {answer.baseline} need for the same loss."
        )
    crossing = [f"{r.candidate} at {short(r.crosses)} parameters" for r in answer.rated if r.crosses is not None]
    if crossing:
        lines.append(f"The fitted difference to {answer.baseline} changes its sign for {', '.join(crossing)}.")
    between = "between seeds" if answer.seeds else "between seeds, it is assumed: no rung has two"
    sizes = len({run.size for run in runs if run.candidate == answer.baseline})
    lines.append(
        f"{len(runs)} losses at {sizes} sizes; a difference varies by {answer.seed_spread:.4f} "
        f"{between}, and the law errs by about {answer.form:.4f}. Under 'top' is what the largest size measured."
    )
    return [*lines, *told.notes]


def scale_figure(told: Told) -> go.Figure:
    """Compute multipliers over the baseline by size: measured, fitted, and the interval at the target."""
    answer = told.answer
    axes = {
        "xaxis": {"type": "log", "title": "parameters of blocks and head"},
        "yaxis": {"type": "log", "title": f"times the compute of {answer.baseline} at the same loss"},
    }
    figure = go.Figure(layout={**axes, "margin": {"l": 60, "r": 20, "t": 30, "b": 50}})
    colors = qualitative.Safe
    others = [rated for rated in answer.rated if rated.candidate != answer.baseline]
    for i, rated in enumerate(others):
        color, group = colors[i % len(colors)], {"legendgroup": str(i), "name": rated.candidate}
        low, high = rated.multiplier_interval
        x, y = zip(*rated.curve, strict=True)
        figure.add_scatter(x=x, y=y, mode="lines", line={"color": color, "width": 2}, hoverinfo="name", **group)
        x, y = zip(*rated.points, strict=True)
        figure.add_scatter(x=x, y=y, mode="markers", marker={"color": color, "size": 8}, showlegend=False, **group)
        figure.add_scatter(
            x=[answer.size * _APART ** (i - (len(others) - 1) / 2)],
            y=[rated.multiplier],
            error_y={"array": [high - rated.multiplier], "arrayminus": [rated.multiplier - low], "color": color},
            mode="markers",
            marker={"color": color, "size": 10, "symbol": "diamond"},
            showlegend=False,
            **group,
        )
    ends = [min(run.size for run in told.runs), answer.size]
    line = {"color": "#010203", "width": 2}  # the page's text colour
    figure.add_scatter(x=ends, y=[1, 1], mode="lines", line=line, name=answer.baseline, hoverinfo="name")
    return figure.update_layout(legend={"orientation": "h", "y": -0.25})
