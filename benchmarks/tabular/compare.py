"""Samplers and stoppers on the table: simple regret against training FLOPs spent, over many seeds.

    python benchmarks/tabular/compare.py [--seeds 50] [--spend 40] [--outside traces_ax.json ...] [--out DIR]

Traces of optimisers that are not ours come from `outside.py`. Prints a Markdown table, writes traces and a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulate import HERE, Table, Trace, corpus, simulate, study

ASHA = {"asha": {"rungs": 3, "reduction": 3}}
METHODS: dict[str, dict[str, Any]] = {
    "random, full training": {"sampler": "random", "stopper": "none"},
    "random, ASHA": {"sampler": "random", "stopper": ASHA},
    "tpe without the budget, full training": {"sampler": "tpe", "stopper": "none"},
    "tpe, full training": {"sampler": "tpe", "stopper": "none"},
    "tpe, ASHA": {"sampler": "tpe", "stopper": ASHA},
    "tpe, median (our defaults)": {"sampler": "tpe", "stopper": {"median": {"rungs": 3, "reduction": 3}}},
    "evolution, full training": {"sampler": "evolution", "stopper": "none"},
    "evolution, ASHA": {"sampler": "evolution", "stopper": ASHA},
    "predictor (tabular), ASHA": {"sampler": "predictor", "stopper": ASHA},
    "predictor (tabular), full training": {"sampler": "predictor", "stopper": "none"},
    "predictor (tabular), median": {"sampler": "predictor", "stopper": {"median": {"rungs": 3, "reduction": 3}}},
    "nsga2, ASHA": {"sampler": "nsga2", "stopper": ASHA},
}


def regret_at(traces: Sequence[Trace], spent: NDArray[Any], optimum: float, worst: float) -> NDArray[Any]:
    """Simple regret by seed (rows) and spending (columns); before anything is found, the worst."""
    out = np.full((len(traces), len(spent)), worst - optimum)
    for row, trace in zip(out, traces, strict=True):
        for at, loss in trace:
            row[spent >= at - 1e-9] = loss - optimum
    return out


def spent_to_reach(traces: Sequence[Trace], loss: float) -> float:
    """Median full trainings until a loss is reached; infinite where most seeds never do."""
    return float(np.median([next((at for at, best in trace if best <= loss), np.inf) for trace in traces]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--spend", type=float, default=40.0)
    parser.add_argument("--share", type=float, default=0.6, help="of candidates that are within the budget")
    parser.add_argument("--methods", help="part of the names, separated by |; default: all")
    parser.add_argument("--reuse", type=Path, help="traces of an earlier run, instead of searching again")
    parser.add_argument("--outside", nargs="*", type=Path, default=())
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    table = Table()
    limit = float(np.quantile([row["flops_per_token"] for row in table.rows.values()], args.share))
    print(f"budget: flops_per_token <= {limit:.0f}, which {args.share:.0%} of the candidates keep")
    optimum, data = table.best(limit), corpus()
    feasible = sorted(table.loss(i, -1) for i, row in table.rows.items() if row["flops_per_token"] <= limit)
    traces: dict[str, list[Trace]] = {}
    if args.reuse:
        traces = json.loads(args.reuse.read_text(encoding="utf-8"))
    for name, search in METHODS.items() if not args.reuse else ():
        if args.methods and not any(part in name for part in args.methods.split("|")):
            continue
        start = time.perf_counter()
        budget = None if "without the budget" in name else limit
        traces[name] = [
            simulate(study({**search, "seed": seed}, budget), table, data, spend=args.spend, max_flops_per_token=limit)
            for seed in range(args.seeds)
        ]
        print(f"{name}: {(time.perf_counter() - start) / args.seeds:.1f} s per search", flush=True)
    for file in args.outside:
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = [[(at, loss) for at, loss in trace] for trace in found["traces"]]
        traces[f"{found['method']} {found['version']}, {len(runs)} seeds"] = runs
    report(traces, optimum, feasible, args)


def report(traces: dict[str, list[Trace]], optimum: float, feasible: Sequence[float], args: argparse.Namespace) -> None:
    """The table, the plot and the traces."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spent = np.linspace(0.25, args.spend, 160)
    top = feasible[max(0, len(feasible) // 100 - 1)] if len(feasible) >= 100 else feasible[0]
    reference = traces.get("random, full training")
    target = optimum
    if reference is not None:
        target = optimum + float(np.median(regret_at(reference, np.array([args.spend]), optimum, feasible[-1])))
    half, whole = np.array([args.spend / 2]), np.array([args.spend])
    print(f"\n{len(feasible)} feasible candidates, losses {optimum:.4f} .. {feasible[-1]:.4f} nats per token\n")
    print("| method | regret after half (mean, milli-nats) | regret at the end | to random's end | to the top 1 % |")
    print("|---|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    for name, runs in traces.items():
        regrets = regret_at(runs, spent, optimum, feasible[-1])
        mean, error = regrets.mean(0), regrets.std(0) / len(runs) ** 0.5
        (line,) = axes.plot(
            spent, np.maximum(mean, 1e-5), label=name, lw=2.2 if "ours" in name or "our " in name else 1.3
        )
        axes.fill_between(spent, np.maximum(mean - error, 1e-5), mean + error, color=line.get_color(), alpha=0.15)
        at_half, at_end = (regret_at(runs, at, optimum, feasible[-1]).mean() * 1e3 for at in (half, whole))
        print(
            f"| {name} | {at_half:.1f} | {at_end:.1f} | {spent_to_reach(runs, target):.1f} | "
            f"{spent_to_reach(runs, top):.1f} |"
        )
    axes.set(
        xlabel="full trainings spent", ylabel="mean simple regret, nats per token", yscale="log", ylim=(5e-5, None)
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "regret.png", dpi=130)
    (args.out / "tabular_traces.json").write_text(json.dumps(traces) + "\n", encoding="utf-8")
    print(f"\nwrote {args.out / 'regret.png'}")


if __name__ == "__main__":
    main()
