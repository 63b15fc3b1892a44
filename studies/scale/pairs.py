"""What a ladder says of candidates at a size that nobody trained: differences to a baseline, each with its interval.

Absolute losses extrapolated apart err by as much as architectures differ. What the law gets wrong it gets wrong for
all candidates alike, so differences of runs that saw the same batches are fitted, not losses:
``L_c - L_base = (q_c + g_c ln(N / N_top)) A N^-a`` with A and a of the shared law. ``g_c``, which lets curves cross, is
held towards zero by as much as candidates differ in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from searchspace.errors import SpecError
from studies.scale.law import Array, Law, Run, check_sizes, fit_law

_WIDE = 10.0  # prior spread of a share: as good as none
_DRIFTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # prior spreads of drift that are tried, for each unit of ln N
_FORMS = np.geomspace(1e-3, 0.1, 13)  # errors of form that are tried, nats
_USUAL_FORM, _FORM_FACTOR = 0.01, 3.0  # what ladders show, give or take: few runs can't tell that there is none
_USUAL_NOISE, _NOISE_FREEDOM = 0.007, 4  # of a difference between seeds, and how many measured ones that counts for
_NEAR = np.log(10.0)  # sizes a factor of ten apart share 37 % of an error of form
_SHARED = 0.7  # of an error of form, and of a seed's noise, by horizons of one size
FURTHER = 10.0
"""Times the largest size: the target where none is given."""
FARTHEST = 100.0
"""Compute multipliers beyond it, or below its inverse, are told as that."""
_FARTHEST_SOUGHT = 1e6  # beyond what is told, so that candidates there still have an order
_LEAST_NOISE = 1e-3  # nats
_POINTS = 24  # of a curve
_REACH = 100.0  # times the largest size: crossings beyond it are not told


@dataclass(frozen=True, slots=True)
class Rated:
    """A candidate at the target."""

    candidate: str
    difference: float
    """To the baseline's loss; negative is better."""
    interval: tuple[float, float]
    cost: float
    """Training FLOPs for a token, relative to the baseline's, at the largest size."""
    multiplier: float
    """The baseline needs so many times the candidate's compute for the same loss, at one ratio of tokens to
    parameters."""
    multiplier_interval: tuple[float, float]
    best: float
    """Probability of having the highest multiplier of all."""
    at_top: float | None
    """Measured difference at the largest size, its longest horizon; None where it was not trained there."""
    crosses: float | None
    """Size at which it passes the baseline, if it does within reach."""
    curve: tuple[tuple[float, float], ...] = ()
    """Fitted multiplier by size, from the smallest to the target."""
    points: tuple[tuple[float, float], ...] = ()
    """Measured multipliers by size, the mean over seeds at each size's longest horizon."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a ladder says."""

    baseline: str
    size: float
    tokens: float
    confidence: float
    rated: tuple[Rated, ...]
    """By multiplier; the baseline among them, at 1."""
    law: Law
    seed_spread: float
    """Standard deviation of a difference between two seeds."""
    seeds: bool
    """Whether that was measured: a rung has two seeds."""
    form: float
    """Of what the law itself gets wrong of a difference, nats."""


@dataclass(frozen=True, slots=True)
class Prior:
    """How far candidates are thought to lie from one law."""

    drift: float
    """Standard deviation of a share's drift, for each unit of ln N."""
    form: float
    """Of what the form gets wrong of a difference."""


