"""What the shipped ladder shows, once it is trained.

    spiralformer search ladder --dir FOLDER && python benchmarks/ladder.py FOLDER

1. Each size is left out and predicted from the others: errors, coverage of the intervals over all pairs and horizons;
   for the largest, predicted against measured ranking, beside the rankings by each smaller size alone and by FLOPs.
2. Compute multipliers by size, and the worth of a further use (phi) by family, coarse uses counted whole and by tokens.
3. What allotting would have saved: the same runs in the order that `studies.scale.allot` asks for them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from searchspace.errors import SpecError
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.records.reading import read_study
from studies.records.trial import TrialRecord
from studies.report.scaling import names_of, points_of, tell_study
from studies.scale.allot import next_cell
from studies.scale.ladder import key_of, ladder_of, runs_of, size_of_rung
from studies.scale.law import Run, fit_law
from studies.scale.pairs import rate
from studies.scale.recurrence import phi_of

LEVEL, Z = 0.8, 1.2816
FAMILY = re.compile(r"[a-z]+")


def read(folder: Path) -> tuple[list[TrialRecord], Dataset, StudyConfig, list[Run]]:
    """The study, and its runs by name, in the unit of its headline."""
    records, corpus, settings = read_study(folder)
    records = [record for record in records if record.state == "complete"]
    names = names_of(records)
    runs = [
        replace(r, candidate=names[r.candidate], loss=corpus.headline.value(r.loss))
        for r in runs_of(records, settings.task)
    ]
    return records, corpus, settings, runs


def measured(runs: Sequence[Run], size: str) -> dict[tuple[str, str], tuple[float, int]]:
    """Difference of each pair of candidates at a size's longest horizon, and over how many seeds."""
    own = [run for run in runs if size_of_rung(run.rung) == size]
    longest = max(run.tokens for run in own)
    losses = {(run.candidate, run.seed): run.loss for run in own if run.tokens == longest}
    found = {}
    names = list(dict.fromkeys(name for name, _ in losses))
    for a, b in combinations(names, 2):
        gaps = [losses[b, s] - losses[a, s] for s in {s for _, s in losses} if (a, s) in losses and (b, s) in losses]
        if gaps:
            found[a, b] = mean(gaps), len(gaps)
    return found


def left_out(runs: Sequence[Run], size: str) -> dict[str, Any]:
    """A size predicted from the others."""
    rest = [run for run in runs if size_of_rung(run.rung) != size]
    own = [run for run in runs if size_of_rung(run.rung) == size]
    truth = measured(runs, size)
    longest = max(run.tokens for run in own)
    errors, inside, with_noise, predicted = [], [], [], {}
    for base in dict.fromkeys(run.candidate for run in own):
        at = next(run.size for run in own if run.candidate == base)
        answer = rate(rest, base, at, longest, confidence=LEVEL, draws=200)
        for rated in answer.rated:
            if (pair := (base, rated.candidate)) not in truth:
                continue
            value, seeds = truth[pair]
            low, high = rated.interval
            spread = np.hypot((high - low) / (2 * Z), answer.seed_spread / seeds**0.5)
            errors.append(rated.difference - value)
            inside.append(low <= value <= high)
            with_noise.append(abs(rated.difference - value) <= Z * spread)
        if base == runs[0].candidate:
            predicted = {rated.candidate: rated.difference for rated in answer.rated}
    return {
        "size": size,
        "pairs": len(errors),
        "rms error": float(np.sqrt(np.mean(np.square(errors)))),
        "rms of what is measured": float(np.sqrt(np.mean([value**2 for value, _ in truth.values()]))),
        "inside": float(np.mean(inside)),
        "inside, with the noise of what is measured": float(np.mean(with_noise)),
        "predicted": predicted,
    }


def tau_at(first: dict[str, float], second: dict[str, float]) -> float:
    names = [name for name in first if name in second]
    return float(kendalltau([first[n] for n in names], [second[n] for n in names]).statistic)


def at_size(runs: Sequence[Run], size: str) -> dict[str, float]:
    """Differences to the first candidate at a size."""
    base = runs[0].candidate
    pairs = measured(runs, size)
    return {base: 0.0} | {b: value for (a, b), (value, _) in pairs.items() if a == base}


