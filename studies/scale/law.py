"""The scaling law of a ladder's losses: exponents shared by all candidates, a factor for each.

``L_c(N, D) = E + A_c N^-a + B D^-b``, parameters N and tokens D (Hoffmann et al., arXiv 2203.15556). Given the
exponents the rest is linear, so a grid over them is exhaustive and cannot diverge (variable projection, arXiv
2603.22339).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchspace.errors import SpecError
from studies.sections import LEAST_SIZES

Array = NDArray[np.float64]

_EXPONENTS = np.geomspace(0.03, 1.2, 48)  # published ones lie between 0.05 and 0.75
_EVEN = 1.5  # tokens per parameter that differ by less can't tell the two terms apart


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model of a ladder, at the end of its decay."""

    candidate: str
    size: float
    """Parameters."""
    tokens: float
    loss: float
    rung: str = ""
    """Size and horizon; runs of one rung and seed saw the same batches and are compared in pairs."""
    seed: int = 0
    flops: float | None = None
    """Of training; None: in proportion to size and tokens."""


@dataclass(frozen=True, slots=True)
class Law:
    """``E + A N^-a + B D^-b``; B is 0 where tokens go with parameters."""

    floor: float
    factors: dict[str, float]
    """A of each candidate."""
    of_tokens: float
    size_exponent: float
    token_exponent: float
    spread: float
    """Root mean square of what is left, relative to the loss."""

    def loss(self, candidate: str, size: float | Array, tokens: float | Array) -> Array:
        """Predicted loss at sizes and tokens."""
        by_size = self.factors[candidate] * np.asarray(size, dtype=float) ** -self.size_exponent
        return self.floor + by_size + self.of_tokens * np.asarray(tokens, dtype=float) ** -self.token_exponent


def check_sizes(runs: Sequence[Run]) -> None:
    """Raise `SpecError` unless one candidate at least was trained at enough sizes."""
    sizes: dict[str, set[float]] = {}
    for run in runs:
        sizes.setdefault(run.candidate, set()).add(run.size)
    if (found := max(map(len, sizes.values()), default=0)) < LEAST_SIZES:
        raise SpecError("scale.sizes", f"{found} are too few for a law", f"give {LEAST_SIZES} or more")


def fit_law(runs: Sequence[Run]) -> Law:
    """The law of a ladder, by least squares of relative losses.

    Args:
        runs: of one candidate or several, at three sizes or more.

    Raises:
        SpecError: with too few sizes, or where losses do not fall.
    """
    sizes, tokens, losses = (np.array([getattr(run, name) for run in runs]) for name in ("size", "tokens", "loss"))
    check_sizes(runs)
    names = list(dict.fromkeys(run.candidate for run in runs))
    is_of = np.array([[run.candidate == name for name in names] for run in runs], dtype=float)
    per_size = tokens / sizes
    apart = per_size.max() / per_size.min() > _EVEN
    # Sizes relative to their middle keep the columns of one magnitude.
    by_size = (sizes / _middle(sizes))[None] ** -_EXPONENTS[:, None]
    by_tokens = (tokens / _middle(tokens))[None] ** -_EXPONENTS[:, None] if apart else np.zeros((1, len(runs)))
    i, j = (index.ravel() for index in np.indices((len(by_size), len(by_tokens))))
    ones = np.ones((len(i), len(runs), 1))
    columns = np.concatenate([ones, is_of[None] * by_size[i][:, :, None], by_tokens[j][:, :, None]], axis=2)
    weighted = columns / losses[None, :, None]
    normal = weighted.transpose(0, 2, 1) @ weighted
    right = weighted.sum(1)  # relative losses: the target is one
    eye = np.eye(normal.shape[1]) * 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None]
    solved = np.linalg.solve(normal + eye, right[:, :, None])[:, :, 0]
    left = ((weighted @ solved[:, :, None])[:, :, 0] - 1) ** 2
    errors = left.sum(1)
    wrong = (solved[:, 1:] < 0).any(1) | (solved[:, 0] < 0) | (solved[:, 0] >= losses.min())
    if wrong.all():
        what = "losses do not fall towards a floor as sizes and tokens grow"
        raise SpecError("scale", what, "give each size its own best rate, and more seeds where losses scatter")
    best = int(np.argmin(np.where(wrong, np.inf, errors)))
    a, b = float(_EXPONENTS[i[best]]), float(_EXPONENTS[j[best]]) if apart else 0.0
    floor, *factors, of_tokens = solved[best]
    return Law(
        floor=float(floor),
        factors={name: float(f * _middle(sizes) ** a) for name, f in zip(names, factors, strict=True)},
        of_tokens=float(of_tokens * _middle(tokens) ** b) if apart else 0.0,
        size_exponent=a,
        token_exponent=b,
        spread=float(np.sqrt(errors[best] / max(1, len(runs) - columns.shape[2] - 1))),
    )


def forecast(
    runs: Sequence[Run],
    candidate: str,
    size: float,
    tokens: float,
    *,
    confidence: float = 0.8,
    draws: int = 400,
    seed: int = 0,
) -> tuple[float, float, float]:
    """One candidate's loss at a target, with an interval.

    The interval is of a bootstrap over runs within each size, and of what the law gets wrong, which grows with the
    distance to the sizes that were seen, in their own span.

    Args:
        runs: of the candidate, perhaps of others too.
        candidate: its name.
        size: parameters of the target.
        tokens: that it sees.
        confidence: of the interval.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The loss, and the interval's ends.

    Raises:
        SpecError: with too few sizes.
    """
    law, random = fit_law(runs), np.random.default_rng(seed)
    alike: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.size, run.candidate), []).append(run)
    sizes = {run.size for run in runs}
    span = np.log(max(sizes) / min(sizes)) / (len(sizes) - 1)
    away = max(0.0, float(np.log(size / max(sizes)) / span))
    drawn = [float(law.loss(candidate, size, tokens))]
    for _ in range(draws):
        again = [own[i] for own in alike.values() for i in random.integers(0, len(own), len(own))]
        form = random.normal(0, law.spread * (1 + away))
        with suppress(SpecError):  # a draw of noise alone
            drawn.append(float(fit_law(again).loss(candidate, size, tokens)) * (1 + form))
    low, high = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(law.loss(candidate, size, tokens)), float(low), float(high)


def _middle(values: Array) -> float:
    return float(np.exp(np.log(values).mean()))
