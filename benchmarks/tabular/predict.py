"""How well predictors rank held-out schedules of the table.

    python benchmarks/tabular/predict.py [--splits 10] [--sizes 25,50,100,200] [--out FILE]

Kendall tau, and how many of the true best ten are among the predicted best ten, mean and standard deviation over
random splits; all that is not trained on is held out. ``gnn, no sharing`` is the graph network without shared blocks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from simulate import HERE, Table

from builder import compile_arch, estimate
from searchspace import load_space
from searchspace.choices import FixedChooser
from searchspace.space import assignments
from studies.predictors import (
    CostPredictor,
    Example,
    GraphNetwork,
    Predictor,
    ScalingLaw,
    Tabular,
    make_example,
    rank_correlation,
)

PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "cost": CostPredictor,
    "scaling_law": ScalingLaw,
    "tabular": Tabular,
    "gnn": GraphNetwork,
    "gnn, no sharing": lambda: GraphNetwork(sharing=False),
}


def load() -> tuple[list[Example], list[float]]:
    """Every architecture of the table once, with its full-budget loss."""
    table, space = Table(), load_space(HERE / "space.yaml")
    examples, losses, seen = list[Example](), list[float](), set[str]()
    for choices in assignments(space.template):
        graph = compile_arch(space.resolve(FixedChooser(choices)))
        if graph.arch_id in seen or graph.arch_id not in table.rows:
            continue
        seen.add(graph.arch_id)
        examples.append(make_example(graph, estimate(graph)))
        losses.append(table.loss(graph.arch_id, -1))
    return examples, losses


def score(predicted: Any, true: list[float]) -> tuple[float, float]:
    """Kendall tau and recall of the best ten."""
    best = set(np.argsort(true)[:10].tolist())
    return rank_correlation(predicted, true), len(best & set(np.argsort(predicted)[:10].tolist())) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--sizes", default="25,50,100,200")
    parser.add_argument("--predictors", help="part of the names, separated by |; default: all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    examples, losses = load()
    print(f"{len(examples)} schedules, encoded in {(time.perf_counter() - begin) / len(examples) * 1e3:.2f} ms each")
    print("| predictor | trained on | Kendall tau | top-10 recall | fit, s | query, ms per candidate |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, make in PREDICTORS.items():
        if args.predictors and not any(part == name for part in args.predictors.split("|")):
            continue
        for size in map(int, args.sizes.split(",")):
            taus, recalls, fits, queries = [], [], [], []
            for split in range(args.splits):
                order = list(range(len(examples)))
                random.Random(split).shuffle(order)
                train, held_out = order[:size], order[size:]
                predictor = make()
                start = time.perf_counter()
                predictor.fit([examples[i] for i in train], [losses[i] for i in train], seed=split)
                fits.append(time.perf_counter() - start)
                start = time.perf_counter()
                predicted, _ = predictor.predict([examples[i] for i in held_out])
                queries.append((time.perf_counter() - start) / len(held_out) * 1e3)
                tau, recall = score(predicted, [losses[i] for i in held_out])
                taus.append(tau)
                recalls.append(recall)
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in (taus, recalls)]
            print(
                f"| {name} | {size} | {mean(taus):.3f} ± {spread[0]:.3f} | {mean(recalls):.2f} ± {spread[1]:.2f} | "
                f"{mean(fits):.2f} | {mean(queries):.3f} |",
                flush=True,
            )
            rows.append({"predictor": name, "size": size, "taus": taus, "recalls": recalls})
    if args.out:
        args.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
