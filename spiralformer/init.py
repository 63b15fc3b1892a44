"""Initial weights, all in one place, by the kind of module that owns them.

Each parameter draws from a generator of its own, seeded by (seed, name): what one part begins with
does not depend on which other parts the model has.

Matrices are normal with std sqrt(2 / (5 D)) ("small init", arXiv 1910.05895, as in GPT-NeoX); the embedding
with sqrt(D) times that, unless it is scaled in the forward or the head uses it too; the output maps of attention and
feed-forward with 1 / sqrt(2 N) of that (GPT-2, MeSH). But: norm weights are one;
biases, scorers and allocations zero, so that pools start as means and up-scaling as uniform; maps that
stand in the stream itself (recall, linear pooling) preserve variance; gains and factors begin as their
modules say.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from spiralformer.attention import Attention
from spiralformer.block import FeedForward, GatedFeedForward
from spiralformer.embedding import ScaledEmbedding, TiedHead
from spiralformer.joins import ScaleStep, WeightedJoin
from spiralformer.pooling import LinearPool, SelfAggregatePool
from spiralformer.recall import ConcatRecall, LinearRecall
from spiralformer.upscale import LearnedUpscale

Draw: TypeAlias = Literal["normal", "fill"]


def initial_values(
    model: nn.Module, *, d_model: int, num_layers: int, scaled_branches: bool
) -> dict[str, tuple[Draw, float]]:
    """How each parameter begins, by name: normal with a standard deviation, or filled with a number.

    What is not among them begins as its module's ``reset`` says.

    Args:
        model: made of this package's parts; may lie on the meta device.
        d_model: width D of the stream.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
    """
    small = math.sqrt(2 / (5 * d_model))
    branch = small if scaled_branches else small / math.sqrt(2 * max(num_layers, 1))
    stds: dict[int, float] = {}
    ones: set[int] = set()
    kept: set[int] = set()
    tied = any(isinstance(module, TiedHead) for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            drawn_small = tied or isinstance(module, ScaledEmbedding)
            stds[id(module.weight)] = small if drawn_small else small * math.sqrt(d_model)
        elif isinstance(module, Attention | FeedForward | GatedFeedForward):
            stds[id(module.out.weight)] = branch
        elif isinstance(module, SelfAggregatePool):
            stds[id(module.scorer.weight)] = 0.0
        elif isinstance(module, LearnedUpscale):
            stds[id(module.allocation.weight)] = 0.0
        elif isinstance(module, LinearRecall | ConcatRecall | LinearPool):
            stds.update({id(p): p.shape[1] ** -0.5 for p in module.parameters()})
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            ones.add(id(module.weight))
        elif isinstance(module, ScaleStep):
            ones.add(id(module.gain))
        elif isinstance(module, WeightedJoin):
            kept.update(id(p) for p in module.parameters())
    found: dict[str, tuple[Draw, float]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in kept:
            continue
        std = stds.get(id(parameter), small)
        if parameter.dim() < 2 or std == 0:
            found[name] = ("fill", 1.0 if id(parameter) in ones else 0.0)
        else:
            found[name] = ("normal", std)
    return found


def init_weights(model: nn.Module, *, seed: int, d_model: int, num_layers: int, scaled_branches: bool) -> None:
    """Draw every parameter in place, as `initial_values` says; those on the meta device are left alone.

    Args:
        model: made of this package's parts.
        seed: of the whole model.
        d_model: width D of the stream.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
    """
    found = initial_values(model, d_model=d_model, num_layers=num_layers, scaled_branches=scaled_branches)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (draw, value) in found.items():
            parameter = parameters[name]
            if parameter.is_meta:
                continue
            if draw == "fill":
                parameter.fill_(value)
            else:
                parameter.copy_(_normal(parameter, value, seed, name))


def _normal(parameter: Tensor, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(parameter.shape, generator=generator).mul_(std)