def phis(records: Sequence[TrialRecord], runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Worth of a further use by family, in both ways to count coarse uses, and at the small and the large sizes."""
    law, base, names = fit_law(runs), runs[0].candidate, names_of(records)
    sizes = list(dict.fromkeys(size_of_rung(run.rung) for run in runs))
    found: dict[str, dict[str, list[float]]] = {}
    for way, by_tokens in (("whole", False), ("by tokens", True)):
        grouped = defaultdict(list)
        for name, points in points_of(runs, records, names, base, by_tokens=by_tokens).items():
            family = FAMILY.match(name)
            grouped[family[0] if family else name] += points
        for family, points in grouped.items():
            for part, kept in (("all sizes", sizes), ("smaller half", sizes[:2]), ("larger half", sizes[2:])):
                if own := [point for point in points if point.size in kept]:
                    found.setdefault(family, {})[f"{way}, {part}"] = list(phi_of(own, law, law.factors[base]))
    return found


def allotted(records: Sequence[TrialRecord], corpus: Dataset, settings: StudyConfig) -> list[dict[str, Any]]:
    """The answer after each run that allotting asks for, replayed from what was measured."""
    assert settings.scale is not None
    settings = replace(settings, scale=replace(settings.scale, allot=True))
    ladder = ladder_of(settings, records, corpus.facts)
    known = {key_of(record): record for record in records if record.purpose == "ladder"}
    got: list[TrialRecord] = []
    rows: list[dict[str, Any]] = []
    spent = 0.0
    while (cell := next_cell(ladder, got)) is not None and ladder.key(cell) in known:
        got.append(known[ladder.key(cell)])
        spent += ladder.flops(cell)
        try:
            told = tell_study(got, settings, corpus)
        except SpecError:
            continue
        best = max(told.answer.rated, key=lambda rated: rated.best)
        low, high = best.multiplier_interval
        rows.append({"runs": len(got), "flops": spent, "best": best.candidate, "probability": best.best,
                     "width": float(np.log(high / low))})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ladder.json")
    options = parser.parse_args()
    records, corpus, settings, runs = read(options.folder)
    sizes = list(dict.fromkeys(size_of_rung(run.rung) for run in runs))
    facts: dict[str, Any] = {"runs": [vars_of(run) for run in runs]}
    names = {run.candidate for run in runs}
    if len(sizes) > 3 and all({r.candidate for r in runs if r.rung.startswith(f"{s},")} == names for s in sizes):
        facts["left out"] = [left_out(runs, size) for size in sizes]
        for row in facts["left out"]:
            shown = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            print(f"size {row['size']} left out: {row['pairs']} pairs, {shown}")
        top, truth = facts["left out"][-1], at_size(runs, sizes[-1])
        cost = {run.candidate: -(run.flops or 0.0) for run in runs if run.rung.startswith(f"{sizes[-1]},")}
        facts["tau"] = {"fit": tau_at(top["predicted"], truth), "FLOPs": tau_at(cost, truth)}
        facts["tau"] |= {f"size {size} alone": tau_at(at_size(runs, size), truth) for size in sizes[:-1]}
        print("tau with the largest size: " + ", ".join(f"{k} {v:+.2f}" for k, v in facts["tau"].items()))
    told = tell_study(records, settings, corpus)
    facts["multipliers"] = {r.candidate: {"points": r.points, "target": [r.multiplier, *r.multiplier_interval],
                                          "best": r.best, "flops": r.cost} for r in told.answer.rated}  # fmt: skip
    for name, row in facts["multipliers"].items():
        points = " ".join(f"{worth:.2f}" for _, worth in row["points"])
        middle, low, high = row["target"]
        print(f"{name}: worth by size {points}; at the target {middle:.2f} ({low:.2f} to {high:.2f})")
    facts["phi"] = phis(records, runs)
    for family, ways in facts["phi"].items():
        print(f"phi of {family}: " + "; ".join(f"{k} {p:.2f} ({a:.2f} to {b:.2f})" for k, (p, a, b) in ways.items()))
    facts["allotted"] = allotted(records, corpus, settings)
    for row in facts["allotted"][-1:]:
        print(f"allotted: {row}")
    facts["cost"] = {size: sum(r.flops for r in records if r.size == size) for size in sizes}
    print("FLOPs by size: " + ", ".join(f"{size} {flops:.3g}" for size, flops in facts["cost"].items()))
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


def vars_of(run: Run) -> list[Any]:
    return [run.candidate, run.size, run.tokens, round(run.loss, 5), run.rung, run.seed, run.flops]


if __name__ == "__main__":
    main()