def rate(
    runs: Sequence[Run],
    baseline: str,
    size: float,
    tokens: float,
    *,
    confidence: float = 0.8,
    draws: int = 400,
    seed: int = 0,
    least_noise: float = _LEAST_NOISE,
) -> Answer:
    """Differences of all candidates to a baseline at a target.

    Args:
        runs: of all candidates; those of one rung and seed saw the same batches.
        baseline: the candidate that the others are held against.
        size: parameters of the target.
        tokens: that it is to see.
        confidence: of the intervals.
        draws: of the bootstrap, over rungs, and seeds within them.
        seed: of the draws.
        least_noise: standard deviation between seeds that is taken where a ladder has one only.

    Raises:
        SpecError: if there are too few sizes, or a candidate shares no rung with the baseline.
    """
    fit, pairs, measured = start(runs, baseline, least_noise)
    names = [name for name in dict.fromkeys(run.candidate for run in runs) if name != baseline]
    if not names:
        raise SpecError("scale", f"{baseline} is the only candidate", "give others to hold against it")
    check_sizes([run for run in runs if run.candidate == baseline])
    for name in names:
        if name not in pairs:
            what = f"shares no rung with {baseline}"
            remedy = "give runs of one horizon the same rung, where their sizes are not equal"
            raise SpecError(f"scale.{name}", what, remedy)
    priors, weights = fit.priors(pairs)
    likeliest = priors[int(weights.argmax())]
    random = np.random.default_rng(seed)
    costs = np.array([1.0, *(_cost(pairs[name]) for name in names)])
    drawn = np.zeros((draws, len(names) + 1))  # the baseline's first
    rungs = sorted({run.rung for run in runs})
    for i, one in enumerate(random.choice(len(priors), draws, p=weights)):
        again = _resample(pairs, rungs, random)
        for j, name in enumerate(names, start=1):
            mean, variance = fit.at(again[name] or pairs[name], priors[one], size)
            drawn[i, j] = random.normal(mean, np.sqrt(variance))
    worth = fit.multipliers(size, tokens, drawn) / costs
    largest = max(run.size for run in runs if run.candidate == baseline)
    top = {run.rung for run in runs if run.candidate == baseline and run.size == largest}
    best = np.bincount(worth.argmax(1), minlength=len(costs)) / draws
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    least, most = np.percentile(worth, [tail, 100 - tail], axis=0).clip(1 / FARTHEST, FARTHEST)
    rated = [Rated(baseline, 0.0, (0.0, 0.0), 1.0, 1.0, (1.0, 1.0), float(best[0]), 0.0, None)]
    for j, name in enumerate(names, start=1):
        own = pairs[name]
        difference = float(np.dot(weights, [fit.at(own, prior, size)[0] for prior in priors]))
        middle = fit.multipliers(size, tokens, np.array(difference)) / costs[j]
        rated.append(
            Rated(
                candidate=name,
                difference=difference,
                interval=(float(low[j]), float(high[j])),
                cost=float(costs[j]),
                multiplier=float(middle.clip(1 / FARTHEST, FARTHEST)),
                multiplier_interval=(float(least[j]), float(most[j])),
                best=float(best[j]),
                at_top=_at_top(own, top),
                crosses=fit.crossing(own, likeliest),
                curve=tuple(
                    (n, fit.worth(n, tokens / size * n, fit.at(own, likeliest, n)[0]) / costs[j])
                    for n in _between(runs, size)
                ),
                points=tuple((p.size, fit.worth(p.size, p.tokens, p.difference) / p.cost) for p in _longest(own)),
            )
        )
    order = sorted(range(len(rated)), key=lambda j: (-rated[j].multiplier, rated[j].difference))
    return Answer(
        baseline=baseline,
        size=size,
        tokens=tokens,
        confidence=confidence,
        rated=tuple(rated[j] for j in order),
        law=fit.law,
        seed_spread=fit.noise,
        seeds=measured is not None,
        form=float(np.dot(weights, [prior.form for prior in priors])),
    )


def start(
    runs: Sequence[Run], baseline: str, least_noise: float = _LEAST_NOISE
) -> tuple[Fit, dict[str, list[Pair]], float | None]:
    """What all candidates share, each one's pairs, and the measured spread between seeds, if there are two.

    Arguments and errors are those of `rate`.
    """
    law, pairs = fit_law(runs), pairs_of(runs, baseline)
    measured = _seed_spread(pairs)
    noise = max(measured or 0.0, least_noise)
    return Fit(law, baseline, noise, top=max(run.size for run in runs)), pairs, measured


