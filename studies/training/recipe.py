"""The recipe of a training by its size: what a study's file leaves open, from parameters and data.

One pure function of how many parameters a token passes and how many tokens are seen. Its form is Step Law's (Li et
al., arXiv 2503.04715): powers of parameters N and of tokens D for the batch and for the peak rate. Its numbers are our
own, of small models over bytes (`benchmarks/recipe.py`, docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from builder.iterations import segments_of
from builder.pricing.cost import Cost
from searchspace.arch import ArchSpec, BaseSpec
from studies.sections import TrainingConfig

# Step Law's exponents of tokens; that of size makes N^-1/3 at one ratio, as in OLMo's ladder; factors of our grids.
_BATCH, _BATCH_TOKENS = 0.18, 0.571
_RATE, _RATE_SIZE, _RATE_TOKENS = 0.1, -0.64, 0.307
_LARGEST_BATCH = 1 << 25  # far above every batch that was ever found best
_HIGHEST_RATE = 0.05  # above it short runs diverge, whatever the size
# OLMo-core's ladder: a second moment that forgets more slowly where batches are small.
_SMALL_BATCH, _BETA2_SMALL, _BETA2 = 1 << 19, 0.99, 0.95
# To zero is best where training is long, and stops a short one early (arXiv 2502.15938, and our grids).
_FINAL_LR, _SHORT = 0.1, 15.0


BYTES_PER_PARAMETER = 60.0
"""Text that is about compute-optimal: 20 tokens of 4.6 bytes a parameter (Chinchilla), or 10.5 of 4.8 where embeddings
are not counted (nanochat); constant in bytes, not in tokens (arXiv 2605.01188)."""


class Shape(Protocol):
    """An architecture or a graph."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def base(self) -> BaseSpec | None: ...


def size_of(shape: Shape, cost: Cost) -> int:
    """Parameters of blocks and head: an embedding that is looked up takes part in no product."""
    return cost.params - (0 if shape.tie_embeddings else shape.vocab_size * shape.d_model)


def tokens_of(config: TrainingConfig, cost: Cost) -> float:
    """Tokens seen."""
    return config.tokens if config.tokens is not None else (config.flops or 0.0) / cost.training_flops_per_token


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the size decides where a study's file does not."""

    batch_tokens: int
    """Tokens in one step."""
    lr: float
    """Peak learning rate of AdamW."""
    beta2: float
    """AdamW's second moment."""
    final_lr: float
    """Learning rate at the end, as a share of the peak."""


def recipe_of(config: TrainingConfig, shape: Shape, cost: Cost) -> Recipe:
    """The recipe of one training: what is given, and by size what is left open.

    Args:
        config: what a recipe decides may be None.
        shape: of the architecture.
        cost: its price.
    """
    size, tokens = size_of(shape, cost), max(1.0, tokens_of(config, cost))
    batch = batch_tokens(tokens, shape.seq_len) if config.batch_tokens is None else config.batch_tokens
    return Recipe(
        batch_tokens=batch,
        lr=_carried_rate(shape, size, tokens) if config.lr is None else config.lr,
        beta2=(_BETA2_SMALL if batch < _SMALL_BATCH else _BETA2) if config.beta2 is None else config.beta2,
        final_lr=final_lr(size, tokens) if config.final_lr is None else config.final_lr,
    )


def batch_tokens(tokens: float, seq_len: int) -> int:
    """Tokens of a step: whole sequences, a power of two of them, so that candidates of about one size share a batch."""
    wanted = _BATCH * tokens**_BATCH_TOKENS
    return seq_len << max(0, round(math.log2(min(wanted, _LARGEST_BATCH) / seq_len)))


def peak_rate(size: int, tokens: float) -> float:
    """Peak learning rate of AdamW, to two digits."""
    rate = _RATE * size**_RATE_SIZE * tokens**_RATE_TOKENS
    return float(f"{min(rate, _HIGHEST_RATE):.2g}")


def final_lr(size: int, tokens: float) -> float:
    """Learning rate at the end, as a share of the peak: a tenth after a short training, zero after a long one."""
    length = math.log(BYTES_PER_PARAMETER * size / tokens) / math.log(BYTES_PER_PARAMETER / _SHORT)
    return float(f"{_FINAL_LR * min(1.0, max(0.0, length)):.2g}")


def _carried_rate(shape: Shape, size: int, tokens: float) -> float:
    """The peak rate; where a parametrization carries rates over from a base, the base's at as many tokens for each."""
    ratio = 1.0 if shape.base is None else (shape.base.d_model / shape.d_model) ** 2  # most parameters are matrices
    return peak_rate(max(1, round(size * ratio)), tokens * ratio)


@dataclass(frozen=True, slots=True)
class Horizon:
    """How long a training is for its size, in text."""

    bytes_per_parameter: float
    """Of text seen, for each parameter of blocks and head."""
    epochs: float
    size: float
    """Parameters for which the same FLOPs would be about compute-optimal."""
    width: int
    """At which a model of this shape would have them."""


def horizon_of(
    config: TrainingConfig, arch: ArchSpec, cost: Cost, train_tokens: int, bytes_per_token: float
) -> Horizon:
    """The horizon of one training. Text that is trained on in several segments is seen once.

    Args:
        config: its settings.
        arch: what is trained.
        cost: its price.
        train_tokens: there are to train on.
        bytes_per_token: of the text.
    """
    size, tokens = size_of(arch, cost), tokens_of(config, cost) / segments_of(arch)
    seen = tokens * bytes_per_token / size
    fits = size * math.sqrt(seen / BYTES_PER_PARAMETER)  # FLOPs go as size times tokens, tokens as size
    width = max(8, 8 * round(arch.d_model * math.sqrt(fits / size) / 8))
    return Horizon(seen, tokens / max(1, train_tokens), fits, width)
