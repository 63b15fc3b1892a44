"""What several tests need: tiny architectures, and the truth about a built module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from builder import build_model, compile_arch
from builder.laws import randomize
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data, merge

ROOT = Path(__file__).parent.parent
ARCHITECTURES = sorted((ROOT / "searchspace/architectures").glob("*.yaml"))
BY_SIZE = [  # the largest presets are the smaller ones', written for longer
    pytest.param(file, marks=pytest.mark.slow if re.search(r"_(1b|1_4b|2_8b|6_9b)", file.stem) else (), id=file.stem)
    for file in ARCHITECTURES
]
SPACES = sorted((ROOT / "searchspace/spaces").glob("*.yaml"))
STUDIES = sorted((ROOT / "studies/configs").glob("*.yaml"))

TINY: dict[str, Any] = {
    "name": "tiny",
    "vocab_size": 17,
    "seq_len": 24,
    "d_model": 16,
    "levels": {"token": {"chunk": 1}, "word": {"chunk": 4}, "phrase": {"chunk": 8}},
    "blocks": {"core": {"layers": 1, "heads": 2}},
    "graph": {
        "x": {"embed": "tokens"},
        "h": {"loop": "core", "in": "x", "schedule": ["phrase", "word", "token"], "topology": "anchor"},
        "logits": {"head": "lm", "in": "h"},
    },
}

TOPOLOGIES = [
    "residual",
    "anchor",
    "anchor_star",
    "mesh",
    {"mix": {"of": ["residual", "anchor", "anchor_star"], "weights": "sum"}},
    {"mix": {"of": ["residual", "anchor"], "weights": "static"}},
    {"mix": {"of": ["anchor", "anchor_star"], "weights": "dynamic"}},
    {"runge_kutta": {"tableau": "euler"}},
    {"runge_kutta": {"tableau": "midpoint", "learned": True}},
    {"runge_kutta": {"tableau": "rk4"}},
    "velocity",
    {"hyper_connections": {"lanes": 3}},
    "lstm",
]


def tiny_data(over: dict[str, Any] | None = None) -> dict[str, Any]:
    """`TINY` with something laid over it."""
    data: dict[str, Any] = merge(TINY, over or {})
    return data


def tiny_arch(over: dict[str, Any] | None = None) -> ArchSpec:
    """The tiny architecture with something laid over it."""
    return arch_from_data(tiny_data(over))


def built(over: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A tiny model with random weights."""
    return randomize(build_model(compile_arch(tiny_arch(over))), seed)


def tiny_study(folder: Path, over: dict[str, Any] | None = None) -> Path:
    """A study file that runs in seconds: a few kilobytes of text, five schedules or so."""
    from searchspace.plain import dump_yaml

    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} is {i} squared\n" for i in range(2000)))
    schedule = {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 3], "order": "coarse_to_fine"}}
    space = tiny_data(
        {"vocab_size": 256, "graph": {"h": {"schedule": schedule, "topology": {"choice": ["residual", "mesh"]}}}}
    )
    baseline = {
        "name": "plain",
        "levels": None,
        "graph": {"h": None, "y": {"block": "core", "in": "x"}, "logits": {"head": "lm", "in": "y"}},
    }
    study = {
        "name": "tiny",
        "space": space,
        "data": {"kind": "text", "path": str(folder / "text.txt")},
        "training": {"flops": 4e8, "batch_tokens": 96, "lr": 0.01, "eval_tokens": 480},
        "budget": {"flops_per_token": "300% of baseline"},
        "baseline": [{k: v for k, v in tiny_data({**baseline, "vocab_size": 256}).items() if v is not None}],
        "search": {"num_trials": 5, "stopper": {"asha": {"rungs": 2, "reduction": 2}}},
    }
    file = folder / "tiny.yaml"
    file.write_text(dump_yaml(merge(study, over or {})))
    return file


def make_driver(folder: Path, over: dict[str, Any] | None = None, *overrides: str) -> Any:
    """The driver of a tiny study in ``folder``."""
    from studies.commands.search import prepare_data
    from studies.config import load_study
    from studies.strategy.driver import StudyDriver

    study = load_study(tiny_study(folder, over), overrides)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    return StudyDriver(study, run, prepare_data(study, run))


def end_all(driver: Any, loss: Callable[[Any], float] = lambda record: float(record.cost.params)) -> Any:
    """Launch every trial and end it at once with a made-up loss."""
    from studies.records.trial import Report, Rung

    while (spec := driver.next_trial()) is not None:
        record = driver.record(spec.number)
        full = spec.training.flops or 1.0
        told = {"bits_per_byte": loss(record) / math.log(2), "loss": loss(record)}
        rungs = tuple(Rung(flops=share * full, tokens=1, score=told["loss"], metrics=told) for share in spec.rungs)
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=rungs))
    return driver


def run_cli(*args: object, code: int = 0) -> str:
    """The output of a command that must end with this exit code."""
    from typer.testing import CliRunner

    from studies.cli import app

    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result.output
