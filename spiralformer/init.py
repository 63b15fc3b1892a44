"""Initial weights, all in one place.

Each parameter draws from a generator of its own, seeded by (seed, name): what one part begins with
does not depend on which other parts the model has.

What is drawn (std 0.02 is GPT-2's; the output maps' 1/sqrt(2 N) is that of GPT-2 and MeSH, section 2.3):
norm weights are one; biases, scorers and allocations zero, so that pools start as means and up-scaling
as uniform; recall maps preserve variance; everything else is normal.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

_STD = 0.02
_ZERO = (".scorer.", ".allocation.")


def init_weights(model: nn.Module, *, seed: int, num_layers: int, scaled_branches: bool) -> None:
    """Draw every parameter in place.

    Args:
        model: any module whose parameter names follow this package's.
        seed: of the whole model.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
    """
    out_std = _STD if scaled_branches else _STD / math.sqrt(2 * max(num_layers, 1))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            elif any(part in f".{name}" for part in _ZERO):
                parameter.zero_()
            else:
                parameter.copy_(_normal(parameter, _std(name, parameter, out_std), seed, name))


def _std(name: str, parameter: Tensor, out_std: float) -> float:
    if name.endswith(".out.weight"):
        return out_std
    if ".recall." in f".{name}" or name.endswith(("adapter.weight", "state.weight", "input.weight")):
        return 1.0 / math.sqrt(parameter.shape[1])
    return _STD


def _normal(parameter: Tensor, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(parameter.shape, generator=generator).mul_(std)
