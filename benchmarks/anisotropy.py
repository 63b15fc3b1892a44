"""How far from an axis stability lies: appendix B.2 of arXiv 2604.15259, the projection exact.

    python benchmarks/anisotropy.py

Points (x, y), state weight of the recall and gain of the branch, are drawn from a normal distribution and moved to the
nearest point of the stable set: ``|1 + x y| <= 1`` for internal recall, ``|(1 + y) x| <= 1`` for external.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = "NDArray[np.float64]"
Where: TypeAlias = Literal["internal", "external"]
CLIP = 1e-8
"""The least modulus of a coordinate; the means hang on it, medians and balances do not."""
_GRID = np.linspace(-12, 6, 1000)  # of log |x| along a border
_NARROWING = 60


def project(points: Points, where: Where) -> Points:
    """The nearest stable point of each, (N, 2)."""
    x, y = points.T
    inside = np.abs(1 + x * y) <= 1 if where == "internal" else np.abs((1 + y) * x) <= 1
    if where == "internal":
        axes = [np.stack((x, 0 * y), 1), np.stack((0 * x, y), 1)]
        borders = [*axes, _nearest(points, lambda t: -2 / t)]
    else:
        borders = [_nearest(points, lambda t, sign=sign: sign / t - 1) for sign in (1, -1)]  # type: ignore[misc]
    distances = np.stack([np.square(border - points).sum(1) for border in borders])
    nearest = np.stack(borders)[distances.argmin(0), np.arange(len(points))]
    return np.where(inside[:, None], points, nearest)


def _nearest(points: Points, curve: Callable[[Points], Points]) -> Points:
    """The nearest points of a curve y(x), by the grid, then by golden sections about its best."""
    found, least = points.copy(), np.full(len(points), np.inf)
    for sign in (1.0, -1.0):

        def distance(log: Points, at: Points, sign: float = sign) -> Points:
            t = sign * np.exp(log)
            return (t - at[..., 0]) ** 2 + (curve(t) - at[..., 1]) ** 2

        best = np.concatenate(
            [distance(_GRID[None], part[:, None]).argmin(1) for part in np.array_split(points, 20) if len(part)]
        )
        low, high = _GRID[np.maximum(best - 1, 0)], _GRID[np.minimum(best + 1, len(_GRID) - 1)]
        for _ in range(_NARROWING):
            a, b = low + 0.382 * (high - low), low + 0.618 * (high - low)
            left = distance(a, points) < distance(b, points)
            low, high = np.where(left, low, a), np.where(left, b, high)
        log = (low + high) / 2
        nearer = distance(log, points) < least
        t = sign * np.exp(log)
        found = np.where(nearer[:, None], np.stack((t, curve(t)), 1), found)
        least = np.where(nearer, distance(log, points), least)
    return found


def anisotropy(points: Points) -> tuple[float, float, float]:
    """Mean and median of ``|log(|x| / |y|)|``, and the mean of ``min / max``."""
    sizes = np.abs(points)
    ratio = np.abs(np.log(np.maximum(sizes[:, 0], CLIP) / np.maximum(sizes[:, 1], CLIP)))
    return float(ratio.mean()), float(np.median(ratio)), float((sizes.min(1) / sizes.max(1)).mean())


def main() -> None:
    print("| sigma | log-ratio mean, internal / external | median | balance |\n|---|---|---|---|")
    for sigma in (0.1, 0.5, 1.0, 2.0, 4.0):
        points = np.random.default_rng(0).normal(size=(10_000, 2)) * sigma
        both = [anisotropy(project(points, where)) for where in ("internal", "external")]
        cells = [f"{a:.3g} / {b:.3g}" for a, b in zip(*both, strict=True)]
        print(f"| {sigma:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