# -- pairs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A candidate and the baseline on the same batches."""

    rung: str
    size: float
    tokens: float
    difference: float
    cost: float
    """FLOPs, relative to the baseline's."""
    seed: int = 0


def pairs_of(runs: Sequence[Run], baseline: str) -> dict[str, list[Pair]]:
    """Differences to the baseline of the same rung and seed; reruns are averaged."""
    losses: dict[tuple[str, int, str], list[Run]] = defaultdict(list)
    for run in runs:
        losses[run.rung, run.seed, run.candidate].append(run)
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for (rung, seed, candidate), own in losses.items():
        other = losses.get((rung, seed, baseline))
        if candidate != baseline and other:
            gap = float(np.mean([run.loss for run in own]) - np.mean([run.loss for run in other]))
            known = own[0].flops is not None and other[0].flops is not None
            cost = (own[0].flops or 1.0) / (other[0].flops or 1.0) if known else 1.0
            pairs[candidate].append(Pair(rung, own[0].size, own[0].tokens, gap, cost, seed))
    return dict(pairs)


def _cost(own: Sequence[Pair]) -> float:
    return max(own, key=lambda pair: pair.size).cost


def _seed_spread(pairs: Mapping[str, Sequence[Pair]]) -> float | None:
    """Standard deviation of a difference over seeds, pooled over candidates and rungs; None with one seed."""
    squares, freedom = 0.0, 0
    for own in pairs.values():
        for rung in {pair.rung for pair in own}:
            found = [pair.difference for pair in own if pair.rung == rung]
            squares += float(np.var(found)) * len(found)
            freedom += len(found) - 1
    if not freedom:
        return None
    usual = _NOISE_FREEDOM * _USUAL_NOISE**2  # a pair or two tell little
    return float(np.sqrt((squares + usual) / (freedom + _NOISE_FREEDOM)))


def _resample(
    pairs: Mapping[str, Sequence[Pair]], rungs: Sequence[str], random: np.random.Generator
) -> dict[str, list[Pair]]:
    """Rungs drawn with replacement, the same for all candidates, and seeds within each."""
    chosen = [rungs[i] for i in random.integers(0, len(rungs), len(rungs))]
    found: dict[str, list[Pair]] = {name: [] for name in pairs}
    for rung in chosen:
        shared = random.random(64)  # one draw of seeds for all candidates: they share the baseline's runs
        for name, own in pairs.items():
            there = [pair for pair in own if pair.rung == rung]
            found[name] += [there[int(shared[i % 64] * len(there))] for i in range(len(there))]
    return found


def _between(runs: Sequence[Run], size: float) -> list[float]:
    sizes = [run.size for run in runs]
    return [float(n) for n in np.geomspace(min(sizes), max(size, *sizes), _POINTS)]


