"""A priced candidate, as it is proposed."""

from __future__ import annotations

from dataclasses import dataclass

from builder.graph.ir import Graph
from builder.pricing.cost import Cost
from searchspace.choices import Scalar
from searchspace.space import Candidate


@dataclass(frozen=True, slots=True)
class Proposal:
    """A priced candidate with decided training settings."""

    candidate: Candidate
    graph: Graph
    cost: Cost
    training: dict[str, object]
    choices: dict[str, Scalar]
    """All decisions as decoded: the architecture's and the training's. What was asked for stays in Optuna's params."""
