"""What the driver costs and how well it keeps a tight budget: proposals, launches, journal, no training.

    python benchmarks/launches.py [--samplers random,tpe,...] [--launches 1000] [--random-launches 10000] [--gp 150]

Every launch is checked against the budget again and for duplicates. Losses are made up from the cost and the
decisions, so that samplers have something to follow. The budget leaves less than 5 % of random candidates.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Any

from builder import compile_arch, estimate
from searchspace.choices import RandomChooser
from searchspace.errors import SpecError
from studies.config import StudyConfig, study_from_data
from studies.data.corpus import Corpus, prepare_corpus
from studies.records.trial import Report, Rung, TrialRecord
from studies.strategy.driver import StudyDriver

TIGHT: dict[str, Any] = {"params": {"min": 200_000, "max": 210_000}}
LOOSE: dict[str, Any] = {"params": 10_000_000}


def study(sampler: str, launches: int, budget: dict[str, Any], narrow: bool) -> StudyConfig:
    """A study over the widest shipped space."""
    from searchspace.files import find_file, read_data

    return study_from_data(
        {
            "name": "launches",
            "space": read_data(find_file("families", folder="spaces")),
            "training": {"flops": 1e12, "batch_tokens": 1536, "lr": {"float": [1e-3, 1e-2], "log": True}},
            "budget": budget,
            "search": {"sampler": sampler, "num_trials": launches, "stopper": "none", "narrow": narrow},
        }
    )


def made_up_loss(record: TrialRecord) -> float:
    """Less for more iterations and a smaller cost, and a little for every decision."""
    schedule = [v for k, v in record.choices.items() if k.startswith("graph.h.schedule.")]
    texture = sum(zlib.crc32(f"{k}={v}".encode()) % 100 for k, v in record.choices.items()) / 100
    return 3.0 + 0.02 * texture - 0.05 * len(schedule) + 0.1 * abs(math.log(record.cost.flops_per_token / 4e5))


def launch_all(settings: StudyConfig, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Launch every trial, ending each at once."""
    start = time.perf_counter()
    driver = StudyDriver(settings, folder, corpus)
    start_up = time.perf_counter() - start
    seconds: list[float] = []
    while True:
        begin = time.perf_counter()
        spec = driver.next_trial()
        seconds.append(time.perf_counter() - begin)
        if spec is None:
            break
        record = driver.record(spec.number)
        rung = Rung(flops=1.0, tokens=1, score=made_up_loss(record))
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,)))
    records = driver.records
    over = sum(not driver.budget.allows(estimate(compile_arch(record.arch_spec()))) for record in records)
    keys = {(record.arch_id, json.dumps(record.training, sort_keys=True)) for record in records}
    counts = driver._proposer.counts
    last = sorted(seconds[-200:])
    return {
        "launches": len(records),
        "over_budget": over,
        "duplicates": len(records) - len(keys),
        "proposals_per_launch": counts["drawn"] / len(records),
        "random_share": counts["random"] / len(records),
        "start_up_s": start_up,
        "median_s": median(seconds),
        "p95_s": sorted(seconds)[int(0.95 * len(seconds))],
        "p95_of_last_200_s": last[int(0.95 * len(last))],
        "best": min(record.rungs[-1].score for record in records),
        "note": driver.progress().note,
    }


def feasible_share(settings: StudyConfig, samples: int = 2000) -> float:
    """Share of random candidates within the budget."""
    budget, kept = settings.budget.resolve(None), 0
    for seed in range(samples):
        try:
            kept += budget.allows(estimate(compile_arch(settings.space.resolve(RandomChooser(seed)))))
        except SpecError:
            continue
    return kept / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default="random,tpe,nsga2,evolution,gp")
    parser.add_argument("--launches", type=int, default=1000)
    parser.add_argument("--random-launches", type=int, default=10_000)
    parser.add_argument("--gp", type=int, default=150, help="launches of gp, whose time grows with their cube")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = prepare_corpus(study("random", 1, TIGHT, True).data, Path(scratch) / "data")
        print(f"{feasible_share(study('random', 1, TIGHT, True)):.1%} of random candidates are within the tight budget")
        print("| sampler | budget | narrowing | launches | over | twice | drawn/launch | random | median s | p95 s |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for sampler in args.samplers.split(","):
            launches = {"random": args.random_launches, "gp": args.gp}.get(sampler, args.launches)
            for name, budget, narrow in (("tight", TIGHT, True), ("tight", TIGHT, False), ("loose", LOOSE, True)):
                if sampler == "random" and (name == "loose" or not narrow):  # narrows after 200 rejections only
                    continue
                folder = Path(scratch) / f"{sampler}-{name}-{narrow}"
                folder.mkdir()
                row = launch_all(study(sampler, launches, budget, narrow), corpus, folder)
                rows.append({"sampler": sampler, "budget": name, "narrow": narrow, **row})
                print(
                    f"| {sampler} | {name} | {'on' if narrow else 'off'} | {row['launches']} | {row['over_budget']} | "
                    f"{row['duplicates']} | {row['proposals_per_launch']:.2f} | {row['random_share']:.0%} | "
                    f"{row['median_s']:.3f} | {row['p95_s']:.3f} |",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
