"""Proposals: asked of an Optuna sampler, decided, compiled and priced in the driver before anything runs."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, deque

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState as OptunaState

from builder.pricing.budget import Budget
from searchspace.choices import (
    Categorical,
    Chooser,
    Decision,
    Integer,
    RandomChooser,
    Scalar,
)
from searchspace.errors import ConstraintError, SpecError
from searchspace.plain import encode
from studies.candidates.drawing import Candidates, HintedChooser
from studies.candidates.listing import LISTINGS
from studies.candidates.proposal import Proposal
from studies.config import StudyConfig
from studies.data.dataset import DataFacts
from studies.records.journal import settle
from studies.sections import Enqueued
from studies.strategy.samplers import SAMPLERS, Asked, make_sampler, startup_trials
from studies.strategy.surrogate import Surrogate

_JOURNALED_REJECTIONS = 2  # each is a line of the journal; then draws are random
_PATIENCE = 1000  # rejections in a row after which there is hardly anything left
_MISSES = 20_000  # draws that break a constraint, decided anew for little
_UNNARROWED = 200  # rejections before proposals are steered: plain rejection draws evenly


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


class NotingChooser:
    """Notes what another chooser decides."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self.decided: dict[str, Scalar] = {}

    def choose(self, decision: Decision) -> Scalar:
        value = self.decided[decision.name] = self._chooser.choose(decision)
        return value


