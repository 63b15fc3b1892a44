"""What tasks, metrics, samplers and export formats owe whoever uses them, checked of a plugin's.

Each check gives what is broken: which rule, how, and where.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeAlias, cast

import optuna
import torch
from torch import Tensor
from torch.nn import functional

from builder.exchange.bundle import load_bundle, save_bundle
from builder.graph.compiler import compile_arch
from builder.lowering import build_model
from searchspace.files import arch_from_data, merge
from studies.commands.export import Format
from studies.config import load_study
from studies.data.dataset import AddedMetric, DataFacts, Dataset, Metric
from studies.data.settings import TextData
from studies.records.trial import Report, Rung
from studies.sections import TrainingConfig
from studies.strategy.driver import StudyDriver
from studies.strategy.samplers import Asked, Sampler, make_sampler
from studies.tasks.pairs import LEFT_OUT, Pairs
from studies.tasks.table import Task, prepare_data, task_named
from studies.training.trainer import Trainer

Data: TypeAlias = dict[str, Any]
Breach: TypeAlias = tuple[str, str, str]
"""Which law, how it is broken, and where."""

TINY: Data = {
    "name": "tiny",
    "vocab_size": 17,
    "seq_len": 24,
    "d_model": 16,
    "levels": {"token": {"chunk": 1}, "word": {"chunk": 4, "offset": 3}, "phrase": {"chunk": 8, "offset": 1}},
    "blocks": {"core": {"layers": 1, "heads": 2}},
    "graph": {
        "x": {"embed": "tokens"},
        "h": {"loop": "core", "in": "x", "schedule": ["word", "word"], "topology": "anchor"},
        "logits": {"head": "lm", "in": "h"},
    },
}
_STEPS, PROPOSALS, _WORDS = 4, 14, 257


def check_metric(row: AddedMetric) -> Iterator[Breach]:
    """One number, the mean over a batch's targets, and better for right answers."""
    if task_named(row.task) is None:
        yield "task", f"is a metric of {row.task!r}, which is no task, or another plugin's (--plugin)", row.name
        return
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(6, 12, _WORDS, generator=generator)
    targets_BL = torch.randint(0, _WORDS, (6, 12), generator=generator)
    logits_BLV += 3.0 * functional.one_hot(targets_BL, _WORDS)  # right now and then

    def value(logits: torch.Tensor, targets: torch.Tensor) -> float:
        before = logits.clone(), targets.clone()
        found = torch.as_tensor(row.measure(logits, targets), dtype=torch.float64)
        if not _equal((logits, targets), before):
            raise ValueError("changes the logits or targets that it is given")
        if found.dim() or not found.isfinite():
            raise ValueError(f"gives {found.tolist()}, not one finite number")
        return float(found)

    whole = value(logits_BLV, targets_BL)
    rows = sum(value(logits_BLV[i : i + 1], targets_BL[i : i + 1]) for i in range(6)) / 6
    if abs(whole - rows) > 1e-4 * max(1.0, abs(whole)):
        what = f"is {whole:.4g} of a batch, and {rows:.4g} on average of its rows: metrics are averaged over batches"
        yield "mean", what, "6 rows of 12"
    left_out_BL, moved_BLV = targets_BL.clone(), logits_BLV.clone()
    left_out_BL[:, :4] = LEFT_OUT
    moved_BLV[:, :4] += 3 * torch.randn(6, 4, _WORDS, generator=generator)
    asked = value(logits_BLV[:, 4:], targets_BL[:, 4:])
    if abs(value(logits_BLV, left_out_BL) - value(moved_BLV, left_out_BL)) > 1e-6:
        yield "left out", f"depends on logits whose target is {LEFT_OUT}, which nothing asks for", "4 of 12"
    elif abs(value(logits_BLV, left_out_BL) - asked) > 1e-4 * max(1.0, abs(asked)):
        what = f"counts targets that are {LEFT_OUT}: {value(logits_BLV, left_out_BL):.4g}, without them {asked:.4g}"
        yield "left out", what, "4 of 12"
    right_BLV = 20.0 * functional.one_hot(targets_BL, _WORDS).float()
    yield from _direction(row, value(right_BLV, targets_BL), value(-right_BLV, targets_BL))


