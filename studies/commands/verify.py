"""Plugins, held to the laws that our own parts are held to: `builder.laws`, and `studies.commands.contracts`."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, cast, get_origin, get_type_hints

from rich.console import Console

from builder.laws import LAWS, breaches, told
from searchspace.errors import SpecError
from searchspace.files import arch_from_data, merge
from searchspace.nodes import FfnKind, NormPlace, PoolKind, UpscaleKind
from searchspace.plain import decode
from searchspace.plugin_loading import Plugin, loaded_plugins, places_of, record_of
from searchspace.plugins import installed, provided
from searchspace.tables import options
from searchspace.topologies import TOPOLOGIES, TopologyRow
from studies.commands.contracts import (
    PROPOSALS,
    TINY,
    Breach,
    Data,
    check_format,
    check_metric,
    check_sampler,
    check_task,
)
from studies.commands.export import Format
from studies.data.dataset import AddedMetric
from studies.show.terminal import say
from studies.strategy.samplers import Sampler
from studies.tasks.table import Task

_CONTRACTS: dict[type, tuple[str, Callable[[Any], Iterator[Breach]]]] = {
    AddedMetric: ("a mean over the batch, of what is asked for, and better for right answers", check_metric),
    Task: ("prepared twice, trained, measured, and its model read back from a bundle", check_task),
    Sampler: (f"{PROPOSALS} proposals, and the same ones again", check_sampler),
    Format: ("a bundle written", check_format),
}
_EXPORTED = 2
"""Of a row's architectures, that many are exported too, which takes seconds each."""
_NESTED: Data = {  # a pool of a pool
    "graph": {
        "h": None,
        "a": {"pool": "word", "in": "x"},
        "b": {"block": "core", "in": "a"},
        "c": {"pool": {"level": "phrase", "offset": 7}, "in": "b"},
        "e": {"upscale": "word", "in": "c", "delay": 1},
        "f": {"join": "sum", "in": ["e", "b"]},
        "g": {"upscale": "token", "in": "f"},
        "y": {"join": "sum", "in": ["g", "x"]},
        "logits": {"head": "lm", "in": "y"},
    }
}


@dataclass
class _Result:
    """Of one row."""

    place: str
    checked: str
    breaches: list[Breach] = field(default_factory=list)


def verify_plugins(console: Console, *, everything: bool = False) -> None:
    """Check every row of the plugins that are loaded, else of those installed, and say what fails.

    Args:
        console: to say it on.
        everything: in every combination with what is built in.

    Raises:
        SpecError: if there is none, or one fails.
    """
    if not loaded_plugins():
        for kind, _, name in (place.partition(":") for place in installed()):
            provided(kind, name)
    if not (plugins := loaded_plugins()):
        raise SpecError("--plugin", "there is no plugin to verify", "give --plugin FILE_OR_MODULE, or install one")
    failed = total = 0
    for plugin in plugins:
        say(console, f"plugin {record_of(plugin.name)}")
        for result in _verify(plugin, console, everything=everything):
            total += 1
            failed += bool(result.breaches)
            mark = "[red]✗[/]" if result.breaches else "[green]✓[/]"
            broken = len(dict.fromkeys(law for law, _, _ in result.breaches))
            verdict = f"breaks {broken} of {result.checked}" if broken else result.checked
            console.print(f"  {mark} {result.place}: {verdict}", highlight=False, soft_wrap=True)
            for law in dict.fromkeys(law for law, _, _ in sorted(result.breaches, key=_order)):
                (what, where), *others = [(how, place) for other, how, place in result.breaches if other == law]
                more = f", and in {len(others)} more" if others else ""
                say(console, f"      {law}: {what} ({where}{more})")
    if importlib.util.find_spec("transformers") is None:
        say(console, "note: exports were not loaded again, which needs transformers: pip install 'spiralformer[hf]'")
    if failed:
        raise SpecError("", f"{failed} of {total} rows fail", "docs/plugins.md says what each law asks for")
    say(console, "1 row holds" if total == 1 else f"{total} rows hold")


def _verify(plugin: Plugin, console: Console, *, everything: bool) -> Iterator[_Result]:
    for row in plugin.rows:
        place = places_of(row)[0]
        with console.status(f"checking {place}"):
            yield _check_row(row, place, everything=everything)


def _order(breach: Breach) -> int:
    """Of a law: what breaks an early one often breaks later ones too."""
    names = [law.name for law in LAWS]
    return names.index(breach[0]) if breach[0] in names else -1


def _check_row(row: Any, place: str, *, everything: bool) -> _Result:
    kind, _, name = place.partition(":")
    if type(row) in _CONTRACTS:
        checked, check = _CONTRACTS[type(row)]
        result = _Result(place, checked)
        try:
            result.breaches += check(row)
        except (Exception, SystemExit) as error:  # whatever its own code raises is its breach
            result.breaches.append(("runs", told(error), place))
        return result
    if isinstance(row, TopologyRow) and not row.bare:
        what = "its settings have keys without a default, so that it can't be checked alone"
        return _Result(place, "nothing", [("settings", what, f"topology: {name}")])
    cases = [*_cases(kind, name), *(_all_cases(kind, name) if everything else ())]
    result = _Result(place, f"{len(LAWS)} laws over {len(cases)} architectures")
    for i, (case, over) in enumerate(cases):
        try:
            arch = arch_from_data(merge(TINY, {**over, "d_model": (16, 24)[i % 2]}))  # prices go by the width
            result.breaches += [(law.name, how, case) for law, how in breaches(arch, slow=i < _EXPORTED)]
        except (Exception, SystemExit) as error:  # as above
            result.breaches.append(("runs", told(error), case))
    return result


