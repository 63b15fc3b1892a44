"""Who tells the value of expressions deeper, or longer, than any it was trained on, at equal training FLOPs.

    python benchmarks/depth.py --seeds 3 --minutes 8

A plain model, a loop whose iterations are drawn, a SpiralFormer, and locate-and-replace: a plain model that rewrites
one step at a time (arXiv 2512.02677). Appends to ``benchmarks/results/depth.jsonl`` and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from recipe import resume

from builder.schedules import model_under
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from studies.sections import TrainingConfig
from studies.tasks.nested_logic import NestedLogicData, prepare_nested_logic
from studies.training.trainer import Trainer

OUT = Path(__file__).parent / "results/depth.jsonl"
FIELDS = ("model", "seed", "flops")
PLAIN: dict[str, Any] = {"blocks": {"stack": {"layers": 6, "heads": 2}}, "graph": {"y": {"block": "stack", "in": "x"}}}


def looped(turn: list[str], count: int, **more: Any) -> dict[str, Any]:
    block = {"layers": 1, "heads": 2}
    loop = {"loop": "core", "in": "a", "schedule": turn * (count // len(turn)), "per": "loop", "recall": "linear"}
    graph = {"a": {"block": "first", "in": "x"}, "h": {**loop, **more}, "y": {"block": "last", "in": "h"}}
    return {"blocks": {"first": block, "core": {**block, "norm_place": "post"}, "last": block}, "graph": graph}


MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "plain": ("value", PLAIN, ()),
    "loop": ("value", looped(["token"], 4, topology="base", iterations={"sample": "uniform", "train": 7}), (4, 8, 16)),
    "spiral": ("value", looped(["four", "pair", "token"], 6, topology="anchor"), (6, 9, 12)),
    "locate and replace": ("rewrite", PLAIN, ()),
}
"""What is asked for, the architecture, and iterations at which it is tried."""


def architecture(model: str) -> ArchSpec:
    _, parts, _ = MODELS[model]
    data = {
        "name": model.replace(" ", "-"),
        "vocab_size": 15,
        "seq_len": 30,
        "d_model": 64,
        "causal": False,
        "levels": {"token": {"chunk": 1}, "pair": {"chunk": 2}, "four": {"chunk": 4}},
        "blocks": parts["blocks"],
        "graph": {"x": {"embed": "tokens"}, **parts["graph"], "logits": {"head": "lm", "in": "y"}},
    }
    return arch_from_data(data)


def run(job: tuple[tuple[Any, ...], str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    (model, seed, flops), folder = job
    answer, _, tried = MODELS[model]
    data = prepare_nested_logic(_config(answer), Path(folder) / answer)
    arch = architecture(model)
    config = TrainingConfig(flops=flops, batch_tokens=1200, lr=1e-3, weight_decay=0.01, eval_tokens=30 * 500)
    trainer = Trainer(arch, config, data, seed=seed)
    trainer.train(trainer.plan.num_steps)
    trained = trainer.model.eval()
    views = {str(count): model_under(trained, arch, {"h": count})[1] for count in tried} or {"": trained}
    accuracy = {
        count: {data.name(level): round(data.accuracy(view, level, 500 * 126), 4) for level in data.facts.levels}
        for count, view in views.items()
    }
    return dict(zip(FIELDS, job[0], strict=True)) | {"accuracy": accuracy, "tokens": trainer.tokens}


def _config(answer: Any) -> NestedLogicData:
    return NestedLogicData(answer=answer, rows=100_000)


def show(rows: list[dict[str, Any]]) -> None:
    levels = list(next(iter(rows[0]["accuracy"].values()))) if rows else []
    print("| model | seeds | " + " | ".join(levels) + " |\n|---|---|" + "---|" * len(levels))
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for count in own[0]["accuracy"]:
            cells = []
            for level in levels:
                found = [row["accuracy"][count][level] for row in own]
                spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
                cells.append(f"{statistics.mean(found):.2f}{spread}")
            name = f"{model}, {count} iterations" if count else model
            print(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--flops", type=float, default=4e12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "spiralformer-depth")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    options = parser.parse_args()
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.is_file() else []
    if options.table:
        show(rows)
        return
    options.data.mkdir(exist_ok=True)
    for answer in dict.fromkeys(MODELS[model][0] for model in options.models):
        prepare_nested_logic(_config(answer), options.data / answer)
    done = {tuple(row[name] for name in FIELDS) for row in rows}
    grid = [(model, seed, options.flops) for seed in range(options.seeds) for model in options.models]
    jobs = [(cell, str(options.data)) for cell in grid if cell not in done]
    resume(jobs, run, OUT, workers=options.workers, minutes=options.minutes)


if __name__ == "__main__":
    main()
