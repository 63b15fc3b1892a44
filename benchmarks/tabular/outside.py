"""Optimisers that are not ours on the table, each through its own ask and tell: Ax and NePS.

    python benchmarks/tabular/outside.py --method ax --budget-flops-per-token X [--seeds 50] [--spend 60] --out FILE

They are no dependencies of this project, and need different versions of BoTorch. Each has an environment of its own,
without the project: `pip install torch==2.13.0 ax-platform==1.3.1`, or `... neural-pipeline-search==0.17.0`.

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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

MAX_ASKS = 3000
ABSENT = "absent"

Key = tuple[tuple[str, ...], str]
"""A schedule and its topology."""


class Table:
    """Losses by candidate and rung, and what candidates are made of.

    The names are in an order of the seed's: some designs begin with whatever is named first.
    """

    def __init__(self, file: Path) -> None:
        data = json.loads(file.read_text(encoding="utf-8"))
        self.rungs: list[float] = data["rungs"]
        self.rows: dict[Key, dict[str, Any]] = {(tuple(row["schedule"]), row["topology"]): row for row in data["rows"]}

    def names(self, seed: int) -> tuple[list[int], list[str], list[str]]:
        """The lengths, the levels and the topologies."""
        shuffled = random.Random(seed)
        lengths = sorted({len(names) for names, _ in self.rows})
        levels = sorted({name for names, _ in self.rows for name in names})
        topologies = sorted({topology for _, topology in self.rows})
        return tuple(shuffled.sample(values, len(values)) for values in (lengths, levels, topologies))  # type: ignore

    def choices(self, seed: int) -> dict[str, list[str]]:
        """The flat space: as many places as the longest schedule has, all but the first of which can be absent.

        With a length beside the places, those beyond it would mean nothing, which a GP cannot know: half of Ax's
        first 40 trainings were then repeated ones.
        """
        lengths, levels, topologies = self.names(seed)
        later = random.Random(seed).sample([ABSENT, *levels], len(levels) + 1)
        places = {f"place{i}": later if i else levels for i in range(max(lengths))}
        return {**places, "topology": topologies}


def key_of(config: Mapping[str, Any]) -> Key:
    """A candidate of the flat space; the places that are there close up."""
    places = (config[name] for name in sorted(config) if name != "topology")
    return tuple(level for level in places if level != ABSENT), config["topology"]


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
                ChoiceParameterConfig(name=name, values=values, parameter_type="str", is_ordered=False)
                for name, values in table.choices(seed).items()
            ]
        )
        self.client.configure_optimization(objective="-loss")
        # The Client's own strategy optimises a continuous relaxation of one-hot choices; BO_MIXED is what Ax has for
        # spaces of choices, where it can look at every one of them.
        sobol = GenerationNode(
            name="Sobol",
            generator_specs=[GeneratorSpec(generator_enum=Generators.SOBOL, generator_kwargs={"seed": seed})],
            transition_criteria=[MinTrials(threshold=10, transition_to="MBM", count_only_trials_with_data=True)],
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

    def __init__(self, table: Table, seed: int, algorithm: str) -> None:
        import neps
        import numpy as np
        import torch
        from neps.space.neps_spaces.neps_space import adjust_evaluation_pipeline_for_neps_space

        quiet("neps")
        random.seed(seed)  # NePS has no seed of its own
        np.random.seed(seed)
        torch.manual_seed(seed)
        space: Any
        if algorithm == "bayesian_optimization":
            # Flat, for it takes no other; a PipelineSpace's strings would go through a set, in an order of no seed's.
            flat = table.choices(seed)
            space = neps.SearchSpace({name: neps.HPOCategorical(values) for name, values in flat.items()})
            self.key: Callable[..., Key] = lambda **config: key_of(config)
        else:
            lengths, levels, topologies = table.names(seed)
            place = neps.Categorical(choices=tuple(levels))
            schedules = tuple(tuple(neps.Resample(place) for _ in range(length)) for length in lengths)
            members: dict[str, Any] = {
                "_place": place,
                "schedule": neps.Categorical(choices=schedules),
                "topology": neps.Categorical(choices=tuple(topologies)),
            }
            if algorithm == "hyperband":
                steps = round(table.rungs[-1] / table.rungs[0])  # integers: it rounds logarithms down
                members["steps"] = neps.IntegerFidelity(lower=1, upper=steps)
            space = type("Space", (neps.PipelineSpace,), members)()
            self.key = adjust_evaluation_pipeline_for_neps_space(
                lambda schedule, topology, **_: (tuple(schedule), topology), space
            )
        self.optimiser = neps.AskAndTell(getattr(neps.algorithms, algorithm)(space))

    def ask(self) -> Ask:
        trial = self.optimiser.ask()
        rung = int(trial.id.partition("_rung_")[2] or -1)
        before = trial.metadata.previous_trial_id
        return Ask(self.key(**trial.config), trial, rung, int(before.partition("_rung_")[2]) if before else None)

    def tell(self, ask: Ask, loss: float | None) -> None:
        # An exception is how an evaluation fails in NePS: promoted last, no parent, and the median loss to the GP.
        self.optimiser.tell(ask.trial, RuntimeError("over the budget") if loss is None else loss)


NEPS = "neural-pipeline-search"
METHODS: dict[str, tuple[str, str, Callable[[Table, int], Optimiser]]] = {
    "ax": (
        "ax-platform",
        "Client, Sobol until 10 trials have a loss, then BO_MIXED (a GP with Hamming distances, log noisy EI over all "
        "choices), deduplicated; flat space with absent places; over the budget: mark_trial_abandoned",
        Ax,
    ),
    "neps": (
        NEPS,
        "bayesian_optimization as it is; flat space with absent places; over the budget: an exception",
        partial(Neps, algorithm="bayesian_optimization"),
    ),
    "neps-evolution": (
        NEPS,
        "neps_regularized_evolution as it is; nested space; over the budget: an exception",
        partial(Neps, algorithm="neps_regularized_evolution"),
    ),
    "neps-hyperband": (
        NEPS,
        "hyperband as it is (eta 3) on the table's rungs; nested space; over the budget: an exception",
        partial(Neps, algorithm="hyperband"),
    ),
}


def quiet(package: str) -> None:
    """Thousands of lines about each trial tell nothing here."""
    for name in (package, *logging.root.manager.loggerDict):
        if name.partition(".")[0] == package:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


@dataclass
class Run:
    """One seed: the best within the budget whenever it improves, asks that the budget forbids, and repeated ones."""

    trace: list[tuple[float, float]] = field(default_factory=list)
    over_budget_asks: int = 0
    repeats: int = 0
    seconds: float = 0.0


def play(optimiser: Optimiser, table: Table, max_flops_per_token: float, spend: float) -> Run:
    """Look losses up until ``spend`` full trainings are spent."""
    run, spent, best = Run(), 0.0, float("inf")
    seen: set[str] = set()
    start = time.process_time()
    for _ in range(MAX_ASKS):
        if spent >= spend - 1e-9:
            break
        ask = optimiser.ask()
        row = table.rows[ask.key]
        if row["flops_per_token"] > max_flops_per_token:
            run.over_budget_asks += 1
            optimiser.tell(ask, None)
            continue
        if ask.trained is None:
            run.repeats += row["arch_id"] in seen  # two ways to decide can be one architecture
            seen.add(row["arch_id"])
        spent += table.rungs[ask.rung] - (0.0 if ask.trained is None else table.rungs[ask.trained])
        loss = row["losses"]["0"][ask.rung]
        if table.rungs[ask.rung] == table.rungs[-1] and loss < best:
            best = loss
            run.trace.append((round(spent, 6), best))
        optimiser.tell(ask, loss)
    run.seconds = round(time.process_time() - start, 2)
    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "table.json")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--budget-flops-per-token", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--spend", type=float, default=60.0, help="full trainings")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: these matrices are small
    table = Table(args.table)
    package, options, make = METHODS[args.method]
    runs: list[Run] = []
    for seed in range(args.seeds):
        runs.append(play(make(table, seed), table, args.budget_flops_per_token, args.spend))
        print(f"{args.method} {seed}: {runs[-1].trace[-1:]}, {runs[-1].seconds} s", flush=True)
        columns = [asdict(run) for run in runs]
        found = {
            "method": args.method,
            "version": version(package),
            "options": options,
            "traces": [run["trace"] for run in columns],
            **{name: [run[name] for run in columns] for name in ("over_budget_asks", "repeats", "seconds")},
        }
        args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")  # after each seed: it can be cut short


if __name__ == "__main__":
    main()
