"""The shipped ladder on one GPU in bf16, at sizes as far as its text goes.

    python benchmarks/ladder_gpu.py OUT --pack text.xz          # here: the Python sources of this environment
    python benchmarks/ladder_gpu.py OUT --text text.xz --minutes 9 --budget 25   # there; again goes on
    python benchmarks/ladder_gpu.py OUT --text text.xz --device cpu --dry-run    # step times, and what it would take

The first call measures a step of each candidate size and keeps the sizes that the budget in minutes and four epochs of
the text allow; they stand in OUT/study.yaml from then on. Each call trains for --minutes and stops between two reports;
OUT/run is the study's folder: copy it back, and any machine goes on. With Ray, --side-by-side trials share the GPU.
"""

from __future__ import annotations

import argparse
import lzma
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from searchspace.files import read_data
from searchspace.plain import dump_yaml, encode
from studies.config import StudyConfig, find_study, load_study
from studies.data.corpus import Corpus
from studies.scale.ladder import Ladder, ladder_of
from studies.sections import SizeConfig, check_training
from studies.tasks.table import prepare_data
from studies.training.trainer import Trainer

SIZES = ((32, 1), (48, 1), (80, 1), (96, 2), (128, 2), (192, 2), (256, 3), (384, 3), (512, 4), (768, 4))
"""Widths and depths, each about three times the parameters of the one before, from the shipped ladder's to 110 M."""
MOST_EPOCHS, MOST_TEXT, WARM_STEPS = 4, 96 * 2**20, 3
LEAST, MOST = 3, 4  # sizes


def pack(file: Path) -> None:
    """Python sources of this environment in one compressed file, in the order of their names."""
    root = Path(sysconfig.get_paths()["purelib"])
    parts, size = [], 0
    for source in sorted(root.rglob("*.py")):
        data = source.read_bytes()
        if size + len(data) > MOST_TEXT or b"\0" in data:
            continue
        parts.append(data)
        size += len(data)
    file.write_bytes(lzma.compress(b"\n".join(parts), preset=6))
    print(f"{size / 2**20:.0f} MiB of {len(parts)} files in {file.stat().st_size / 2**20:.1f} MiB: {file}")


def study_of(
    text: Path, sizes: list[tuple[int, int]], *, gpu: float, horizons: list[float], seeds: int
) -> dict[str, Any]:
    """The shipped ladder over this text, at these sizes."""
    data = read_data(find_study("ladder"))
    data["data"] = {"kind": "text", "path": str(text)}
    data["scale"] |= {
        "sizes": [encode(SizeConfig(d_model=width, depth=depth)) for width, depth in sizes],
        "horizons": horizons,
        "seeds": seeds,
        "allot": True,
    }
    data["training"] |= {"checkpoint_every_s": 15.0}  # a call may end at any time
    data["resources"] = {"gpus_per_trial": gpu, "cpus_per_trial": 1}
    return data


def load(data: dict[str, Any], out: Path) -> StudyConfig:
    file = out / "study.yaml"
    file.write_text(dump_yaml(data))
    return load_study(file)


def step_times(ladder: Ladder, corpus: Corpus, device: str) -> dict[str, tuple[float, float]]:
    """Seconds of a step of the baseline, and minutes of the whole ladder there, by size."""
    found = {}
    for size in ladder.config.sizes:
        cells = [cell for cell in ladder.cells if cell.size == size]
        config = check_training(ladder.training(cells[0]))
        trainer = Trainer(ladder.arch(cells[0]), config, corpus, seed=0, device=device)
        trainer.train(WARM_STEPS)
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.train(2 * WARM_STEPS)
        if device != "cpu":
            torch.cuda.synchronize()
        step = (time.perf_counter() - start) / WARM_STEPS
        steps = sum(ladder.flops(cell) for cell in cells) / trainer.plan.flops_per_step
        found[size.label] = step, steps * step / 60
        print(
            f"size {size.label}: {ladder.size(cells[0]):,} parameters, batch {trainer.plan.tokens_per_step:,} tokens, "
            f"{1e3 * step:.1f} ms a step, {trainer.plan.flops_per_step / step:.2g} FLOP/s, {found[size.label][1]:.1f} "
            f"minutes for its {len(cells)} runs one after another",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pack", type=Path, help="write the text, and stop")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--budget", type=float, default=25.0, help="minutes of all calls together")
    parser.add_argument("--horizons", type=float, nargs="+", default=[0.35, 0.7])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--side-by-side", type=int, default=4)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--most", type=int, default=len(SIZES), help="sizes to measure, from the smallest")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.pack is not None:
        pack(options.pack)
        return
    if options.text is None:
        parser.error("--text is missing")
    torch.set_num_threads(1)  # as each trial has
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    text = out / "text.txt"
    if not text.is_file():
        raw = options.text.read_bytes()
        text.write_bytes(lzma.decompress(raw) if options.text.suffix == ".xz" else raw)
    gpu = 0.0 if options.device == "cpu" else 1 / options.side_by_side
    settings = {"gpu": gpu, "horizons": options.horizons, "seeds": options.seeds}
    if not (out / "run").is_dir() or options.dry_run:
        study = load(study_of(text, list(SIZES[: options.most]), **settings), out)
        corpus = prepare_data(study.data, out / "data", out)
        assert isinstance(corpus, Corpus)
        ladder = ladder_of(study, [], corpus.facts)
        longest = MOST_EPOCHS * corpus.facts.train_tokens
        first = {size: next(c for c in ladder.cells if c.size == size) for size in ladder.config.sizes}
        fits = [(s.d_model, s.depth) for s, cell in first.items() if ladder.training(cell)["tokens"] <= longest]
        study = load(study_of(text, fits, **settings), out)
        minutes = step_times(ladder_of(study, [], corpus.facts), corpus, options.device)
        side = 1 if gpu == 0 or find_spec("ray") is None else options.side_by_side
        kept = (
            [size for size in study.scale.sizes if minutes[size.label][1] / side <= options.budget]
            if study.scale
            else []
        )
        while len(kept) > LEAST and sum(minutes[size.label][1] for size in kept[-MOST:]) / side > options.budget:
            kept.pop()
        kept = kept[-MOST:]
        if len(kept) < LEAST:
            sys.exit(f"{len(kept)} sizes fit, {LEAST} are needed: raise --budget, lower --horizons, or give more text")
        load(study_of(text, [(size.d_model, size.depth) for size in kept], **settings), out)
        told = ", ".join(size.label for size in kept)
        print(f"sizes {told}: {sum(minutes[size.label][1] for size in kept) / side:.0f} minutes", flush=True)
    if options.dry_run:
        return
    command = [sys.executable, "-m", "studies.cli", "search", str(out / "study.yaml"), "--dir", str(out / "run")]
    child = subprocess.Popen([*command, *([] if find_spec("ray") else ["--serial"])])
    try:
        child.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # it stops at the next report, and the next call goes on
        child.wait()
    subprocess.run([sys.executable, "-m", "studies.cli", "scale", str(out / "run")], check=False)


if __name__ == "__main__":
    main()
