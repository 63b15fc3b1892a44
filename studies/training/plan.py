"""How far a training goes, and whether data and architecture fit: what can be told before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from builder.pricing.cost import Cost
from searchspace.errors import SpecError
from studies.sections import TrainingConfig
from studies.training.recipe import Recipe, Shape, recipe_of

FEW_STEPS = 50
"""Losses after fewer steps tell little of longer training."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes, and how far."""

    recipe: Recipe
    batch_size: int
    num_steps: int
    flops_per_step: float
    tokens_per_step: int

    def step_at(self, share: float) -> int:
        """The step by which ``share`` of the budget is spent."""
        return max(1, min(self.num_steps, round(self.num_steps * share)))

    def branch_at(self, share: float, decay: float) -> int:
        """The step at which a decay that ends with ``share`` of the budget leaves the trunk."""
        return self.step_at(share) - max(1, round(decay * self.step_at(share)))


def make_plan(config: TrainingConfig, shape: Shape, cost: Cost) -> Plan:
    """Decide what is left open by size, and divide the budget into steps.

    Args:
        config: the settings.
        shape: the architecture, or its graph.
        cost: its price.

    Raises:
        SpecError: if the budget does not last for one step.
    """
    recipe, seq_len = recipe_of(config, shape, cost), shape.seq_len
    if recipe.batch_tokens < seq_len:
        raise SpecError(
            "training.batch_tokens",
            f"{recipe.batch_tokens} is less than one sequence of {seq_len}",
            f"use {seq_len} or more",
        )
    batch_size = recipe.batch_tokens // seq_len
    tokens = batch_size * seq_len
    flops = tokens * cost.training_flops_per_token
    steps = round(config.flops / flops) if config.flops is not None else round((config.tokens or 0) / tokens)
    if steps < 1:
        what = f"flops ({config.flops:.3g})" if config.flops is not None else f"tokens ({config.tokens:.3g})"
        need = f"{flops:.3g} FLOPs" if config.flops is not None else f"{tokens} tokens"
        raise SpecError(
            "training",
            f"{what} do not last for one step, which takes {need}",
            "raise it" if config.batch_tokens is None else "raise it, or lower batch_tokens",
        )
    return Plan(recipe, batch_size, steps, flops, tokens)


def rate_at(config: TrainingConfig, recipe: Recipe, step: int, num_steps: int) -> float:
    """Learning rate of one step, as a share of the peak: warm-up, then cosine, or stable and linear decay (WSD)."""
    warmup = math.ceil(config.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_schedule == "cosine":
        progress = (step - warmup) / max(1, num_steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, (num_steps - step) / max(1.0, config.decay * num_steps))
    return recipe.final_lr + (1 - recipe.final_lr) * share
