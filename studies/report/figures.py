"""The plots of a report, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import plotly.graph_objects as go

from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.predict.explain import (
    Effects,
    effects_by_place,
    kept_effects,
    observe_all,
    representative,
    schedule_of,
)
from studies.predict.features import adjust, last_rungs
from studies.predict.importance import measured_importance, optuna_figures
from studies.predict.predictor import FEWEST
from studies.records.trial import TrialRecord
from studies.report.ranking import best_of, front, labels_of, ranked
from studies.sections import LOSS, Objective
from studies.show.summary import decided, short, summarize

Figures: TypeAlias = dict[str, go.Figure]

_PLACE = re.compile(r"\.(length|count\.[^.]+|\d+)$")
"""Decisions about a schedule, which the summary shows."""
_MOST_SCHEDULES = 60  # rows of a plot that can still be read
_MOST_WITHIN = 8  # curves with a colour of their own
_MOST_CURVES = 300  # lines of a plot: more are a blot, and slow to draw
_BLUE, _GREEN, _GREY = "#3b82c4", "#2da44e", "#9aa5b1"
_INK = "#010203"
"""Becomes the page's text colour."""

_COSTS = {
    "FLOPs per token": "flops_per_token",
    "parameters": "params",
    "decode FLOPs per token": "decode_flops_per_token",
}


def figures_of(records: Sequence[TrialRecord], settings: StudyConfig, corpus: Dataset, folder: Path) -> Figures:
    """Curves, the front, schedules, and what matters: those for which there are trials enough."""
    figures: Figures = {}
    shown = [record for record in records if record.rungs and record.purpose != "ladder"]
    complete = [record for record in ranked(records) if record.state == "complete"]
    figures["learning"] = _learning(shown, corpus)
    if any(record.curve for record in complete):
        figures["curves"] = _curves(complete)
    if complete:
        figures["front"] = _front(complete, corpus, settings.objectives)
    if any(_schedule(record) for record in complete):
        figures["schedules"] = _schedules(records)
    if measured := measured_importance(records, settings):
        names = list(reversed(measured))
        labels = [name.removeprefix("graph.") for name in names]
        figures["importance"] = go.Figure(
            go.Bar(x=[measured[n] for n in names], y=labels, orientation="h", marker_color=_BLUE),
            {"xaxis": {"title": "share of variance", "tickformat": ".0%"}, "margin": _MARGIN},
        )
    maps = {"effects": _measured_effects(shown), "predicted": kept_effects(shown, settings, corpus.facts, folder)}
    titles = {"effects": "measured, trials that were run", "predicted": "predicted, candidates nobody trained"}
    most = corpus.headline.spread(max((abs(e) for effects in maps.values() for e in effects.values()), default=0.0))
    for name, effects in maps.items():
        if (figure := _effects(effects, corpus, most)) is not None:  # in one range of colours
            figures[name] = figure.update_layout(title={"text": titles[name], "font": {"size": 14}})
    figures |= optuna_figures(records, settings)
    return figures


_MARGIN = {"l": 50, "r": 20, "t": 30, "b": 50}


def _hover(record: TrialRecord, corpus: Dataset) -> str:
    bits = corpus.headline.text(record.rungs[-1].score) if record.rungs else ""
    lines = [
        _who(record),
        summarize(record.arch_spec()),
        bits,
        f"{short(record.cost.params)} parameters, {short(record.cost.flops_per_token)} FLOPs per token",
    ]
    told = [decided(name, value) for name, value in record.choices.items() if not _PLACE.search(name)]
    lines += [", ".join(told[i : i + 4]) for i in range(0, min(len(told), 16), 4)]
    return "<br>".join(lines)


def _who(record: TrialRecord) -> str:
    return f"{record.purpose} {record.number}" + (f" ({record.name})" if record.purpose == "baseline" else "")


_CURVES = {
    "stopped or failed": (_GREY, 1.0),
    "complete": (_BLUE, 1.2),
    "trained again": ("#b7791f", 1.2),
    "best": (_GREEN, 2.5),
    "baseline": (_INK, 2.5),
}
"""Colour and width by kind of trial, the later in front."""


