"""Whether a search finds the loops that go on: told a space and objectives, against random search at equal FLOPs.

    python benchmarks/regime.py FOLDER --minutes 8
    python benchmarks/regime.py --table

Prefix sums, trained on 16 bits with up to 16 iterations, 256 bits with 250 as ``hard_accuracy``; 2,916 candidates. The
regime is what ``benchmarks/recall_and_norm.py`` found to go on: recall inside the block with norms after each sum. Goes
on where it stopped; every trial of every arm is in ``benchmarks/results/regime.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from searchspace.nodes import LoopNode
from studies.commands.search import run_study
from studies.config import load_study
from studies.records.reading import read_study
from studies.records.trial import TrialRecord

OUT = Path(__file__).parent / "results/regime.jsonl"
STUDY: dict[str, Any] = {
    "name": "regime",
    "data": {"kind": "prefix_sums", "bits": 16, "test_bits": [64, 256]},
    "training": {"tokens": 1.5e6, "batch_tokens": 1024, "lr": 2e-3, "weight_decay": 0.01, "eval_tokens": 8192},
    "objectives": ["solved", "hard_accuracy", "flops_per_token"],
    "space": {
        "vocab_size": 4,
        "seq_len": 16,
        "d_model": 32,
        "levels": {"token": {"chunk": 1}},
        "blocks": {
            "core": {
                "layers": 1,
                "heads": 2,
                "window": 5,
                "qk_norm": True,
                "norm_place": {"choice": ["pre", "peri", "post", "sandwich"]},
                "residual": {"choice": ["add", "gate", "gru"]},
                "recall": {"choice": [None, "add", "linear"]},
            }
        },
        "graph": {
            "x": {"embed": "tokens"},
            "h": {
                "loop": "core",
                "in": "x",
                "schedule": {"sequence": {"of": ["token"], "length": [8, 16]}},
                "topology": "base",
                "recall": {"choice": [None, "add", "linear"]},
                "per": "loop",
                "iterations": {
                    "sample": {"choice": ["fixed", "uniform", "progressive"]},
                    "train": 16,
                    "test": [16, 50, 250],
                },
            },
            "logits": {"head": "lm", "in": "h"},
        },
    },
}
SOLVES = 0.5  # of the rows of 256 bits
KNOBS = ("recall", "norm", "residual", "sample", "iterations")


def row_of(sampler: str, seed: int, record: TrialRecord) -> dict[str, Any]:
    """What is kept of a trial."""
    arch = record.arch_spec()
    core, loop = arch.blocks["core"], arch.graph["h"]
    assert isinstance(loop, LoopNode)
    assert loop.iterations is not None
    ended = record.state == "complete"
    places = [f"{place} {kind}" for place, kind in (("internal", core.recall), ("external", loop.recall)) if kind]
    return {
        "sampler": sampler,
        "seed": seed,
        "trial": record.number,
        "recall": " and ".join(places) or "none",
        "norm": core.norm_place,
        "residual": core.residual,
        "sample": loop.iterations.sample,
        "iterations": len(loop.schedule),
        "regime": core.recall is not None and core.norm_place in ("post", "sandwich"),
        "hard_accuracy": round(record.rungs[-1].metrics["hard_accuracy"], 4) if ended else 0.0,
        "flops_per_token": record.cost.flops_per_token,
        "training_flops": record.flops,
        "state": record.state,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the studies lie")
    parser.add_argument("--samplers", nargs="*", default=["tpe", "random"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no trial after these")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    args = parser.parse_args()
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    until = time.monotonic() + 60 * args.minutes
    for seed, sampler in product(args.seeds, args.samplers):
        if args.table or len([r for r in rows if (r["sampler"], r["seed"]) == (sampler, seed)]) >= args.trials:
            continue
        left = until - time.monotonic()
        if left <= 0:
            break
        search = {"sampler": sampler, "seed": seed, "num_trials": args.trials, "stopper": "none", "time_budget_s": left}
        folder = args.folder / f"{sampler}-{seed}"
        settings = load_study({**STUDY, "search": search})
        run_study(settings, folder, Console(stderr=True), serial=True, address=None, farewell=False)
        records = read_study(folder)[0]
        known = {r["trial"] for r in rows if (r["sampler"], r["seed"]) == (sampler, seed)}
        new = [row_of(sampler, seed, r) for r in records if r.number not in known and r.state in ("complete", "failed")]
        rows += new
        with OUT.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
    show(rows, args.trials)


def show(rows: Sequence[dict[str, Any]], trials: int) -> None:
    """Markdown: an arm a row; then how many of all different candidates solve long rows, by what they are."""
    print(
        "| arm | trials | solve | of the regime | first of it | training FLOPs | cheapest that solves |\n"
        + "|---" * 7
        + "|"
    )
    for arm in sorted({(row["sampler"], row["seed"]) for row in rows}):
        own = sorted((r for r in rows if (r["sampler"], r["seed"]) == arm), key=lambda row: row["trial"])[:trials]
        solved = [row for row in own if row["hard_accuracy"] >= SOLVES]
        regime = [row["trial"] + 1 for row in solved if row["regime"]]
        least = min(solved, key=lambda row: row["flops_per_token"], default=None)
        what = (
            "" if least is None else f"{least['recall']}, {least['norm']}, {least['residual']} x{least['iterations']}"
        )
        spent = sum(row["training_flops"] for row in own)
        first = min(regime, default="")
        print(f"| {arm[0]} {arm[1]} | {len(own)} | {len(solved)} | {len(regime)} | {first} | {spent:.2g} | {what} |")
    different = {json.dumps([r[k] for k in KNOBS]): r for r in rows}.values()
    print(f"\n| of {len(different)} candidates | solve |\n|---|---|")
    kinds = [("recall", "none"), *product(("residual",), ("add", "gate", "gru")), *product(("regime",), (True, False))]
    for (name, value), residual in product(kinds, ("", "add")):
        own = [r for r in different if str(r[name]) == str(value) and residual in ("", r["residual"])]
        solved = [r for r in own if r["hard_accuracy"] >= SOLVES]
        if name != "residual" or not residual:
            print(f"| {name} {value}{', residual ' + residual if residual else ''} | {len(solved)} of {len(own)} |")


if __name__ == "__main__":
    main()
