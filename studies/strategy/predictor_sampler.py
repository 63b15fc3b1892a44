"""Proposals by what a predictor expects of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial

from searchspace.choices import Scalar
from searchspace.open_values import Sequence as ScheduleChoice
from studies.candidates.proposal import Proposal
from studies.strategy.evolution import TOURNAMENT, EvolutionSampler, mutate
from studies.strategy.history import Complete, choices_of, chunks_of, fitness
from studies.strategy.surrogate import Surrogate

_POOL = 64  # candidates judged for one proposal: a tenth of a second


_RANDOM_SHARE = 0.1  # so that the predictor does not see only what it likes


class PredictorSampler(EvolutionSampler):
    """Draws many candidates, half of them mutants of the best, and takes the one of greatest expected improvement.

    One in ten is taken at random, so that the predictor does not only see what it likes.
    """

    def __init__(
        self, schedules: Sequence[ScheduleChoice], seed: int, complete: Complete, surrogate: Surrogate
    ) -> None:
        super().__init__(schedules, seed, complete)
        self._surrogate = surrogate

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._child = {}
        parents = sorted(
            (t for t in study.get_trials(deepcopy=False) if fitness(t) is not None), key=lambda t: fitness(t) or ()
        )[:TOURNAMENT]
        pool: dict[str, Proposal] = {}
        for i in range(_POOL):
            given: Mapping[str, Scalar] = {}
            if parents and i % 2:
                parent = self._random.choice(parents)
                given = mutate(choices_of(parent), self._schedules, chunks_of(parent), self._random)
            proposal = self._complete(given, self._random.getrandbits(32))
            if proposal is not None:
                pool[f"{proposal.graph.arch_id} {proposal.training}"] = proposal
        if not pool:
            return
        candidates = list(pool.values())
        if self._random.random() < _RANDOM_SHARE:
            self._child = self._random.choice(candidates).choices
            return
        gains = self._surrogate.expected_improvement(candidates)
        self._child = candidates[max(range(len(candidates)), key=gains.__getitem__)].choices
