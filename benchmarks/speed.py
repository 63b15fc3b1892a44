"""Training and decoding speed, every figure a ratio measured within this one run.

    python benchmarks/speed.py [--device cpu|cuda] [--out FILE.json]

On a CPU one thread is used, and the minimum of interleaved runs is taken. FLOPs are the cost model's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from builder import build_model, compile_arch, estimate
from searchspace import load_arch
from searchspace.arch import ArchSpec
from searchspace.files import arch_from_data
from spiralformer.block import Block
from spiralformer.pooling import MeanPool
from spiralformer.upscale import UniformUpscale

ROWS: list[tuple[str, float, str]] = []
"""(figure, value, target)."""


def loop_arch(
    chunks: list[int], *, d_model: int = 128, seq_len: int = 256, core: int = 2, topology: str = "residual"
) -> ArchSpec:
    """1 + coreR[chunks] + 1 with mean pools and uniform up-scaling: the shape of the speed targets."""
    levels = {f"l{g}": {"chunk": g, "pool": "mean", "upscale": "uniform"} for g in sorted({1, *chunks})}
    block = {"heads": 4, "ffn": "gelu"}
    return arch_from_data(
        {
            "vocab_size": 512,
            "seq_len": seq_len,
            "d_model": d_model,
            "levels": levels,
            "blocks": {
                "pre": {"layers": 1, **block},
                "core": {"layers": core, **block},
                "post": {"layers": 1, **block},
            },
            "graph": {
                "x": {"embed": "tokens"},
                "h0": {"block": "pre", "in": "x"},
                "h": {"loop": "core", "in": "h0", "schedule": [f"l{g}" for g in chunks], "topology": topology},
                "y": {"block": "post", "in": "h"},
                "logits": {"head": "lm", "in": "y"},
            },
        }
    )


class HandWritten(nn.Module):
    """The 8 4 2 1 loop as one would write it by hand, over the same parts."""

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = compiled.embed, compiled.head
        self.pre, self.core, self.post = compiled.blocks.pre, compiled.blocks.core, compiled.blocks.post
        assert isinstance(self.core, Block)
        self.pools = [MeanPool(g, g // 2) for g in (8, 4, 2)]
        self.upscales = [UniformUpscale(g, g // 2, delay=0, own_chunk=False, target=(1, 0)) for g in (8, 4, 2)]

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.pre(self.embed(tokens))
        for pool, upscale in zip(self.pools, self.upscales, strict=True):
            h = h + upscale(self.core(pool(h)), tokens=tokens)
        h = h + self.core(h)
        return self.head(self.post(h))


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(runs: list[Callable[[], object]], device: str, repeats: int = 7) -> list[float]:
    """Least seconds of each, run in turn, after a warm-up of each."""
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            sync(device)
            start = time.perf_counter()
            run()
            sync(device)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def step_of(model: nn.Module, tokens: Tensor, vocab: int, precision: torch.dtype | None = None) -> Callable[[], None]:
    """Forward and backward of a next-token loss."""

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(tokens)
        logits = out if isinstance(out, Tensor) else out.logits
        F.cross_entropy(logits.view(-1, vocab).float(), tokens.view(-1)).backward()
        model.zero_grad(set_to_none=True)

    return step


def random_tokens(batch: int, length: int, vocab: int, device: str) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def row(figure: str, value: float, target: str) -> None:
    ROWS.append((figure, value, target))


def compiled_against_hand_written(device: str) -> None:
    model = build_model(compile_arch(loop_arch([8, 4, 2, 1])), device=device)
    hand = HandWritten(model)
    tokens = random_tokens(8, 256, 512, device)
    assert torch.equal(model(tokens), hand(tokens)), "same weights, same logits"
    ours, theirs = interleaved([step_of(model, tokens, 512), step_of(hand, tokens, 512)], device, 11)
    row("step, compiled from YAML / hand-written (P4)", ours / theirs, "<= 1.03")


def against_transformers(device: str) -> None:
    import transformers

    arch = load_arch("pythia_70m", ["vocab_size=2048", "seq_len=512"])
    model = build_model(compile_arch(arch), device=device)
    config = transformers.GPTNeoXConfig(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=2048,
        max_position_embeddings=512,
    )  # fmt: skip
    theirs = transformers.GPTNeoXForCausalLM(config).to(device)
    tokens = random_tokens(2, 512, 2048, device)
    a, b = interleaved([step_of(model, tokens, 2048), step_of(theirs, tokens, 2048)], device)
    row("step, pythia-70m shape / transformers' GPT-NeoX", a / b, "<= 1")


def flop_saving_realised(device: str) -> None:
    archs = [loop_arch(chunks) for chunks in ([1, 1, 1, 1], [8, 4, 2, 1])]
    costs = [estimate(compile_arch(arch)).flops for arch in archs]
    for batch, target in ((8, ">= 0.95"), (1, ">= 0.75")):
        tokens = random_tokens(batch, 256, 512, device)
        steps = [step_of(build_model(compile_arch(arch), device=device), tokens, 512) for arch in archs]
        full, ladder = interleaved(steps, device)
        row(
            f"FLOP saving realised, 1111 against 8421, B={batch} L=256 (P6)",
            full / ladder / (costs[0] / costs[1]),
            target,
        )


def loop_activations(device: str) -> None:
    """Bytes that the loop's core saves for the backward pass, against sum(1/g) / T of the full-resolution loop's."""

    def saved(chunks: list[int]) -> int:
        model = build_model(compile_arch(loop_arch(chunks)), device=device)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        total = 0
        kept = []  # outputs stay alive, so that no storage is used twice
        core = model.blocks.core
        original = core.forward

        def forward(*args: Tensor) -> Tensor:
            nonlocal total
            seen.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = original(*args)
            total += sum(seen.values())
            kept.append(out)
            return out

        core.forward = forward
        model(random_tokens(8, 256, 512, device))
        return total

    ratio = saved([8, 4, 2, 1]) / saved([1, 1, 1, 1])
    row(
        "loop activations, 8421 / 1111, over sum(1/g)/T (P8)", ratio / ((1 / 8 + 1 / 4 + 1 / 2 + 1) / 4), "0.95 .. 1.05"
    )


def recomputation(device: str) -> None:
    """Running the loop again in the backward pass: its price in time."""
    tokens = random_tokens(8, 256, 512, device)
    plain, again = (build_model(compile_arch(loop_arch([1, 1, 1, 1])), device=device) for _ in range(2))
    again.blocks.core.gradient_checkpointing = True
    a, b = interleaved([step_of(again, tokens, 512), step_of(plain, tokens, 512)], device)
    row("time, loop recomputed / kept (P8)", a / b, "<= 1.35")


@torch.no_grad()
def decoding(device: str) -> None:
    archs = [loop_arch(chunks, seq_len=256, core=8) for chunks in ([1, 1, 1, 1], [8, 4, 2, 1])]
    models = [build_model(compile_arch(arch), device=device).eval() for arch in archs]
    passes = [2 + 8 * 4, 2 + 8 * (1 / 8 + 1 / 4 + 1 / 2 + 1)]
    prompt = random_tokens(1, 64, 512, device)

    def tokens_of(model: nn.Module) -> Callable[[], object]:
        return lambda: model.generate(prompt, 64, temperature=0)

    full, ladder = interleaved([tokens_of(model) for model in models], device, 3)
    row(
        "decoding speed, 8421 / 1111, over the ratio of block passes (P10)",
        full / ladder / (passes[0] / passes[1]),
        ">= 0.85",
    )
    state = models[1].decode_state(1, max_len=256, cache_dtype=torch.bfloat16)
    row("cache bytes / formula (P10)", state.kv_cache_bytes / estimate(compile_arch(archs[1])).kv_cache_bytes, "1")

    model = build_model(compile_arch(loop_arch([8, 4, 2, 1], seq_len=512)), device=device).eval()
    long = random_tokens(1, 496, 512, device)
    cached, uncached = interleaved(
        [
            lambda: model.generate(long, 16, temperature=0),
            lambda: model.generate(long, 16, temperature=0, use_cache=False),
        ],
        device,
        3,
    )
    prefill, *_ = interleaved([lambda: model(long)], device, 3)
    row("cached / uncached decoding at L=512, prefill left out", (uncached - prefill) / (cached - prefill), ">= 10")


def hardware_use(device: str) -> None:
    """Training FLOP/s against a matrix product of the model's own largest shape."""
    arch = loop_arch([8, 4, 2, 1])
    cost = estimate(compile_arch(arch))
    tokens = random_tokens(8, 256, 512, device)
    model = build_model(compile_arch(arch), device=device)
    a, b = torch.randn(2048, 128, device=device), torch.randn(128, 512, device=device)
    (seconds,), (product,) = (
        interleaved([step_of(model, tokens, 512)], device),
        interleaved([lambda: [a @ b for _ in range(20)]], device),
    )
    row(
        "training FLOP/s / matrix product's, fp32 (P5)",
        3 * 8 * cost.flops / seconds / (20 * 2 * a.numel() * 512 / product),
        ">= 0.65",
    )
    half, full = interleaved([step_of(model, tokens, 512, torch.bfloat16), step_of(model, tokens, 512)], device)
    row("speed, bf16 autocast / fp32 (P16)", full / half, ">= 1.2 where the CPU has bf16")


