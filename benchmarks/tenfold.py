"""Whether what a study says of its finalists holds at more FLOPs.

    spiralformer search quickstart --dir STUDY search.promote="{trials: 5, seeds: 6}"
    cp -r STUDY LONGER && spiralformer search quickstart --dir LONGER search.promote="{trials: 5, seeds: 3, factor: 10}"
    python benchmarks/tenfold.py LONGER

The second search only trains the finalists again. Printed: both rankings, Kendall's tau over all pairs and over those
that the study called decided.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

from scipy.stats import kendalltau

from studies.records.reading import read_study
from studies.records.trial import budget_of
from studies.report.finalists import finals, promotions
from studies.show.summary import summarize


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/tenfold.json")
    options = parser.parse_args()
    records, corpus, _ = read_study(options.folder)
    again = [record for record in records if record.purpose == "promotion" and record.state == "complete"]
    budgets = sorted({budget_of(record) for record in again})
    short, long = budgets[0], budgets[-1]
    before, after = ({group.runs[0].arch_id: group for group in promotions(records, b)} for b in (short, long))
    told = finals([r for r in records if r not in again or budget_of(r) == short])
    print(f"| finalist | {corpus.headline.label} at {short:.3g} (runs) | at {long:.3g} (runs) |\n|---|---|---|")
    shared = [arch for arch in before if arch in after]
    rows = [
        [summarize(r.arch_spec()), budget_of(r), r.seed, round(corpus.headline.value(r.rungs[-1].score), 5)]
        for r in again
    ]
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for arch in shared:
        first, second = before[arch], after[arch]
        name = summarize(first.runs[0].arch_spec()) + (" (baseline)" if first.is_baseline else "")
        ends = [
            f"{corpus.headline.value(g.mean):.3f} ± {corpus.headline.spread(g.spread or 0):.3f} ({len(g.runs)})"
            for g in (first, second)
        ]
        print(f"| {name} | {ends[0]} | {ends[1]} |")
    tau = kendalltau([before[a].mean for a in shared], [after[a].mean for a in shared]).statistic
    pairs = list(combinations(shared, 2))
    decided = [(a, b) for a, b in pairs if told.decided(before[a], before[b])]
    kept = sum((before[a].mean < before[b].mean) == (after[a].mean < after[b].mean) for a, b in decided)
    print(f"\ntau {tau:+.2f} over all {len(pairs)} pairs; {len(decided)} decided, of which {kept} hold", end="")
    print(f": tau {2 * kept / len(decided) - 1:+.2f}" if decided else "")


if __name__ == "__main__":
    main()
