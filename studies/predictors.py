"""Predictors of a candidate's loss from its graph and cost, trained on finished trials.

``cost`` ranks by FLOPs alone, ``scaling_law`` fits the looped law, ``tabular`` a ridge or boosted trees over counts and
paths, ``gnn`` a graph network. All have one face, `Predictor`; what they predict orders candidates (less is better), in
units of the losses' standard deviation. A graph network has to beat the others before it is worth its price
(`docs/results.md`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import HeteroConv, SAGEConv, global_add_pool, global_max_pool, global_mean_pool

from builder.cost import Cost
from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, KINDS, OP_FEATURES, encode_graph
from builder.ir import Graph

PredictorName: TypeAlias = Literal["cost", "scaling_law", "tabular", "gnn"]
Array: TypeAlias = NDArray[np.float64]

_CHUNKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Example:
    """A candidate as predictors see it."""

    data: HeteroData
    features: Array
    """Counts, sums and paths of its schedule (`tabular_features`)."""
    cost: Cost
    once: float
    """Parameters of blocks called once, without embeddings."""
    looped: float
    """Parameters of blocks called more than once."""
    loops: float
    """Mean calls of the latter."""


def make_example(graph: Graph, cost: Cost) -> Example:
    """Encode one candidate."""
    data = encode_graph(graph, cost)
    block, names = data["block"].x.double().numpy(), {name: i for i, name in enumerate(BLOCK_FEATURES)}
    params = block[:, names["params_share"]] * cost.params
    uses = block[:, names["uses"]] * 8
    many = uses > 1.5
    return Example(
        data=data,
        features=tabular_features(graph, cost, data),
        cost=cost,
        once=float(params[~many].sum()),
        looped=float(params[many].sum()),
        loops=float((params * uses)[many].sum() / params[many].sum()) if many.any() else 1.0,
    )


def tabular_features(graph: Graph, cost: Cost, data: HeteroData) -> Array:
    """Costs; counts of operations; calls by chunk; sums of 1 / chunk; where in the schedule coarse levels stand."""
    ops = data["op"].x.double().numpy()
    calls = [node for node in graph.nodes if node.op == "block"]
    chunks = [node.level.chunk for node in calls]
    logs = [math.log2(chunk) for chunk in chunks]
    steps = list(pairwise(logs))
    return np.array(
        [
            *data.cost[0].double().tolist(),
            *ops[:, : len(KINDS)].sum(0),
            *(float(sum(chunk == c for chunk in chunks)) for c in _CHUNKS),
            sum(1 / chunk for chunk in chunks),
            sum(graph.block_of(node).layers / node.level.chunk for node in calls),
            float(graph.num_layers),
            sum(logs) / len(logs),
            sum(i * log for i, log in enumerate(logs)) / (len(logs) * (len(logs) + 1)),  # coarse late, or early
            float(sum(b < a for a, b in steps)),
            float(sum(b > a for a, b in steps)),
            max(logs),
            logs[1] if len(logs) > 2 else 0.0,  # the first and the last level of the loop
            logs[-2] if len(logs) > 2 else 0.0,
            float(len(graph.blocks)),
        ]
    )


class Predictor(Protocol):
    """Learns to order candidates by loss."""

    def fit(self, examples: Sequence[Example], losses: Sequence[float], seed: int = 0) -> None:
        """Learn from finished trials."""

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        """Mean and standard deviation for each, in standard deviations of the losses learned from."""


def make_predictor(name: PredictorName) -> Predictor:
    """A predictor by name, untrained."""
    makers: dict[str, type[CostPredictor | ScalingLaw | Tabular | GraphNetwork]] = {
        "cost": CostPredictor,
        "scaling_law": ScalingLaw,
        "tabular": Tabular,
        "gnn": GraphNetwork,
    }
    return makers[name]()


class CostPredictor:
    """Ranks by FLOPs per token alone, in the direction that the examples show."""

    def fit(self, examples: Sequence[Example], losses: Sequence[float], seed: int = 0) -> None:
        x = np.array([math.log(e.cost.flops_per_token) for e in examples])
        self._line = np.polyfit(x, _standardise(losses), 1)

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        x = np.array([math.log(e.cost.flops_per_token) for e in examples])
        return np.asarray(np.polyval(self._line, x), dtype=np.float64), np.ones(len(examples))


class ScalingLaw:
    """``L = E + A (N_once + r^0.46 N_rec)^-alpha + B D^-beta`` (arXiv 2604.21106), D the tokens at equal FLOPs."""

    EXPONENT = 0.46

    def fit(self, examples: Sequence[Example], losses: Sequence[float], seed: int = 0) -> None:
        y = _standardise(losses)
        size, tokens = self._inputs(examples)
        self._origin = float(size.mean()), float(tokens.mean())

        def residual(p: Array) -> Array:
            return self._law(p, size, tokens) - y

        self._fitted = least_squares(residual, np.array([0.0, 0.0, 0.0, -1.0, -1.0]), loss="soft_l1").x

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        return self._law(self._fitted, *self._inputs(examples)), np.ones(len(examples))

    def _inputs(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        size = np.array([math.log(e.once + e.loops**self.EXPONENT * e.looped) for e in examples])
        return size, np.array([-math.log(e.cost.training_flops_per_token) for e in examples])

    def _law(self, p: Array, size: Array, tokens: Array) -> Array:
        floor, a, b, alpha, beta = p
        terms = (a, alpha, size - self._origin[0]), (b, beta, tokens - self._origin[1])
        parts = [scale * np.exp(-np.exp(np.clip(power, -6, 2)) * x) for scale, power, x in terms]
        return np.asarray(floor + parts[0] + parts[1])


class Tabular:
    """Ridge, boosted trees, or their mean over `tabular_features`, whichever ranks best in cross-validation."""

    def fit(self, examples: Sequence[Example], losses: Sequence[float], seed: int = 0) -> None:
        try:
            from sklearn.ensemble import GradientBoostingRegressor
            from sklearn.linear_model import RidgeCV
            from sklearn.model_selection import KFold, cross_val_predict
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            what = "the tabular predictor needs scikit-learn"
            raise ImportError(f"{what}: pip install 'spiralformer[predict]'") from error
        x, y = np.stack([e.features for e in examples]), _standardise(losses)
        models = {
            "ridge": make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))),
            "boosted": GradientBoostingRegressor(
                n_estimators=150, max_depth=3, learning_rate=0.06, subsample=0.7, random_state=seed
            ),
        }
        folds = KFold(min(5, len(y)), shuffle=True, random_state=seed)
        held_out = {name: cross_val_predict(model, x, y, cv=folds) for name, model in models.items()}
        held_out["both"] = (held_out["ridge"] + held_out["boosted"]) / 2
        self.chosen = max(held_out, key=lambda name: rank_correlation(held_out[name], y))
        self._spread = float(np.std(held_out[self.chosen] - y))
        self._models = [model.fit(x, y) for name, model in models.items() if self.chosen in (name, "both")]

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        x = np.stack([e.features for e in examples])
        mean = np.mean([model.predict(x) for model in self._models], axis=0)
        return mean, np.full(len(examples), self._spread)


class _Network(nn.Module):
    """A few rounds of messages between operations and shared blocks, then one number for each graph."""

    def __init__(self, width: int, rounds: int, sharing: bool) -> None:
        super().__init__()
        edges = [("op", "next", "op"), ("op", "back", "op")]
        if sharing:
            edges += [("op", "uses", "block"), ("block", "used_by", "op")]
        self.sharing = sharing
        self.op, self.block = nn.Linear(len(OP_FEATURES), width), nn.Linear(len(BLOCK_FEATURES), width)
        self.convs = nn.ModuleList(
            HeteroConv({edge: SAGEConv((width, width), width, aggr="sum") for edge in edges}, aggr="sum")
            for _ in range(rounds)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * rounds))
        self.head = nn.Sequential(
            nn.Linear((4 if sharing else 3) * width + len(COST_FEATURES), width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, batch: Any, cost_BF: Tensor) -> Tensor:
        """Scores, shape (B,)."""
        x = {"op": self.op(batch["op"].x), "block": self.block(batch["block"].x)}
        edges = {kind: batch[kind].edge_index for kind in batch.edge_types}
        for i, conv in enumerate(self.convs):
            out = conv(x, edges)
            for j, kind in enumerate(out):
                x[kind] = x[kind] + F.gelu(self.norms[2 * i + j](out[kind]))
        ops, index, size = x["op"], batch["op"].batch, batch.num_graphs
        pooled = [global_mean_pool(ops, index, size), global_max_pool(ops, index, size)]
        pooled.append(global_add_pool(ops, index, size) / 8)
        if self.sharing:
            pooled.append(global_mean_pool(x["block"], batch["block"].batch, size))
        scores: Tensor = self.head(torch.cat([*pooled, cost_BF], dim=1))[:, 0]
        return scores


class GraphNetwork:
    """An ensemble of small graph networks, trained to order pairs; their disagreement is the uncertainty.

    Args:
        members: networks.
        epochs: passes over all examples.
        width: of hidden layers.
        rounds: of messages.
        sharing: whether shared blocks are nodes (an ablation turns it off).
    """

    def __init__(
        self, members: int = 4, epochs: int = 120, width: int = 32, rounds: int = 3, *, sharing: bool = True
    ) -> None:
        self.members, self.epochs, self.width, self.rounds, self.sharing = members, epochs, width, rounds, sharing

    def fit(self, examples: Sequence[Example], losses: Sequence[float], seed: int = 0) -> None:
        y = torch.tensor(_standardise(losses), dtype=torch.float32)
        costs = torch.cat([e.data.cost for e in examples])
        self._middle, self._scale = costs.mean(0), costs.std(0).clamp_min(1e-3)
        self._networks = [self._train(examples, y, seed * 1000 + i) for i in range(self.members)]

    def _train(self, examples: Sequence[Example], y: Tensor, seed: int) -> _Network:
        draw = random.Random(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network(self.width, self.rounds, self.sharing).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=self.epochs)
        keep = sorted(draw.sample(range(len(examples)), max(2, round(0.9 * len(examples)))))
        batch, cost = self._batch([examples[i] for i in keep])
        target = y[keep]
        first, second = torch.triu_indices(len(keep), len(keep), offset=1)
        sign = torch.sign(target[first] - target[second])
        weight = (target[first] - target[second]).abs()
        for _ in range(self.epochs):
            score = network(batch, cost)
            ranking = (F.softplus(-sign * 2.0 * (score[first] - score[second])) * weight).mean()
            loss = ranking + 0.3 * F.mse_loss(score, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return network.eval()

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        batch, cost = self._batch(examples)
        scores = np.stack([network(batch, cost).double().numpy() for network in self._networks])
        return scores.mean(0), scores.std(0) + 1e-6

    def _batch(self, examples: Sequence[Example]) -> tuple[Any, Tensor]:
        batch = next(iter(DataLoader([e.data for e in examples], batch_size=len(examples))))
        return batch, (batch.cost - self._middle) / self._scale


def rank_correlation(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Kendall's tau; 0 where one side is constant."""
    from scipy.stats import kendalltau

    if np.ptp(np.asarray(a)) == 0 or np.ptp(np.asarray(b)) == 0:
        return 0.0
    return float(kendalltau(a, b).statistic)


def _standardise(losses: Sequence[float]) -> Array:
    y = np.asarray(losses, dtype=float)
    return np.asarray((y - y.mean()) / max(float(y.std()), 1e-9))
