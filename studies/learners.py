"""The four learners behind `studies.predictors.Predictor`, each one fitted model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import HeteroConv, SAGEConv, global_add_pool, global_max_pool, global_mean_pool

from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, OP_FEATURES
from searchspace.errors import SpecError
from studies.config import LearnerName
from studies.examples import FEATURES, SETTINGS, Array, Example

State = dict[str, NDArray[Any]]
NEEDS_SKLEARN = "the tabular predictor needs scikit-learn"


class Member(Protocol):
    """One fitted model."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        """Learn; only examples of one group compare."""

    def predict(self, examples: Sequence[Example]) -> Array:
        """A number for each; less is better."""

    def state(self) -> State:
        """What `restore` makes it again from."""

    def restore(self, state: State) -> None:
        """Be what another was."""


class _Cost:
    """A plane through FLOPs per token and progress, in the direction that the examples show."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        self._plane = np.linalg.lstsq(self._inputs(examples), y, rcond=None)[0]

    def predict(self, examples: Sequence[Example]) -> Array:
        return np.asarray(self._inputs(examples) @ self._plane)

    def _inputs(self, examples: Sequence[Example]) -> Array:
        return np.array([[1.0, math.log(e.cost.flops_per_token), e.progress] for e in examples])

    def state(self) -> State:
        return {"plane": self._plane}

    def restore(self, state: State) -> None:
        self._plane = _shaped(state["plane"], (3,))


