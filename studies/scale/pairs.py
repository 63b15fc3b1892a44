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
_FORMS = np.concatenate([[0.0], np.geomspace(1e-4, 0.1, 13)])  # errors of form that are tried, nats
_NEAR = np.log(10.0)  # sizes a factor of ten apart share 37 % of an error of form
_SHARED = 0.7  # of an error of form, by horizons of one size
FARTHEST = 100.0
"""Compute multipliers beyond it, or below its inverse, are told as that."""
_REACH = 100.0  # times the largest size: crossings beyond it are not told


@dataclass(frozen=True, slots=True)
class Rated:
    """A candidate at the target."""

    candidate: str
    difference: float
    """To the baseline's loss; negative is better."""
    interval: tuple[float, float]
    multiplier: float
    """The baseline needs so many times the compute for the same loss, at one ratio of tokens to parameters."""
    multiplier_interval: tuple[float, float]
    best: float
    """Probability of being the best of all."""
    at_top: float
    """Measured difference at the largest size, its longest horizon."""
    crosses: float | None
    """Size at which it passes the baseline, if it does within reach."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a ladder says."""

    baseline: str
    size: float
    tokens: float
    confidence: float
    rated: tuple[Rated, ...]
    """By difference; the baseline among them, at 0."""
    law: Law
    seed_spread: float
    """Standard deviation of a difference between two seeds."""
    seeds: bool
    """Whether that was measured: a rung has two seeds."""
    form: float
    """Of what the law itself gets wrong of a difference, nats."""


@dataclass(frozen=True, slots=True)
class _Prior:
    drift: float
    form: float


def rate(
    runs: Sequence[Run],
    baseline: str,
    size: float,
    tokens: float,
    *,
    confidence: float = 0.8,
    draws: int = 400,
    seed: int = 0,
    least_noise: float = 1e-3,
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
    law = fit_law(runs)
    pairs = _pair(runs, baseline)
    names = [name for name in dict.fromkeys(run.candidate for run in runs) if name != baseline]
    if not names:
        raise SpecError("scale", f"{baseline} is the only candidate", "give others to hold against it")
    check_sizes([run for run in runs if run.candidate == baseline])
    for name in names:
        if name not in pairs:
            what = f"shares no rung with {baseline}"
            remedy = "give runs of one horizon the same rung, where their sizes are not equal"
            raise SpecError(f"scale.{name}", what, remedy)
    measured = _seed_spread(pairs)
    noise = max(measured or 0.0, least_noise)
    fit = _Fit(law, baseline, noise, top=max(run.size for run in runs))
    priors, weights = fit.priors(pairs)
    likeliest = priors[int(weights.argmax())]
    random = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(names) + 1))  # the baseline's first
    rungs = sorted({run.rung for run in runs})
    for i, one in enumerate(random.choice(len(priors), draws, p=weights)):
        again = _resample(pairs, rungs, random)
        for j, name in enumerate(names, start=1):
            mean, variance = fit.at(again[name] or pairs[name], priors[one], size)
            drawn[i, j] = random.normal(mean, np.sqrt(variance))
    best = np.bincount(drawn.argmin(1), minlength=len(names) + 1) / draws
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    rated = [Rated(baseline, 0.0, (0.0, 0.0), 1.0, (1.0, 1.0), float(best[0]), 0.0, None)]
    for j, name in enumerate(names, start=1):
        own = pairs[name]
        means = [fit.at(own, prior, size)[0] for prior in priors]
        difference = float(np.dot(weights, means))
        worth, least, most = (fit.multiplier(size, tokens, d) for d in (difference, high[j], low[j]))
        rated.append(
            Rated(
                candidate=name,
                difference=difference,
                interval=(float(low[j]), float(high[j])),
                multiplier=worth,
                multiplier_interval=(least, most),
                best=float(best[j]),
                at_top=_at_top(own),
                crosses=fit.crossing(own, likeliest),
            )
        )
    order = sorted(range(len(rated)), key=lambda j: rated[j].difference)
    return Answer(
        baseline=baseline,
        size=size,
        tokens=tokens,
        confidence=confidence,
        rated=tuple(rated[j] for j in order),
        law=law,
        seed_spread=noise,
        seeds=measured is not None,
        form=float(np.dot(weights, [prior.form for prior in priors])),
    )


# -- pairs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pair:
    rung: str
    size: float
    tokens: float
    difference: float


def _pair(runs: Sequence[Run], baseline: str) -> dict[str, list[_Pair]]:
    """Differences to the baseline of the same rung and seed; reruns are averaged."""
    losses: dict[tuple[str, int, str], list[Run]] = defaultdict(list)
    for run in runs:
        losses[run.rung, run.seed, run.candidate].append(run)
    pairs: dict[str, list[_Pair]] = defaultdict(list)
    for (rung, seed, candidate), own in losses.items():
        other = losses.get((rung, seed, baseline))
        if candidate != baseline and other:
            gap = float(np.mean([run.loss for run in own]) - np.mean([run.loss for run in other]))
            pairs[candidate].append(_Pair(rung, own[0].size, own[0].tokens, gap))
    return dict(pairs)


