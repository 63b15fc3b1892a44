"""What predictors are for: ranking a space, carrying over to another study, and saying why a schedule is good."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import TypeAlias

import numpy as np

from searchspace.arch import ArchSpec
from searchspace.choices import RandomChooser, Scalar
from searchspace.disk import read_json, write_file
from searchspace.errors import SpecError
from searchspace.nodes import LoopNode
from searchspace.plain import decode, key
from searchspace.space import SpaceSpec, assignments
from studies.candidates.drawing import Candidates
from studies.candidates.proposal import Proposal
from studies.config import StudyConfig
from studies.data.dataset import DataFacts
from studies.predict.features import MOST_TRIALS, Array, Example, Observation, adjust, last_rungs, make_example, observe
from studies.predict.predictor import FEWEST, Predictor, rank_correlation
from studies.records.folder import PREDICTED
from studies.records.trial import TrialRecord
from studies.sections import LearnerName

_LISTED = 100_000  # ways: priced one by one in about a minute
_SECONDS = 60.0  # after which people wonder
_IN_VAIN = 20_000  # draws in a row that find nothing new
_UNNARROWED = 200  # of them before proposals are steered into the budget
_LEAST_TAU = 0.2
"""Rank correlation below which a predictor's effects are left out."""
_TRIED = 4
"""Pairs of candidates looked at for each that is to be changed."""

Effects: TypeAlias = dict[tuple[int, str], float]
Tick: TypeAlias = Callable[[int, int], None]
"""Told how many of how many are done."""


