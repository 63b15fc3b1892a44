"""Initial weights, all in one place.

Each parameter draws from a generator of its own, seeded by (seed, name): what one part begins with
does not depend on which other parts the model has.

Matrices are normal with a small standard deviation, vectors zero, norm weights one, unless the part that owns them
says otherwise (its method ``starts``): `spiralformer.starts` holds the deviations to choose from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spiralformer.embedding import TiedHead
from spiralformer.starts import Scales, Start


def initial_values(model: nn.Module, *, d_model: int, num_layers: int, scaled_branches: bool) -> dict[str, Start]:
    """How each parameter begins, by name.

    Args:
        model: made of this package's parts; may lie on the meta device.
        d_model: width D of the stream.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
    """
    small = math.sqrt(2 / (5 * d_model))
    tied = any(isinstance(module, TiedHead) for module in model.modules())
    scales = Scales(
        small=small,
        branch=small if scaled_branches else small / math.sqrt(2 * max(num_layers, 1)),
        embedding=small if tied else small * math.sqrt(d_model),
    )
    found: dict[str, Start] = {
        name: ("normal", small) if parameter.dim() >= 2 else ("fill", 0.0)
        for name, parameter in model.named_parameters()
    }
    for path, module in model.named_modules():
        for name, start in _starts(module, scales).items():
            found[f"{path}.{name}" if path else name] = start
    return found


def _starts(module: nn.Module, scales: Scales) -> dict[str, Start]:
    if callable(said := getattr(module, "starts", None)):
        starts: dict[str, Start] = said(scales)
        return starts
    if isinstance(module, nn.Embedding):
        return {"weight": ("normal", scales.embedding)}
    return {"weight": ("fill", 1.0)} if isinstance(module, nn.RMSNorm | nn.LayerNorm) else {}


def init_weights(
    model: nn.Module,
    *,
    seed: int,
    d_model: int,
    num_layers: int,
    scaled_branches: bool,
    stretched: Mapping[str, float] | None = None,
) -> None:
    """Draw every parameter in place, as `initial_values` says; those on the meta device are left alone.

    Args:
        model: made of this package's parts.
        seed: of the whole model.
        d_model: width D of the stream.
        num_layers: unrolled layers N, each use of a shared layer counted.
        scaled_branches: whether the residual branches are scaled already; else their output maps are.
        stretched: factors on standard deviations, by parameter.
    """
    found = initial_values(model, d_model=d_model, num_layers=num_layers, scaled_branches=scaled_branches)
    for name, factor in (stretched or {}).items():
        draw, value = found[name]
        found[name] = (draw, value * factor) if draw == "normal" else found[name]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (draw, value) in found.items():
            parameter = parameters[name]
            if parameter.is_meta or draw == "keep":
                continue
            if draw == "fill":
                parameter.fill_(value)
            else:
                parameter.copy_(_normal(parameter, value, seed, name))


def _normal(parameter: Tensor, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(parameter.shape, generator=generator).mul_(std)