class _ScalingLaw:
    """``L = E + A (N_once + r^0.46 N_rec)^-alpha + B D^-beta`` (arXiv 2604.21106), D the tokens seen."""

    EXPONENT: ClassVar[float] = 0.46

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        size, tokens = self._inputs(examples)
        self._origin = np.array([size.mean(), tokens.mean()])

        def residual(p: Array) -> Array:
            return self._law(p, size, tokens) - y

        self._fitted = least_squares(residual, np.array([0.0, 0.0, 0.0, -1.0, -1.0]), loss="soft_l1").x

    def predict(self, examples: Sequence[Example]) -> Array:
        return self._law(self._fitted, *self._inputs(examples))

    def _inputs(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        size = np.array([math.log(e.once + e.loops**self.EXPONENT * e.looped + 1) for e in examples])
        tokens = [math.log(e.full_flops * e.share / e.cost.training_flops_per_token) for e in examples]
        return size, np.array(tokens)

    def _law(self, p: Array, size: Array, tokens: Array) -> Array:
        floor, a, b, alpha, beta = p
        terms = (a, alpha, size - self._origin[0]), (b, beta, tokens - self._origin[1])
        parts = [scale * np.exp(-np.exp(np.clip(power, -6, 2)) * x) for scale, power, x in terms]
        return np.asarray(floor + parts[0] + parts[1])

    def state(self) -> State:
        return {"fitted": self._fitted, "origin": self._origin}

    def restore(self, state: State) -> None:
        self._fitted, self._origin = _shaped(state["fitted"], (5,)), _shaped(state["origin"], (2,))


class _Tabular:
    """The mean of ridge regression and boosted trees over `FEATURES` and progress."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        self._fit(self._inputs(examples), y, seed)

    def _fit(self, x: Array, y: Array, seed: int) -> None:
        try:
            from sklearn.ensemble import GradientBoostingRegressor
            from sklearn.linear_model import RidgeCV
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise SpecError("", NEEDS_SKLEARN, "pip install 'spiralformer[predict]'") from error
        self._x, self._y, self._seed = x, y, seed
        models = (
            make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))),
            GradientBoostingRegressor(
                n_estimators=150, max_depth=3, learning_rate=0.06, subsample=0.7, random_state=seed
            ),
        )
        self._models = [model.fit(x, y) for model in models]

    def predict(self, examples: Sequence[Example]) -> Array:
        x = self._inputs(examples)
        return np.asarray(np.mean([model.predict(x) for model in self._models], axis=0))

    def _inputs(self, examples: Sequence[Example]) -> Array:
        return np.stack([np.append(e.features, e.progress) for e in examples])

    def state(self) -> State:
        """What it learned from: learning it again takes a moment, and trees have no format of their own."""
        return {"x": self._x, "y": self._y, "seed": np.array([self._seed])}

    def restore(self, state: State) -> None:
        y = np.asarray(state["y"], dtype=np.float64)
        x = _shaped(state["x"], (len(y), len(FEATURES) + 1))
        self._fit(x, _shaped(y, (len(y),)), int(state["seed"][0]))


class _Network(nn.Module):
    """A few rounds of messages between operations and shared blocks, then one number for each graph and rung."""

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
            nn.Linear((4 if sharing else 3) * width + _NUM_GLOBAL, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, batch: Any, graph_B: Tensor, global_BF: Tensor) -> Tensor:
        """Scores, shape (B,): of graph ``graph_B[i]`` of the batch, with settings and progress ``global_BF[i]``."""
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
        scores: Tensor = self.head(torch.cat([torch.cat(pooled, dim=1)[graph_B], global_BF], dim=1))[:, 0]
        return scores


_NUM_GLOBAL = len(COST_FEATURES) + len(SETTINGS) + 1


class GraphNetwork:
    """A small graph network, trained to order pairs of one rung.

    Args:
        epochs: passes over all examples.
        width: of hidden layers.
        rounds: of messages.
        sharing: whether shared blocks are nodes (an ablation turns it off).
    """

    def __init__(self, epochs: int = 120, width: int = 32, rounds: int = 3, *, sharing: bool = True) -> None:
        self.epochs, self.width, self.rounds, self.sharing = epochs, width, rounds, sharing

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the graphs are small: threads would mostly wait for each other
        try:
            self._fit(examples, y, groups, seed)
        finally:
            torch.set_num_threads(threads)

    def _fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = _Network(self.width, self.rounds, self.sharing).train()
        raw = self._globals(examples)
        self._middle, self._scale = raw.mean(0), raw.std(0).clamp_min(1e-3)
        batch, index = _batch(examples)
        inputs, target = (raw - self._middle) / self._scale, torch.tensor(y, dtype=torch.float32)
        first, second = torch.triu_indices(len(examples), len(examples), offset=1)
        places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        place = torch.tensor([places[group] for group in groups])
        same = place[first] == place[second]
        first, second = first[same], second[same]
        sign = torch.sign(target[first] - target[second])
        weight = (target[first] - target[second]).abs()
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=5e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=self.epochs)
        for _ in range(self.epochs):
            score = self._network(batch, index, inputs)
            ranking = (F.softplus(-sign * 2.0 * (score[first] - score[second])) * weight).mean()
            loss = ranking + 0.3 * F.mse_loss(score, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._network.eval()

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> Array:
        batch, index = _batch(examples)
        inputs = (self._globals(examples) - self._middle) / self._scale
        return np.asarray(self._network(batch, index, inputs).double().numpy())

    def _globals(self, examples: Sequence[Example]) -> Tensor:
        rows = [[*e.features[: _NUM_GLOBAL - 1], e.progress] for e in examples]
        return torch.tensor(rows, dtype=torch.float32)

    def state(self) -> State:
        weights = {f"network.{name}": value.numpy() for name, value in self._network.state_dict().items()}
        return {**weights, "middle": self._middle.numpy(), "scale": self._scale.numpy()}

    def restore(self, state: State) -> None:
        self._network = _Network(self.width, self.rounds, self.sharing).eval()
        self._middle, self._scale = (torch.tensor(_shaped(state[n], (_NUM_GLOBAL,))) for n in ("middle", "scale"))
        weights = {
            name.removeprefix("network."): torch.tensor(value)
            for name, value in state.items()
            if name.startswith("network.")
        }
        self._network.load_state_dict(weights)


LEARNERS: dict[LearnerName, type[_Cost | _ScalingLaw | _Tabular | GraphNetwork]] = {
    "cost": _Cost,
    "scaling_law": _ScalingLaw,
    "tabular": _Tabular,
    "gnn": GraphNetwork,
}


def _batch(examples: Sequence[Example]) -> tuple[Any, Tensor]:
    """Each graph once, and whose graph each example has."""
    place: dict[int, int] = {}
    graphs: list[HeteroData] = []
    for example in examples:
        if id(example.data) not in place:
            place[id(example.data)] = len(graphs)
            graphs.append(example.data)
    batch = next(iter(DataLoader(graphs, batch_size=len(graphs))))
    return batch, torch.tensor([place[id(example.data)] for example in examples])


def _shaped(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"an array of shape {array.shape} that should be {shape}, or not finite")
    return array
