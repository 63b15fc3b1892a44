"""The learner ``gnn``: a graph network over `builder.graphdata`, apart because PyG takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import HeteroConv, SAGEConv, global_add_pool, global_max_pool, global_mean_pool

from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, OP_FEATURES, hetero_data
from spiralformer.threads import one_thread
from studies.predict.features import SETTINGS, Array, Example, State, shaped


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
        with one_thread():
            self._fit(examples, y, groups, seed)

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
        self._middle, self._scale = (torch.tensor(shaped(state[n], (_NUM_GLOBAL,))) for n in ("middle", "scale"))
        weights = {
            name.removeprefix("network."): torch.tensor(value)
            for name, value in state.items()
            if name.startswith("network.")
        }
        self._network.load_state_dict(weights)


def _batch(examples: Sequence[Example]) -> tuple[Any, Tensor]:
    """Each graph once, and whose graph each example has."""
    place: dict[int, int] = {}
    graphs: list[HeteroData] = []
    for example in examples:
        if id(example.graph) not in place:
            place[id(example.graph)] = len(graphs)
            graphs.append(hetero_data(example.graph))
    batch = next(iter(DataLoader(graphs, batch_size=len(graphs))))
    return batch, torch.tensor([place[id(example.graph)] for example in examples])
