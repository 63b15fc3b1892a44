"""The closed tables of what a block is made of: feed-forwards, normalizations, residuals, recalls.

Each row names the class in `spiralformer` that computes it, and what that costs: parameters, and multiply-adds at one
position. D is the stream's width, F the feed-forward's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from searchspace.arch import BlockSpec
from searchspace.nodes import FfnKind, NormKind, NormPlace, RecallKind, ResidualKind, ResidualScale
from searchspace.tables import complete, options, table

Count: TypeAlias = Callable[[int], int]
"""Of D."""


@complete
@dataclass(frozen=True, slots=True)
class FeedForwardRow:
    """A feed-forward; its class is made with (D, F, bias)."""

    name: str
    part: str | type
    hidden: Count
    """F where the file gives none, of D."""
    params: Callable[[int, int, bool], int]
    """Of (D, F, bias)."""
    work: Callable[[int, int], int]
    """Of (D, F)."""


@complete
@dataclass(frozen=True, slots=True)
class NormRow:
    """A normalization; its class is made with (D, eps=)."""

    name: str
    part: str | type
    params: Count


@complete
@dataclass(frozen=True, slots=True)
class ResidualRow:
    """How a branch's output meets the state; its class is made with (D, scale)."""

    name: str
    part: str | type
    params: Count
    work: Count


@complete
@dataclass(frozen=True, slots=True)
class RecallRow:
    """How a stream is injected again; its class is made with (D)."""

    name: str
    part: str | type
    params: Count
    work: Count


@complete
@dataclass(frozen=True, slots=True)
class NormPlaceRow:
    """Where a sub-layer normalises: before the branch, on its output, after the residual sum."""

    name: str
    pre: bool
    peri: bool
    post: bool

    @property
    def count(self) -> int:
        """Norms in one sub-layer."""
        return self.pre + self.peri + self.post


@complete
@dataclass(frozen=True, slots=True)
class ResidualScaleRow:
    """Factor on every residual branch: N to the power of ``-power``, N unrolled layers."""

    name: str
    power: float


def _four(d: int) -> int:
    return 4 * d


def _none(d: int) -> int:
    return 0


def feed_forward(name: str, part: str | type, hidden: Count = _four, maps_in: int = 1) -> FeedForwardRow:
    """One of linear maps alone: ``maps_in`` of D x F lead in, one leads out. Others are a `FeedForwardRow`.

    Args:
        name: in files.
        part: its class, made with (D, F, bias).
        hidden: F where the file gives none, of D.
        maps_in: how many maps lead in.
    """
    return FeedForwardRow(
        name,
        part,
        hidden,
        lambda d, f, bias: (maps_in + 1) * d * f + (maps_in * f + d if bias else 0),
        lambda d, f: (maps_in + 1) * d * f,
    )


FEED_FORWARDS = table(
    "a feed-forward",
    (
        feed_forward("gelu", "feedforward.GeluFeedForward"),
        feed_forward("relu2", "feedforward.SquaredReluFeedForward"),
        feed_forward("swiglu", "feedforward.GatedFeedForward", lambda d: -(-8 * d // 24) * 8, 2),
    ),
    options(FfnKind),
    places="ffn",
)
NORMS = table(
    "a norm",
    (
        NormRow("rms", "nn.RMSNorm", lambda d: d),
        NormRow("layer", "nn.LayerNorm", lambda d: 2 * d),
    ),
    options(NormKind),
    places="norm",
)
RESIDUALS = table(
    "a residual",
    (
        ResidualRow("add", "residual.AddResidual", _none, _none),
        ResidualRow("gate", "residual.GateResidual", lambda d: 2 * d * d, lambda d: 2 * d * d),
        ResidualRow("gru", "residual.GruResidual", lambda d: 6 * d * (d + 1), lambda d: 6 * d * d),
    ),
    options(ResidualKind),
    places="residual",
)
RECALLS = table(
    "a recall",
    (
        RecallRow("add", "recall.AddRecall", _none, _none),
        RecallRow("linear", "recall.LinearRecall", lambda d: 2 * d * d, lambda d: 2 * d * d),
        RecallRow("affine", "recall.AffineRecall", lambda d: 2 * d * (d + 1), lambda d: 2 * d * d),
        RecallRow("concat", "recall.ConcatRecall", lambda d: 2 * d * d, lambda d: 2 * d * d),
        RecallRow("diagonal", "recall.DiagonalRecall", lambda d: 2 * d, _none),
    ),
    options(RecallKind),
    places="recall",
)
NORM_PLACES = table(
    "a norm place",
    (
        NormPlaceRow("pre", pre=True, peri=False, post=False),
        NormPlaceRow("peri", pre=True, peri=True, post=False),
        NormPlaceRow("post", pre=False, peri=False, post=True),
        NormPlaceRow("sandwich", pre=True, peri=False, post=True),
    ),
    options(NormPlace),
)
RESIDUAL_SCALES = table(
    "a residual scale",
    (
        ResidualScaleRow("none", 0.0),
        ResidualScaleRow("inverse_depth", 1.0),
        ResidualScaleRow("inverse_sqrt_depth", 0.5),
    ),
    options(ResidualScale),
)


def ffn_dim(block: BlockSpec, d_model: int) -> int:
    """Width of the feed-forward's hidden layer: as given, else by its kind."""
    return block.ffn_dim or FEED_FORWARDS[block.ffn].hidden(d_model)


def norm_params(kind: str, dim: int) -> int:
    """Parameters of one normalization, or of ``none``."""
    return 0 if kind == "none" else NORMS[kind].params(dim)
