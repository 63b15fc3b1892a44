"""Initial weights, all in one place.

Each parameter draws from a generator of its own, seeded by (seed, name): what one part begins with
does not depend on which other parts the model has.

Everything is normal with std sqrt(2 / (5 D)) ("small init", arXiv 1910.05895, as in GPT-NeoX), the
branches' output maps with 1 / sqrt(2 N) of that (GPT-2, MeSH). But: norm weights are one; biases,
scorers and allocations zero, so that pools start as means and up-scaling as uniform; maps that stand in the
stream itself (recall, linear pooling) preserve variance; gains and factors begin as their modules say.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

_ZERO = (".scorer.", ".allocation.")
_PRESERVING = (".adapter.weight", ".state.weight", ".input.weight", ".mix.weight")


def init_weights(model: nn.Module, *, seed: int, d_model: int, num_layers: int, scaled_branches: bool) -> None:
    """Draw every parameter in place.

    Args:
        model: any module whose parameter names follow this package's.
        seed: of the whole model.
        d_model: width D of the stream.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
    """
    branch_factor = 1.0 if scaled_branches else 1.0 / math.sqrt(2 * max(num_layers, 1))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if name.endswith(".factors"):
                continue  # their module knows them
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith(("norm.weight", ".gain")) else 0.0)
            elif any(part in f".{name}" for part in _ZERO):
                parameter.zero_()
            else:
                parameter.copy_(_normal(parameter, _std(name, parameter, d_model, branch_factor), seed, name))


def _std(name: str, parameter: Tensor, d_model: int, branch_factor: float) -> float:
    small = math.sqrt(2 / (5 * d_model))
    if name.endswith(".out.weight"):
        return small * branch_factor
    if name.endswith(_PRESERVING):
        return 1.0 / math.sqrt(parameter.shape[1])
    return small


def _normal(parameter: Tensor, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(parameter.shape, generator=generator).mul_(std)
