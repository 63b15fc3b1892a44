"""The training loop: spends a FLOP or token budget exactly, and resumes bit for bit.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from builder.compiler import compile_arch
from builder.cost import estimate
from builder.lowering import build_model
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from studies.config import TrainingConfig
from studies.data import Corpus

_CHECK_EVERY = 10


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How far a run goes."""

    batch_size: int
    num_steps: int
    flops_per_step: float
    tokens_per_step: int

    def step_at(self, share: float) -> int:
        """The step by which ``share`` of the budget is spent."""
        return max(1, min(self.num_steps, round(self.num_steps * share)))


def make_plan(config: TrainingConfig, seq_len: int, training_flops_per_token: float) -> Plan:
    """Divide the budget into steps.

    Raises:
        SpecError: if it does not last for one step.
    """
    batch_size = max(1, config.batch_tokens // seq_len)
    tokens = batch_size * seq_len
    flops = tokens * training_flops_per_token
    steps = round(config.flops / flops) if config.flops is not None else round((config.tokens or 0) / tokens)
    if steps < 1:
        what = f"flops ({config.flops:.3g})" if config.flops is not None else f"tokens ({config.tokens:.3g})"
        need = f"{flops:.3g} FLOPs" if config.flops is not None else f"{tokens} tokens"
        raise SpecError(
            "training", f"{what} do not last for one step, which takes {need}", "raise it, or lower batch_tokens"
        )
    return Plan(batch_size, steps, flops, tokens)


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Learning rate of one step: warm-up, then cosine, or stable and linear decay (WSD)."""
    warmup = math.ceil(config.warmup * num_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "cosine":
        progress = (step - warmup) / max(1, num_steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, (num_steps - step) / max(1.0, config.decay * num_steps))
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)


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
        self, arch: ArchSpec, config: TrainingConfig, corpus: Corpus, *, seed: int, device: str = "cpu"
    ) -> None:
        if corpus.facts.vocab_size > arch.vocab_size:
            raise SpecError(
                "vocab_size",
                f"{arch.vocab_size} is too small for data with {corpus.facts.vocab_size} tokens",
                f"use {corpus.facts.vocab_size} or more",
            )
        graph = compile_arch(arch)
        self.cost = estimate(graph)
        self.plan = make_plan(config, arch.seq_len, self.cost.training_flops_per_token)
        self.arch, self.config, self.corpus, self.seed, self.device = arch, config, corpus, seed, device
        random.seed(seed)
        torch.manual_seed(seed)
        self.model = build_model(graph, seed=seed, device=device)
        self.optimizer = _make_optimizer(self.model, config, fused=device != "cpu")
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and device != "cpu")
        self.step = 0
        self.seconds = 0.0

    @property
    def flops(self) -> float:
        """Training FLOPs spent."""
        return self.step * self.plan.flops_per_step

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.step * self.plan.tokens_per_step

    def train(self, until: int, time_limit_s: float = math.inf) -> float:
        """Train up to step ``until``, or until the time is up.

        Returns:
            Mean training loss of these steps, nats per token.

        Raises:
            DivergedError: when the loss is not finite.
        """
        self.model.train()
        start = time.perf_counter()
        total = torch.zeros((), device=self.device)
        steps = 0
        while self.step < until:
            total += self._train_step()
            self.step += 1
            steps += 1
            time_is_up = time.perf_counter() - start > time_limit_s
            looks = steps % _CHECK_EVERY == 0 or self.step == until or time_is_up  # each look waits for the device
            if looks and not math.isfinite(total.item()):
                raise DivergedError(f"the training loss is {total.item()} at step {self.step}")
            if time_is_up:
                break
        self.seconds += time.perf_counter() - start
        return total.item() / max(1, steps)

    def _train_step(self) -> torch.Tensor:
        lr = learning_rate(self.config, self.step, self.plan.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs_BL, targets_BL = self.corpus.batch(self.seed, self.step, self.plan.batch_size, self.arch.seq_len)
        loss = self._loss(inputs_BL, targets_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        inputs_BL = inputs_BL.to(self.device, non_blocking=True)
        targets_BL = targets_BL.to(self.device, non_blocking=True)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            logits_BLV = self.model(inputs_BL)
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out loss, nats per token. Raises `DivergedError` when it is not finite."""
        self.model.eval()
        losses = [
            self._loss(inputs_BL, targets_BL)
            for inputs_BL, targets_BL in self.corpus.eval_batches(
                self.config.eval_tokens, self.plan.batch_size, self.arch.seq_len
            )
        ]
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise DivergedError(f"the held-out loss is {loss} at step {self.step}")
        return loss

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device != "cpu" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the rest of the run is bit-equal on a CPU."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device != "cpu":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())


def _make_optimizer(model: nn.Module, config: TrainingConfig, *, fused: bool) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)
