"""Whether the papers' pictures of what iterations do appear: the study ``specialization``, looked into.

    spiralformer search specialization --dir FOLDER
    python benchmarks/specialization.py FOLDER
    python benchmarks/specialization.py --table

By candidate and iteration, mean and standard deviation over seeds, on 500 held-out examples. What was seen in each run
is in ``benchmarks/results/specialization.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from searchspace.disk import write_file
from studies.commands.export import trained_model
from studies.probes.look import Inside, LoopSeen, look, rows_at_once
from studies.records.reading import read_study
from studies.report.inside import mean_of
from studies.show.summary import summarize

OUT = Path(__file__).parent / "results/specialization.jsonl"
ROWS = 500
COLUMNS: dict[str, Callable[[LoopSeen, int], float]] = {
    "entropy": lambda loop, t: mean_of(loop.heads["entropy"][t], loop.changed),
    "entropy, all heads": lambda loop, t: mean_of(loop.heads["entropy"][t]),
    "distance": lambda loop, t: mean_of(loop.heads["distance"][t], loop.changed),
    "distance, all heads": lambda loop, t: mean_of(loop.heads["distance"][t]),
    "nearby": lambda loop, t: mean_of(loop.heads["local"][t], loop.changed),
    "update": lambda loop, t: loop.core[t],
    "CKA with the one before": lambda loop, t: loop.similarity[t][t + 1],
    "rank": lambda loop, t: loop.ranks[t + 1],
    "worth, nats": lambda loop, t: loop.worth[t + 1],
}

_DIGITS = {"distance": 1, "distance, all heads": 1, "rank": 1}


def main() -> None:
    """Look, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.folder is not None:
        look_into(args.folder)
    print(table([json.loads(line) for line in OUT.read_text().splitlines()]))


def look_into(folder: Path) -> None:
    """Write a row for each complete trial."""
    torch.set_num_threads(1)
    records, corpus, settings = read_study(folder)
    rows = []
    for record in records:
        if record.state != "complete":
            continue
        arch, model = record.arch_spec(), trained_model(record, folder, corpus, settings).eval()
        at_once = min(rows_at_once(arch, arch.seq_len), ROWS // 5)
        batches = list(corpus.eval_batches(ROWS * arch.seq_len, at_once, arch.seq_len))
        seen = look(model, arch, batches, corpus.loss, name=summarize(arch))
        bits = corpus.headline.value(record.rungs[-1].score)
        rows.append({"seed": record.seed, "bits_per_byte": bits, "tokens": record.tokens, **seen.to_plain()})
        print(f"{record.number}: {seen.name}, seed {record.seed}, {bits:.3f}", flush=True)
    write_file(OUT, "".join(json.dumps(row) + "\n" for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    facts = ("seed", "bits_per_byte", "tokens")
    groups: dict[str, list[tuple[dict[str, Any], Inside]]] = {}
    for row in rows:
        seen = Inside.from_plain({name: value for name, value in row.items() if name not in facts})
        groups.setdefault(seen.name, []).append((row, seen))
    order = sorted(groups, key=lambda name: mean(row["bits_per_byte"] for row, _ in groups[name]))
    lines = [f"| model | bits/byte | iteration | {' | '.join(COLUMNS)} |", "|" + "---|" * (3 + len(COLUMNS))]
    for name in order:
        bits = _spread([row["bits_per_byte"] for row, _ in groups[name]], 3)
        loops = [seen.loops[0] for _, seen in groups[name]]
        for t in range(len(loops[0].chunks)):
            cells = [_spread([value(loop, t) for loop in loops], _DIGITS.get(c, 3)) for c, value in COLUMNS.items()]
            first = (name, bits) if t == 0 else ("", "")
            lines.append(f"| {' | '.join((*first, f'{t + 1}, chunk {loops[0].chunks[t]}', *cells))} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    if any(math.isnan(value) for value in values):
        return ""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


if __name__ == "__main__":
    main()