def _direction(metric: Metric, right: float, wrong: float) -> Iterator[Breach]:
    if (right > wrong) if metric.better == "lower" else (right < wrong):
        what = f"says that {metric.better} is better, and is {right:.4g} for right answers, {wrong:.4g} for wrong ones"
        yield "direction", what, metric.name


def check_task(row: Task) -> Iterator[Breach]:
    """Data that are the same every time, a few steps of training, and a bundle that is read back."""
    if unset := [f.name for f in fields(row.config) if f.name != "kind" and f.default is f.default_factory is MISSING]:
        yield "settings", f"{', '.join(unset)} has no default, so that it can't be checked alone", row.config.__name__
        return
    config = cast("type[Any]", row.config)()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, again = (row.prepare(config, folder / name, folder) for name in ("one", "two"))
        if data.facts.content != again.facts.content:
            yield "prepare", "makes other data the second time", "default settings"
        if data.headline.metric.name != row.headline.name:
            what = f"tells scores by {data.headline.metric.name}, and names {row.headline.name} first"
            yield "headline", what, "metrics"
        facts = row.look(config, folder, prepare=False)
        for name in ("task", "vocab_size", "positions"):
            before, after = getattr(facts, name), getattr(data.facts, name)
            if before != after:
                yield "look", f"says {name} {before} before the data are made, {after} after", "default settings"
        if data.facts.task != row.name:
            yield "look", f"its data are of the task {data.facts.task!r}", "default settings"
            return
        length = data.facts.positions or 24
        over = {"vocab_size": data.facts.vocab_size, "seq_len": length, "causal": row.causal is not False}
        arch = arch_from_data(merge(TINY, over))
        yield from _check_batches(data, length)
        yield from _check_answers(data, length)
        if isinstance(data, Pairs):
            train, held_out = ({r.tobytes() for r in data.rows(part)} for part in (data.train, data.val))
            if len(held_out) > _STEPS and held_out <= train:
                yield "held out", "every held-out example is a training example", "default settings"
        batch, few = 4 * length, 8 * length
        training = TrainingConfig(tokens=float(_STEPS * batch), batch_tokens=batch, lr=0.01, eval_tokens=few)
        trainer = Trainer(arch, training, data, seed=0)
        trainer.train(trainer.plan.num_steps)
        if lacks := set(row.metrics) - set(trainer.evaluate()[1]):
            yield "metrics", f"names {', '.join(sorted(lacks))} and does not measure it", "after training"
        model = trainer.model.eval()
        data.show(model, 0)
        if row.examine is not None:
            row.examine(model, config, few, {})
        told = {"data": {"task": row.name}, "data_settings": config.settings()}
        load_bundle(save_bundle(folder / "bundle", arch, build_model(compile_arch(arch)), facts=told))


def _check_batches(data: Dataset, length: int) -> Iterator[Breach]:
    for step in range(2):
        (inputs_BL, targets_BL), again = (data.batch(0, step, 4, length) for _ in range(2))
        if not _equal((inputs_BL, targets_BL), again):
            yield "batch", "is another one for the same seed and step", f"seed 0, step {step}"
        if inputs_BL.shape != (4, length) or targets_BL.shape != (4, length):
            shapes = f"{tuple(inputs_BL.shape)} and {tuple(targets_BL.shape)}"
            yield "batch", f"is of the shapes {shapes}", f"asked for (4, {length})"
        elif int(inputs_BL.min()) < 0 or int(inputs_BL.max()) >= data.facts.vocab_size:
            what = f"holds tokens from {int(inputs_BL.min())} to {int(inputs_BL.max())}"
            yield "batch", what, f"a vocabulary of {data.facts.vocab_size}"
    one, two = (list(data.eval_batches(8 * length, 4, length)) for _ in range(2))
    if not one or len(one) != len(two) or not all(map(_equal, one, two)):
        yield "eval_batches", "gives none, or others the second time", "default settings"


