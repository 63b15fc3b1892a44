"""From finished study folders to the table.

    spiralformer search benchmarks/tabular/study.yaml --dir runs/tabular-0
    spiralformer search benchmarks/tabular/study.yaml search.seed=1 search.num_trials=60 --dir runs/tabular-1
    python benchmarks/tabular/make_table.py runs/tabular-0 runs/tabular-1

Both searches can be interrupted and go on. The first folder must hold every candidate; further ones are more seeds.
Prints how well seeds agree: a table whose seeds do not rank alike measures noise.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import pstdev
from typing import Any

import torch
from scipy.stats import kendalltau

from builder import compile_arch, estimate
from searchspace import load_space
from searchspace.choices import FixedChooser
from searchspace.space import assignments
from studies.records.reading import read_study
from studies.records.trial import TrialRecord

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "table.json")
    args = parser.parse_args()
    studies = [read_study(folder) for folder in args.folders]
    by_seed: dict[int, dict[str, TrialRecord]] = {}
    for records, _, settings in studies:
        complete = {record.arch_id: record for record in records if record.state == "complete"}
        by_seed.setdefault(settings.search.seed, {}).update(complete)
    settings, corpus = studies[0][2], studies[0][1]
    space = load_space(HERE / "space.yaml")
    rows: list[dict[str, Any]] = []
    for choices in assignments(space.template):
        arch = space.resolve(FixedChooser(choices))
        graph = compile_arch(arch)
        cost = estimate(graph)
        length = choices["graph.h.schedule.length"]
        assert isinstance(length, int)
        found = {str(seed): trials[graph.arch_id] for seed, trials in by_seed.items() if graph.arch_id in trials}
        if str(settings.search.seed) not in found:
            raise SystemExit(f"{args.folders[0]} does not hold {choices}: let the search go on first")
        rows.append(
            {
                "schedule": [choices[f"graph.h.schedule.{i}"] for i in range(length)],
                "topology": choices["graph.h.topology"],
                "arch_id": graph.arch_id,
                "params": cost.params,
                "flops_per_token": cost.flops_per_token,
                "losses": {seed: [round(r.score, 5) for r in record.rungs] for seed, record in found.items()},
            }
        )
    training = settings.training.decide(FixedChooser({})).tree["training"]
    table = {
        "made_by": "benchmarks/tabular/make_table.py",
        "data": f"{corpus.facts.source}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}",
        "rungs": [3.0**-i for i in reversed(range(4))],
        "training": {name: training[name] for name in ("flops", "batch_tokens")},
        "seeds": sorted(by_seed),
        "noise": noise(rows, sorted(by_seed)),
        "rows": rows,
    }
    text = json.dumps({**table, "rows": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(f"{text}[\n{lines}\n]\n}}\n", encoding="utf-8")
    print(f"{len(rows)} rows, {len({row['arch_id'] for row in rows})} architectures, to {args.out}")
    for rung, figures in enumerate(table["noise"]):
        print(f"rung {rung}: {figures}")


def noise(rows: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, float]]:
    """By rung: Kendall tau between the first two seeds, their spread, and the spread of the candidates (nats)."""
    if len(seeds) < 2:
        return []
    unique = {row["arch_id"]: row["losses"] for row in rows if len(row["losses"]) > 1}
    figures = []
    for rung in range(4):
        first, second = ([losses[str(seed)][rung] for losses in unique.values()] for seed in seeds[:2])
        apart = [(a - b) / 2**0.5 for a, b in zip(first, second, strict=True)]
        figures.append(
            {
                "pairs": len(first),
                "kendall_tau": round(float(kendalltau(first, second).statistic), 3),
                "seed_std": round(pstdev(apart), 4),
                "candidate_std": round(pstdev(first), 4),
            }
        )
    return figures


if __name__ == "__main__":
    main()
