"""What looking inside a model costs: time and memory against a forward of the same examples.

    python benchmarks/probing.py

One thread; `spiralformer probe`'s own defaults: 131,072 tokens and at most 500 examples, random, as costs do not depend
on them. Each is measured in a process of its own: its peak of memory less that of one which only holds model and
examples.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional

from builder import build_model, compile_arch
from searchspace.files import load_arch
from studies.probes.look import look, rows_at_once

MODELS = ("two_cores_small", "spiralformer_small", "looped_recall_small", "plain_4")
TOKENS, ROWS = 131_072, 500
EVAL_TOKENS = 16_384  # at once, as `spiralformer eval` does


def main() -> None:
    """Print a table; or, told what, measure it here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--what", choices=["nothing", "forward", "look"])
    args = parser.parse_args()
    if args.what is not None:
        print(*measure(args.models[0], args.what))
        return
    print("| model | rows | forward, s | look, s | ratio | forward, MiB | look, MiB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for model in args.models:
        found = {what: _apart(model, what) for what in ("nothing", "forward", "look")}
        held = found["nothing"][1]
        (forward_s, forward_mib), (look_s, look_mib) = ((s, mib - held) for s, mib in (found["forward"], found["look"]))
        rows = len(_rows(model))
        cells = [f"{forward_s:.2f}", f"{look_s:.2f}", f"{look_s / forward_s:.2f}"]
        cells += [f"{forward_mib:.0f}", f"{look_mib:.0f}", f"{look_mib / forward_mib:.2f}"]
        print(f"| {model} | {rows} | {' | '.join(cells)} |", flush=True)


def _apart(model: str, what: str) -> tuple[float, float]:
    command = [sys.executable, __file__, model, "--what", what]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(said[0]), float(said[1])


def _rows(name: str) -> torch.Tensor:
    arch = load_arch(name)
    rows = min(ROWS, TOKENS // arch.seq_len)
    return torch.randint(arch.vocab_size, (rows, arch.seq_len), generator=torch.Generator().manual_seed(0))


def measure(name: str, what: str) -> tuple[float, float]:
    """Seconds, and the peak of this process's memory in MiB."""
    torch.set_num_threads(1)
    arch = load_arch(name)
    model, tokens_BL = build_model(compile_arch(arch)).eval(), _rows(name)

    def loss(logits_BLV: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())

    with torch.no_grad():
        model(tokens_BL[:1])  # what is made once
    began = time.perf_counter()
    if what == "forward":
        for part_BL in tokens_BL.split(max(1, EVAL_TOKENS // arch.seq_len)):
            with torch.no_grad():
                loss(model(part_BL), part_BL)
    elif what == "look":
        look(model, arch, [(each, each) for each in tokens_BL.split(rows_at_once(arch, arch.seq_len))], loss)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