def _curves(complete: Sequence[TrialRecord]) -> go.Figure:
    """Training loss within each of the best, and of the baselines."""
    figure = go.Figure(layout={"xaxis": {"type": "log", "title": "tokens"}, "margin": _MARGIN})
    shown = [r for r in complete if r.curve][:_MOST_WITHIN]
    for record, label in zip(shown, labels_of(shown), strict=True):
        is_baseline = record.purpose == "baseline"
        x, y = zip(*record.curve, strict=True)
        line = {"color": _INK, "width": 3} if is_baseline else {"width": 1.5}
        name = f"{record.number}: {record.name if is_baseline else label}"
        figure.add_scatter(x=x, y=y, mode="lines", line=line, name=name)
    figure.update_yaxes(title="training loss, nats")
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure


def _learning(shown: Sequence[TrialRecord], corpus: Dataset) -> go.Figure:
    """One line for each trial; of very many, the best."""
    best = best_of(shown)
    figure = go.Figure(layout={"xaxis": {"type": "log", "title": "training FLOPs"}, "margin": _MARGIN})
    order = [*shown] if len(shown) <= _MOST_CURVES else ranked(shown)[:_MOST_CURVES]
    groups: dict[str, list[TrialRecord]] = {name: [] for name in _CURVES}
    for record in order:
        name = "complete" if record.state == "complete" else "stopped or failed"
        if record.purpose == "baseline":
            name = "baseline"
        elif record is best:
            name = "best"
        elif record.purpose == "promotion":
            name = "trained again"
        groups[name].append(record)
    for name, group in groups.items():
        x: list[float | None] = []
        y: list[float | None] = []
        hover: list[str] = []
        for record in group:  # all in one trace, a gap after each: a trace of its own for each takes ten times longer
            x += [*(rung.flops for rung in record.rungs), None]
            y += [*(corpus.headline.value(rung.score) for rung in record.rungs), None]
            hover += [_hover(record, corpus)] * (len(record.rungs) + 1)
        if group:
            color, width = _CURVES[name]
            line, marker = {"color": color, "width": width}, {"size": 6}
            figure.add_scatter(
                x=x, y=y, mode="lines+markers", line=line, marker=marker, name=name, hovertext=hover, hoverinfo="text"
            )
    figure.update_yaxes(title=corpus.headline.metric.words)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure


