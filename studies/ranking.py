"""What predictors are for: ranking a space, carrying over to another study, and saying why a schedule is good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TypeAlias

import numpy as np

from searchspace.arch import ArchSpec
from searchspace.choices import Scalar
from searchspace.errors import SpecError
from searchspace.nodes import LoopNode
from searchspace.space import SpaceSpec
from studies.config import LearnerName, StudyConfig
from studies.data import CorpusFacts
from studies.examples import MOST_TRIALS, Array, Example, Observation, adjust, last_rungs, make_example, observe
from studies.predictors import FEWEST, Predictor, rank_correlation
from studies.proposer import Proposer
from studies.samplers import Proposal
from studies.trial import TrialRecord

Effects: TypeAlias = dict[tuple[int, str], float]
Tick: TypeAlias = Callable[[int, int], None]
"""Told how many of how many are done."""


def representative(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """At most `MOST_TRIALS` of the trials with a result: the best tenth, and of the others evenly spaced ones.

    What was trained again after the search stays out.
    """
    told = [record for record in records if record.purpose != "promotion" and record.rungs]
    if len(told) <= MOST_TRIALS:
        return told
    best = sorted(told, key=lambda record: (-len(record.rungs), record.rungs[-1].loss))[: MOST_TRIALS // 10]
    kept = {record.number for record in best}
    others = [record for record in told if record.number not in kept]
    room = MOST_TRIALS - len(best)
    kept |= {others[i * len(others) // room].number for i in range(room)}
    return [record for record in told if record.number in kept]


def observe_all(records: Sequence[TrialRecord], study: str = "") -> list[Observation]:
    """Every rung of every trial that is `representative`."""
    found: list[Observation] = []
    for record in representative(records):
        rungs = [(rung.flops, rung.loss) for rung in record.rungs]
        found += observe(record.arch_spec(), record.cost, record.training, rungs, record.number, study)
    return found


class Pool:
    """Candidates of a study's space within its budget.

    Args:
        settings: the study's; its space may be replaced.
        facts: of its data.
    """

    def __init__(self, settings: StudyConfig, facts: CorpusFacts) -> None:
        self._proposer = Proposer(settings, settings.absolute_budget(), facts)

    def draw(self, number: int, seed: int = 0, tick: Tick = lambda done, of: None) -> list[Proposal]:
        """Up to ``number`` different ones; fewer where 20 draws in a row bring nothing new."""
        found: dict[str, Proposal] = {}
        in_vain = 0
        attempt = 0
        while len(found) < number and in_vain < 20:
            proposal = self._proposer.complete({}, seed * 1_000_003 + attempt)
            attempt += 1
            in_vain += 1
            if proposal is not None and _key(proposal) not in found:
                found[_key(proposal)] = proposal
                in_vain = 0
            tick(len(found), number)
        return list(found.values())

    def complete(self, given: Mapping[str, Scalar], seed: int) -> Proposal | None:
        """A candidate that keeps the given decisions where it can; None if it is over the budget."""
        return self._proposer.complete(given, seed)


def _key(proposal: Proposal) -> str:
    return f"{proposal.graph.arch_id} {sorted(proposal.training.items())}"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with what is predicted for it; nothing here was measured."""

    proposal: Proposal
    loss: float
    """Nats per token at the full budget."""
    spread: float


def rank(pool: Sequence[Proposal], predictor: Predictor, study: str = "") -> list[Ranked]:
    """Candidates, the best predicted first, in the losses of one of the studies learned from."""
    scale = predictor.scales[study]
    means, spreads = predictor.predict([_example(proposal) for proposal in pool])
    ranked = [
        Ranked(proposal, scale.middle + scale.spread * float(m), scale.spread * float(s))
        for proposal, m, s in zip(pool, means, spreads, strict=True)
    ]
    return sorted(ranked, key=lambda candidate: candidate.loss)


def _example(proposal: Proposal) -> Example:
    return make_example(proposal.graph, proposal.cost, proposal.training)


def transfer(
    source: Sequence[Observation],
    target: Sequence[Observation],
    learner: LearnerName,
    after: Sequence[int] = (0, 8, 16, 32),
    seeds: int = 5,
) -> Iterator[tuple[int, float, float | None]]:
    """How well the target's other trials are ranked after so many of its own: with the source's, and without.

    Yields:
        number of the target's trials learned from, and Kendall's tau on the rest, with and without the source's
        trials; None without them while there are fewer than 8.
    """
    trials = sorted({o.trial for o in target}, key=str)
    for number in after:
        if len(trials) - number < FEWEST:
            return
        with_source, alone = [], []
        for seed in range(seeds):
            own = {trials[i] for i in np.random.default_rng(seed).permutation(len(trials))[:number].tolist()}
            known = [o for o in target if o.trial in own]
            left = [o for o in target if o.trial not in own]
            with_source.append(_tau(learner, [*source, *known], left, seed))
            if number >= FEWEST:
                alone.append(_tau(learner, known, left, seed))
        yield number, mean(with_source), mean(alone) if alone else None


