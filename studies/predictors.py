"""Predictors of a candidate's loss from its graph, cost and training settings, learned from finished trials.

Four learners: ``cost`` is a line through FLOPs per token, ``scaling_law`` the looped law, ``tabular`` ridge and boosted
trees over counts and paths, ``gnn`` a graph network trained to order pairs. `Predictor` makes an ensemble of one of
them, each member blind to one fold of the trials: together they say how unsure they are, and how well they rank what
they have not seen. What they predict is the loss at the full budget, in standard deviations of the losses learned from
(less is better); `docs/results.md` compares them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.optimize import least_squares
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import HeteroConv, SAGEConv, global_add_pool, global_max_pool, global_mean_pool

from builder.compiler import compile_arch
from builder.cost import Cost
from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, KINDS, OP_FEATURES, encode_graph
from builder.ir import Graph
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from studies.config import LearnerName, TrainingConfig, check_training

Array = NDArray[np.float64]
State = dict[str, NDArray[Any]]

_CHUNKS = (1, 2, 4, 8, 16, 32)
_FORMAT, _VERSION = "spiralformer-predictor", 1
NEEDS_SKLEARN = "the tabular predictor needs scikit-learn"
FEWEST = 8
"""Trials below which nothing is learned."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A candidate as predictors see it, at one rung of its training."""

    data: HeteroData
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
    data = encode_graph(graph, cost)
    block, names = data["block"].x.double().numpy(), {name: i for i, name in enumerate(BLOCK_FEATURES)}
    params = block[:, names["params_share"]] * cost.params
    uses = block[:, names["uses"]] * 8
    many = uses > 1.5
    config = check_training(training)
    return Example(
        data=data,
        features=_features(graph, data, config),
        cost=cost,
        once=float(params[~many].sum()),
        looped=float(params[many].sum()),
        loops=float((params * uses)[many].sum() / params[many].sum()) if many.any() else 1.0,
        full_flops=config.flops or (config.tokens or 0.0) * cost.training_flops_per_token,
    )


def _features(graph: Graph, data: HeteroData, training: TrainingConfig) -> Array:
    """`FEATURES`: costs; settings; operations; calls by chunk; where in the schedule coarse levels stand."""
    ops = data["op"].x.double().numpy()
    calls = [node for node in graph.nodes if node.op == "block"]
    chunks = [node.level.chunk for node in calls]
    logs = [math.log2(chunk) for chunk in chunks] or [0.0]
    steps = list(pairwise(logs))
    return np.array(
        [
            *data.cost[0].double().tolist(),
            math.log(training.lr),
            math.log(training.muon_lr),
            float(training.optimizer == "muon"),
            math.log(training.batch_tokens),
            training.weight_decay,
            training.warmup,
            training.final_lr,
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


class Predictor:
    """An ensemble of one learner.

    Args:
        learner: its name.
        members: folds of the trials, each held out from one member.
    """

    def __init__(self, learner: LearnerName, members: int = 5) -> None:
        self.learner, self.members = learner, members
        self.tau = 0.0
        """Kendall's tau between the losses and what a member predicts that has not seen them."""
        self.scales: dict[str, Scale] = {}
        self._error = 1.0
        self._fitted: list[Member] = []

    def fit(self, seen: Sequence[Observation], seed: int = 0) -> None:
        """Learn from finished and stopped trials.

        Raises:
            SpecError: if there are fewer than 8, or ``tabular`` finds no scikit-learn.
        """
        trials = sorted({(o.study, str(o.trial)) for o in seen})
        if len(trials) < FEWEST:
            raise SpecError("", f"{len(trials)} trials are too few to learn from", f"train {FEWEST} or more")
        y, self.scales = adjust(seen)
        random.Random(seed).shuffle(trials)
        fold = {trial: i % self.members for i, trial in enumerate(trials)}
        folds = np.array([fold[o.study, str(o.trial)] for o in seen])
        groups = [(o.study, o.rung) for o in seen]
        held_out, self._fitted = np.zeros(len(seen)), []
        for i in range(self.members):
            member = LEARNERS[self.learner]()
            keep, left = np.flatnonzero(folds != i).tolist(), np.flatnonzero(folds == i).tolist()
            member.fit([seen[j].example for j in keep], y[keep], [groups[j] for j in keep], seed * 1000 + i)
            held_out[left] = member.predict([seen[j].example for j in left])
            self._fitted.append(member)
        judged = last_rungs(seen)
        self.tau = rank_correlation(held_out[judged], y[judged])
        self._error = float(np.sqrt(np.mean((held_out[judged] - y[judged]) ** 2)))

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        """Mean and standard deviation for each, in standard deviations of the losses learned from."""
        each = np.stack([member.predict(examples) for member in self._fitted])
        return each.mean(0), np.sqrt(each.var(0) + self._error**2)

    def save(self, folder: Path) -> None:
        """Write ``predictor.json`` and ``predictor.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{i}.{name}": np.ascontiguousarray(value)
            for i, member in enumerate(self._fitted)
            for name, value in member.state().items()
        }
        save_file(arrays, folder / "predictor.safetensors")
        facts = {
            "format": _FORMAT,
            "version": _VERSION,
            "learner": self.learner,
            "members": self.members,
            "tau": self.tau,
            "error": self._error,
            "scales": {study: [scale.middle, scale.spread] for study, scale in self.scales.items()},
            "features": _known_features(),
        }
        (folder / "predictor.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Predictor:
        """Read what `save` wrote. Raises `SpecError` if it is damaged, or made with other features."""
        file = folder / "predictor.json"
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(
                "", f"can't be read: {error}", "give a folder that predict --save made", str(file)
            ) from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise SpecError("", "is no predictor", "give a folder that predict --save made", str(file))
        if facts.get("version") != _VERSION or facts.get("features") != _known_features():
            raise SpecError("", "was made by another version", "fit it again: predict --save", str(file))
        file = folder / "predictor.safetensors"
        try:
            arrays = load_file(file)
            predictor = Predictor(facts["learner"], int(facts["members"]))
            predictor.tau, predictor._error = float(facts["tau"]), float(facts["error"])
            predictor.scales = {str(study): Scale(*map(float, pair)) for study, pair in facts["scales"].items()}
            for i in range(predictor.members):
                member = LEARNERS[predictor.learner]()
                mine = {n.partition(".")[2]: value for n, value in arrays.items() if n.partition(".")[0] == str(i)}
                member.restore(mine)
                predictor._fitted.append(member)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SpecError("", f"is damaged: {reason}", "fit it again: predict --save", str(file)) from error
        return predictor


def fit_best(
    seen: Sequence[Observation], seed: int = 0, names: Iterable[LearnerName] = ("tabular", "gnn", "scaling_law", "cost")
) -> list[Predictor]:
    """Every learner fitted, the best in cross-validation first."""
    fitted = []
    for name in names:
        predictor = Predictor(name)
        predictor.fit(seen, seed)
        fitted.append(predictor)
    return sorted(fitted, key=lambda predictor: -predictor.tau)


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


def rank_correlation(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Kendall's tau; 0 where one side is constant."""
    if np.ptp(np.asarray(a)) == 0 or np.ptp(np.asarray(b)) == 0:
        return 0.0
    return float(kendalltau(a, b).statistic)


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


def _known_features() -> dict[str, list[str]]:
    return {"all": list(FEATURES), "op": list(OP_FEATURES), "block": list(BLOCK_FEATURES)}


def _shaped(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"an array of shape {array.shape} that should be {shape}, or not finite")
    return array