def representative(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """At most `MOST_TRIALS` of the trials with a result: the best tenth, and of the others evenly spaced ones.

    What was trained again after the search stays out.
    """
    told = [record for record in records if record.ranks and record.rungs]
    if len(told) <= MOST_TRIALS:
        return told
    best = sorted(told, key=lambda record: (-len(record.rungs), record.rungs[-1].score))[: MOST_TRIALS // 10]
    kept = {record.number for record in best}
    others = [record for record in told if record.number not in kept]
    room = MOST_TRIALS - len(best)
    kept |= {others[i * len(others) // room].number for i in range(room)}
    return [record for record in told if record.number in kept]


def observe_all(records: Sequence[TrialRecord], study: str = "") -> list[Observation]:
    """Every rung of every trial that is `representative`."""
    found: list[Observation] = []
    for record in representative(records):
        rungs = [(rung.flops, rung.score) for rung in record.rungs]
        found += observe(record.arch_spec(), record.cost, record.training, rungs, record.number, study)
    return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """Different candidates within a study's budget, and what was looked at to find them."""

    proposals: list[Proposal]
    looked_at: int
    """Ways to decide the architecture."""
    ways: float
    """All there are; infinite with a continuous range."""
    whole: bool
    """Whether the proposals are all that keep the budget."""

    def __str__(self) -> str:
        found = f"{len(self.proposals):,}"
        if self.whole:
            return f"{found} of {found} candidates within the budget"
        space = "a continuous range" if math.isinf(self.ways) else f"{self.ways:,.0f} ways to decide"
        return f"{found} candidates within the budget, out of {self.looked_at:,} of {space} looked at"


class Pool:
    """Candidates of a study's space within its budget.

    Args:
        settings: the study's; its space may be replaced.
        facts: of its data.
    """

    def __init__(self, settings: StudyConfig, facts: DataFacts) -> None:
        self._template = settings.space.template
        self._candidates = Candidates(settings, settings.absolute_budget(), facts)

    def draw(
        self,
        number: int,
        seed: int = 0,
        tick: Tick = lambda done, of: None,
        *,
        listed: int = _LISTED,
        seconds: float = _SECONDS,
    ) -> Drawn:
        """All there are where the space has few enough ways to be decided, else so many at random.

        Open training settings are drawn at random for each.

        Args:
            number: how many to draw where the space is not listed.
            seed: of the draws.
            tick: progress.
            listed: the most ways to decide that are looked at one by one.
            seconds: after which it is content with what it has found.
        """
        ways, until = self._template.size(), time.monotonic() + seconds
        choices = self._list(until - seconds / 2) if ways <= listed else None  # the rest is for what follows
        if choices is not None:
            random.Random(seed).shuffle(choices)  # what the time does not suffice for is missing everywhere alike
            return self._price(iter(choices), len(choices), ways, tick, until, whole=True)
        return self._price(self._choices(seed), number, ways, tick, until, whole=False)

    def _list(self, until: float) -> list[dict[str, Scalar]] | None:
        """Every way that satisfies the constraints; None where that takes too long, or a range is continuous."""
        found = []
        for choices in assignments(self._template):
            found.append(choices)
            if time.monotonic() > until:
                return None
        return found

    def _choices(self, seed: int) -> Iterator[dict[str, Scalar] | None]:
        """Random ways without end; None for one that breaks a constraint."""
        draw = random.Random(seed)
        while True:
            try:
                yield self._template.decide(RandomChooser(draw.getrandbits(48))).choices
            except SpecError:
                yield None

    def _price(
        self,
        choices: Iterator[dict[str, Scalar] | None],
        number: int,
        ways: float,
        tick: Tick,
        until: float,
        *,
        whole: bool,
    ) -> Drawn:
        found: dict[str, Proposal] = {}
        looked_at = in_vain = 0
        for seed, given in enumerate(choices):
            if time.monotonic() > until or in_vain >= _IN_VAIN:
                whole = False
                break
            looked_at += 1
            in_vain += not whole
            # Rejection alone draws evenly from what fits; where little fits, narrowing finds it.
            narrow = not whole and in_vain > _UNNARROWED
            proposal = None if given is None else self._candidates.complete(given, seed, narrow=narrow)
            if proposal is not None and _key(proposal) not in found:
                found[_key(proposal)] = proposal
                in_vain = 0
            tick(looked_at if whole else len(found), number)
            if not whole and len(found) >= number:
                break
        return Drawn(list(found.values()), looked_at, ways, whole)

    def complete(self, given: Mapping[str, Scalar], seed: int) -> Proposal | None:
        """A candidate that keeps the given decisions where it can; None if it is over the budget."""
        return self._candidates.complete(given, seed)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Effect:
    place: int = key("Iteration.", low=0)
    level: str = key("At it.")
    loss: float = key("Against all that go so far.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """What a study's folder keeps of its predicted effects."""

    state: str = key("Digest of the trials and settings that they come from.")
    effects: tuple[_Effect, ...] = key("One for each iteration and level.")


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a predictor has learned, asked of candidates that nobody trained."""

    importance: dict[str, float]
    """By decision: mean change of the predicted loss when that decision alone is taken as in another candidate."""
    effect: Effects
    """By iteration and level: predicted loss of schedules that have the level there, against all that go so far."""


def explain(
    pool: Pool,
    drawn: Sequence[Proposal],
    predictor: Predictor,
    *,
    study: str = "",
    swaps: int = 24,
    seed: int = 0,
    tick: Tick = lambda done, of: None,
) -> Explanation:
    """Permutation importance of every decision, and the effect of each level at each place of a loop's schedule.

    Args:
        pool: where changed candidates come from.
        drawn: candidates of it.
        predictor: fitted.
        study: whose losses to state effects in, nats per token.
        swaps: candidates each decision is changed in.
        seed: of the draws.
        tick: progress.

    Raises:
        SpecError: if hardly a candidate is within the budget.
    """
    if len(drawn) < FEWEST:
        raise SpecError("", f"only {len(drawn)} candidates are within the budget", "there is little to explain")
    means, _ = predictor.predict([_example(proposal) for proposal in drawn])
    scale, order = predictor.scales[study].spread, random.Random(seed)
    names = list(dict.fromkeys(name for proposal in drawn for name in proposal.choices))
    importance = {}
    for done, name in enumerate(names):
        having = [i for i, proposal in enumerate(drawn) if name in proposal.choices]
        order.shuffle(having)
        changed: list[Example] = []
        before = []
        for i, j in islice(zip(having, [*having[1:], *having[:1]], strict=True), _TRIED * swaps):
            value = drawn[j].choices[name]
            if value == drawn[i].choices[name] or len(changed) == swaps:
                continue
            other = pool.complete({**drawn[i].choices, name: value}, seed + i)
            if other is not None:
                changed.append(_example(other))
                before.append(means[i])
        moved = np.abs(predictor.predict(changed)[0] - np.array(before)) if changed else np.zeros(1)
        importance[name] = float(moved.mean()) * scale
        tick(done + 1, len(names))
    return Explanation(dict(sorted(importance.items(), key=lambda item: -item[1])), _effects(drawn, means * scale))


def kept_effects(shown: Sequence[TrialRecord], settings: StudyConfig, facts: DataFacts, folder: Path) -> Effects:
    """Of candidates that nobody trained, as the tabular predictor sees them; computed once for each state of a study.

    Args:
        shown: trials with a rung.
        settings: of the study.
        facts: of its data.
        folder: of the study, which keeps them.

    Returns:
        Nothing while the predictor ranks no better than chance.
    """
    told = [(r.number, r.arch_id, [(rung.flops, rung.score) for rung in r.rungs]) for r in representative(shown)]
    state = hashlib.sha256(json.dumps([told, settings.plain], default=str).encode()).hexdigest()
    file = folder / PREDICTED
    with contextlib.suppress(SpecError):  # none yet, or damaged: it is made again
        kept = decode(_Kept, read_json(file), str(file))
        if kept.state == state:
            return {(effect.place, effect.level): effect.loss for effect in kept.effects}
    effects = _predict_effects(shown, settings, facts)
    listed = tuple(_Effect(place=place, level=level, loss=loss) for (place, level), loss in effects.items())
    with contextlib.suppress(OSError, SpecError):  # somebody else's folder may be read only
        write_file(file, json.dumps(asdict(_Kept(state=state, effects=listed))))
    return effects


def _predict_effects(shown: Sequence[TrialRecord], settings: StudyConfig, facts: DataFacts) -> Effects:
    seen = observe_all(shown)
    predictor = Predictor("tabular")
    try:
        predictor.fit(seen)
    except SpecError:  # too few trials, or no scikit-learn
        return {}
    if predictor.tau < _LEAST_TAU:
        return {}
    drawn = Pool(with_space(settings, settings.space), facts).draw(150, listed=1000, seconds=5).proposals
    if len(drawn) < FEWEST:
        return {}
    means, _ = predictor.predict([_example(proposal) for proposal in drawn])
    return _effects(drawn, means * predictor.scales[""].spread)


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