def _front(complete: Sequence[TrialRecord], corpus: Dataset, objectives: Sequence[Objective]) -> go.Figure:
    """Loss against one cost or metric at a time, the study's objectives first; buttons choose which."""
    figure = go.Figure()
    searched = [record for record in complete if record.purpose == "search"]
    baselines = [record for record in complete if record.purpose == "baseline"]
    hovers = {record.number: _hover(record, corpus) for record in (*searched, *baselines)}
    asked = [o.name for o in objectives[1:]]
    costs = {name: Objective(cost, name) for name, cost in _COSTS.items() if all(r.value(cost) for r in complete)}
    metrics = {o.label: o for o in objectives[1:] if o.name not in _COSTS.values()}
    kinds = dict(sorted({**costs, **metrics}.items(), key=lambda item: item[1].name not in asked))
    for i, other in enumerate(kinds.values()):
        metric = other.name
        line = sorted(front(complete, (LOSS, other)), key=lambda r: r.value(metric))
        rows = (
            ("front", line, {"mode": "lines", "line": {"color": _GREEN, "width": 2}, "hoverinfo": "skip"}),
            ("trial", searched, {"mode": "markers", "marker": {"color": _BLUE, "size": 9}}),
            ("baseline", baselines, {"mode": "markers", "marker": {"color": _INK, "size": 14, "symbol": "star"}}),
        )
        for label, group, style in rows:
            hover = {} if label == "front" else {"hovertext": [hovers[r.number] for r in group], "hoverinfo": "text"}
            x, y = [r.value(metric) for r in group], [corpus.headline.value(r.rungs[-1].score) for r in group]
            figure.add_scatter(x=x, y=y, name=label, visible=i == 0, **style, **hover)
    buttons = [
        {
            "label": name.removesuffix(" per token"),
            "method": "update",
            "args": [{"visible": [j // 3 == i for j in range(3 * len(kinds))]}, {"xaxis.title.text": name}],
        }
        for i, name in enumerate(kinds)
    ]
    menu = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.18, "buttons": buttons}
    menu["font"] = {"color": "#1f66a8"}
    figure.update_layout(updatemenus=[menu], showlegend=True, legend={"orientation": "h", "y": -0.2}, margin=_MARGIN)
    figure.update_xaxes(title=next(iter(kinds), ""))
    figure.update_yaxes(title=corpus.headline.metric.words)
    return figure


def _schedule(record: TrialRecord) -> list[tuple[str, int]]:
    """Level and chunk of each iteration of its first loop."""
    arch = record.arch_spec()
    return [(level, arch.levels[level].chunk) for level in schedule_of(arch)]


def _schedules(records: Sequence[TrialRecord]) -> go.Figure:
    having = ((record, schedule) for record in ranked(records) if (schedule := _schedule(record)))
    order = list(islice(having, _MOST_SCHEDULES))
    width = max(len(schedule) for _, schedule in order)
    chunks = [[math.log2(s[i][1]) if i < len(s) else None for i in range(width)] for _, s in order]
    names = [[s[i][0] if i < len(s) else "" for i in range(width)] for _, s in order]
    labels = [f"{i + 1}. trial {record.number}" for i, (record, _) in enumerate(order)]
    most = max(value for row in chunks for value in row if value is not None)
    ticks = list(range(int(most) + 1))
    figure = go.Figure(
        go.Heatmap(
            z=chunks,
            x=[str(i + 1) for i in range(width)],
            y=labels,
            text=names,
            texttemplate="%{text}" if len(order) <= 30 else None,
            hovertemplate="%{y}, iteration %{x}: %{text}<extra></extra>",
            colorscale="Blues",
            zmin=-1,
            zmax=max(most, 1),
            xgap=1,
            ygap=1,
            colorbar={"title": "chunk", "tickvals": ticks, "ticktext": [str(2**t) for t in ticks]},
        )
    )
    figure.update_layout(margin={**_MARGIN, "l": 90})
    figure.update_xaxes(title="iteration", side="top", type="category")
    figure.update_yaxes(autorange="reversed", showticklabels=len(order) <= 30)
    return figure


def _measured_effects(shown: Sequence[TrialRecord]) -> Effects:
    """Of searched trials, each at its last rung, brought to the level of the full budget."""
    searched = [record for record in representative(shown) if record.purpose == "search"]
    if len(searched) < FEWEST:
        return {}
    seen = observe_all(searched)
    y, scales = adjust(seen)
    losses = {seen[i].trial: float(y[i]) * scales[""].spread for i in last_rungs(seen)}
    schedules = [schedule_of(record.arch_spec()) for record in searched]
    return effects_by_place(schedules, [losses[record.number] for record in searched])


def _effects(effects: Effects, corpus: Dataset, most: float) -> go.Figure | None:
    places, levels = sorted({place for place, _ in effects}), sorted({level for _, level in effects})
    if len(levels) < 2:
        return None
    table = [
        [None if (e := effects.get((place, level))) is None else corpus.headline.value(e) for place in places]
        for level in levels
    ]
    figure = go.Figure(
        go.Heatmap(
            z=table,
            x=[str(place + 1) for place in places],
            y=levels,
            colorscale="RdBu_r",
            zmid=0,
            zmin=-most,
            zmax=most,
            texttemplate="%{z:+.3f}",
            hovertemplate="%{y} at iteration %{x}: %{z:+.3f} " + f"{corpus.headline.label}<extra></extra>",
            xgap=1,
            ygap=1,
            colorbar={"title": corpus.headline.label},
        )
    )
    figure.update_layout(margin={**_MARGIN, "l": 80})
    figure.update_xaxes(title="iteration", type="category")
    return figure
