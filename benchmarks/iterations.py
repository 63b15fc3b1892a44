"""Iterations never trained: a loop trained with a fixed number against one whose number is drawn, on text.

    python benchmarks/iterations.py --seeds 3 --minutes 8

One layer, a looped one, one layer, over bytes of the standard library, equal tokens; bits per byte on the same held-out
text at 1 to 16 iterations. Appends to ``benchmarks/results/iterations.jsonl`` and goes on where it stopped. The
published curve beside it, of a model of its own: ``--published looped_nanochat_test_depth.csv``.
"""

from __future__ import annotations

import argparse
import csv
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
from studies.data.corpus import prepare_corpus
from studies.data.settings import TextData
from studies.sections import TrainingConfig
from studies.training.trainer import Trainer

OUT = Path(__file__).parent / "results/iterations.jsonl"
TRAINED = 4
ARMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "uniform": {"sample": "uniform", "train": 2 * TRAINED - 1},
    "poisson": {"sample": "poisson_lognormal", "train": TRAINED - 1},
    "truncated": {"sample": "poisson_lognormal", "train": TRAINED - 1, "gradient_through": 2},
}
SCHEDULES: dict[str, list[str]] = {"loop": ["one"], "spiral": ["four", "one"]}
"""A turn of each: [four, one] is a SpiralFormer's, whose iterations are drawn by twos."""
TESTED = (1, 2, 3, 4, 5, 6, 8, 12, 16)
FIELDS = ("family", "arm", "seed", "tokens")


def architecture(family: str, arm: str) -> ArchSpec:
    turn = SCHEDULES[family]
    loop: dict[str, Any] = {"loop": "core", "in": "a", "schedule": turn * (TRAINED // len(turn))}
    loop |= {"topology": "anchor", "norm": "rms", "per": "loop"}
    if ARMS[arm]:
        given = {**ARMS[arm]}
        given["train"] = given["train"] + given["train"] % len(turn)
        loop["iterations"] = given
    block = {"layers": 1, "heads": 3}
    return arch_from_data(
        {
            "vocab_size": 256,
            "seq_len": 128,
            "d_model": 48,
            "levels": {"one": {"chunk": 1}, "four": {"chunk": 4}},
            "blocks": {"first": block, "core": block, "last": block},
            "graph": {
                "x": {"embed": "tokens"},
                "a": {"block": "first", "in": "x"},
                "h": loop,
                "z": {"block": "last", "in": "h"},
                "logits": {"head": "lm", "in": "z"},
            },
        }
    )


def run(job: tuple[tuple[Any, ...], str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    (family, arm, seed, tokens), data = job
    arch = architecture(family, arm)
    config = TrainingConfig(tokens=tokens, batch_tokens=1024, lr=0.0077, beta2=0.99, eval_tokens=1 << 17)
    trainer = Trainer(arch, config, prepare_corpus(TextData(), data), seed=seed)
    trainer.train(trainer.plan.num_steps)
    own, bits = trainer.model, {}
    for count in TESTED:
        trainer.model = model_under(own, arch, {"h": count})[1]
        bits[str(count)] = round(trainer.evaluate()[1]["bits_per_byte"], 4)
    return dict(zip(FIELDS, job[0], strict=True)) | {"bits": bits, "flops": trainer.flops}


def show(rows: list[dict[str, Any]], published: Path | None) -> None:
    print("| | training FLOPs | seeds | " + " | ".join(f"{count}" for count in TESTED) + " |")
    print("|---|---|---|" + "---|" * len(TESTED))
    for family, arm, _, tokens in dict.fromkeys((row["family"], row["arm"], 0, row["tokens"]) for row in rows):
        own = [row for row in rows if (row["family"], row["arm"], row["tokens"]) == (family, arm, tokens)]
        cells = []
        for count in TESTED:
            found = [row["bits"][str(count)] for row in own]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}")
        print(f"| {family}, {arm} | {own[0]['flops']:.2g} | {len(own)} | " + " | ".join(cells) + " |")
    if published is not None:
        with published.open() as file:
            for line in csv.DictReader(file):
                print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--families", nargs="+", choices=SCHEDULES, default=["loop"])
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "spiralformer-recipe-data")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    options = parser.parse_args()
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.is_file() else []
    if options.table:
        show(rows, options.published)
        return
    prepare_corpus(TextData(), options.data)
    done = {tuple(row[name] for name in FIELDS) for row in rows}
    grid = [
        (family, arm, seed, options.tokens)
        for seed in range(options.seeds)
        for family in options.families
        for arm in options.arms
    ]
    jobs = [(cell, str(options.data)) for cell in grid if cell not in done]
    resume(jobs, run, OUT, workers=options.workers, minutes=options.minutes)


if __name__ == "__main__":
    main()
