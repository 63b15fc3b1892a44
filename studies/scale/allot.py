"""Which run of a ladder tells most for its FLOPs: after which the wrong candidate is least likely taken for the best.

The first seed at the lowest sizes is trained for all; what follows goes by the fit. A candidate that is hardly the best
any more is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from searchspace.errors import SpecError
from studies.records.trial import TrialRecord
from studies.scale.ladder import Cell, Ladder, key_of, runs_of, size_of_rung
from studies.scale.law import Array, Run
from studies.scale.pairs import FURTHER, Pair, Prior, start
from studies.sections import LEAST_SIZES

_HOPELESS = 0.02  # probability of being the best, below which a candidate is left out
_DRAWS = 4096
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def next_cell(ladder: Ladder, records: Sequence[TrialRecord]) -> Cell | None:
    """The next run of a ladder; None when nothing is left that could change its answer."""
    own = [record for record in records if record.purpose == "ladder"]
    begun = {key_of(record): record for record in own}
    left = [cell for cell in ladder.cells if ladder.key(cell) not in begun]
    if not ladder.config.allot:
        return next(iter(left), None)
    baseline = ladder.candidates[0].origin
    unpaired = {(r.size, r.seed) for r in own if r.state == "failed" and r.origin == baseline}
    lost = {r.origin for r in own if r.state == "failed"} - {r.origin for r in own if r.rungs} - {baseline}
    left = [cell for cell in left if cell.origin not in lost and (cell.size.label, cell.seed) not in unpaired]
    low = {size.label for size in ladder.config.sizes[:LEAST_SIZES]}
    first = ladder.cells[0].seed
    if opening := [cell for cell in left if cell.seed == first and cell.size.label in low]:
        return opening[0]
    try:
        known = {cell: begun.get(ladder.key(cell)) for cell in ladder.cells}
        pending = [cell for cell, record in known.items() if record is not None and record.state == "running"]
        standing = Standing(ladder, runs_of(own, ladder.study.task), pending)
    except SpecError:  # too little has ended yet, or losses don't fall
        return next(iter(left), None)
    return standing.choose(left) if left else None


@dataclass(frozen=True, slots=True)
class _Rival:
    """A candidate as the fit sees it."""

    pairs: list[Pair]
    worth: float
    """Logarithm of the compute multiplier."""
    spread: float
    """Its standard deviation."""


class Standing:
    """What is known of a ladder's candidates at its target.

    Args:
        ladder: its runs and their costs.
        runs: that have ended.
        pending: that are on their way: they are taken to end as is expected.

    Raises:
        SpecError: if too little is known.
    """

    def __init__(self, ladder: Ladder, runs: Sequence[Run], pending: Sequence[Cell] = ()) -> None:
        self._ladder = ladder
        self._baseline = ladder.candidates[0].origin

        self._fit, pairs, _ = start(runs, self._baseline)
        priors, weights = self._fit.priors(pairs)
        self._prior: Prior = priors[int(weights.argmax())]
        largest = max(runs, key=lambda run: (run.size, run.tokens))
        top = ladder.size(Cell(self._baseline, ladder.config.sizes[-1], 0))
        self._target = ladder.config.target or FURTHER * top
        self._tokens = largest.tokens / largest.size * self._target
        self._begun = {(cell.origin, cell.size.label, cell.seed) for cell in pending}
        self._begun |= {(run.candidate, size_of_rung(run.rung), run.seed) for run in runs}
        self._rivals: dict[str, _Rival] = {self._baseline: _Rival([], 0.0, 0.0)}
        for candidate in ladder.candidates[1:]:
            if own := pairs.get(candidate.origin):
                awaited = [cell for cell in pending if cell.origin == candidate.origin]
                self._rivals[candidate.origin] = self._rate([*own, *(self._expected(cell, own) for cell in awaited)])
        self.best = self._probabilities()
        """Of being the best, by candidate."""

    def choose(self, left: Sequence[Cell]) -> Cell | None:
        """The cell that tells most for its FLOPs; its baseline's first, where that is not there yet."""
        hopeful = {name for name, chance in self.best.items() if chance >= _HOPELESS} - {self._baseline}
        cells = [cell for cell in left if cell.origin in hopeful or cell.origin not in self._rivals]
        if self.best[max(self.best, key=self.best.__getitem__)] >= 1 - _HOPELESS:
            cells = [cell for cell in cells if cell.seed == self._ladder.cells[0].seed]  # once at each size is enough
        if not cells:
            return None
        chosen = max(cells, key=lambda cell: self._gain(cell) / self._price(cell))
        base = Cell(self._baseline, chosen.size, chosen.seed)
        return base if base in left else chosen

    def _price(self, cell: Cell) -> float:
        base = Cell(self._baseline, cell.size, cell.seed)
        there = (base.origin, base.size.label, base.seed) in self._begun
        return self._ladder.flops(cell) + (0.0 if there else self._ladder.flops(base))

    def _gain(self, cell: Cell) -> float:
        """How much less likely the wrong candidate is taken for the best after this run."""
        rival = self._rivals.get(cell.origin)
        if rival is None:
            return 1.0  # nothing is known of it
        after = self._rate([*rival.pairs, self._expected(cell, rival.pairs)])
        leader = max(self._rivals, key=lambda name: self._rivals[name].worth)
        others = [name for name in self._rivals if name != cell.origin] if leader == cell.origin else [leader]
        total = 0.0
        for name in others:
            other = self._rivals[name]
            gap = abs(other.worth - rival.worth)
            before = float(np.hypot(rival.spread, other.spread))
            left = float(np.hypot(min(after.spread, rival.spread), other.spread))
            total += _wrong(gap, before, before) - _wrong(gap, before, left)
        return total

    def _rate(self, own: list[Pair]) -> _Rival:
        mean, variance = self._fit.at(own, self._prior, self._target)
        spread = variance**0.5
        at = np.array([mean, mean - spread, mean + spread])
        middle, high, low = np.log(self._fit.multipliers(self._target, self._tokens, at))
        cost = max(own, key=lambda pair: pair.size).cost
        return _Rival(own, float(middle - np.log(cost)), float(high - low) / 2)

    def _expected(self, cell: Cell, own: list[Pair]) -> Pair:
        """A run as it is expected to end."""
        size = self._ladder.size(cell)
        mean, _ = self._fit.at(own, self._prior, size)
        cost = self._ladder.flops(cell) / self._ladder.flops(Cell(self._baseline, cell.size, cell.seed))
        return Pair(f"{cell.size.label}, expected", size, 0.0, mean, cost)

    def _probabilities(self) -> dict[str, float]:
        draw: Array = np.random.default_rng(0).normal(size=(_DRAWS, len(self._rivals)))
        means, spreads = (np.array([getattr(r, name) for r in self._rivals.values()]) for name in ("worth", "spread"))
        best = np.bincount((means + draw * spreads).argmax(1), minlength=len(means)) / _DRAWS
        return dict(zip(self._rivals, best.tolist(), strict=True))


def _wrong(gap: float, before: float, after: float) -> float:
    """Probability of taking the wrong one of two, once their difference is known to ``after`` instead of ``before``."""
    if before == 0.0:
        return 0.0
    moved = np.abs(gap + (before**2 - after**2) ** 0.5 * _NODES)
    return float(_WEIGHTS @ ndtr(-moved / max(after, 1e-12)))
