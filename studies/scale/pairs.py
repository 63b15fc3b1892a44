"""What a ladder says of candidates at a size that nobody trained: differences to a baseline, each with its interval.

Absolute losses extrapolated apart err by as much as architectures differ. What the law gets wrong it gets wrong for
all candidates alike, so differences of runs that saw the same batches are fitted, not losses:
``L_c - L_base = (q_c + g_c ln(N / N_top)) A N^-a`` with A and a of the shared law. ``g_c``, which lets curves cross, is
held towards zero by as much as candidates differ in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from searchspace.errors import SpecError
from studies.scale.law import Array, Law, Run, fit_law

_WIDE = 10.0  # prior spread of q: as good as none
_DRIFTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # prior spreads of g that are tried, for each unit of ln N
_FORMS = np.concatenate([[0.0], np.geomspace(1e-4, 0.1, 13)])  # errors of form that are tried, nats
_NEAR = np.log(10.0)  # sizes a factor of ten apart share 37 % of an error of form
_SHARED = 0.7
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
    form: float
    """Of what the law itself gets wrong of a difference, at the target."""
    draws: Array
    """(draws, candidates) of differences, in the order of ``rated``."""


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
    for name in names:
        if name not in pairs:
            raise SpecError(f"scale.{name}", f"shares no rung with {baseline}", "train both at one size and horizon")
    noise = max(_seed_spread(pairs), least_noise)
    priors, weights = _priors(pairs, law, baseline, noise)
    prior = priors[int(weights.argmax())]
    top = max(run.size for run in runs)
    random = np.random.default_rng(seed)
    drawn = np.empty((draws, len(names)))
    rungs = sorted({run.rung for run in runs})
    for i, one in enumerate(random.choice(len(priors), draws, p=weights)):
        again = _resample(pairs, rungs, random)
        for j, name in enumerate(names):
            mean, variance = _solve(again[name] or pairs[name], law, baseline, noise, priors[one], size, top)
            drawn[i, j] = random.normal(mean, np.sqrt(variance))
    middle = [
        sum(
            w * _solve(pairs[name], law, baseline, noise, each, size, top)[0]
            for each, w in zip(priors, weights, strict=True)
        )
        for name in names
    ]
    everyone = np.column_stack([np.zeros(draws), drawn])
    best = np.bincount(everyone.argmin(1), minlength=len(names) + 1) / draws
    tail = 50 * (1 - confidence)
    low, high = np.percentile(everyone, [tail, 100 - tail], axis=0)
    rated = []
    for j, name in enumerate([baseline, *names]):
        difference = 0.0 if j == 0 else float(middle[j - 1])
        worth = [_multiplier(law, baseline, size, tokens, d) for d in (difference, high[j], low[j])]
        rated.append(
            Rated(
                candidate=name,
                difference=difference,
                interval=(float(low[j]), float(high[j])),
                multiplier=worth[0],
                multiplier_interval=(worth[1], worth[2]),
                best=float(best[j]),
                at_top=0.0 if j == 0 else _at_top(pairs[name]),
                crosses=None if j == 0 else _crossing(pairs[name], law, baseline, noise, prior, top),
            )
        )
    order = sorted(range(len(rated)), key=lambda j: rated[j].difference)
    form = float(np.dot(weights, [each.form for each in priors]))
    return Answer(
        baseline=baseline,
        size=size,
        tokens=tokens,
        confidence=confidence,
        rated=tuple(rated[j] for j in order),
        law=law,
        seed_spread=noise,
        form=form,
        draws=everyone[:, order],
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


def _seed_spread(pairs: Mapping[str, Sequence[_Pair]]) -> float:
    """Standard deviation of a difference over seeds, pooled over candidates and rungs; 0 with one seed."""
    squares, freedom = 0.0, 0
    for own in pairs.values():
        for rung in {pair.rung for pair in own}:
            found = [pair.difference for pair in own if pair.rung == rung]
            squares += float(np.var(found)) * len(found)
            freedom += len(found) - 1
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


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


def _scale(law: Law, baseline: str, size: float | Array) -> Array:
    """A N^-a of the baseline: what differences are measured in."""
    return law.factors[baseline] * np.asarray(size, dtype=float) ** -law.size_exponent


def _solve(
    own: Sequence[_Pair], law: Law, baseline: str, noise: float, prior: _Prior, size: float, top: float
) -> tuple[float, float]:
    """Mean and variance of the difference at a size."""
    sizes = np.array([pair.size for pair in own])
    spread = np.diag([_WIDE**2, prior.drift**2])
    columns, at = _columns(sizes, law, baseline, top), _columns(np.array([size]), law, baseline, top)
    logs, there = np.log(sizes), np.log([size])
    same = np.array([[pair.rung == other.rung for other in own] for pair in own])
    # What the form gets wrong at one size it gets wrong alike at sizes near it, and half of it at every horizon there.
    wrong = prior.form**2 * _nearness(logs, logs) * np.where(same, 1.0, _SHARED)
    known = columns @ spread @ columns.T + wrong + noise**2 * np.eye(len(own))
    across = at @ spread @ columns.T + prior.form**2 * _SHARED * _nearness(there, logs)
    gain = np.linalg.solve(known, across.T).T
    variance = at @ spread @ at.T + prior.form**2 - gain @ across.T
    return float(gain[0] @ [pair.difference for pair in own]), max(0.0, float(variance[0, 0]))


def _columns(sizes: Array, law: Law, baseline: str, top: float) -> Array:
    scale = _scale(law, baseline, sizes)
    return np.column_stack([scale, scale * np.log(sizes / top)])


def _nearness(first: Array, second: Array) -> Array:
    """Correlation of errors of form by how far sizes lie apart."""
    correlation: Array = np.exp(-np.abs(first[:, None] - second[None]) / _NEAR)
    return correlation


def _priors(pairs: Mapping[str, Sequence[_Pair]], law: Law, baseline: str, noise: float) -> tuple[list[_Prior], Array]:
    """How far slopes differ and how wrong the form is, with how likely each makes the rungs that are there.

    Each candidate's larger sizes are predicted from its smaller ones: that is what the answer will be asked to do.
    """
    tried = [_Prior(drift, float(form)) for drift in _DRIFTS for form in _FORMS]
    likely = np.array([sum(_left_out(own, law, baseline, noise, prior) for own in pairs.values()) for prior in tried])
    weights = np.exp(likely - likely.max())
    return tried, weights / weights.sum()


def _left_out(own: Sequence[_Pair], law: Law, baseline: str, noise: float, prior: _Prior) -> float:
    """Log likelihood of each size given the smaller ones."""
    sizes = sorted({pair.size for pair in own})
    total = 0.0
    for above in sizes[1:]:
        lower, upper = [p for p in own if p.size < above], [p for p in own if p.size == above]
        top = max(pair.size for pair in lower)
        mean, variance = _solve(lower, law, baseline, noise, prior, above, top)
        for rung in {pair.rung for pair in upper}:
            found = [pair.difference for pair in upper if pair.rung == rung]
            spread = variance + noise**2 / len(found)
            total -= 0.5 * (np.log(spread) + (float(np.mean(found)) - mean) ** 2 / spread)
    return total


# -- in words --------------------------------------------------------------------------------------


def _multiplier(law: Law, baseline: str, size: float, tokens: float, difference: float) -> float:
    """Compute of the baseline at the other's loss, over that at the target; compute is size times tokens."""
    worth = np.geomspace(1e-2, 1e2, 4001)
    losses = law.loss(baseline, size * np.sqrt(worth), tokens * np.sqrt(worth))
    wanted = float(law.loss(baseline, size, tokens)) + difference
    return float(np.exp(np.interp(-wanted, -losses, np.log(worth))))


def _at_top(own: Sequence[_Pair]) -> float:
    largest = max(pair.size for pair in own)
    longest = max(pair.tokens for pair in own if pair.size == largest)
    return float(np.mean([p.difference for p in own if (p.size, p.tokens) == (largest, longest)]))


def _crossing(own: Sequence[_Pair], law: Law, baseline: str, noise: float, prior: _Prior, top: float) -> float | None:
    """The first size above the smallest at which the fitted difference changes its sign."""
    sizes = np.geomspace(min(pair.size for pair in own), top * _REACH, 200)
    signs = np.sign([_solve(own, law, baseline, noise, prior, float(size), top)[0] for size in sizes])
    changes = np.flatnonzero(signs[1:] != signs[:-1])
    return float(sizes[changes[-1] + 1]) if len(changes) else None
