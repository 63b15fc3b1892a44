"""What probes saw inside models, as pictures with what each means: of a page of its own, and of a study's report.

Shape legend: T iterations, N heads.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from searchspace.arch import ArchSpec
from studies.probes.look import MEASURES, Inside, LayerSeen, LoopSeen
from studies.probes.table import WORST, probed_metrics
from studies.report.figures import Figures
from studies.report.html import write_page
from studies.show.summary import summarize
from studies.show.svg import draw_svg

_COLORS = ("#3b82c4", "#c2703d", "#2da44e", "#8b5fbf", "#b7791f", "#9aa5b1")
MOST_MODELS = len(_COLORS)
_MARGIN = {"l": 60, "r": 20, "t": 40, "b": 50}
_LEGEND = {"orientation": "h", "y": -0.3}
_TITLES = {
    "entropy": "entropy, over its most",
    "distance": "distance, tokens",
    "local": "weight on keys nearby",
}
_FEW = 12  # iterations that can be told apart on an axis

_WORDS = {
    "attention": (
        "Where each iteration attends",
        "Entropy: of a query's attention, over the logarithm of how many keys it sees: 1 is spread evenly, 0 is on one "
        "key. Distance: between query and key, in tokens; of latents, times their chunk. Nearby: within a sixteenth of "
        "the length. Solid: the 40 % of heads whose entropy changes most between iterations; dotted: all heads; "
        "points: each head, where one model is drawn. SpiralFormer (arXiv 2602.11698, section 4) finds early, coarse "
        "iterations broad and late, fine ones focused, and a plain loop's trend weak.",
    ),
    "layers": (
        "Where each layer attends",
        "Every layer at every call, in the order of computing; the mean of its heads. The buttons choose the measure.",
    ),
    "updates": (
        "How far each iteration moves the state",
        "2 |new - old| / (|new| + |old|): 0 is not at all. Solid: what the core gives, against what it reads; dashed: "
        "the loop's state, against the one before. In MeSH (arXiv 2510.07739) the first iteration of a plain loop does "
        "nearly all of the work, and later ones are nearly idle: their computation does not differ.",
    ),
    "similarity": (
        "How alike states are",
        "Centred kernel alignment (CKA, arXiv 1905.00414) of the states after each iteration; 0 is what the loop "
        "starts from. 1: the same up to rotation and scale. High between late states: the loop stagnates "
        "(arXiv 2510.07739).",
    ),
    "spectra": (
        "How many dimensions states use",
        "Leading singular values of the state after each iteration, over the first. A steep fall: the state has "
        "collapsed to a few directions, as one that must be memory and workplace at once does (arXiv 2510.07739). "
        "Rank: effective number of dimensions, the exponential of the singular values' entropy.",
    ),
    "routers": (
        "What routers give",
        "Mean weights, over tokens. Of a memory (MeSH): into which slots an iteration writes, and from which the next "
        "one reads; the same in every row: iterations are treated alike. Of a mixture: how much the update and each "
        "support weigh.",
    ),
    "worth": (
        "What each iteration is worth",
        "How much the loss rises, in nats, if an iteration's update is left out and all that follows computed without "
        "it. Near 0: the model does not need it. The others were trained to expect it, so this says what it does in "
        "this model, not what a model without it would lose.",
    ),
}


@dataclass(frozen=True, slots=True)
class _Track:
    """One loop of one model, in its colour."""

    label: str
    color: str
    loop: LoopSeen


def inside_figures(seen: Sequence[Inside]) -> tuple[Figures, dict[str, Any]]:
    """Pictures by name, and the sections of a template: titles, words, names of pictures, and a table of stability."""
    seen = seen[:MOST_MODELS]
    figures: Figures = {}
    sections: list[dict[str, Any]] = []

    def add(key: str, made: Figures) -> None:
        title, words = _WORDS[key]
        if made:
            figures.update(made)
            sections.append({"title": title, "words": words, "figures": list(made)})

    tracks = [
        _Track(model.name if len(model.loops) == 1 else f"{model.name}, {loop.name}", _COLORS[i], loop)
        for i, model in enumerate(seen)
        for loop in model.loops
    ]
    add("attention", _attention([track for track in tracks if track.loop.heads]))
    if any(model.layers for model in seen):
        add("layers", {"inside-layers": _layers(seen)})
    if tracks:
        add("updates", {"inside-updates": _updates(tracks)})
        add("worth", {"inside-worth": _worth(tracks)})
        add("similarity", {f"inside-similarity-{i}": _similarity(track) for i, track in enumerate(tracks)})
        add("spectra", {f"inside-spectra-{i}": _spectra(track) for i, track in enumerate(tracks)})
    routers = [model for model in seen if model.routers]
    add("routers", {f"inside-routers-{i}": _routers(model) for i, model in enumerate(routers)})
    return figures, {
        "names": [model.name for model in seen],
        "examples": "; ".join(dict.fromkeys(map(examples_of, seen))),
        "sections": sections,
        "stability": _stability(seen),
    }


def write_probe(file: Path, seen: Sequence[Inside], archs: Sequence[ArchSpec], command: str) -> Path:
    """Write the page of one or more models.

    Args:
        file: to be written.
        seen: inside each.
        archs: of each.
        command: that makes it again.
    """
    figures, told = inside_figures(seen)
    models = [
        {
            "name": model.name,
            "what": summarize(arch),
            "loss": "" if model.loss is None else f"{model.loss:.4f}",
            "examples": examples_of(model),
            "positions": model.positions,
            "color": color,
            "svg": base64.b64encode(draw_svg(replace(arch, name=model.name)).encode()).decode(),
        }
        for model, arch, color in zip(seen, archs, _COLORS, strict=False)
    ]
    return write_page(file, "probe.html", figures, seen=told, models=models, command=command)


def examples_of(seen: Inside) -> str:
    """How much was looked at."""
    return f"{seen.rows:,} example{'s' if seen.rows > 1 else ''} of {seen.positions:,} positions"


def _figure(title: str, y: str = "", x: str = "iteration") -> go.Figure:
    layout = {"margin": _MARGIN, "title": {"text": title, "font": {"size": 14}}, "legend": _LEGEND}
    return go.Figure(layout={**layout, "xaxis": {"title": x}, "yaxis": {"title": y}})


def mean_of(values: Sequence[float | None], picked: Sequence[bool] | None = None) -> float:
    """Of those that are picked; default: all. NaN if one of them is no number."""
    chosen = values if picked is None else [value for value, of in zip(values, picked, strict=True) if of]
    known = [value for value in chosen if value is not None]
    return sum(known) / len(known) if known and len(known) == len(chosen) else math.nan


def _told(loop: LoopSeen) -> list[str]:
    return [f"iteration {t}, chunks of {chunk}" for t, chunk in enumerate(loop.chunks, start=1)]


def _iterations(figure: go.Figure, tracks: Sequence[_Track]) -> None:
    """Numbers below the axis, and the size of a chunk where all loops have the same."""
    chunks = tracks[0].loop.chunks
    most = max(len(track.loop.chunks) for track in tracks)
    if most > _FEW:
        return
    same = all(track.loop.chunks == chunks for track in tracks) and max(chunks) > 1
    texts = [f"{t + 1}<br>chunk {chunks[t]}" if same else f"{t + 1}" for t in range(most)]
    figure.update_xaxes(tickvals=list(range(1, most + 1)), ticktext=texts)


def _attention(tracks: Sequence[_Track]) -> Figures:
    figures: Figures = {}
    for measure in MEASURES if tracks else ():
        figure = _figure(_TITLES[measure])
        for track in tracks:
            loop = track.loop
            x, heads_TN = list(range(1, len(loop.chunks) + 1)), loop.heads[measure]
            common = {"x": x, "hovertext": _told(loop), "hoverinfo": "text+y", "legendgroup": track.label}
            if len(tracks) == 1:
                figure.add_scatter(
                    x=[t for t in x for _ in heads_TN[0]],
                    y=[value for heads_N in heads_TN for value in heads_N],
                    mode="markers",
                    marker={"color": track.color, "size": 5, "opacity": 0.35},
                    showlegend=False,
                    hoverinfo="y",
                )
            line = {"color": track.color, "width": 2.5}
            figure.add_scatter(
                y=[mean_of(heads_N, loop.changed) for heads_N in heads_TN],
                name=track.label,
                line=line,
                mode="lines+markers",
                **common,
            )
            dots = {"color": track.color, "width": 1.5, "dash": "dot"}
            figure.add_scatter(
                y=[mean_of(v) for v in heads_TN], line=dots, mode="lines", showlegend=False, name="all heads", **common
            )
        _iterations(figure, tracks)
        if measure != "distance":
            figure.update_yaxes(range=[0, 1.03])
        else:
            figure.update_yaxes(rangemode="tozero")
        figures[f"inside-{measure}"] = figure
    return figures


def _layers(seen: Sequence[Inside]) -> go.Figure:
    figure = _figure("", x="layer call")
    for i, measure in enumerate(MEASURES):
        for model, color in zip(seen, _COLORS, strict=False):
            rows = model.layers
            figure.add_scatter(
                x=list(range(1, len(rows) + 1)),
                y=[mean_of(getattr(row, measure)) for row in rows],
                hovertext=[_called(row) for row in rows],
                hoverinfo="text+y",
                mode="lines+markers",
                line={"color": color, "width": 2},
                name=model.name,
                visible=i == 0,
            )
    count = len(seen)
    buttons = [
        {
            "label": "nearby" if measure == "local" else measure,
            "method": "update",
            "args": [
                {"visible": [j // count == i for j in range(count * len(MEASURES))]},
                {"yaxis.title.text": _TITLES[measure]},
            ],
        }
        for i, measure in enumerate(MEASURES)
    ]
    menu = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.16, "buttons": buttons}
    menu["font"] = {"color": "#1f66a8"}
    figure.update_layout(updatemenus=[menu])
    figure.update_yaxes(title=_TITLES[MEASURES[0]], rangemode="tozero")
    return figure


def _called(row: LayerSeen) -> str:
    return f"{row.call}, layer {row.layer + 1}" + (f", chunks of {row.chunk}" if row.chunk > 1 else "")


def _updates(tracks: Sequence[_Track]) -> go.Figure:
    figure = _figure("", "relative update")
    for track in tracks:
        loop = track.loop
        common = {"x": list(range(1, len(loop.chunks) + 1)), "hovertext": _told(loop), "hoverinfo": "text+y"}
        line = {"color": track.color, "width": 2.5}
        figure.add_scatter(y=loop.core, name=track.label, mode="lines+markers", line=line, **common)
        dashed = {"color": track.color, "width": 1.5, "dash": "dash"}
        figure.add_scatter(y=loop.state, name="the state", mode="lines", line=dashed, showlegend=False, **common)
    _iterations(figure, tracks)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _worth(tracks: Sequence[_Track]) -> go.Figure:
    figure = _figure("", "nats")
    for track in tracks:
        x, y = list(track.loop.worth), list(track.loop.worth.values())
        figure.add_bar(x=x, y=y, name=track.label, marker_color=track.color)
    _iterations(figure, tracks)
    return figure


def _similarity(track: _Track) -> go.Figure:
    loop = track.loop
    names = [str(t) for t in loop.states]
    figure = _figure(track.label, "state after")
    figure.add_heatmap(
        z=loop.similarity,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        colorscale="Blues",
        texttemplate="%{z:.2f}" if len(names) <= _FEW else None,
        hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(type="category", title="state after")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure


def _spectra(track: _Track) -> go.Figure:
    loop = track.loop
    figure = _figure(track.label, "over the first", "singular value")
    colors = sample_colorscale("Viridis", [0.9 * i / max(1, len(loop.states) - 1) for i in range(len(loop.states))])
    for t, values, rank, color in zip(loop.states, loop.spectra, loop.ranks, colors, strict=True):
        known = "" if rank is None else f", rank {rank:.1f}"
        x = list(range(1, len(values) + 1))
        figure.add_scatter(x=x, y=values, mode="lines", line={"color": color, "width": 2}, name=f"{t}{known}")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def _routers(model: Inside) -> go.Figure:
    rows = [str(router["name"]) for router in model.routers]
    most = max(len(router["weights"]) for router in model.routers)
    table = [[*router["weights"], *[None] * (most - len(router["weights"]))] for router in model.routers]
    figure = _figure(model.name, x="slot, or what is mixed")
    figure.add_heatmap(
        z=table,
        x=[str(i + 1) for i in range(most)],
        y=rows,
        colorscale="Blues",
        zmin=0,
        texttemplate="%{z:.2f}" if len(rows) <= 2 * _FEW else None,
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure


_MORE = {
    "recall_ratio": ("recall ratio", "spectral norm of the state's map in the recall, over that of the input's"),
    "recall_radius": ("recall radius", "spectral radius of the recall's map of the state"),
    "recall_condition": ("recall condition", "its first singular value over its eleventh"),
}
"""What only loops with a recall have."""


def _stability(seen: Sequence[Inside]) -> list[list[str]]:
    """A row for each measure: its name, every model's value, and what it is."""
    known = {name: (metric.label, metric.words) for name, (_, metric) in probed_metrics().items()} | _MORE
    asked = [name for name in known if any(name in model.stability for model in seen)]
    return [[known[name][0], *(_number(model.stability.get(name)) for model in seen), known[name][1]] for name in asked]


def _number(value: float | None) -> str:
    return "" if value is None else "∞" if value >= WORST else f"{value:.4g}"
