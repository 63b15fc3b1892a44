r"""A board solved by loops: recall and norm on sudoku, by rating and by iterations (arXiv 2604.15259).

    python benchmarks/board.py --seeds 3 --minutes 8                                      # 6 x 6, two cores
    python benchmarks/board.py --box 3 3 --width 256 --iterations 30 --tokens 1e9 \
        --batch 40500 --device cuda --lr 1e-3 --test 100 500 --seeds 3 --minutes 8        # 9 x 9, a GPU

Trains on easy boards, iterations drawn as the authors do, and tries harder ones with more iterations. A run that is not
done when the minutes are over is saved, and the same command goes on with it. Finished runs go to
``benchmarks/results/board.jsonl``; ``--table`` prints what is there. Sudoku-Extreme is read with --csv and --ratings.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from recall_and_norm import PROBES

from builder.schedules import model_under
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from studies.probes.table import probe
from studies.sections import TrainingConfig
from studies.tasks.rated import prepare_rated
from studies.tasks.sudoku import Sudoku, SudokuData
from studies.training.trainer import DivergedError, Trainer

OUT = Path(__file__).parent / "results/board.jsonl"
SETTINGS = ("box", "layers", "width", "iterations", "tokens", "batch", "lr")


def architecture(args: argparse.Namespace, recall: str, norm: str) -> ArchSpec:
    """One looped block over the cells, rows and columns as two axes."""
    side = args.box[0] * args.box[1]
    core: dict[str, Any] = {"layers": args.layers, "heads": max(2, args.width // 32), "norm_place": norm}
    core |= {"qk_norm": "after_rotation", "axes": [side, side]}
    loop: dict[str, Any] = {"loop": "core", "in": "x", "schedule": ["token"] * args.iterations, "topology": "base"}
    loop |= {"per": "loop", "iterations": {"sample": "progressive"}}
    (core if recall == "internal" else loop).update({"recall": "affine"} if recall != "none" else {})
    return arch_from_data(
        {
            "name": f"{recall}-{norm}",
            "vocab_size": side + 1,
            "seq_len": side * side,
            "d_model": args.width,
            "causal": False,
            "levels": {"token": {"chunk": 1}},
            "blocks": {"core": core},
            "graph": {"x": {"embed": "tokens"}, "h": loop, "logits": {"head": "lm", "in": "h"}},
        }
    )


def run(args: argparse.Namespace, arch: ArchSpec, seed: int, data: Sudoku, saved: Path, until: float) -> dict[str, Any]:
    """Train to the end, or until the time is up (then nothing is returned); accuracy by iterations and rating."""
    cells = arch.seq_len
    config = TrainingConfig(
        tokens=args.tokens, batch_tokens=args.batch, lr=args.lr, weight_decay=0.01, eval_tokens=200 * cells
    )
    trainer = Trainer(arch, config, data, seed=seed, device=args.device)
    if saved.is_file():
        trainer.restore(torch.load(saved, weights_only=True, map_location=args.device))
    try:
        trainer.train(trainer.plan.num_steps, time_limit_s=max(1.0, until - time.monotonic()))
    except DivergedError as error:
        return {"accuracy": {}, "probes": {}, "error": str(error)}
    if trainer.step < trainer.plan.num_steps:
        torch.save(trainer.state(), saved)
        print(f"{arch.name}, seed {seed}: step {trainer.step} of {trainer.plan.num_steps}, saved", flush=True)
        return {}
    saved.unlink(missing_ok=True)
    model = trainer.model.eval()
    accuracy, probes = {}, {}
    few = next(data.eval_batches(4 * cells, 4, cells))[0].to(args.device)
    for iterations in (args.iterations, *args.test):
        own, view = model_under(model, arch, {"h": iterations})
        accuracy[str(iterations)] = {
            data.name(level): round(data.accuracy(view, level, args.tried * cells), 4) for level in data.facts.levels
        }
        probes[str(iterations)] = {n: float(f"{value:.4g}") for n, value in probe(PROBES, view, own, few).items()}
    return {"accuracy": accuracy, "probes": probes, "seconds": round(trainer.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, nargs=2, default=[2, 3])
    parser.add_argument("--csv", help="Sudoku-Extreme, or a file like it")
    parser.add_argument("--ratings", type=int, nargs="*", default=[])
    parser.add_argument("--recalls", nargs="*", default=["external", "internal"])
    parser.add_argument("--norms", nargs="*", default=["pre", "post"])
    parser.add_argument("--boards", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--test", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--tried", type=int, default=200, help="boards of each rating")
    parser.add_argument("--tokens", type=float, default=1.5e6)
    parser.add_argument("--batch", type=int, default=4608)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spiralformer-board")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in SETTINGS}
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    own = [row for row in rows if row["settings"] == settings]
    if args.table:
        show(own)
        return
    until = time.monotonic() + 60 * args.minutes
    name = "-".join(map(str, [*args.box, args.boards, *args.ratings]))
    config = SudokuData(path=args.csv, box=tuple(args.box), puzzles=args.boards, ratings=tuple(args.ratings))
    data = prepare_rated(Sudoku, config, args.work / f"data-{name}")
    known = {(row["recall"], row["norm"], row["seed"]) for row in own}
    for seed, recall, norm in product(range(args.seeds), args.recalls, args.norms):
        if (recall, norm, seed) in known or time.monotonic() > until:
            continue
        saved = args.work / f"{'-'.join(map(str, settings.values()))}-{recall}-{norm}-{seed}.pt".replace(" ", "")
        found = run(args, architecture(args, recall, norm), seed, data, saved, until)
        if not found:
            return
        row = {"recall": recall, "norm": norm, "seed": seed, "settings": settings, **found}
        own.append(row)
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    show(own)


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table: by rating of the board, at each number of iterations; means over seeds."""
    whole = [row for row in rows if row["accuracy"]]
    if not whole:
        return
    iterations = [*whole[0]["accuracy"]]
    levels = [*whole[0]["accuracy"][iterations[0]]]
    print("| recall | norm | seeds | " + " | ".join(f"rated {level}" for level in levels) + " | norm ratio | radius |")
    print("|---|---|---|" + "---|" * (len(levels) + 2))
    for recall, norm in dict.fromkeys((row["recall"], row["norm"]) for row in whole):
        own = [row for row in whole if (row["recall"], row["norm"]) == (recall, norm)]
        cells = [
            " / ".join(f"{sum(row['accuracy'][i][level] for row in own) / len(own):.2f}" for i in iterations)
            for level in levels
        ]
        for name in ("norm_ratio", "jacobian_radius"):
            values = sorted(row["probes"][iterations[-1]][name] for row in own)
            cells.append(f"{values[0]:.3g} to {values[-1]:.3g}")
        print(f"| {recall} | {norm} | {len(own)} | " + " | ".join(cells) + " |")
    print(f"\nEach cell at {', '.join(iterations)} iterations.")


if __name__ == "__main__":
    main()
