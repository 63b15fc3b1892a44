"""How well predictors rank held-out schedules of the table.

    python benchmarks/tabular/predict.py [--splits 10] [--sizes 25,50,100,200] [--rungs] [--out FILE]

Kendall tau, and how many of the true best ten are among the predicted best ten, mean and standard deviation over
random splits; all that is not trained on is held out. ``gnn, no sharing`` is the graph network without shared blocks.
With ``--rungs``, the trials learned from were stopped as ASHA would: a third reaches each rung of the next.
"""

from __future__ import annotations

import argparse
import json
import random
import time
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
from studies.predict import learners
from studies.predict.features import Observation, observe
from studies.predict.gnn import GraphNetwork
from studies.predict.predictor import Predictor, rank_correlation

NAMES = ("cost", "scaling_law", "tabular", "gnn", "gnn, no sharing")
RUNGS = (1, 2, 3)
"""Of the table's four: a ninth, a third and the whole budget."""


def load() -> list[list[Observation]]:
    """Every architecture of the table once, with its losses at three rungs."""
    table, space = Table(), load_space(HERE / "space.yaml")
    found, seen = [], set[str]()
    for choices in assignments(space.template):
        arch = space.resolve(FixedChooser(choices))
        graph = compile_arch(arch)
        if graph.arch_id in seen or graph.arch_id not in table.rows:
            continue
        seen.add(graph.arch_id)
        rungs = [(table.training["flops"] * table.rungs[i], table.loss(graph.arch_id, i)) for i in RUNGS]
        found.append(observe(arch, estimate(graph), table.training, rungs, len(found)))
    return found


def stop_early(trials: list[list[Observation]]) -> list[Observation]:
    """What ASHA would have left of them: the best third of a rung goes on."""
    kept = list[Observation]()
    for i in range(len(RUNGS)):
        kept += [trial[i] for trial in trials]
        trials = sorted(trials, key=lambda trial: trial[i].loss)[: max(1, len(trials) // 3)]
    return kept


def make(name: str) -> Predictor:
    """A predictor; the ablation replaces the learner behind it."""
    if name == "gnn, no sharing":
        learners.LEARNERS["gnn"] = lambda: GraphNetwork(sharing=False)
        return Predictor("gnn")
    learners.LEARNERS["gnn"] = GraphNetwork
    return Predictor(name)  # type: ignore[arg-type]


def score(predicted: Any, true: list[float]) -> tuple[float, float]:
    """Kendall tau and recall of the best ten."""
    best = set(np.argsort(true)[:10].tolist())
    return rank_correlation(predicted, true), len(best & set(np.argsort(predicted)[:10].tolist())) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--sizes", default="25,50,100,200")
    parser.add_argument("--rungs", action="store_true", help="learn from trials that ASHA would have stopped")
    parser.add_argument("--predictors", help="part of the names, separated by |; default: all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    trials = load()
    print(f"{len(trials)} schedules, encoded in {(time.perf_counter() - begin) / len(trials) * 1e3:.2f} ms each")
    print("| predictor | trained on | Kendall tau | its own estimate | top-10 recall | fit, s | query, ms |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in NAMES:
        if args.predictors and name not in args.predictors.split("|"):
            continue
        for size in map(int, args.sizes.split(",")):
            taus, own, recalls, fits, queries = [], [], [], [], []
            for split in range(args.splits):
                order = list(range(len(trials)))
                random.Random(split).shuffle(order)
                train, held_out = [trials[i] for i in order[:size]], [trials[i][-1] for i in order[size:]]
                predictor = make(name)
                start = time.perf_counter()
                predictor.fit(stop_early(train) if args.rungs else [trial[-1] for trial in train], seed=split)
                fits.append(time.perf_counter() - start)
                start = time.perf_counter()
                predicted, _ = predictor.predict([o.example for o in held_out])
                queries.append((time.perf_counter() - start) / len(held_out) * 1e3)
                tau, recall = score(predicted, [o.loss for o in held_out])
                taus.append(tau)
                own.append(predictor.tau)
                recalls.append(recall)
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in (taus, recalls)]
            print(
                f"| {name} | {size} | {mean(taus):.3f} ± {spread[0]:.3f} | {mean(own):.3f} | "
                f"{mean(recalls):.2f} ± {spread[1]:.2f} | "
                f"{mean(fits):.2f} | {mean(queries):.3f} |",
                flush=True,
            )
            rows.append({"predictor": name, "size": size, "taus": taus, "recalls": recalls})
    if args.out:
        args.out.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
