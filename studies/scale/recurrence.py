"""How much a use of shared weights is worth: the exponent phi of ``L = E + A (N_once + r^phi N_shared)^-a + B D^-b``.

At 1 a block used r times is worth r blocks of its own, at 0 its further uses are worth nothing (arXiv 2604.21106: 0.46
for plain loops, 0.65 with hyper-connections). Uses at coarse levels are counted whole, or by their share of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.graph.ir import Graph
from builder.pricing.cost import breakdown
from studies.scale.law import Array, Law

_PHIS = np.arange(-1.0, 2.0001, 0.01)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a model's parameters are used for."""

    once: float
    """Parameters of blocks and head that a token passes once."""
    often: tuple[tuple[float, float], ...]
    """Of each block that is used more than once: parameters, and uses."""

    def effective(self, phi: float) -> float:
        """Parameters of a model without sharing that is as good."""
        return self.once + float(sum(params * uses**phi for params, uses in self.often))


def shared_of(graph: Graph, *, by_tokens: bool = False) -> Shared:
    """Parameters once and often; with ``by_tokens`` a use at chunk g counts 1/g."""
    params: dict[str, float] = {}
    uses: dict[str, float] = {}
    for part in breakdown(graph):
        if part.part == "embed" and not graph.tie_embeddings:
            continue
        params[part.part] = params.get(part.part, 0.0) + part.params
        uses[part.part] = uses.get(part.part, 0.0) + part.uses * (1 / part.level.chunk if by_tokens else 1)
    loops = {node.owner for node in graph.nodes if node.op == "block"}
    often = tuple((params[name], uses[name]) for name in params if name in loops and uses[name] > 1)
    return Shared(sum(params.values()) - sum(size for size, _ in often), often)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured difference to the baseline."""

    size: str
    seed: int
    shared: Shared
    base: Shared
    difference: float


def phi_of(
    points: Sequence[Point], law: Law, factor: float, *, confidence: float = 0.8, draws: int = 200
) -> tuple[float, float, float]:
    """The exponent that makes the differences of one candidate, or of a family, likeliest, and its interval.

    Args:
        points: of candidates that use a block more than once.
        law: of the ladder.
        factor: A of its baseline.
        confidence: of the interval.
        draws: of the bootstrap over sizes, and over runs within each.
    """
    predicted = np.array([[_difference(point, law, factor, phi) for phi in _PHIS] for point in points])
    measured = np.array([point.difference for point in points])
    sizes = sorted({point.size for point in points})
    at = {size: np.array([i for i, point in enumerate(points) if point.size == size]) for size in sizes}
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        chosen = [random.choice(at[size], len(at[size])) for size in random.choice(sizes, len(sizes))]
        found.append(_best(predicted, measured, np.concatenate(chosen).astype(np.int64)))
    low, high = np.percentile(found, [50 * (1 - confidence), 50 * (1 + confidence)])
    return _best(predicted, measured, np.arange(len(points), dtype=np.int64)), float(low), float(high)


def exponent(phi: float) -> str:
    """As people are told it; at an end of what is tried, as beyond it."""
    low, high = _PHIS[[0, -1]]
    return f"<{low:.0f}" if phi <= low else f">{high:.0f}" if phi >= high - 1e-9 else f"{phi:.2f}"


def _difference(point: Point, law: Law, factor: float, phi: float) -> float:
    a = law.size_exponent
    return float(factor * (point.shared.effective(phi) ** -a - point.base.effective(phi) ** -a))


def _best(predicted: Array, measured: Array, rows: NDArray[np.int64]) -> float:
    errors = ((predicted[rows] - measured[rows, None]) ** 2).sum(0)
    return float(_PHIS[int(errors.argmin())])