def building(device: str) -> None:
    """A model on the meta device: from YAML text, against its bare modules."""
    stack = build_model(compile_arch(load_arch("pythia_160m")), device="meta").blocks.stack

    def from_yaml() -> None:
        build_model(compile_arch(load_arch("pythia_160m")), device="meta")

    def bare() -> list[nn.Module]:
        with torch.device("meta"):
            return [nn.Embedding(50304, 768), Block(stack.config), nn.Linear(768, 50304, bias=False)]

    ours, theirs = interleaved([from_yaml, bare], "cpu", 9)
    row("YAML to meta model / bare modules on meta, 160M (P3)", ours / theirs, "<= 10")


def compiling(device: str) -> None:
    """torch.compile per layer against the whole model, cold, and the steady gain."""
    arch = loop_arch([8, 4, 2, 1])
    tokens = random_tokens(8, 256, 512, device)
    eager = build_model(compile_arch(arch), device=device)
    plain = step_of(eager, tokens, 512)
    cold, gains = [], []
    torch._inductor.config.force_disable_caches = True  # else the second is given what the first compiled
    warm_up = torch.compile(nn.Linear(8, 8).to(device))
    warm_up(torch.ones(2, 8, device=device)).sum().backward()
    for whole in (False, True):
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 32
        model = build_model(compile_arch(arch), device=device)
        if whole:
            model = torch.compile(model, dynamic=False)
        else:
            for name in ("pre", "core", "post"):
                for layer in model.blocks.get_submodule(name).layers:
                    layer.compile(dynamic=False)
        start = time.perf_counter()
        step = step_of(model, tokens, 512)
        step()
        sync(device)
        cold.append(time.perf_counter() - start)
        ours, theirs = interleaved([step, plain], device, 5)
        gains.append(theirs / ours)
    torch.compiler.reset()
    row("cold compilation, per layer / whole model (P7)", cold[0] / cold[1], "<= 0.33")
    row("steady speed, compiled per layer / eager (P7)", gains[0], ">= 1.3 on a GPU")
    row("steady speed, compiled whole / eager (P7)", gains[1], "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for measure in (
        compiled_against_hand_written, against_transformers, flop_saving_realised, loop_activations,
        recomputation, decoding, hardware_use, building, compiling,
    ):  # fmt: skip
        with console.status(measure.__name__):
            measure(options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    table = Table(
        "figure", "value", "target", title=f"torch {torch.__version__}, {options.device} ({name}), one thread"
    )
    for figure, value, target in ROWS:
        table.add_row(figure, f"{value:.3f}", target)
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps({figure: value for figure, value, _ in ROWS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
