"""Which loops solve longer rows with more iterations: recall and norm on prefix sums (arXiv 2604.15259), one row a run.

    python benchmarks/recall_and_norm.py --bits 16 --iterations 8 --tokens 2e6 --seeds 1 --minutes 8

Appends to ``benchmarks/results/recall_and_norm.jsonl`` and goes on where it stopped. Prints accuracy (every bit of a
row right) by length of the row and iterations, each the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from builder.schedules import model_under
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from studies.config import TrainingConfig
from studies.tasks.prefix_sums import PrefixSums, PrefixSumsData, prepare_prefix_sums
from studies.training.trainer import Trainer

OUT = Path(__file__).parent / "results/recall_and_norm.jsonl"
RECALLS, NORMS = ("none", "external", "internal"), ("pre", "peri", "post")


def architecture(recall: str, norm: str, bits: int, iterations: int, width: int) -> ArchSpec:
    """One looped layer that attends to five bits."""
    core: dict[str, Any] = {"layers": 1, "heads": 2, "window": 5, "qk_norm": True, "norm_place": norm}
    loop: dict[str, Any] = {"loop": "core", "in": "x", "schedule": ["token"] * iterations, "topology": "base"}
    if recall == "internal":
        core["recall"] = "linear"
    if recall == "external":
        loop["recall"] = "linear"
    return arch_from_data(
        {
            "name": f"{recall}-{norm}",
            "vocab_size": 4,
            "seq_len": bits,
            "d_model": width,
            "levels": {"token": {"chunk": 1}},
            "blocks": {"core": core},
            "graph": {"x": {"embed": "tokens"}, "h": loop, "logits": {"head": "lm", "in": "h"}},
        }
    )


def run(args: argparse.Namespace, recall: str, norm: str, seed: int, data: PrefixSums) -> dict[str, Any]:
    """Train once; accuracy by length and by iterations at test time."""
    arch = architecture(recall, norm, args.bits, args.iterations, args.width)
    config = TrainingConfig(
        tokens=args.tokens, batch_tokens=args.batch, lr=args.lr, weight_decay=0.01, eval_tokens=200 * args.bits
    )
    began = time.monotonic()
    trainer = Trainer(arch, config, data, seed=seed)
    trainer.train(trainer.plan.num_steps)
    model = trainer.model.eval()
    accuracy: dict[str, dict[str, float]] = {}
    for iterations in (args.iterations, *args.test):
        _, view = model_under(model, arch, {"h": iterations})
        accuracy[str(iterations)] = {
            str(bits): round(data.accuracy(view, bits, 100 * bits), 4) for bits in data.facts.levels
        }
    return {
        "accuracy": accuracy,
        "loss": round(trainer.evaluate()[1]["loss"], 4),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--longer", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--test", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=float, default=2e6)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no run after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("bits", "iterations", "width", "tokens", "batch", "lr")}
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    known = {(row["recall"], row["norm"], row["seed"]) for row in rows if row["settings"] == settings}
    folder = Path(tempfile.gettempdir()) / f"spiralformer-prefix-sums-{args.bits}-{'-'.join(map(str, args.longer))}"
    data = prepare_prefix_sums(PrefixSumsData(bits=args.bits, test_bits=tuple(args.longer)), folder)
    until = time.monotonic() + 60 * args.minutes
    for seed, recall, norm in product(range(args.seeds), RECALLS, NORMS):
        if (recall, norm, seed) in known or time.monotonic() > until:
            continue
        row = {
            "recall": recall,
            "norm": norm,
            "seed": seed,
            "settings": settings,
            **run(args, recall, norm, seed, data),
        }
        rows.append(row)
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    show([row for row in rows if row["settings"] == settings])


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    if not rows:
        return
    lengths, iterations = [*next(iter(rows[0]["accuracy"].values()))], [*rows[0]["accuracy"]]
    print("| recall | norm | loss | " + " | ".join(f"{n} bits, {i}" for n in lengths for i in iterations) + " |")
    print("|---|---|---|" + "---|" * (len(lengths) * len(iterations)))
    for recall, norm in product(RECALLS, NORMS):
        own = [row for row in rows if (row["recall"], row["norm"]) == (recall, norm)]
        if own:
            cells = [sum(r["accuracy"][i][n] for r in own) / len(own) for n in lengths for i in iterations]
            loss = sum(row["loss"] for row in own) / len(own)
            print(f"| {recall} | {norm} | {loss:.3f} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
