"""The training loop: spends a FLOP or token budget to the nearest whole step, and resumes bit for bit.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.iterations import Run, drawn, segments_of
from builder.lowering import build_model
from builder.parametrization import Factors, factors_of
from builder.pricing.cost import estimate
from builder.schedules import model_under, tried_models
from searchspace.arch import ArchSpec
from searchspace.tables import TableError
from spiralformer.block import LAYERS, Block
from spiralformer.model import SpiralFormer
from studies.config import StudyConfig
from studies.data.dataset import Dataset, added_metrics
from studies.probes.table import probe
from studies.sections import MiddleChooser, TrainingConfig, check_training, decide_training
from studies.tasks.table import check_fit
from studies.training.plan import make_plan, rate_at
from studies.training.recipe import Recipe

_EPS = 1e-8  # of AdamW, at the base
_EVAL_BATCH = 8192  # tokens at least
_POINTS = 32  # of a training curve: each waits for the device, and stands in the journal
_PROBED = 4  # sequences
_MOST_VIEWS = 512  # kept: some 100 KiB each
_CHECK_EVERY = 10  # steps between looks at the loss: each waits for the device


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class Trainer:
    """One model, its optimizer and its place in the run.

    Args:
        arch: what to train.
        config: decided training settings.
        corpus: prepared data; its vocabulary must fit.
        seed: of initial weights, dropout and batches.
        device: ``cpu`` or ``cuda``.

    Raises:
        SpecError: if data and architecture do not fit.
    """

    def __init__(
        self, arch: ArchSpec, config: TrainingConfig, corpus: Dataset, *, seed: int, device: str = "cpu"
    ) -> None:
        check_fit(arch, corpus.facts)
        graph = compile_arch(arch)
        self.cost = estimate(graph)
        self.plan = make_plan(config, graph, self.cost)
        self.arch, self.config, self.corpus, self.seed, self.device = arch, config, corpus, seed, device
        torch.manual_seed(seed)
        self.model = build_model(graph, seed=seed, device=device)
        self.optimizers = make_optimizers(self.model, config, self.plan.recipe, factors_of(self.model, graph))
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and device != "cpu")
        self.step = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []
        """Training loss: tokens seen, and the mean since the point before; some thirty points of a whole run."""
        self._since = torch.zeros((), device=device)
        """Losses summed since the last point."""
        self._ends = self.plan.num_steps
        """The step at which the schedule of the rate ends."""
        self._trunk: dict[str, Any] | None = None
        uses = Counter(node.attr("block", str) for node in graph.nodes if node.op == "block")
        for name, module in self.model.named_modules():
            if isinstance(module, Block):
                used = uses[name.removeprefix("blocks.").removesuffix("_")]
                module.gradient_checkpointing = config.recompute == "loop" and used > 1
        if config.compile == "blocks" or (config.compile == "auto" and device != "cpu"):
            _compile_blocks(self.model, graph)
        self._batches = _Batches(self)
        self._views: dict[tuple[tuple[str, Run], ...], SpiralFormer] = {}
        self._segments = segments_of(arch)
        self._carried: list[dict[str, torch.Tensor]] = []
        """Where the next step's loops begin, for each part of the batch."""

    def _drawn(self, step: int) -> SpiralFormer:
        """The model as one step of training runs it: where its iterations are drawn, a view of it under them."""
        key = tuple(sorted(drawn(self.arch, self.seed, step).items()))
        if not key:
            return self.model
        if key not in self._views:
            totals, held = {name: run.total for name, run in key}, {name: run.held for name, run in key}
            if len(self._views) >= _MOST_VIEWS:
                self._views.pop(next(iter(self._views)))
            self._views[key] = model_under(self.model, self.arch, totals, held)[1]
        view = self._views[key].train(self.model.training)
        assert isinstance(view, SpiralFormer)
        return view

    @property
    def flops(self) -> float:
        """Training FLOPs of the way to here, other branches left out."""
        return self.step * self.plan.flops_per_step

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.step * self.plan.tokens_per_step

    def train(self, until: int, time_limit_s: float = math.inf) -> float:
        """Train up to step ``until``, or until the time is up.

        Returns:
            Mean training loss of these steps.

        Raises:
            DivergedError: when the loss is not finite.
        """
        self.model.train()
        start = time.perf_counter()
        total = torch.zeros((), device=self.device)
        steps = 0
        every = max(1, self.plan.num_steps // _POINTS)
        while self.step < until:
            loss = self._train_step()
            total += loss
            self._since += loss
            self.step += 1
            steps += 1
            if self.step % every == 0:
                self.curve.append((self.tokens, round(self._since.item() / every, 4)))
                self._since.zero_()
            time_is_up = time.perf_counter() - start > time_limit_s
            looks = steps % _CHECK_EVERY == 0 or self.step == until or time_is_up  # each look waits for the device
            if looks and not math.isfinite(total.item()):
                raise DivergedError(f"the training loss is {total.item()} at step {self.step}")
            if time_is_up:
                break
        self.seconds += time.perf_counter() - start
        return total.item() / max(1, steps)

    def branch(self, ends: int) -> None:
        """Leave the trunk here: the rate decays from now on, to step ``ends`` (WSD; arXiv 2405.18392)."""
        self._trunk, self._ends = copy.deepcopy(self.state()), ends

    def rejoin(self) -> None:
        """Go back to where the trunk was left; without a branch, nothing."""
        if self._trunk is None:
            return
        spent = self.seconds
        self.restore(self._trunk)
        self.seconds = spent

    def _train_step(self) -> torch.Tensor:
        share = rate_at(self.config, self.plan.recipe, self.step, self._ends)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        segment = self.step % self._segments
        inputs_BL, targets_BL = self._batches.get(self.step // self._segments)
        total = torch.zeros((), device=self.device)
        parts, model = min(self.config.micro_batches, self.plan.batch_size), self._drawn(self.step)
        begun = iter(self._carried if segment else [])
        self._carried = []
        for inputs, targets in zip(inputs_BL.chunk(parts), targets_BL.chunk(parts), strict=True):
            inputs, targets = (each.to(self.device, non_blocking=True) for each in (inputs, targets))
            with self._autocast():
                logits, own, carried = model.with_losses(inputs, next(begun, None))
            if segment + 1 < self._segments:
                self._carried.append(carried)
            share_of_batch = len(inputs) / len(inputs_BL)
            loss = self.corpus.loss(logits, targets)
            (sum(own.values(), start=loss) * share_of_batch).backward()
            total += loss.detach() * share_of_batch
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Score and metrics on held-out data. Raises `DivergedError` when a mean is not finite."""
        self.model.eval()
        size = max(self.plan.batch_size, _EVAL_BATCH // self.arch.seq_len)  # small steps would take their time here too
        batches = self.corpus.eval_batches(self.config.eval_tokens, size, self.arch.seq_len)
        found = []
        for inputs_BL, targets_BL in batches:
            with self._autocast():
                logits_BLV = self.model(inputs_BL.to(self.device))
            found.append(self.corpus.measure_all(logits_BLV, targets_BL.to(self.device)))
        means = {name: torch.stack([each[name] for each in found]).mean().item() for name in found[0]}
        for name, value in means.items():
            if not math.isfinite(value):
                raise DivergedError(f"the held-out {name} is {value} at step {self.step}")
        added = {row.name: means.pop(row.name) for row in added_metrics(self.corpus.facts.task)}
        tried = tried_models(self.model, self.arch)
        asked_more = self.corpus.measure_model(self.model, self.config.eval_tokens, tried)
        metrics = {**self.corpus.result(means), **asked_more, **added, **self._probed()}
        if lacks := set(self.corpus.metrics) - set(metrics):
            raise TableError(f"{type(self.corpus).__name__} names metrics that it does not measure: {sorted(lacks)}")
        return self.corpus.score(metrics), metrics

    def _probed(self) -> Mapping[str, float]:
        """What `TrainingConfig.probes` ask of the model, on a few held-out examples."""
        if not self.config.probes:
            return {}
        batches = self.corpus.eval_batches(_PROBED * self.arch.seq_len, _PROBED, self.arch.seq_len)
        inputs_BL, targets_BL = (each.to(self.device) for each in next(batches))

        def judge(logits_BLV: torch.Tensor) -> float:
            return self.corpus.loss(logits_BLV, targets_BL).item()

        return probe(self.config.probes, self.model, self.arch, inputs_BL, judge)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "ends": self._ends,
            "trunk": self._trunk,
            "curve": [*self.curve],
            "since": self._since.item(),
            "carried": self._carried,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device != "cpu" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the rest of the run is bit-equal on a CPU."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self._ends, self._trunk = state["ends"], state["trunk"]
        self.curve = [(tokens, loss) for tokens, loss in state["curve"]]
        self._since.fill_(state["since"])
        self._carried = [{loop: at.to(self.device) for loop, at in part.items()} for part in state["carried"]]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device != "cpu":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())


class _Batches:
    """Training batches; for a GPU the next one is made in a thread while a step runs, in pinned memory."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._thread = ThreadPoolExecutor(1) if trainer.device != "cpu" else None
        self._next: tuple[int, Future[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one step."""
        if self._thread is None:
            return self._make(step)
        ready = self._next[1].result() if self._next is not None and self._next[0] == step else self._pinned(step)
        self._next = (step + 1, self._thread.submit(self._pinned, step + 1))
        return ready

    def _make(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        t = self._trainer
        return t.corpus.batch(t.seed, step, t.plan.batch_size, t.arch.seq_len)

    def _pinned(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs_BL, targets_BL = self._make(step)
        return inputs_BL.pin_memory(), targets_BL.pin_memory()


def _compile_blocks(model: nn.Module, graph: Graph) -> None:
    """Compile layer by layer, one static variant per length; the limit on variants follows from the graph.

    Compiling the whole model takes several times as long cold, for the same steady speed.
    """
    from torch import _dynamo  # a second to import, for nothing where nothing is compiled

    torch.compiler.reset()
    calls = [node for node in graph.nodes if node.op == "block"]
    lengths = {(node.attr("block", str), node.level.closed_chunks(graph.seq_len)) for node in calls}
    _dynamo.config.recompile_limit = 8 + 4 * len(lengths)  # training and evaluation, with and without grad
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.compile(dynamic=False)


def make_optimizers(
    model: nn.Module, config: TrainingConfig, recipe: Recipe, factors: Mapping[str, Factors]
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of blocks beside it; weight decay on matrices only."""
    named = list(model.named_parameters())
    by_muon = {name for name, p in named if config.optimizer == "muon" and name.startswith("blocks.") and p.dim() == 2}
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, p in named:
        if name not in by_muon:
            own = factors[name]
            decay = config.weight_decay * own.decay if p.dim() >= 2 else 0.0
            groups.setdefault((recipe.lr * own.lr, decay, _EPS * own.eps), []).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": ps, "lr": lr, "weight_decay": decay, "eps": eps} for (lr, decay, eps), ps in groups.items()],
            betas=(0.9, recipe.beta2),
            fused=True,
        )
    ]
    if by_muon:
        # An update of AdamW's RMS that is orthogonal grows with sqrt(width) in spectral norm, AdamW's with width.
        wide = next(factors[name].lr for name in by_muon) ** 0.5
        muon = torch.optim.Muon(
            [p for name, p in named if name in by_muon],
            lr=config.muon_lr * wide,
            weight_decay=config.weight_decay / wide,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def measure_speed(study: StudyConfig, corpus: Dataset, device: str, *, for_s: float = 1.0) -> float:
    """Training FLOPs per second of one worker, from a short run of the first baseline or a sample."""
    arch = study.baselines[0] if study.baselines else study.space.sample(0).arch
    config = check_training(decide_training(study.training, MiddleChooser()).tree)
    torch.set_num_threads(study.resources.cpus_per_trial)
    trainer = Trainer(arch, config, corpus, seed=0, device=device)
    trainer.train(1)  # warm-up; the schedule of the learning rate does not matter here
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < for_s:
        trainer.train(trainer.step + 1)
        steps += 1
    return steps * trainer.plan.flops_per_step / (time.perf_counter() - start)