def _loop(schedule: list[Any], topology: Any = "anchor", **more: Any) -> Data:
    return {"graph": {"h": {"schedule": schedule, "topology": topology, **more}}}


def _core(**settings: Any) -> Data:
    return {"blocks": {"core": settings}}


def _cases(kind: str, name: str) -> Iterator[tuple[str, Data]]:
    """What is laid over the tiny architecture to use a name, and what that is."""
    whole_input: Data = {"causal": False}
    if kind in ("pool", "upscale"):
        level = {"levels": {"word": {kind: name}, "phrase": {kind: name}}}
        yield "chunks of 4, offset 3", level
        yield "seeing the whole input", merge(level, whole_input)
        schedule = ["phrase", {"level": "word", "delay": 2}, "token"]
        yield "chunks of 8 and 4, delayed", merge(level, _loop(schedule, "mesh"))
        yield "a pool of a pool", merge(level, _NESTED)
    elif kind == "topology":
        row = TOPOLOGIES[name]
        step = ["word"] * row.stages(row.settings() if row.settings else None)
        steps = [level for level in ("word", "token", "phrase", "word") for _ in step]
        yield "four steps", _loop(steps, name)
        yield "seeing the whole input", merge(_loop(steps, name), whole_input)
        yield "with recall, norms and step vectors", _loop(steps, name, recall="linear", norm="rms", step="add")
        yield "one step", _loop(step, name)
        between = {"graph": {"p": {"block": "core", "in": "x"}}}
        yield "not from the embedding", merge(between, _loop(steps, name, **{"in": "p"}))
        settings = row.settings
        for setting, value in _other_settings(settings) if settings is not None else ():
            stages = row.stages(decode(cast("type[Any]", settings), {setting: value}))
            levels = [level for level in ("word", "token", "phrase", "word") for _ in range(stages)]
            yield f"{setting}: {value}", _loop(levels, {name: {setting: value}})
    elif kind == "ffn":
        yield "as it is", _core(ffn=name)
        yield "with biases", merge(_core(ffn=name, bias=True), whole_input)
        yield "of a width given", _core(ffn=name, ffn_dim=24, layers=2)
        yield "beside attention", _core(ffn=name, bias=True, parallel_residual=True)
    elif kind == "norm":
        head = {"graph": {"logits": {"norm": name}}}
        inside = merge(_core(norm=name, norm_place="sandwich"), head)
        yield "in blocks, loop and head", merge(inside, _loop(["word", "token"], norm=name))
        yield "seeing the whole input", merge(_core(norm=name), whole_input)
    elif kind == "recall":
        yield "outside blocks and inside", merge(_core(recall=name), _loop(["word", "token"], recall=name))
        yield "seeing the whole input", merge(_loop(["word"], recall=name), whole_input)
    elif kind == "residual":
        for place in options(NormPlace):
            yield f"norm place {place}", _core(residual=name, norm_place=place)
    elif kind == "step":
        yield "of every iteration", _loop(["word", "token"], step=name)
        yield "seeing the whole input", merge(_loop(["word", "token"], step=name), whole_input)
    elif kind == "loss":
        yield "of the logits", {"graph": {"z": {"loss": name, "in": "logits"}}}


def _other_settings(settings: type[Any]) -> Iterator[tuple[str, Any]]:
    """Each setting at another value than its own: the other switch, the other names, the bounds."""
    hints = get_type_hints(settings, include_extras=True)
    for each in fields(settings):
        name, annotation = each.metadata.get("key") or each.name, hints[each.name]
        if annotation is bool:
            values: list[Any] = [True, False]
        elif get_origin(annotation) in (Literal, Annotated):
            values = list(options(annotation))
        else:
            values = [each.metadata.get("low"), each.metadata.get("high")]
        for value in values:
            if value is not None and value != each.default:
                yield name, annotation(value) if annotation in (int, float) else value


def _all_cases(kind: str, name: str) -> Iterator[tuple[str, Data]]:
    """The first of them with every pool, up-scaling, topology and feed-forward that is built in."""
    _, first = next(_cases(kind, name))
    pools = [name] if kind == "pool" else options(PoolKind)
    upscales = [name] if kind == "upscale" else options(UpscaleKind)
    ours = [row.name for row in TOPOLOGIES.values() if row.bare and row.unroll is None and row.name != "base"]
    for pool, upscale, topology in itertools.product(pools, upscales, [name] if kind == "topology" else ours):
        level = {"pool": pool, "upscale": upscale}
        over = merge(first, {"levels": {"word": level, "phrase": level}})
        over = over if kind == "topology" else merge(over, _loop(["word", "phrase"], topology))
        yield f"{pool}, {upscale}, {topology}", over
    for ffn in options(FfnKind) if kind != "ffn" else ():
        yield f"with {ffn}", merge(first, _core(ffn=ffn))