def _check_answers(data: Dataset, length: int) -> Iterator[Breach]:
    """Right answers are measured as better than wrong ones, where targets are tokens."""
    _, targets_BL = data.batch(0, 0, 4, length)
    asked_BL = targets_BL.clamp(min=0)
    if int(asked_BL.max()) >= data.facts.vocab_size:
        return
    right_BLV = 20.0 * functional.one_hot(asked_BL, data.facts.vocab_size).float()
    means = [data.measure(logits_BLV, targets_BL) for logits_BLV in (right_BLV, -right_BLV)]
    right, wrong = (data.result({name: float(value) for name, value in each.items()}) for each in means)
    for name, metric in data.metrics.items():
        if name in right:
            yield from _direction(metric, right[name], wrong[name])
    if data.headline.metric.name in right and data.score(right) > data.score(wrong):
        yield "headline", "its score, of which less is better, is larger for right answers: see its scale", "score"


def _equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def check_sampler(row: Sampler) -> Iterator[Breach]:
    """A search over made-up losses, and the same again."""
    with tempfile.TemporaryDirectory() as place:
        first, again = (_proposals(row.name, Path(place) / name) for name in ("one", "two"))
    if first != again:
        at = next((i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b), len(again))
        what = "proposes otherwise from the same seed and history: no search could go on"
        yield "seed", what, f"proposal {at}"
    drawn = {_first_draw(row, seed) for seed in range(4)}
    if len(drawn) == 1:
        yield "seed", "draws the same first value whatever asked.seed is", f"{drawn.pop():.4g}"
    if len(first) < PROPOSALS:
        yield "proposals", f"gives up after {len(first)} of {PROPOSALS}", "a space of 78 schedules"


def _first_draw(row: Sampler, seed: int) -> float:
    """What it draws from 0 to 1 before anything is known."""
    asked = Asked(seed=seed, num_trials=PROPOSALS, schedules=(), complete=lambda choices, seed: None, surrogate=None)
    study = optuna.create_study(sampler=make_sampler(cast("Any", row.name), asked))
    return study.ask().suggest_float("x", 0.0, 1.0)


def _proposals(sampler: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} is {i} squared\n" for i in range(500)))
    schedule = {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 3]}}
    loop = {"schedule": schedule, "topology": {"choice": ["residual", "mesh"]}}
    study = load_study(
        {
            "space": merge(TINY, {"vocab_size": 256, "graph": {"h": loop}}),
            "data": {"kind": "text", "path": str(folder / "text.txt")},
            "training": {"flops": 1e8, "batch_tokens": 96, "lr": {"float": [1e-3, 1e-1], "log": True}},
            "search": {"sampler": sampler, "num_trials": PROPOSALS, "stopper": "none"},
        }
    )
    driver = StudyDriver(study, folder, prepare_data(study.data, folder / "data"))
    while (spec := driver.next_trial()) is not None:
        record = driver.record(spec.number)
        loss = 2.0 + record.cost.params / 1e6 + abs(float(record.training["lr"]) - 0.02)
        rung = Rung(flops=1e8, tokens=1, score=loss, metrics={"loss": loss})
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,)))
    return [dict(record.choices) for record in driver.records]


def check_format(row: Format) -> Iterator[Breach]:
    """A small bundle, written to the place that is given."""
    if row.write is None:
        yield "write", "says how by nothing", row.name
        return
    with tempfile.TemporaryDirectory() as place:
        arch, out = arch_from_data(merge(TINY, {"vocab_size": 256})), Path(place) / f"written{row.suffix}"
        facts = DataFacts(
            kind="text",
            task="text_lm",
            vocab_size=256,
            dtype="uint8",
            text="bytes",
            train_tokens=0,
            val_tokens=0,
            source="bytes",
        )
        told = {"data": asdict(facts), "data_settings": TextData().settings(), "metrics": {"loss": 1.0}}
        bundle = save_bundle(Path(place) / "bundle", arch, build_model(compile_arch(arch)), facts=told)
        if row.write(bundle, out) != out or not out.exists():
            yield "write", "does not write to the place that it is given, or does not give it back", row.name