class Proposer:
    """Finds feasible candidates that have not been launched.

    Args:
        study: its space, training settings and sampler.
        budget: absolute limits.
        facts: of the data.

    Raises:
        SpecError: if the sampler lists candidates, and there are too many.
    """

    def __init__(self, study: StudyConfig, budget: Budget, facts: DataFacts) -> None:
        self.study = study
        self.candidates = Candidates(study, budget, facts)
        self.queue: deque[Enqueued] = deque(study.search.enqueue)
        """To be proposed before the sampler is asked."""
        self.exhausted = ""
        """Why it gave up, if it has."""
        search = study.search
        self._listed = iter(LISTINGS[search.sampler](study)) if search.sampler in LISTINGS else None
        self._learns = SAMPLERS[search.sampler].make is not None
        self.surrogate = Surrogate(search.predictor, search.seed) if search.sampler == "predictor" else None
        """What a sampler ``predictor`` has learned."""

    @property
    def counts(self) -> Counter[str]:
        """Candidates looked at (``drawn``), ``rejected``, and launches that were drawn at ``random``."""
        return self.candidates.counts

    @property
    def rejected(self) -> int:
        """Draws that were not launched."""
        return self.counts["rejected"]

    def propose(self, study: optuna.Study, number: int, launched: int) -> tuple[optuna.Trial, Proposal] | None:
        """The next candidate to launch; None when there is none left, or 1,000 draws in a row were rejected.

        Asks the sampler at most twice, then draws feasible at random: a launch costs bounded work.

        Args:
            study: of searched trials.
            number: of the trial to be.
            launched: searched trials launched before; the first few are drawn at random.
        """
        while self.queue:
            found = self._propose_given(study, self.queue.popleft())
            if found is not None:
                return found
        if self._learns and launched >= startup_trials(self.study.search.num_trials):
            if self.surrogate is not None:
                self.surrogate.learn(study.get_trials(deepcopy=False))
            for attempt in range(_JOURNALED_REJECTIONS):
                study.sampler = self._sampler(_seed_of(self.study.search.seed, number, attempt))
                trial = study.ask()
                chooser = NotingChooser(self.candidates.narrowed(OptunaChooser(trial)))
                proposal, reason, excesses = self.candidates.draw(chooser, narrow=False)
                settle(trial, chooser.decided)
                if proposal is not None:
                    return trial, proposal
                self.reject(trial, reason, excesses)
        return self._propose_listed(study) if self._listed is not None else self._propose_random(study, number)

    def _propose_given(self, study: optuna.Study, given: Enqueued) -> tuple[optuna.Trial, Proposal] | None:
        """What is given, unless it was launched before an interruption."""
        key = _key_of(given)
        if key in _enqueued(study, failed=not self.study.is_custom):
            return None
        if given.arch is not None:
            proposal = self.candidates.of_arch(given.arch)
            found = None if proposal is None else (study.ask(), proposal)
        else:
            found = self._enqueue(study, self.candidates.of_decisions(given.decisions))
        if found is not None:
            found[0].set_user_attr("enqueued", key)
        return found

    def waiting(self, study: optuna.Study) -> int:
        """Given candidates that have not been launched."""
        launched = _enqueued(study, failed=not self.study.is_custom)
        return sum(_key_of(given) not in launched for given in self.study.search.enqueue)

    def _propose_random(self, study: optuna.Study, number: int) -> tuple[optuna.Trial, Proposal] | None:
        draw = random.Random(f"{self.study.search.seed}:{number}")
        reasons: list[str] = []
        misses = 0
        while len(reasons) < _PATIENCE:
            # Rejection alone draws evenly from what fits; where little fits, narrowing finds it.
            narrow = len(reasons) >= _UNNARROWED
            seed = draw.getrandbits(48)
            chooser: Chooser = RandomChooser(seed)
            if (valid := self.study.space.valid) is not None:
                chooser = HintedChooser(draw.choice(valid), seed)
            elif not narrow and misses < _MISSES and not self._holds(seed):
                misses += 1  # decided anew, not given up on
                continue
            proposal, reason, _ = self.candidates.draw(chooser, narrow=narrow)
            found = self._enqueue(study, proposal)
            if found is not None:
                self.counts["random"] += 1
                return found
            self.counts["rejected"] += 1
            reasons.append(reason)
        counted = "; ".join(f"{count} times {reason}" for reason, count in Counter(reasons).most_common(3))
        self.exhausted = f"stopped proposing after {_PATIENCE} rejections in a row: {counted}"
        return None

    def _holds(self, seed: int) -> bool:
        """Whether a random draw satisfies the constraints, for a fraction of what building it takes."""
        if not self.study.space.template.constraints:
            return True
        try:
            self.study.space.template.decide(RandomChooser(seed))
        except ConstraintError:
            return False
        except SpecError:
            pass
        return True

    def _propose_listed(self, study: optuna.Study) -> tuple[optuna.Trial, Proposal] | None:
        for choices in self._listed or ():
            found = self._enqueue(study, self.candidates.draw(HintedChooser(choices, 0), narrow=False)[0])
            if found is not None:
                return found
            self.counts["rejected"] += 1
        self.exhausted = (
            f"every candidate of the sampler {self.study.search.sampler} within the budget has been launched"
        )
        return None

    def _enqueue(self, study: optuna.Study, proposal: Proposal | None) -> tuple[optuna.Trial, Proposal] | None:
        """Have the study ask for exactly this proposal."""
        if proposal is None:
            return None
        study.enqueue_trial(proposal.choices)
        trial = study.ask()
        again, reason, excesses = self.candidates.draw(OptunaChooser(trial), narrow=False)
        self.counts["drawn"] -= 1  # the same again
        if again is None:
            self.reject(trial, reason, excesses)
            return None
        return trial, again

    def _sampler(self, seed: int) -> BaseSampler:
        search = self.study.search
        asked = Asked(
            seed=seed,
            num_trials=search.num_trials,
            schedules=self.study.space.schedules,
            complete=self.candidates.complete,
            surrogate=self.surrogate,
        )
        return make_sampler(search.sampler, asked)

    def reject(self, trial: optuna.Trial, reason: str, excesses: dict[str, float]) -> None:
        """Told as pruned with constraint values, which teaches TPE; without values, as failed."""
        self.counts["rejected"] += 1
        trial.set_user_attr("rejected", reason)
        for metric, excess in excesses.items():
            trial.set_constraint(metric, excess)
        state = OptunaState.PRUNED if any(e > 0 for e in excesses.values()) else OptunaState.FAIL
        trial.study.tell(trial, state=state)


def _key_of(given: Enqueued) -> str:
    return json.dumps(encode(given), sort_keys=True)


def _enqueued(study: optuna.Study, *, failed: bool) -> set[str]:
    """Keys of given candidates that were launched; ``failed``: those that failed, too."""
    trials = study.get_trials(deepcopy=False)
    return {trial.user_attrs.get("enqueued", "") for trial in trials if failed or trial.state != OptunaState.FAIL}


def _seed_of(study_seed: int, number: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{study_seed}:{number}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
