"""What predictors learn from: candidates as features and graphs, and their losses on one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, KINDS, OP_FEATURES, GraphFeatures, graph_features
from builder.pricing.cost import Cost
from searchspace.arch import ArchSpec
from studies.sections import TrainingConfig, check_training
from studies.training.recipe import Recipe, recipe_of

Array = NDArray[np.float64]
State = dict[str, NDArray[Any]]
"""What a fitted learner is made again from."""

_CHUNKS = (1, 2, 4, 8, 16, 32)  # of common schedules; other levels show in no column

MOST_TRIALS = 500
"""Trials that a predictor learns from at most: more teach it little, and take long."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A candidate as predictors see it, at one rung of its training."""

    graph: GraphFeatures
    features: Array
    """Costs, training settings, and counts, sums and paths of the schedule (`FEATURES`)."""
    cost: Cost
    once: float
    """Parameters of blocks called once, without embeddings."""
    looped: float
    """Parameters of blocks called more than once."""
    loops: float
    """Mean calls of the latter."""
    full_flops: float
    """Training FLOPs of its full budget."""
    share: float = 1.0
    """Of the full budget, spent at this rung."""

    @property
    def progress(self) -> float:
        """0 at the full budget; less, the logarithm of the share, before."""
        return math.log(self.share)


@dataclass(frozen=True, slots=True)
class Observation:
    """A held-out loss of a candidate at one rung."""

    example: Example
    loss: float
    """Nats per token."""
    rung: int
    trial: int | str
    """Rungs of one trial are never split between learning and judging."""
    study: str = ""
    """Losses are compared within a study only."""


SETTINGS = ("log_lr", "log_muon_lr", "is_muon", "log_batch_tokens", "weight_decay", "warmup", "final_lr", "is_wsd")

FEATURES = (
    *COST_FEATURES,
    *SETTINGS,
    *(f"count_{kind}" for kind in KINDS),
    *(f"calls_at_{chunk}" for chunk in _CHUNKS),
    "sum_inverse_chunk",
    "layers_over_chunk",
    "layers",
    "mean_log2_chunk",
    "coarse_late",
    "refinements",
    "coarsenings",
    "coarsest",
    "first_of_loop",
    "last_of_loop",
    "blocks",
)


def make_example(graph: Graph, cost: Cost, training: Mapping[str, Any]) -> Example:
    """Encode one candidate at its full budget.

    Args:
        graph: verified.
        cost: its price.
        training: decided settings, as a study's ``training``.
    """
    encoded = graph_features(graph, cost)
    block, names = _rows(encoded.blocks, BLOCK_FEATURES), {name: i for i, name in enumerate(BLOCK_FEATURES)}
    params = block[:, names["params_share"]] * cost.params
    uses = block[:, names["uses"]] * 8
    many = uses > 1.5
    config = check_training(training)
    return Example(
        graph=encoded,
        features=_features(graph, encoded, config, recipe_of(config, graph, cost)),
        cost=cost,
        once=float(params[~many].sum()),
        looped=float(params[many].sum()),
        loops=float((params * uses)[many].sum() / params[many].sum()) if many.any() else 1.0,
        full_flops=config.flops or (config.tokens or 0.0) * cost.training_flops_per_token,
    )


def _rows(rows: list[list[float]], names: Sequence[str]) -> Array:
    return np.array(rows, dtype=np.float32).astype(np.float64).reshape(-1, len(names))


def _features(graph: Graph, encoded: GraphFeatures, training: TrainingConfig, recipe: Recipe) -> Array:
    """`FEATURES`: costs; settings; operations; calls by chunk; where in the schedule coarse levels stand."""
    ops = _rows(encoded.ops, OP_FEATURES)
    calls = [node for node in graph.nodes if node.op == "block"]
    chunks = [node.level.chunk for node in calls]
    logs = [math.log2(chunk) for chunk in chunks] or [0.0]
    steps = list(pairwise(logs))
    return np.array(
        [
            *np.array(encoded.cost, dtype=np.float32).astype(np.float64),
            math.log(recipe.lr),
            math.log(training.muon_lr),
            float(training.optimizer == "muon"),
            math.log(recipe.batch_tokens),
            training.weight_decay,
            training.warmup,
            recipe.final_lr,
            float(training.lr_schedule == "wsd"),
            *ops[:, : len(KINDS)].sum(0),
            *(float(sum(chunk == c for chunk in chunks)) for c in _CHUNKS),
            sum(1 / chunk for chunk in chunks),
            sum(graph.block_of(node).layers / node.level.chunk for node in calls),
            float(graph.num_layers),
            sum(logs) / len(logs),
            sum(i * log for i, log in enumerate(logs)) / (len(logs) * (len(logs) + 1)),
            float(sum(b < a for a, b in steps)),
            float(sum(b > a for a, b in steps)),
            max(logs),
            logs[1] if len(logs) > 2 else 0.0,  # behind the prelude
            logs[-2] if len(logs) > 2 else 0.0,  # before the coda
            float(len(graph.blocks)),
        ]
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """How a study's losses became comparable numbers: ``(loss at the full budget - middle) / spread``."""

    middle: float
    spread: float


def adjust(seen: Sequence[Observation]) -> tuple[Array, dict[str, Scale]]:
    """Losses on one scale: rungs brought to the full budget, studies standardised.

    A rung lies below the one before by the mean drop of the trials that have both, so that early stopping, which lets
    only good trials reach late rungs, does not make these look ordinary.
    """
    y = np.array([o.loss for o in seen])
    scales = {}
    for study in {o.study for o in seen}:
        mine = [i for i, o in enumerate(seen) if o.study == study]
        at = {(seen[i].trial, seen[i].rung): seen[i].loss for i in mine}
        drops = [0.0]
        for rung in range(1, 1 + max(rung for _, rung in at)):
            both = [loss - at[trial, rung - 1] for (trial, r), loss in at.items() if r == rung and (trial, r - 1) in at]
            drops.append(drops[-1] + (float(np.mean(both)) if both else 0.0))
        for i in mine:
            y[i] += drops[-1] - drops[seen[i].rung]
        scale = Scale(float(y[mine].mean()), max(float(y[mine].std()), 1e-9))
        scales[study] = scale
        y[mine] = (y[mine] - scale.middle) / scale.spread
    return y, scales


def last_rungs(seen: Sequence[Observation]) -> list[int]:
    """Where in ``seen`` each trial's last rung stands."""
    last = {(o.study, o.trial): i for i, o in sorted(enumerate(seen), key=lambda pair: pair[1].rung)}
    return list(last.values())


def observe(
    arch: ArchSpec,
    cost: Cost,
    training: Mapping[str, Any],
    rungs: Iterable[tuple[float, float]],
    trial: int,
    study: str = "",
) -> list[Observation]:
    """Everything one trial has to say.

    Args:
        arch: what was trained.
        cost: its price.
        training: decided settings.
        rungs: training FLOPs and loss at each.
        trial: its number.
        study: what losses compare with.
    """
    example = make_example(compile_arch(arch), cost, training)
    return [
        Observation(replace(example, share=min(1.0, flops / example.full_flops)), loss, i, trial, study)
        for i, (flops, loss) in enumerate(rungs)
    ]


def shaped(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The array. Raises ValueError unless it has this shape and is finite."""
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"an array of shape {array.shape} that should be {shape}, or not finite")
    return array
