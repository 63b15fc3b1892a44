"""Our fits on ladders that others measured: do they say what the largest size showed?

    python benchmarks/published.py FOLDER [--out benchmarks/results/published.json]

FOLDER holds ``olmo_ladder.csv`` (allenai/OLMo-ladder), ``mesh_table1_pile.csv`` (MeSH, arXiv 2510.07739, table 1) and
``looped_nanochat.csv`` (kschwethelm/looped_nanochat): the figures are theirs, and not shipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from studies.scale.law import Run, forecast
from studies.scale.pairs import rate

Rows = list[dict[str, str]]


def read(file: Path) -> Rows:
    with file.open() as text:
        return list(csv.DictReader(text))


def olmo(rows: Rows) -> list[dict[str, Any]]:
    """Absolute losses at the largest size, over its horizons."""
    runs = [Run("olmo", float(r["parameters"]), float(r["tokens"]), float(r["c4_loss"]), r["horizon"]) for r in rows]
    sizes = sorted({run.size for run in runs})
    target = [run for run in runs if run.size == sizes[-1] and "rerun" not in run.rung]
    found = []
    for lower in (sizes[:3], sizes[1:4], sizes[:4]):
        known = [run for run in runs if run.size in lower]
        for run in target:
            loss, low, high = forecast(known, "olmo", run.size, run.tokens)
            found.append(
                {
                    "from": " ".join(f"{size / 1e6:.0f}M" for size in lower),
                    "horizon": run.rung,
                    "error": loss - run.loss,
                    "interval": [low - run.loss, high - run.loss],
                    "inside": low <= run.loss <= high,
                }
            )
    for size in sizes[:-1]:  # compute alone: L = E + K C^-c, over the horizons of one size
        own = [run for run in runs if run.size == size]
        for run in target:
            loss = by_compute(own, run)
            found.append({"from": f"{size / 1e6:.0f}M", "horizon": run.rung, "error": loss - run.loss})
    return found


def by_compute(own: list[Run], run: Run) -> float:
    compute, losses = (np.array([f(r) for r in own]) for f in (lambda r: r.size * r.tokens, lambda r: r.loss))
    fits = []
    for exponent in np.geomspace(0.03, 1.2, 200):
        columns = np.column_stack([np.ones(len(own)), (compute / compute[0]) ** -exponent])
        solved, *_ = np.linalg.lstsq(columns, losses, rcond=None)
        there = solved @ [1.0, (run.size * run.tokens / compute[0]) ** -exponent]
        fits.append((float(np.square(columns @ solved - losses).sum()), float(there)))
    return min(fits)[1]


def mesh(rows: Rows) -> dict[str, Any]:
    """Differences to vanilla at 1.4B, of log perplexity, from 160M to 1B."""
    size = {"160M": 160e6, "410M": 410e6, "1B": 1e9, "1.4B": 1.4e9}
    tokens = 300e9  # of the Pile, for every size
    rows = [row for row in rows if (row["size"], row["layout"]) != ("410M", "3+6R3+3")]
    runs = [Run(r["variant"], size[r["size"]], tokens, math.log(float(r["pile_ppl"])), r["size"]) for r in rows]
    answer = rate([run for run in runs if run.rung != "1.4B"], "vanilla", 1.4e9, tokens)
    losses = {run.candidate: run.loss for run in runs if run.rung == "1.4B"}
    found = []
    for rated in answer.rated:
        truth = losses[rated.candidate] - losses["vanilla"]
        found.append(
            {
                "variant": rated.candidate,
                "predicted": rated.difference,
                "interval": rated.interval,
                "measured": truth,
                "at 1B": rated.at_top,
                "inside": rated.interval[0] <= truth <= rated.interval[1],
                "sign": np.sign(rated.difference) == np.sign(truth),
                "best": rated.best,
            }
        )
    others = [row for row in found if row["variant"] != "vanilla"]
    measured = [row["measured"] for row in found]
    return {
        "variants": found,
        "tau": kendalltau([row["predicted"] for row in found], measured)[0],
        "tau at 1B": kendalltau([row["at 1B"] for row in found], measured)[0],
        "error": float(np.sqrt(np.mean([(row["predicted"] - row["measured"]) ** 2 for row in others]))),
        "error at 1B": float(np.sqrt(np.mean([(row["at 1B"] - row["measured"]) ** 2 for row in others]))),
    }


def looped(rows: Rows) -> dict[str, Any]:
    """The order of uses at s20, from s12: one size, so no law."""
    bits = {(row["size"], int(row["uses"])): float(row["val_bpb"]) for row in rows}
    uses = sorted(n for size, n in bits if size == "s12")
    small, large = ([bits[size, n] for n in uses] for size in ("s12", "s20"))
    return {"uses": uses, "s12": small, "s20": large, "tau": kendalltau(small, large)[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {
        "olmo": olmo(read(options.folder / "olmo_ladder.csv")),
        "mesh": mesh(read(options.folder / "mesh_table1_pile.csv")),
        "looped": looped(read(options.folder / "looped_nanochat.csv")),
    }
    print("| OLMo at 3.2B, from | horizons | largest error | inside the 80 % interval |\n|---|---|---|---|")
    for lower in dict.fromkeys(row["from"] for row in found["olmo"]):
        rows = [row for row in found["olmo"] if row["from"] == lower]
        inside = sum(row["inside"] for row in rows) if "inside" in rows[0] else "-"
        worst = max((row["error"] for row in rows), key=abs)
        print(f"| {lower} | {len(rows)} | {worst:+.3f} | {inside} |")
    print("\n| MeSH at 1.4B | predicted | 80 % interval | measured | at 1B |\n|---|---|---|---|---|")
    for row in found["mesh"]["variants"]:
        low, high = row["interval"]
        print(
            f"| {row['variant']} | {row['predicted']:+.4f} | {low:+.4f} to {high:+.4f} | {row['measured']:+.4f} "
            f"| {row['at 1B']:+.4f} |"
        )
    told = found["mesh"]
    print(f"\nMeSH: tau {told['tau']:.2f} (1B alone {told['tau at 1B']:.2f}), rms error {told['error']:.4f} "
          f"(1B alone {told['error at 1B']:.4f})")  # fmt: skip
    print(f"looped: tau {found['looped']['tau']:.2f} of {len(found['looped']['uses'])} uses, from one size")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, default=bool) + "\n")


if __name__ == "__main__":
    main()
