"""Joins with factors, and per-iteration vectors.

Shape legend: B batch, L positions, D model, K supports.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spiralformer.starts import Scales, Starts


class WeightedJoin(nn.Module):
    """A sum with a factor for each input, fixed or learned (Runge-Kutta stages, static mixtures of supports).

    With fewer factors than inputs, the first inputs have none.

    Shape:
        any number of (B, L, D) -> (B, L, D).
    """

    def __init__(self, factors: Sequence[float], *, learned: bool) -> None:
        super().__init__()
        self.initial = tuple(factors)
        self.factors = nn.Parameter(torch.tensor(self.initial)) if learned else self.initial

    def starts(self, scales: Scales) -> Starts:
        return {"factors": ("keep", 0.0)} if isinstance(self.factors, nn.Parameter) else {}

    def reset(self) -> None:
        """Learned factors back to their initial values."""
        if isinstance(self.factors, nn.Parameter):
            with torch.no_grad():
                self.factors.copy_(torch.tensor(self.initial))

    def forward(self, *inputs_BLD: Tensor) -> Tensor:
        plain = len(inputs_BLD) - len(self.factors)
        total = inputs_BLD[0] if plain else self.factors[0] * inputs_BLD[0]
        for i, x_BLD in enumerate(inputs_BLD[1:], start=1):
            total = total + (x_BLD if i < plain else self.factors[i - plain] * x_BLD)
        return total


class MixtureJoin(nn.Module):
    """The update and supports, weighted for each token by a softmax router that reads the state (MeSH, appendix E.2).

    Shape:
        update, state, then K supports, each (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, supports: int) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, 1 + supports)

    def weights(self, state_BLD: Tensor) -> Tensor:
        """Of the update and of each support, (B, L, 1 + K)."""
        return self.router(state_BLD).softmax(dim=-1)

    def forward(self, update_BLD: Tensor, state_BLD: Tensor, *supports_BLD: Tensor) -> Tensor:
        weights_BLK = self.weights(state_BLD)
        mixed_BLD = weights_BLK[..., :1] * update_BLD
        for k, support_BLD in enumerate(supports_BLD, start=1):
            mixed_BLD = mixed_BLD + weights_BLK[..., k : k + 1] * support_BLD
        return mixed_BLD


class Noise(nn.Module):
    """x + normal noise, or noise in the place of x, in training; else x, or zeros.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, std: float, replaces: bool) -> None:
        super().__init__()
        self.std, self.replaces = std, replaces

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training:
            return torch.zeros_like(x_BLD) if self.replaces else x_BLD
        noise_BLD = torch.randn_like(x_BLD)
        # What is begun with is no wider than three deviations (arXiv 2502.05171).
        return noise_BLD.clamp(-3, 3) * self.std if self.replaces else x_BLD + noise_BLD * self.std


class AddStep(nn.Module):
    """x + e, a vector of the iteration's own (step embedding).

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.vector


class ScaleStep(nn.Module):
    """x * v, a vector of the iteration's own (element vector).

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_model))

    def starts(self, scales: Scales) -> Starts:
        return {"gain": ("fill", 1.0)}

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD * self.gain
