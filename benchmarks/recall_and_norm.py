"""Which loops solve longer rows with more iterations: recall and norm on prefix sums (arXiv 2604.15259), one row a run.

    python benchmarks/recall_and_norm.py --seeds 3 --minutes 8

Iterations are drawn in training as the authors do (``progressive``), or as --sample says. Appends to
``benchmarks/results/recall_and_norm.jsonl`` and goes on where it stopped. Prints accuracy (every bit of a row right) by
length of the row and iterations, with what the stability probes say of the last of them, seeds one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from builder.schedules import model_under
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from studies.probes.table import probe
from studies.sections import TrainingConfig
from studies.tasks.prefix_sums import PrefixSums, PrefixSumsData, prepare_prefix_sums
from studies.training.trainer import DivergedError, Trainer

OUT = Path(__file__).parent / "results/recall_and_norm.jsonl"
RECALLS, NORMS = ("none", "external", "internal"), ("pre", "peri", "post")
SETTINGS = ("bits", "sample", "iterations", "width", "tokens", "batch", "lr")
PROBES = ("reachability", "input_dependence", "geometry")


def architecture(recall: str, norm: str, bits: int, width: int, sample: str, iterations: int) -> ArchSpec:
    """One looped layer that attends to five bits."""
    core: dict[str, Any] = {"layers": 1, "heads": 2, "window": 5, "qk_norm": True, "norm_place": norm}
    loop: dict[str, Any] = {"loop": "core", "in": "x", "schedule": ["token"] * iterations, "topology": "base"}
    loop |= {"per": "loop", "iterations": {"sample": sample}}
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
    """Train once; accuracy by iterations at test time and by length, and probes."""
    arch = architecture(recall, norm, args.bits, args.width, args.sample, args.iterations)
    config = TrainingConfig(
        tokens=args.tokens, batch_tokens=args.batch, lr=args.lr, weight_decay=0.01, eval_tokens=200 * args.bits
    )
    began = time.monotonic()
    trainer = Trainer(arch, config, data, seed=seed)
    try:
        trainer.train(trainer.plan.num_steps)
    except DivergedError as error:
        return {"accuracy": {}, "probes": {}, "loss": None, "error": str(error)}
    model = trainer.model.eval()
    accuracy: dict[str, dict[str, float]] = {}
    probes: dict[str, dict[str, float]] = {}
    few, _ = next(data.eval_batches(8 * args.bits, 8, args.bits))
    for iterations in (args.iterations, *args.test):
        own, view = model_under(model, arch, {"h": iterations})
        accuracy[str(iterations)] = {
            str(bits): round(data.accuracy(view, bits, min(100 * bits, args.most)), 4) for bits in data.facts.levels
        }
        probes[str(iterations)] = {name: float(f"{value:.4g}") for name, value in probe(PROBES, view, own, few).items()}
    return {
        "accuracy": accuracy,
        "probes": probes,
        "loss": round(trainer.evaluate()[1]["loss"], 4),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--longer", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--sample", default="progressive", help="how iterations are drawn in training")
    parser.add_argument("--iterations", type=int, default=30, help="of training: their number, or the most")
    parser.add_argument("--test", type=int, nargs="*", default=[100, 500])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--most", type=int, default=16_384, help="positions tried at a length, at most")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recalls", nargs="*", choices=RECALLS, default=RECALLS)
    parser.add_argument("--norms", nargs="*", choices=NORMS, default=NORMS)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no run after these")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in SETTINGS}
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    for row in rows:
        row["settings"].setdefault("sample", "fixed")  # as the first runs were
    known = {(row["recall"], row["norm"], row["seed"]) for row in rows if row["settings"] == settings}
    folder = Path(tempfile.gettempdir()) / f"spiralformer-prefix-sums-{args.bits}-{'-'.join(map(str, args.longer))}"
    data = prepare_prefix_sums(PrefixSumsData(bits=args.bits, test_bits=tuple(args.longer)), folder)
    until = 0.0 if args.table else time.monotonic() + 60 * args.minutes
    for seed, recall, norm in product(range(args.seeds), args.recalls, args.norms):
        if (recall, norm, seed) in known or time.monotonic() > until:
            continue
        found = run(args, recall, norm, seed, data)
        row = {"recall": recall, "norm": norm, "seed": seed, "settings": settings, **found}
        rows.append(row)
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    show([row for row in rows if row["settings"] == settings])


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table, seeds one by one."""
    whole = [row for row in rows if row["accuracy"]]
    if not whole:
        return
    iterations, lengths = [*whole[0]["accuracy"]], [*next(iter(whole[0]["accuracy"].values()))]
    cells = [(n, i) for n in lengths for i in iterations]
    probed = ("norm_ratio", "jacobian_radius", "recall_radius")
    head = ["recall", "norm", "learned", *(f"{n} bits, {i}" for n, i in cells), *probed]
    print("| " + " | ".join(head).replace("_", " ") + " |\n" + "|---" * len(head) + "|")
    for recall, norm in product(RECALLS, NORMS):
        own = [row for row in whole if (row["recall"], row["norm"]) == (recall, norm)]
        own.sort(key=lambda row: row["seed"])
        if not own:
            continue
        learned = sum(row["accuracy"][iterations[0]][lengths[0]] > 0.5 for row in own)
        shown = [f"{learned} of {len(own)}"]
        shown += [" ".join(f"{row['accuracy'][i][n]:.2f}" for row in own) for n, i in cells]
        for name in probed:
            values = [row.get("probes", {}).get(iterations[-1], {}).get(name) for row in own]
            finite = [None if value is None else value if value < 1e12 else math.inf for value in values]  # NaN is none
            shown.append(" ".join("" if value is None else f"{value:.3g}" for value in finite))
        print(f"| {recall} | {norm} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
