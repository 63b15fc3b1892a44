"""Normalizations by kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": lambda dim, eps: nn.RMSNorm(dim, eps=eps),
    "layer": lambda dim, eps: nn.LayerNorm(dim, eps=eps),
    "none": lambda dim, eps: nn.Identity(),
}


def make_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """A normalization over the last dimension: ``rms``, ``layer`` (with bias) or ``none``."""
    return _NORMS[kind](dim, eps)
