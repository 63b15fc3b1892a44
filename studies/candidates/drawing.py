"""Candidates of a study: decided, compiled, priced, and held against its limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget
from builder.pricing.cost import Cost, estimate
from builder.pricing.narrowing import Narrower
from searchspace.arch import ArchSpec
from searchspace.choices import Chooser, Decision, RandomChooser, Scalar, check_value
from searchspace.errors import ConstraintError, SpecError
from searchspace.space import Candidate
from studies.candidates.listing import LISTINGS
from studies.candidates.proposal import Proposal
from studies.config import StudyConfig
from studies.data.dataset import DataFacts
from studies.sections import MiddleChooser, check_training, decide_training
from studies.tasks.table import check_fit
from studies.training.plan import Plan, make_plan
from studies.training.recipe import recipe_of

_TRIES = 64  # ways to fill in what is not given


class HintedChooser:
    """Repeats given decisions where they are allowed, and draws the others at random."""

    def __init__(self, given: Mapping[str, Scalar], seed: int) -> None:
        self._given = given
        self._random = RandomChooser(seed)

    def choose(self, decision: Decision) -> Scalar:
        value = self._given.get(decision.name, ...)
        if value is not ...:
            try:
                check_value(decision, value)
            except SpecError:
                pass
            else:
                return value
        return self._random.choose(decision)


class Candidates:
    """What may be launched of a study's space.

    Args:
        study: its space, training settings and seed.
        budget: absolute limits.
        facts: of the data.
    """

    def __init__(self, study: StudyConfig, budget: Budget, facts: DataFacts) -> None:
        self.study, self.budget = study, budget
        self._facts = facts
        self._baseline = (study.baselines[0], estimate(compile_arch(study.baselines[0]))) if study.baselines else None
        self.seen: set[str] = set()
        """Keys of everything launched (`trial_key`)."""
        self.counts: Counter[str] = Counter()
        """How many were ``drawn``; the proposer adds what it ``rejected``, and launches drawn at ``random``."""

    def complete(self, given: Mapping[str, Scalar], seed: int, *, narrow: bool = True) -> Proposal | None:
        """A candidate that keeps the given decisions where it can; None if it may not be launched."""
        return self.draw(HintedChooser(given, seed), narrow=narrow)[0]

    def of_decisions(self, given: Mapping[str, Scalar]) -> Proposal | None:
        """A candidate with these decisions, the others drawn at random, the same every time; None if none is found."""
        for seed in range(_TRIES):
            proposal, _, _ = self.draw(HintedChooser(given, seed), narrow=seed > 0)
            if proposal is not None and given.items() <= proposal.choices.items():
                return proposal
        return None

    def of_arch(self, arch: ArchSpec) -> Proposal | None:
        """An architecture as it is given, trained as baselines are; None if it has been launched.

        Raises:
            SpecError: if it can't be trained, or is over the budget.
        """
        graph, training = compile_arch(arch), decide_training(self.study.training, MiddleChooser())
        cost = estimate(graph)
        if over := [metric for metric, excess in self.budget.excesses(cost).items() if excess > 0]:
            what = f"{arch.name} is over the budget: {', '.join(over)}"
            raise SpecError("", what, "leave it out, or widen the budget")
        settings = self.settle(arch, cost, training.tree)
        if trial_key("search", graph.arch_id, settings, self.study.search.seed) in self.seen:
            return None
        return Proposal(Candidate(arch, {}), graph, cost, settings, training.choices)

    @cached_property
    def _narrower(self) -> Narrower | None:
        """It takes seconds to learn; who draws at random from a wide budget never needs it."""
        search = self.study.search
        return Narrower(self.study.space, self.budget) if search.narrow and search.sampler not in LISTINGS else None

    def narrowed(self, chooser: Chooser) -> Chooser:
        """Decides the same way, but only what can still be within the budget."""
        return chooser if self._narrower is None else self._narrower.wrap(chooser)

    def draw(self, chooser: Chooser, *, narrow: bool = True) -> tuple[Proposal | None, str, dict[str, float]]:
        """One candidate, priced; or why not, and by how much it exceeds each limit."""
        self.counts["drawn"] += 1
        try:
            candidate = self.study.space.draw(self.narrowed(chooser) if narrow else chooser)
            training = decide_training(self.study.training, chooser)
            graph = compile_arch(candidate.arch)
            cost = estimate(graph)
            excesses = dict(self.budget.excesses(cost))
            settings = self.settle(candidate.arch, cost, training.tree)
        except ConstraintError as error:
            return None, f"constraint {error.problem}", {"constraint": 1.0}
        except SpecError as error:
            return None, f"invalid: {error}", {"invalid": 1.0}
        if over := [metric for metric, excess in excesses.items() if excess > 0]:
            return None, f"over budget: {', '.join(over)}", excesses
        if trial_key("search", graph.arch_id, settings, self.study.search.seed) in self.seen:
            return None, "duplicate", {}
        choices = {**candidate.choices, **training.choices}
        return Proposal(candidate, graph, cost, settings, choices), "", {}

    def settle(self, arch: ArchSpec, cost: Cost, training: dict[str, Any]) -> dict[str, Any]:
        """The training settings with what the size decides, as they are recorded. Raises as `plan` does."""
        return {**training, **asdict(self.plan(arch, cost, training).recipe)}

    def plan(self, arch: ArchSpec, cost: Cost, training: dict[str, Any]) -> Plan:
        """How a candidate is trained. A batch that is left open is the baseline's, so that all see the same batches.

        Raises:
            SpecError: if the training budget lasts for no step, or the data does not fit.
        """
        check_fit(arch, self._facts)
        config = check_training(training)
        if config.batch_tokens is None and self._baseline is not None:
            batch = recipe_of(config, *self._baseline).batch_tokens
            config = replace(config, batch_tokens=max(batch, arch.seq_len))
        return make_plan(config, arch, cost)


def trial_key(purpose: str, arch_id: str, training: dict[str, object], seed: int) -> str:
    """What must not be trained twice."""
    return f"{purpose}:{arch_id}:{seed}:" + ",".join(f"{k}={training[k]}" for k in sorted(training))
