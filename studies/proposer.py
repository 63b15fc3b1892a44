"""Proposals: asked of an Optuna sampler, decided, compiled and priced in the driver before anything runs."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState as OptunaState

from builder.budget import Budget
from builder.compiler import compile_arch
from builder.cost import Cost, estimate
from builder.ir import Graph
from searchspace.arch import ArchSpec
from searchspace.choices import Categorical, Decision, Integer, RandomChooser, Scalar
from searchspace.errors import ConstraintError, SpecError
from searchspace.space import Candidate
from studies.config import StudyConfig, check_training, decide_training
from studies.data import CorpusFacts
from studies.training import check_fit, make_plan

_JOURNALED_REJECTIONS = 2
_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class Proposal:
    """A priced candidate with decided training settings."""

    candidate: Candidate
    graph: Graph
    cost: Cost
    training: dict[str, object]
    choices: dict[str, Scalar]
    """All decisions: the architecture's and the training's."""


class OptunaChooser:
    """Decisions by an Optuna trial. A value beyond what is still allowed is brought to the nearest that is."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def choose(self, decision: Decision) -> Scalar:
        if isinstance(decision, Categorical):
            value: Scalar = self._trial.suggest_categorical(decision.name, decision.options)
            return value
        if isinstance(decision, Integer):
            whole = self._trial.suggest_int(
                decision.name, decision.low, decision.high, step=decision.step, log=decision.log
            )
            return whole if decision.limit is None else min(whole, decision.limit)
        return self._trial.suggest_float(
            decision.name, decision.low, decision.high, step=decision.step, log=decision.log
        )


class Proposer:
    """Finds feasible candidates that have not been launched.

    Args:
        study: its space, training settings and sampler.
        budget: absolute limits.
        facts: of the data.
    """

    def __init__(self, study: StudyConfig, budget: Budget, facts: CorpusFacts) -> None:
        self.study, self.budget = study, budget
        self._facts = facts
        self.seen: set[str] = set()
        """Keys of everything launched (`trial_key`)."""
        self.rejected = 0
        self.exhausted = ""
        """Why it gave up, if it has."""

    def propose(self, study: optuna.Study, number: int) -> tuple[optuna.Trial, Proposal] | None:
        """The next candidate to launch; None when 1,000 draws in a row were rejected.

        Asks the sampler at most twice, then draws feasible at random: a launch costs bounded work.
        """
        for attempt in range(_JOURNALED_REJECTIONS):
            study.sampler = make_sampler(self.study, _seed_of(self.study.search.seed, number, attempt))
            trial = study.ask()
            proposal, reason, excesses = self._draw(OptunaChooser(trial))
            if proposal is not None:
                return trial, proposal
            self.reject(trial, reason, excesses)
        draw = random.Random(f"{self.study.search.seed}:{number}")
        reasons: list[str] = []
        for _ in range(_PATIENCE):
            proposal, reason, _ = self._draw(RandomChooser(draw.getrandbits(48)))
            if proposal is not None:
                study.enqueue_trial(proposal.choices)
                trial = study.ask()
                again, reason, excesses = self._draw(OptunaChooser(trial))
                if again is not None:
                    return trial, again
                self.reject(trial, reason, excesses)
            else:
                self.rejected += 1
            reasons.append(reason)
        worst = max(set(reasons), key=reasons.count)
        self.exhausted = f"stopped proposing after {_PATIENCE} rejections in a row, most often: {worst}"
        return None

    def _draw(self, chooser: OptunaChooser | RandomChooser) -> tuple[Proposal | None, str, dict[str, float]]:
        """One candidate, priced; or why not, and by how much it exceeds each limit."""
        try:
            candidate = self.study.space.draw(chooser)
            training = decide_training(self.study.training, chooser)
            graph = compile_arch(candidate.arch)
            cost = estimate(graph)
            excesses = dict(self.budget.excesses(cost))
            self.check_runnable(candidate.arch, cost, training.tree)
        except ConstraintError as error:
            return None, f"constraint {error.problem}", {"constraint": 1.0}
        except SpecError as error:
            return None, f"invalid: {error}", {"invalid": 1.0}
        if over := [metric for metric, excess in excesses.items() if excess > 0]:
            return None, f"over budget: {', '.join(over)}", excesses
        if trial_key("search", graph.arch_id, training.tree, self.study.search.seed) in self.seen:
            return None, "duplicate", {}
        choices = {**candidate.choices, **training.choices}
        return Proposal(candidate, graph, cost, training.tree, choices), "", {}

    def check_runnable(self, arch: ArchSpec, cost: Cost, training: dict[str, object]) -> None:
        """Raise `SpecError` if the training budget lasts for no step, or the data does not fit."""
        make_plan(check_training(training), arch.seq_len, cost.training_flops_per_token)
        check_fit(arch, self._facts)

    def reject(self, trial: optuna.Trial, reason: str, excesses: dict[str, float]) -> None:
        """Told as pruned with constraint values, which teaches TPE; without values, as failed."""
        self.rejected += 1
        trial.set_user_attr("rejected", reason)
        for metric, excess in excesses.items():
            trial.set_constraint(metric, excess)
        state = OptunaState.PRUNED if any(e > 0 for e in excesses.values()) else OptunaState.FAIL
        trial.study.tell(trial, state=state)


def make_sampler(study: StudyConfig, seed: int) -> BaseSampler:
    """The sampler for one proposal, seeded for it alone: resuming needs no replay."""
    startup = max(4, min(10, study.search.num_trials // 4))
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(
            multivariate=True, group=True, constant_liar=True, n_startup_trials=startup, seed=seed
        ),
        "random": lambda: RandomSampler(seed=seed),
        "nsga2": lambda: NSGAIISampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[study.search.sampler]()


def _seed_of(study_seed: int, number: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{study_seed}:{number}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def trial_key(purpose: str, arch_id: str, training: dict[str, object], seed: int) -> str:
    """What must not be trained twice."""
    return f"{purpose}:{arch_id}:{seed}:" + ",".join(f"{k}={training[k]}" for k in sorted(training))
