"""Which batch and peak rate train best at a size: the grid behind `studies.training.recipe`.

    python benchmarks/recipe.py --size 30k [--families plain mesh] [--seeds 2] [--minutes 18] [--workers 2]

Every run sees --horizon bytes per parameter (blocks and head). Runs go to --out, one line each; the same command goes
on where it was. ``--table`` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from families import architecture

from builder import compile_arch, estimate
from studies.data.corpus import prepare_corpus
from studies.data.settings import TextData
from studies.sections import TrainingConfig
from studies.training.recipe import recipe_of, size_of
from studies.training.trainer import DivergedError, Trainer

SIZES = {"30k": (32, (1, 1, 0)), "100k": (48, (1, 1, 1)), "300k": (64, (2, 2, 2))}
"""Width, and layers of prelude, core and coda."""
FAMILIES = {
    "plain": ([1], "base"),
    "loop": ([1, 1], "anchor"),
    "mesh": ([1, 1], "mesh"),
    "spiral": ([4, 2, 1], "mesh"),
}
FIELDS = ("size", "horizon", "family", "rate", "batch", "beta2", "schedule", "final_lr", "decay", "warmup", "seed")
SHAPE = {"schedule": "cosine", "final_lr": 0.1, "decay": 0.2, "warmup": 0.05}
"""Of the learning rate over a training, where a row does not say."""


def architecture_of(size: str, family: str) -> Any:
    width, layers = SIZES[size]
    schedule, topology = FAMILIES[family]
    return architecture(width, 128, 256, layers, schedule, topology, heads=width // 16)


def cells(options: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """The middle of the grid first: what the recipe says of the plain model. Sqrt(2) apart in rate, 2 in batch."""
    plain = architecture_of(options.size, "plain")
    cost = estimate(compile_arch(plain))
    recipe = recipe_of(TrainingConfig(tokens=options.horizon * size_of(plain, cost)), plain, cost)
    rate, batch = options.rate or recipe.lr, options.batch or recipe.batch_tokens
    steps = itertools.product(range(-options.rates, options.rates + 1), range(-options.batches, options.batches + 1))
    near = sorted(steps, key=lambda at: abs(at[0]) + abs(at[1]))
    for (r, b), seed, family in itertools.product(near, range(options.seeds), options.families):
        at = (float(f"{rate * 2 ** (r / 2):.2g}"), int(batch * 2.0**b))
        shape = [getattr(options, name) for name in SHAPE]
        yield options.size, options.horizon, family, *at, options.beta2, *shape, seed


def run(job: tuple[tuple[Any, ...], str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    (size, horizon, family, rate, batch, beta2, schedule, final_lr, decay, warmup, seed), data = job
    corpus = prepare_corpus(TextData(), data)
    arch = architecture_of(size, family)
    plain = architecture_of(size, "plain")
    tokens = horizon * size_of(plain, estimate(compile_arch(plain)))
    config = TrainingConfig(
        tokens=tokens,
        batch_tokens=batch,
        lr=rate,
        beta2=beta2,
        lr_schedule=schedule,
        final_lr=final_lr,
        decay=decay,
        warmup=warmup,
        eval_tokens=1 << 18,
    )
    start = time.perf_counter()
    trainer = Trainer(arch, config, corpus, seed=seed)
    try:
        trainer.train(trainer.plan.num_steps)
        bits = trainer.evaluate()[1]["bits_per_byte"]
    except DivergedError:
        bits = None
    seconds = time.perf_counter() - start
    facts = {
        "bits": bits,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "flops": trainer.flops,
        "seconds": round(seconds, 1),
    }
    return dict(zip(FIELDS, job[0], strict=True)) | facts


def show(rows: list[dict[str, Any]]) -> None:
    grids = ("size", "horizon", "family", "beta2", *SHAPE)
    for grid in sorted({tuple(row[name] for name in grids) for row in rows}):
        size, horizon, family, beta2, schedule, final_lr, decay, warmup = grid
        here = [row for row in rows if tuple(row[name] for name in grids) == grid]
        batches, rates = (sorted({row[name] for row in here}) for name in ("batch", "rate"))
        print(
            f"\n{size} {family}, {horizon:g} bytes per parameter, beta2 {beta2}, warm-up {warmup:g}, {schedule}"
            f"{f' over {decay:g}' if schedule == 'wsd' else ''} to {final_lr:g}: "
            "bits per byte, mean over seeds (seeds)"
        )
        print("| batch \\ rate | " + " | ".join(f"{rate:.4g}" for rate in rates) + " |")
        print("|---" * (len(rates) + 1) + "|")
        for batch in batches:
            shown = []
            for rate in rates:
                found = [row["bits"] for row in here if (row["batch"], row["rate"]) == (batch, rate)]
                bad = not found or None in found
                shown.append("" if not found else "diverged" if bad else f"{statistics.mean(found):.3f} ({len(found)})")
            print(f"| {batch} | " + " | ".join(shown) + " |")


def resume(jobs: list[Any], run: Callable[[Any], dict[str, Any]], out: Path, *, workers: int, minutes: float) -> None:
    """Run jobs side by side until the time is up; each row is appended as it comes."""
    end = time.monotonic() + 60 * minutes
    with multiprocessing.get_context("spawn").Pool(workers) as pool, out.open("a") as file:
        pending: list[Any] = []
        while jobs or pending:
            while jobs and len(pending) < workers and time.monotonic() < end:
                pending.append(pool.apply_async(run, (jobs.pop(0),)))
            if not pending:
                break
            ready = [job for job in pending if job.ready()]
            for job in ready:
                pending.remove(job)
                row = job.get()
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{len(jobs) + len(pending)} to go: {row}", flush=True)
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="30k")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--horizon", type=float, default=60, help="bytes per parameter")
    parser.add_argument("--rate", type=float, help="the grid's centre")
    parser.add_argument("--batch", type=int, help="the grid's centre, in tokens")
    parser.add_argument("--rates", type=int, default=2, help="steps of sqrt(2) to each side of the centre")
    parser.add_argument("--batches", type=int, default=1, help="steps of 2 to each side")
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--schedule", choices=["cosine", "wsd"], default="cosine")
    parser.add_argument("--final-lr", type=float, default=SHAPE["final_lr"], help="share of the peak")
    parser.add_argument("--decay", type=float, default=SHAPE["decay"], help="share of the steps (wsd)")
    parser.add_argument("--warmup", type=float, default=SHAPE["warmup"], help="share of the steps")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "spiralformer-recipe-data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/recipe.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    for row in rows:  # the first had no horizon or schedule, and rates of more digits
        row.setdefault("horizon", 60)
        row |= {name: row.get(name, usual) for name, usual in SHAPE.items()}
        row["rate"] = float(f"{row['rate']:.2g}")
    if options.table:
        show(rows)
        return
    prepare_corpus(TextData(), options.data)
    done = {tuple(row[name] for name in FIELDS) for row in rows}
    grid = cells(options)
    jobs = [(cell, str(options.data)) for cell in grid if cell not in done]
    resume(jobs, run, options.out, workers=options.workers, minutes=options.minutes)


if __name__ == "__main__":
    main()