def _seed_spread(pairs: Mapping[str, Sequence[_Pair]]) -> float | None:
    """Standard deviation of a difference over seeds, pooled over candidates and rungs; None with one seed."""
    squares, freedom = 0.0, 0
    for own in pairs.values():
        for rung in {pair.rung for pair in own}:
            found = [pair.difference for pair in own if pair.rung == rung]
            squares += float(np.var(found)) * len(found)
            freedom += len(found) - 1
    return float(np.sqrt(squares / freedom)) if freedom else None


def _resample(
    pairs: Mapping[str, Sequence[_Pair]], rungs: Sequence[str], random: np.random.Generator
) -> dict[str, list[_Pair]]:
    """Rungs drawn with replacement, the same for all candidates, and seeds within each."""
    chosen = [rungs[i] for i in random.integers(0, len(rungs), len(rungs))]
    found: dict[str, list[_Pair]] = {name: [] for name in pairs}
    for rung in chosen:
        shared = random.random(64)  # one draw of seeds for all candidates: they share the baseline's runs
        for name, own in pairs.items():
            there = [pair for pair in own if pair.rung == rung]
            found[name] += [there[int(shared[i % 64] * len(there))] for i in range(len(there))]
    return found


# -- the fit ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fit:
    """What all candidates share: the law, the baseline, the noise of a pair, the largest size."""

    law: Law
    baseline: str
    noise: float
    top: float

    def at(self, own: Sequence[_Pair], prior: _Prior, size: float) -> tuple[float, float]:
        """Mean and variance of a candidate's difference at a size, from its pairs."""
        sizes = np.array([pair.size for pair in own])
        spread = np.diag([_WIDE**2, prior.drift**2])
        columns, at = self._columns(sizes), self._columns(np.array([size]))
        same = np.array([[pair.rung == other.rung for other in own] for pair in own])
        # What the form gets wrong at one size it gets wrong alike near it, and much of it at every horizon there.
        wrong = prior.form**2 * _nearness(sizes, sizes) * np.where(same, 1.0, _SHARED)
        known = columns @ spread @ columns.T + wrong + self.noise**2 * np.eye(len(own))
        across = at @ spread @ columns.T + prior.form**2 * _SHARED * _nearness(np.array([size]), sizes)
        gain = np.linalg.solve(known, across.T).T
        variance = at @ spread @ at.T + prior.form**2 - gain @ across.T
        return float(gain[0] @ [pair.difference for pair in own]), max(0.0, float(variance[0, 0]))

    def _columns(self, sizes: Array) -> Array:
        scale = self.law.factors[self.baseline] * sizes**-self.law.size_exponent
        return np.column_stack([scale, scale * np.log(sizes / self.top)])

    def priors(self, pairs: Mapping[str, Sequence[_Pair]]) -> tuple[list[_Prior], Array]:
        """How far shares drift and how wrong the form is, with how likely each makes the rungs that are there.

        Each candidate's larger sizes are predicted from its smaller ones: that is what the answer will be asked to do.
        """
        tried = [_Prior(drift, float(form)) for drift in _DRIFTS for form in _FORMS]
        likely = np.array([sum(self._left_out(own, prior) for own in pairs.values()) for prior in tried])
        weights = np.exp(likely - likely.max())
        return tried, weights / weights.sum()

    def _left_out(self, own: Sequence[_Pair], prior: _Prior) -> float:
        """Log likelihood of each size given the smaller ones."""
        total = 0.0
        for above in sorted({pair.size for pair in own})[1:]:
            lower, upper = [p for p in own if p.size < above], [p for p in own if p.size == above]
            mean, variance = replace(self, top=max(pair.size for pair in lower)).at(lower, prior, above)
            for rung in {pair.rung for pair in upper}:
                found = [pair.difference for pair in upper if pair.rung == rung]
                spread = variance + self.noise**2 / len(found)
                total -= 0.5 * (np.log(spread) + (float(np.mean(found)) - mean) ** 2 / spread)
        return total

    def multiplier(self, size: float, tokens: float, difference: float) -> float:
        """Compute of the baseline at the other's loss, over that at the target; compute is size times tokens."""
        worth = np.geomspace(1 / FARTHEST, FARTHEST, 4001)
        losses = self.law.loss(self.baseline, size * np.sqrt(worth), tokens * np.sqrt(worth))
        wanted = float(self.law.loss(self.baseline, size, tokens)) + difference
        return float(np.clip(np.exp(np.interp(-wanted, -losses, np.log(worth))), 1 / FARTHEST, FARTHEST))

    def crossing(self, own: Sequence[_Pair], prior: _Prior) -> float | None:
        """The last size within reach at which the fitted difference changes its sign."""
        sizes = np.geomspace(min(pair.size for pair in own), self.top * _REACH, 200)
        signs = np.sign([self.at(own, prior, float(size))[0] for size in sizes])
        changes = np.flatnonzero(signs[1:] != signs[:-1])
        return float(sizes[changes[-1] + 1]) if len(changes) else None


def _nearness(first: Array, second: Array) -> Array:
    """Correlation of errors of form by how far sizes lie apart."""
    correlation: Array = np.exp(-np.abs(np.log(first[:, None] / second[None])) / _NEAR)
    return correlation


def _at_top(own: Sequence[_Pair]) -> float:
    largest = max(pair.size for pair in own)
    longest = max(pair.tokens for pair in own if pair.size == largest)
    return float(np.mean([p.difference for p in own if (p.size, p.tokens) == (largest, longest)]))
