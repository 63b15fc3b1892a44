"""One honest comparison at equal training FLOPs on real text: plain, looped, MeSH and SpiralFormer.

    python benchmarks/families.py [--device cuda] [--width 64] [--flops 4e11] [--seeds 3] [--data python_source]

Runs everything in one call, resumes nothing, prints a Markdown table, and writes every loss as JSON with --out.
Every architecture has the same number of unique layers but the looped ones, which have two thirds, as in MeSH's
table 1; all of them spend the same training FLOPs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from studies.data.corpus import prepare_corpus
from studies.data.settings import TextData
from studies.sections import TrainingConfig
from studies.show.summary import short, summarize
from studies.training.trainer import Trainer


def architecture(
    width: int,
    seq_len: int,
    vocab_size: int,
    layers: tuple[int, int, int],
    schedule: list[int],
    topology: str,
    *,
    heads: int,
) -> ArchSpec:
    """Prelude, looped core and coda of so many layers each; without layers, a part is left out."""
    prelude, core, coda = layers
    block = {"heads": heads, "ffn": "swiglu"}
    loop = {"loop": "core", "schedule": [f"c{g}" for g in schedule], "topology": topology}
    graph = {
        "x": {"embed": "tokens"},
        **({"h0": {"block": "prelude", "in": "x"}} if prelude else {}),
        "h": {**loop, "in": "h0" if prelude else "x"},
        **({"y": {"block": "coda", "in": "h"}} if coda else {}),
        "logits": {"head": "lm", "in": "y" if coda else "h"},
    }
    sizes = {"prelude": prelude, "core": core, "coda": coda}
    return arch_from_data(
        {
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "d_model": width,
            "residual_scale": "inverse_sqrt_depth",
            "levels": {f"c{g}": {"chunk": g} for g in sorted({1, *schedule})},
            "blocks": {name: {"layers": count, **block} for name, count in sizes.items() if count},
            "graph": graph,
        }
    )


def families(width: int, seq_len: int, vocab_size: int) -> dict[str, ArchSpec]:
    """Six architectures with 6 unique layers (looped: 4), SpiralFormer's core a third of them."""

    def arch(layers: tuple[int, int, int], schedule: list[int], topology: str) -> ArchSpec:
        heads = max(1, width // 64) if width > 64 else 4
        return architecture(width, seq_len, vocab_size, layers, schedule, topology, heads=heads)

    return {
        "vanilla, 6 layers": arch((2, 2, 2), [1], "base"),
        "loop base, 1+2R2+1": arch((1, 2, 1), [1, 1], "base"),
        "loop anchor, 1+2R2+1": arch((1, 2, 1), [1, 1], "anchor"),
        "MeSH, 1+2R2+1": arch((1, 2, 1), [1, 1], "mesh"),
        "SpiralFormer anchor, 2+2R4+2": arch((2, 2, 2), [16, 8, 4, 2], "anchor"),
        "SpiralFormer MeSH, 2+2R4+2": arch((2, 2, 2), [16, 8, 4, 2], "mesh"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--flops", type=float, default=4e11)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="python_source", help="python_source, or files, folders or globs of text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = TextData() if options.data == "python_source" else TextData(kind="text", path=options.data)
    config = TrainingConfig(flops=options.flops, batch_tokens=options.batch_tokens, lr=options.lr)
    results: dict[str, list[float]] = {}
    lines = [
        "| architecture | parameters | FLOPs/token | tokens seen | bits per byte, mean (each seed) |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = prepare_corpus(data, Path(scratch) / "data")
        for name, arch in families(options.width, options.seq_len, corpus.facts.vocab_size).items():
            start = time.perf_counter()
            for seed in range(options.seeds):
                trainer = Trainer(arch, config, corpus, seed=seed, device=options.device)
                trainer.train(trainer.plan.num_steps)
                results.setdefault(name, []).append(trainer.evaluate()[1]["bits_per_byte"])
            seeds = ", ".join(f"{bits:.3f}" for bits in results[name])
            cost = trainer.cost
            lines.append(
                f"| {name} (`{summarize(arch)}`) | {short(cost.params)} | {short(cost.flops_per_token)} "
                f"| {short(trainer.tokens)} | **{statistics.mean(results[name]):.3f}** ({seeds}) |"
            )
            print(f"{name}: {seeds}  [{time.perf_counter() - start:.0f} s]", flush=True)
    print("\n".join(lines))
    if options.out:
        options.out.write_text(
            json.dumps({"settings": vars(options) | {"out": None}, "bits_per_byte": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
