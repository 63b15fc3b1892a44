"""The key reference, generated from the specs themselves, so that it can't drift."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from builder.pricing.budget import BudgetSpec
from builder.pricing.cost import COSTS
from searchspace import nodes
from searchspace.arch import ArchSpec, BaseSpec, BlockSpec, LevelSpec
from searchspace.plain import encode
from searchspace.plugin_loading import PluginRecord, loaded_names, owner
from searchspace.tables import kind_of, options
from searchspace.topologies import TOPOLOGIES
from studies.config import StudyKeys
from studies.sections import (
    Enqueued,
    PromoteConfig,
    ResourcesConfig,
    ScaleConfig,
    SearchConfig,
    SizeConfig,
    StopperConfig,
    TrainingConfig,
)
from studies.tasks.table import TASKS


def _sections() -> Iterator[tuple[str, str, tuple[type[Any], ...]]]:
    """Title, introduction and specs of each, with what plugins add."""
    yield ("Architecture", "The keys of an architecture or space file. In a space, any value may be open.", (ArchSpec,))
    yield ("base", "The model whose settings `mup` and `completep` carry over.", (BaseSpec,))
    yield ("levels.NAME", "A resolution level.", (LevelSpec,))
    yield ("blocks.NAME", "A stack of layers; every use of its name shares its weights.", (BlockSpec,))
    yield ("graph.NAME", "One node; the key that names the operation tells its kind.", tuple(nodes.NODE_TYPES.values()))
    yield (
        "graph.NAME.iterations",
        "How often a loop runs in training, and when it is tried. They are drawn for each step, in whole turns of the "
        "schedule: `[four, two, one, four, two, one]` is two turns. Costs and evaluation go by the schedule, training "
        "FLOPs by the mean of what is drawn.",
        (nodes.IterationsSpec,),
    )
    yield ("A level in a schedule or a node", "Its name, or a mapping that starts from one.", (nodes.LevelUse,))
    yield (
        "topology",
        ", ".join(f"`{row.name}`" for row in TOPOLOGIES.values() if row.bare)
        + ", or a mapping of one of these names to its settings: "
        + ", ".join(f"`{row.name}`" for row in TOPOLOGIES.values() if row.settings)
        + ".",
        tuple(row.settings for row in TOPOLOGIES.values() if row.settings),
    )
    yield (
        "Study",
        "The keys of a study file. Beside those in the table: `space` (required), a file beside the study, a shipped "
        "name, or the space itself; `baseline`, an architecture or a list of them, each a file, a shipped name or "
        "itself, trained in full before the search; `extends`, another study to start from. `training` and the "
        "sections below have tables of their own.",
        (StudyKeys,),
    )
    yield (
        "Study: data",
        "What to train on; `kind` tells which of the keys have a use.",
        tuple(task.config for task in TASKS.values()),
    )
    yield ("Study: training", "Any value may be open; baselines take the middle.", (TrainingConfig,))
    yield (
        "Study: budget",
        "Each limit is an amount (`1500000`, `1.5M`, `64KiB`, `90% of baseline`), or `{min: ..., max: ...}`.",
        (BudgetSpec,),
    )
    yield (
        "Study: search",
        "How to propose, when to stop, what to train again; `stopper` is `none`, `asha`, `median`, or `{asha: {...}}`. "
        "See docs/search.md.",
        (SearchConfig, StopperConfig, PromoteConfig),
    )
    yield (
        "Study: scale",
        "A ladder after the search; `sizes` lists widths, or widths and depths. See docs/scale.md.",
        (ScaleConfig, SizeConfig),
    )
    yield ("Study: resources", "What one trial occupies.", (ResourcesConfig,))


OPEN_VALUES = """## Open values

| form | meaning |
|---|---|
| `{choice: [a, b]}` | one of these, values or mappings; choices inside an alternative exist only when it is taken |
| `{int: [1, 4]}`, with `step` or `log: true` | a whole number, bounds inclusive |
| `{float: [1.0e-4, 1.0e-2]}`, with `step` or `log: true` | a number, bounds inclusive |
| `{sequence: {of: [word, token], length: [2, 6], order: any}}` | levels; or `coarse_to_fine`, `fine_to_coarse` |
| any of the first three, with `prior: VALUE` and `confidence: low`, `medium` or `high` | random draws favour it |
| `${path.to.value}` | the value decided there; `vars:` holds decisions that serve several places |

`constraints:` is a list of expressions over paths, numbers and text, with arithmetic, comparisons, `and`, `or`, `not`,
`in`, `a if c else b`, and the functions `iterations('LOOP')`, `count('LOOP', 'LEVEL')`, `first('LOOP')`,
`last('LOOP')`, `exists('PATH')`, `min`, `max`, `sum`, `len`, `abs`.

`extends: FILE` lays a file over another one, beside it or shipped. A node that names an operation, a choice, and a
mapping that names a `kind` are replaced whole; other mappings merge; `null` removes a level, block, node or var.
"""


def key_reference() -> str:
    """Every key of the three YAML languages with type, default and meaning, as Markdown."""
    parts = ["# Keys of the YAML languages\n\nMade by `spiralformer keys`.\n", OPEN_VALUES]
    for title, intro, classes in _sections():
        parts.append(f"## {title}\n\n{intro}\n")
        for cls in classes:
            if len(classes) > 1:
                parts.append(f"### {(cls.__doc__ or cls.__name__).splitlines()[0]}\n")
            parts.append("| key | type | default | meaning |\n|---|---|---|---|")
            if cls is not BudgetSpec:
                rows = [_row(cls, field) for field in dataclasses.fields(cls)]
            else:
                rows = [f"| `{row.name}` | limit | `null` | {row.words} |" for row in COSTS.values()]
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(cls: type[Any], field: dataclasses.Field[Any]) -> str:
    kind = _show_type(typing.get_type_hints(cls, include_extras=True)[field.name])
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None or high is not None:
        kind += f", from {low:.12g}" if low is not None else ""
        kind += f" to {high:.12g}" if high is not None else ""
    default = "required"
    if field.default is not dataclasses.MISSING:
        default = f"`{_show_value(encode(field.default))}`"
    elif field.default_factory is not dataclasses.MISSING:
        default = "`{}`"
    name = field.metadata["key"] or field.name
    return f"| `{name}` | {kind} | {default} | {field.metadata['doc']} |".replace("\n", " ")


def _show_value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict | list | tuple):
        return "[]" if not value and not isinstance(value, dict) else str(value).replace("'", "") if value else "{}"
    return str(value)


def _show_type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if (kind := kind_of(annotation)) is not None:
        added = [f"`{name}` (of plugin {owner(kind, name)})" for name in loaded_names(kind)]
        return ", ".join([*(f"`{name}`" for name in options(annotation)), *added])
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_show_type(arg) for arg in args if arg is not type(None)))
    if origin is tuple:
        return f"list of {_show_type(args[0])}"
    if origin is not None:
        return f"mapping of {_show_type(args[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    names |= {Enqueued: "architecture or decisions", PluginRecord: "plugin"}
    return names.get(annotation, "see there")