# -- the fit ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """What all candidates share: the law, the baseline, the noise of a pair, the largest size."""

    law: Law
    baseline: str
    noise: float
    top: float

    def at(self, own: Sequence[Pair], prior: Prior, size: float) -> tuple[float, float]:
        """Mean and variance of a candidate's difference at a size, from its pairs."""
        sizes = np.array([pair.size for pair in own])
        spread = np.diag([_WIDE**2, prior.drift**2])
        columns, at = self._columns(sizes), self._columns(np.array([size]))
        same = np.array([[pair.rung == other.rung for other in own] for pair in own])
        # What the form gets wrong at one size it gets wrong alike near it, and much of it at every horizon there.
        wrong = prior.form**2 * _nearness(sizes, sizes) * np.where(same, 1.0, _SHARED)
        trunk = np.array([[p.size == other.size and p.seed == other.seed for other in own] for p in own])
        noise = self.noise**2 * np.where(np.eye(len(own), dtype=bool), 1.0, np.where(trunk, _SHARED, 0.0))
        known = columns @ spread @ columns.T + wrong + noise
        across = at @ spread @ columns.T + prior.form**2 * _SHARED * _nearness(np.array([size]), sizes)
        gain = np.linalg.solve(known, across.T).T
        variance = at @ spread @ at.T + prior.form**2 - gain @ across.T
        return float(gain[0] @ [pair.difference for pair in own]), max(0.0, float(variance[0, 0]))

    def _columns(self, sizes: Array) -> Array:
        scale = self.law.factors[self.baseline] * sizes**-self.law.size_exponent
        return np.column_stack([scale, scale * np.log(sizes / self.top)])

    def priors(self, pairs: Mapping[str, Sequence[Pair]]) -> tuple[list[Prior], Array]:
        """How far shares drift and how wrong the form is, with how likely each makes the rungs that are there.

        Each candidate's larger sizes are predicted from its smaller ones: that is what the answer will be asked to do.
        """
        tried = [Prior(drift, float(form)) for drift in _DRIFTS for form in _FORMS]
        likely = np.array([sum(self._left_out(own, prior) for own in pairs.values()) for prior in tried])
        likely -= 0.5 * np.log([prior.form / _USUAL_FORM for prior in tried]) ** 2 / np.log(_FORM_FACTOR) ** 2
        weights = np.exp(likely - likely.max())
        return tried, weights / weights.sum()

    def _left_out(self, own: Sequence[Pair], prior: Prior) -> float:
        """Log likelihood of each size given the smaller ones."""
        total = 0.0
        for above in sorted({pair.size for pair in own})[1:]:
            lower, upper = [p for p in own if p.size < above], [p for p in own if p.size == above]
            mean, variance = replace(self, top=max(pair.size for pair in lower)).at(lower, prior, above)
            rungs = {pair.rung for pair in upper}
            for rung in rungs:
                found = [pair.difference for pair in upper if pair.rung == rung]
                spread = variance + self.noise**2 / len(found)
                error = (float(np.mean(found)) - mean) ** 2
                total -= 0.5 * (np.log(spread) + error / spread) / len(rungs)  # horizons off one trunk tell one thing
        return total

    def multipliers(self, size: float, tokens: float, differences: Array) -> Array:
        """Compute of the baseline at losses that differ so, over that at the target; compute is size times tokens."""
        worth = np.geomspace(_FARTHEST_SOUGHT, 1 / _FARTHEST_SOUGHT, 8001)
        losses = self.law.loss(self.baseline, size * np.sqrt(worth), tokens * np.sqrt(worth))
        wanted = self.law.loss(self.baseline, size, tokens) + differences
        found: Array = np.exp(np.interp(wanted, losses, np.log(worth)))
        return found

    def worth(self, size: float, tokens: float, difference: float) -> float:
        """`multipliers` of one difference."""
        return float(self.multipliers(size, tokens, np.array(difference)))

    def crossing(self, own: Sequence[Pair], prior: Prior) -> float | None:
        """The last size within reach at which the fitted difference changes its sign."""
        sizes = np.geomspace(min(pair.size for pair in own), self.top * _REACH, 200)
        signs = np.sign([self.at(own, prior, float(size))[0] for size in sizes])
        changes = np.flatnonzero(signs[1:] != signs[:-1])
        return float(sizes[changes[-1] + 1]) if len(changes) else None


def _nearness(first: Array, second: Array) -> Array:
    """Correlation of errors of form by how far sizes lie apart."""
    correlation: Array = np.exp(-np.abs(np.log(first[:, None] / second[None])) / _NEAR)
    return correlation


def _at_top(own: Sequence[Pair], top: set[str]) -> float | None:
    there = [pair for pair in own if pair.rung in top]
    return _longest(there)[-1].difference if there else None


def _longest(own: Sequence[Pair]) -> list[Pair]:
    """The mean over seeds at each size's longest horizon, by size."""
    found = []
    for size in sorted({pair.size for pair in own}):
        there = [pair for pair in own if pair.size == size]
        longest = max(pair.tokens for pair in there)
        there = [pair for pair in there if pair.tokens == longest]
        found.append(replace(there[0], difference=float(np.mean([pair.difference for pair in there]))))
    return found