def _tau(learner: LearnerName, seen: Sequence[Observation], left: Sequence[Observation], seed: int) -> float:
    """Over the others, each at its last rung."""
    predictor = Predictor(learner)
    predictor.fit(seen, seed)
    y, last = adjust(left)[0], last_rungs(left)
    return rank_correlation(predictor.predict([left[i].example for i in last])[0], y[last])


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a predictor has learned, asked of candidates that nobody trained."""

    importance: dict[str, float]
    """By decision: mean change of the predicted loss when that decision alone is taken as in another candidate."""
    effect: Effects
    """By iteration and level: predicted loss of schedules that have the level there, against all that go so far."""


def explain(
    pool: Pool,
    predictor: Predictor,
    *,
    study: str = "",
    candidates: int = 200,
    swaps: int = 24,
    seed: int = 0,
    tick: Tick = lambda done, of: None,
) -> Explanation:
    """Permutation importance of every decision, and the effect of each level at each place of a loop's schedule.

    Args:
        pool: where candidates come from.
        predictor: fitted.
        study: whose losses to state effects in, nats per token.
        candidates: drawn for the effects.
        swaps: candidates each decision is changed in.
        seed: of the draws.
        tick: progress.

    Raises:
        SpecError: if hardly a candidate is within the budget.
    """
    drawn = pool.draw(candidates, seed)
    if len(drawn) < FEWEST:
        raise SpecError("", f"only {len(drawn)} candidates are within the budget", "there is little to explain")
    means, _ = predictor.predict([_example(proposal) for proposal in drawn])
    scale = predictor.scales[study].spread
    names = list(dict.fromkeys(name for proposal in drawn for name in proposal.choices))
    importance = {}
    for done, name in enumerate(names):
        having = [i for i, proposal in enumerate(drawn) if name in proposal.choices]
        changed, before = [], []
        for i, j in zip(having[:swaps], [*having[1:], *having[:1]], strict=False):
            value = drawn[j].choices[name]
            if value == drawn[i].choices[name]:
                continue
            other = pool.complete({**drawn[i].choices, name: value}, seed + i)
            if other is not None:
                changed.append(_example(other))
                before.append(means[i])
        moved = np.abs(predictor.predict(changed)[0] - np.array(before)) if changed else np.zeros(1)
        importance[name] = float(moved.mean()) * scale
        tick(done + 1, len(names))
    return Explanation(dict(sorted(importance.items(), key=lambda item: -item[1])), _effects(drawn, means * scale))


def predicted_effects(pool: Pool, predictor: Predictor, study: str = "", candidates: int = 150) -> Effects:
    """`Explanation.effect` alone; empty where hardly a candidate is within the budget."""
    drawn = pool.draw(candidates)
    if len(drawn) < FEWEST:
        return {}
    means, _ = predictor.predict([_example(proposal) for proposal in drawn])
    return _effects(drawn, means * predictor.scales[study].spread)


def _effects(drawn: Sequence[Proposal], predicted: Array) -> Effects:
    schedules = [schedule_of(proposal.candidate.arch) for proposal in drawn]
    return effects_by_place(schedules, predicted.tolist())


def schedule_of(arch: ArchSpec) -> list[str]:
    """The level of each iteration of its first loop."""
    loop = next((node for node in arch.graph.values() if isinstance(node, LoopNode)), None)
    return [] if loop is None else [use.level for use in loop.schedule]


def effects_by_place(schedules: Iterable[Sequence[str]], losses: Iterable[float]) -> Effects:
    """By iteration and level: mean loss of schedules with it there, against all that go so far."""
    at: dict[int, list[tuple[str, float]]] = {}
    for schedule, loss in zip(schedules, losses, strict=True):
        for i, level in enumerate(schedule):
            at.setdefault(i, []).append((level, loss))
    effects = {}
    for i, entries in at.items():
        overall = mean(loss for _, loss in entries)
        for level in {name for name, _ in entries}:
            effects[i, level] = mean(loss for name, loss in entries if name == level) - overall
    return effects


def with_space(settings: StudyConfig, space: SpaceSpec) -> StudyConfig:
    """The study's budget and training over another space."""
    search = replace(settings.search, sampler="random")
    return replace(settings, space=space, search=search)
