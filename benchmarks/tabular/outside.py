"""Optimisers that are not ours on the table, each through its own ask and tell: Ax and NePS.

    python benchmarks/tabular/outside.py --method ax --budget-flops-per-token X [--seeds 50] [--spend 60] --out FILE

They are no dependencies of this project and exclude one another, so each needs an environment of its own, which
needs nothing of the project: `pip install ax-platform==1.3.1`, or `pip install neural-pipeline-search==0.17.0`.

Sequential: one trial at a time. A training costs its share of a full one, a continued one only the difference, and a
configuration that is asked for again is charged again, for that is what the optimiser would cost. A candidate over
the budget is not trained: that costs nothing, and the optimiser is told in its own way that there is no loss.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

LONGEST = 3
MAX_ASKS = 3000

Key = tuple[tuple[str, ...], str]
"""A schedule and its topology."""


class Table:
    """Losses by candidate and rung, and the choices that the candidates are made of."""

    def __init__(self, file: Path) -> None:
        data = json.loads(file.read_text(encoding="utf-8"))
        self.rungs: list[float] = data["rungs"]
        self.rows: dict[Key, dict[str, Any]] = {(tuple(row["schedule"]), row["topology"]): row for row in data["rows"]}

    def choices(self, seed: int) -> dict[str, list[Any]]:
        """The flat space, its choices in an order of the seed's: some designs begin with whatever is named first."""
        shuffled = random.Random(seed)
        places = sorted({name for names, _ in self.rows for name in names})
        values: dict[str, list[Any]] = {"length": list(range(1, LONGEST + 1))}
        values |= {f"place{i}": places for i in range(LONGEST)}
        values |= {"topology": sorted({topology for _, topology in self.rows})}
        return {name: shuffled.sample(options, len(options)) for name, options in values.items()}


def key_of(config: Mapping[str, Any]) -> Key:
    """A candidate of the flat space: places beyond its length mean nothing."""
    return tuple(config[f"place{i}"] for i in range(config["length"])), config["topology"]


@dataclass(frozen=True)
class Ask:
    """What an optimiser wants trained, up to which rung, and from which it goes on."""

    key: Key
    trial: Any
    rung: int = -1
    trained: int | None = None


class Optimiser(Protocol):
    """Asked and told one trial at a time; a loss of None says that the candidate is over the budget."""

    def ask(self) -> Ask: ...

    def tell(self, ask: Ask, loss: float | None) -> None: ...


class Ax:
    """Ax's Bayesian optimisation for categorical spaces, Sobol first."""

    package = "ax-platform"
    options = (
        "Client, Sobol until 10 trials have a loss, then BO_MIXED (a GP with Hamming distances, log noisy EI over all "
        "choices), deduplicated; flat space, places beyond the length ignored; over the budget: mark_trial_abandoned"
    )

    def __init__(self, table: Table, seed: int) -> None:
        from ax.adapter.registry import Generators
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig
        from ax.generation_strategy.generation_node import GenerationNode
        from ax.generation_strategy.generation_strategy import GenerationStrategy
        from ax.generation_strategy.generator_spec import GeneratorSpec
        from ax.generation_strategy.transition_criterion import MinTrials

        quiet("ax")
        self.client = Client(random_seed=seed)
        self.client.configure_experiment(
            parameters=[
                # The length alone has an order. Ax sorts numbers itself.
                ChoiceParameterConfig(
                    name=name,
                    values=values,
                    parameter_type="int" if name == "length" else "str",
                    is_ordered=name == "length",
                )
                for name, values in table.choices(seed).items()
            ]
        )
        self.client.configure_optimization(objective="-loss")
        # The Client's own strategy optimises a continuous relaxation of one-hot choices; BO_MIXED is what Ax has for
        # spaces of choices, where it can look at every one of them.
        sobol = GenerationNode(
            name="Sobol",
            generator_specs=[GeneratorSpec(generator_enum=Generators.SOBOL, generator_kwargs={"seed": seed})],
            transition_criteria=[
                MinTrials(
                    threshold=10, transition_to="MBM", use_all_trials_in_exp=True, count_only_trials_with_data=True
                )
            ],
            should_deduplicate=True,
        )
        mixed = GenerationNode(
            name="MBM", generator_specs=[GeneratorSpec(generator_enum=Generators.BO_MIXED)], should_deduplicate=True
        )
        self.client.set_generation_strategy(GenerationStrategy(name="Sobol+BO_MIXED", nodes=[sobol, mixed]))

    def ask(self) -> Ask:
        ((number, config),) = self.client.get_next_trials(max_trials=1).items()
        return Ask(key_of(config), number)

    def tell(self, ask: Ask, loss: float | None) -> None:
        if loss is None:
            self.client.mark_trial_abandoned(ask.trial)  # "not able to be re-suggested"; a failed one could be
        else:
            self.client.complete_trial(ask.trial, {"loss": loss})


class Neps:
    """One of NePS's algorithms."""

    package = "neural-pipeline-search"

    def __init__(self, table: Table, seed: int, algorithm: str, *, nested: bool, fidelity: bool) -> None:
        import neps
        import numpy as np
        import torch
        from neps.space.neps_spaces.neps_space import adjust_evaluation_pipeline_for_neps_space

        quiet("neps")
        random.seed(seed)  # NePS has no seed of its own
        np.random.seed(seed)
        torch.manual_seed(seed)
        choices = table.choices(seed)
        steps = round(table.rungs[-1] / table.rungs[0])  # in integers, for NePS floors logarithms
        space: Any
        if nested:
            place = neps.Categorical(choices=tuple(choices["place0"]))
            lengths = [tuple(neps.Resample(place) for _ in range(n)) for n in choices["length"]]
            members: dict[str, Any] = {
                "place": place,
                "schedule": neps.Categorical(choices=tuple(lengths)),
                "topology": neps.Categorical(choices=tuple(choices["topology"])),
            }
            if fidelity:
                members["steps"] = neps.IntegerFidelity(lower=1, upper=steps)
            space = type("Space", (neps.PipelineSpace,), members)()  # NePS overlooks what a space inherits
            self.key: Callable[..., Key] = adjust_evaluation_pipeline_for_neps_space(
                lambda schedule, topology, **_: (tuple(schedule), topology), space
            )
        else:
            flat: dict[str, Any] = {name: neps.HPOCategorical(values) for name, values in choices.items()}
            if fidelity:
                flat["steps"] = neps.HPOInteger(1, steps, is_fidelity=True)
            space = neps.SearchSpace(flat)  # a PipelineSpace's strings would go through a set, in an order of no seed's
            self.key = lambda **config: key_of(config)
        self.optimiser = neps.AskAndTell(getattr(neps.algorithms, algorithm)(space))

    def ask(self) -> Ask:
        trial = self.optimiser.ask()
        rung, before = (
            int(name.partition("_rung_")[2] or -1) if name else None
            for name in (trial.id, trial.metadata.previous_trial_id)
        )
        assert rung is not None
        return Ask(self.key(**trial.config), trial, rung, before)

    def tell(self, ask: Ask, loss: float | None) -> None:
        # An exception is how an evaluation fails in NePS: never promoted nor a parent; to the GP, the median loss.
        self.optimiser.tell(ask.trial, RuntimeError("over the budget") if loss is None else loss)
