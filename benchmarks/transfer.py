"""Whether the best rate carries over widths and uses, under each parametrization.

    python benchmarks/transfer.py [--over width uses] [--seeds 2] [--minutes 18] [--workers 2] [--table]

Three layers over bytes of the standard library, the same batches everywhere. Runs go to --out, one line each, with the
mean training loss of each tenth; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from recipe import resume

from builder import compile_arch
from searchspace import load_arch
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from searchspace.plain import encode
from studies.commands.coordinates import repeated
from studies.data.corpus import prepare_corpus
from studies.data.settings import TextData
from studies.scale.sizes import scaled
from studies.sections import SizeConfig, TrainingConfig
from studies.training.trainer import DivergedError, Trainer

VALUES = {"width": (32, 64, 128), "uses": (1, 2, 4, 8), "coarse": (1, 2, 4, 8)}
KINDS = {"width": ("standard", "mup"), "uses": ("standard", "completep"), "coarse": ("standard", "completep")}
"""``coarse`` repeats a schedule of a use at chunk 4 and one at chunk 1."""
RATES = tuple(float(f"{0.016 * 2 ** (i / 2):.2g}") for i in (-4, -3, -2, -1, 0, 1, 2, 3, 4))
FIELDS = ("over", "kind", "value", "rate", "seed")
TOKENS, BATCH = 524_288, 1024


def architecture_of(over: str, kind: str, value: int) -> ArchSpec:
    plain: dict[str, Any] = encode(load_arch("three_layers"))
    plain["residual_scale"] = "inverse_sqrt_depth" if over == "width" else "none"
    if over == "coarse":
        plain["graph"]["h"]["schedule"] = ["word", "token"]
    layers = compile_arch(arch_from_data(plain)).num_layers
    if kind != "standard":
        plain |= {
            "parametrization": kind,
            "base": {"d_model": 32, **({"layers": layers} if kind == "completep" else {})},
        }
    arch = arch_from_data(plain)
    return scaled(arch, SizeConfig(d_model=value)) if over == "width" else repeated(arch, value)


def run(job: tuple[tuple[Any, ...], str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    (over, kind, value, rate, seed), data = job
    config = TrainingConfig(tokens=float(TOKENS), batch_tokens=BATCH, lr=rate, beta2=0.99, eval_tokens=1 << 18)
    trainer = Trainer(architecture_of(over, kind, value), config, prepare_corpus(TextData(), data), seed=seed)
    curve: list[float] = []
    try:
        for tenth in range(1, 11):
            curve.append(trainer.train(trainer.plan.step_at(tenth / 10)))
        bits = trainer.evaluate()[1]["bits_per_byte"]
    except DivergedError:
        bits = None
    return dict(zip(FIELDS, job[0], strict=True)) | {"bits": bits, "curve": [round(loss, 4) for loss in curve]}


def show(rows: list[dict[str, Any]]) -> None:
    for over, kind in sorted({(row["over"], row["kind"]) for row in rows}):
        here = [row for row in rows if (row["over"], row["kind"]) == (over, kind)]
        rates, values = (sorted({row[name] for row in here}) for name in ("rate", "value"))
        print(f"\nby {over}, {kind}: bits per byte, mean over seeds (seeds)")
        print(
            f"| {over} | " + " | ".join(f"{rate:g}" for rate in rates) + " | best rate | worst tenth against smaller |"
        )
        print("|---" * (len(rates) + 3) + "|")
        below: dict[float, list[float]] = {}
        for value in values:
            cells, best = [], (float("inf"), 0.0)
            for rate in rates:
                found = [row["bits"] for row in here if (row["value"], row["rate"]) == (value, rate)]
                bad = not found or None in found
                cells.append("" if not found else "diverged" if bad else f"{statistics.mean(found):.3f} ({len(found)})")
                best = best if bad else min(best, (statistics.mean(found), rate))
            curves = {
                rate: [
                    statistics.mean(tenth)
                    for tenth in zip(
                        *(row["curve"] for row in here if (row["value"], row["rate"]) == (value, rate)), strict=True
                    )
                ]
                for rate in rates
                if all(row["bits"] for row in here if (row["value"], row["rate"]) == (value, rate))
            }
            worse = [a - b for a, b in zip(curves.get(best[1], [])[1:], below.get(best[1], [])[1:], strict=False)]
            told = f"{max(worse):+.3f} nats" if worse else ""
            print(f"| {value} | " + " | ".join(cells) + f" | {best[1]:g} | {told} |")
            below = curves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--over", nargs="+", choices=VALUES, default=["width", "uses"])
    parser.add_argument("--values", nargs="+", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "spiralformer-recipe-data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/transfer.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    if options.table:
        show(rows)
        return
    prepare_corpus(TextData(), options.data)
    done = {tuple(row[name] for name in FIELDS) for row in rows}
    near = sorted(RATES, key=lambda rate: abs(RATES.index(rate) - len(RATES) // 2))
    grid = [
        (over, kind, value, rate, seed)
        for rate, seed, over in itertools.product(near, range(options.seeds), options.over)
        for value in options.values or VALUES[over]
        for kind in KINDS[over]
    ]
    jobs = [(cell, str(options.data)) for cell in grid if cell not in done]
    resume(jobs, run, options.out, workers=options.workers, minutes=options.minutes)


if __name__ == "__main__":
    main()
