"""Closed tables: a row without one of its parts, or a name without a row, is an error at import, and named."""

import dataclasses
import subprocess
import sys

import pytest
from helpers import ROOT

from builder.graph import blocks, topologies
from builder.graph.ops import OPS
from builder.graph.row import PartName
from builder.lowering import class_of
from builder.pricing.cost import COSTS
from searchspace.tables import TableError, table
from searchspace.topologies import TOPOLOGIES
from studies.commands.export import FORMATS
from studies.data.corpus import Corpus
from studies.report.tracking import TRACKERS
from studies.strategy.samplers import SAMPLERS
from studies.strategy.stopper import STOPPERS
from studies.tasks.prefix_sums import PrefixSums
from studies.tasks.reach import Mazes
from studies.tasks.table import TASKS

TABLES = {
    "operations": OPS, "topologies": TOPOLOGIES, "unrollings": topologies.UNROLLINGS, "feed-forwards": blocks.FEED_FORWARDS,
    "norms": blocks.NORMS, "residuals": blocks.RESIDUALS, "recalls": blocks.RECALLS, "norm places": blocks.NORM_PLACES,
    "residual scales": blocks.RESIDUAL_SCALES, "cost metrics": COSTS, "metrics of text": Corpus.metrics,
    "metrics of mazes": Mazes.metrics, "metrics of sums": PrefixSums.metrics, "samplers": SAMPLERS, "stoppers": STOPPERS, "tasks": TASKS,
    "export formats": FORMATS, "trackers": TRACKERS,
}  # fmt: skip


def required(row):
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(row) if f.default is absent and f.default_factory is absent]


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_a_row_says_everything(rows):
    row = next(iter(rows.values()))
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    for missing in required(row):
        if missing == "name":
            continue
        with pytest.raises(TableError, match=rf"'{row.name}' does not say: {missing}$"):
            type(row)(**{name: value for name, value in values.items() if name != missing})
    assert type(row)(**values) == row


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_names_and_rows_are_the_same(rows):
    listed = list(rows.values())
    with pytest.raises(TableError, match=rf"'{listed[0].name}' has two rows"):
        table("a thing", [*listed, listed[0]])
    with pytest.raises(TableError, match="'more' can be written in a file, but has no row"):
        table("a thing", listed, [*rows, "more"])
    with pytest.raises(TableError, match=rf"'{listed[-1].name}' has a row, but can't be written in a file"):
        table("a thing", listed, list(rows)[:-1])


@pytest.mark.parametrize("name", ["feed-forwards", "norms", "residuals", "recalls"])
def test_the_classes_that_rows_name_exist(name):
    for row in TABLES[name].values():
        assert callable(class_of(PartName(row.part))), row.name


REMOVALS = [  # file, what is taken out of it, what the import says
    (
        "builder/graph/ops.py",
        '    pool("last", "pooling.LastPool"),\n',
        "an operation 'pool.last' can be written in a file",
    ),
    ("builder/graph/ops.py", "        draw=draw,\n", "Operation 'embed' does not say: draw"),
    ("builder/graph/ops.py", "        decode=decode,\n", "Operation 'embed' does not say: decode"),
    ("builder/graph/ops.py", "        part=part,\n", "Operation 'embed' does not say: part"),
    ("builder/graph/ops.py", "        work=cost[1],\n", "Operation 'embed' does not say: work"),
    (
        "builder/graph/ops.py",
        "        init=init,\n        identity=identity,\n",
        "Operation 'embed' does not say: init",
    ),
    (
        "builder/graph/blocks.py",
        '        feed_forward("relu2", "feedforward.SquaredReluFeedForward"),\n',
        "a feed-forward 'relu2' can be written",
    ),
    ("builder/graph/topologies.py", '        Unrolling("mix", _mix),\n', "a topology 'mix' can be written"),
    ("searchspace/topologies.py", '        _plain("anchor"),\n', "a topology 'anchor' can be written"),
    (
        "studies/strategy/samplers.py",
        '        Sampler("random", "draws at random", None),\n',
        "a sampler 'random' can be written",
    ),
    (
        "studies/strategy/stopper.py",
        '        Stopper("none", "no trial is ended early", lambda c, better, others: False, lambda c: 1.0),\n',
        "a stopper 'none' can be written",
    ),
    (
        "studies/report/tracking.py",
        '        TrackerRow("wandb", WandB, "wandb", "wandb"),\n',
        "a tracker 'wandb' can be written",
    ),
]
ADDITIONS = [  # file, a name of a literal, the same and one more, what the import of the table says
    ("searchspace/nodes.py", 'PoolKind: TypeAlias = Annotated[Literal["mean"', 'PoolKind: TypeAlias = Annotated[Literal["max", "mean"', "builder.graph.ops", "an operation 'pool.max' can be written"),
    ("searchspace/nodes.py", 'FfnKind: TypeAlias = Annotated[Literal["gelu"', 'FfnKind: TypeAlias = Annotated[Literal["moe", "gelu"', "builder.graph.blocks", "a feed-forward 'moe' can be written"),
    ("searchspace/topologies.py", '        "base",\n        "residual"', '        "dense",\n        "base",\n        "residual"', "searchspace.topologies", "a topology 'dense' can be written"),
    ("studies/sections.py", '    Literal["tpe"', '    Literal["bore", "tpe"', "studies.strategy.samplers", "a sampler 'bore' can be written"),
]  # fmt: skip


def imported(tmp_path, file, old, new, module):
    """What importing a module says, one file of the packages being changed."""
    for package in ("searchspace", "builder", "spiralformer", "studies"):
        (tmp_path / package).symlink_to(ROOT / package)
    place = tmp_path
    for part in file.split("/")[:-1]:  # folders on the way become real, the rest stays linked
        place = place / part
        source = place.resolve()
        place.unlink()
        place.mkdir()
        for entry in source.iterdir():
            if entry.name != "__pycache__":
                (place / entry.name).symlink_to(entry)
    text = (ROOT / file).read_text()
    assert text.count(old) == 1, (file, old)
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"import {module}"], capture_output=True, text=True, cwd=tmp_path
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.mark.parametrize(("file", "line", "told"), REMOVALS, ids=[f"{row[0]} {i}" for i, row in enumerate(REMOVALS)])
def test_what_is_taken_out_is_missed_at_import(tmp_path, file, line, told):
    assert told in imported(tmp_path, file, line, "", file.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize(("file", "old", "new", "module", "told"), ADDITIONS, ids=[row[2][-12:] for row in ADDITIONS])
def test_a_name_without_a_row_is_an_error_at_import(tmp_path, file, old, new, module, told):
    assert told in imported(tmp_path, file, old, new, module)


def test_the_change_alone_breaks_the_import(tmp_path):
    assert imported(tmp_path, "builder/graph/ops.py", "STREAM, MEMORY", "STREAM, MEMORY", "builder.graph.ops") == ""
