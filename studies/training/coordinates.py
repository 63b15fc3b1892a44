"""Coordinate checks: whether activations keep their size as a model grows, and after some steps of training.

Sizes are of outputs, by call site: a module of a loop runs many times in one forward, and each of its calls is a place
of its own. Yang et al., arXiv 2203.03466, appendix D; Dey et al., arXiv 2505.01618, section 3.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from builder.graph.compiler import compile_arch
from builder.lowering import build_model
from builder.parametrization import READOUTS, factors_of
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from studies.sections import TrainingConfig
from studies.training.recipe import Recipe
from studies.training.trainer import make_optimizers

STEPS = (0, 1, 2, 10)
"""Of training, after which sizes are taken."""
FLAT = 0.05
"""A slope up to it is none."""
_SEQUENCES = 4
_NOTHING = 1e-4  # a site that gives less has not begun to learn: its slope is noise

Sizes = dict[tuple[str, int], float]
"""Root mean square of a call site's output, by site and step."""


@dataclass(frozen=True, slots=True)
class Slope:
    """How a call site's size goes with the model's: the slope of its logarithm."""

    site: str
    step: int
    slope: float
    sizes: tuple[float, ...]


def sizes_of(arch: ArchSpec, *, lr: float, seed: int = 0, steps: Sequence[int] = STEPS) -> Sizes:
    """Sizes at every call site: ``path#0`` is a module's first call in a forward, ``path#-1`` its last.

    Args:
        arch: trained without warm-up or decay on the standard library's own text.
        lr: rate of AdamW; best taken above what training would use.
        seed: of weights and batches.
        steps: after which sizes are taken.
    """
    torch.manual_seed(seed)
    graph = compile_arch(arch)
    model = build_model(graph, seed=seed)
    with torch.no_grad():  # what is random in a readout's outputs shrinks with width, which is no fault
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in READOUTS:
                module.weight.zero_()
    config = TrainingConfig(tokens=1.0, weight_decay=0.0)
    recipe = Recipe(batch_tokens=_SEQUENCES * arch.seq_len, lr=lr, beta2=0.95, final_lr=1.0)
    optimizers = make_optimizers(model, config, recipe, factors_of(model, graph))
    found: Sizes = {}
    batches = _batches(arch, seed)
    for step in range(max(steps) + 1):
        tokens_BL = next(batches)
        with _watched(model) as seen:
            logits_BLV = model(tokens_BL[:, :-1])
        if step in steps:
            for path, calls in seen.items():
                found |= {(f"{path}#{i}", step): size for i, size in enumerate(calls)}
                if len(calls) > 1:
                    found[f"{path}#-1", step] = calls[-1]
        F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return found


def slopes(archs: Mapping[float, ArchSpec], *, lr: float, seeds: int = 3, steps: Sequence[int] = STEPS) -> list[Slope]:
    """Slope of log size on the logarithm of what the architectures are keyed by, over the sites that all have.

    Args:
        archs: by width, uses or depth.
        lr: rate of AdamW.
        seeds: over which sizes are averaged.
        steps: after which sizes are taken.

    Returns:
        The steepest first.
    """
    means: list[Sizes] = []
    for arch in archs.values():
        each = [sizes_of(arch, lr=lr, seed=seed, steps=steps) for seed in range(seeds)]
        means.append({at: float(np.mean([sizes[at] for sizes in each])) for at in each[0]})
    if wrong := {at for each in means for at, size in each.items() if not math.isfinite(size)}:
        what = f"{len(wrong)} activations are no longer finite"
        raise SpecError("--lr", what, "lower it: training diverges within the check")
    x = np.log(list(archs))
    shared = [at for at in means[0] if all(sizes.get(at, 0.0) > _NOTHING for sizes in means)]
    found = []
    for at in shared:
        sizes = tuple(each[at] for each in means)
        found.append(Slope(*at, float(np.polyfit(x, np.log(sizes), 1)[0]), sizes))
    return sorted(found, key=lambda each: -abs(each.slope))


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Sizes of every module's outputs in the forwards inside, in the order of its calls."""
    seen: dict[str, list[float]] = defaultdict(list)

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[path].append(float(output.detach().square().mean().sqrt()))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _batches(arch: ArchSpec, seed: int) -> Iterator[Tensor]:
    """Windows (B, L + 1) of text that is everywhere; its bytes, folded into the vocabulary."""
    text_T = torch.tensor(list(inspect.getsource(inspect).encode())) % arch.vocab_size
    length = arch.seq_len + 1
    text_T = text_T.repeat(math.ceil(2 * length / len(text_T)))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts_B = torch.randint(len(text_T) - length, (_SEQUENCES,), generator=generator)
        yield torch.stack([text_T[i : i + length] for i in starts_B.tolist()])
