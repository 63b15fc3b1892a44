"""Finalists: what was trained again after a search, with other seeds, and how far that tells them apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev

import numpy as np
from scipy.special import stdtrit

from studies.data.dataset import Dataset
from studies.records.trial import TrialRecord, budget_of
from studies.show.summary import summarize

_LEVEL = 0.1  # of a test
_ENOUGH = 2 / 3  # of the pairs of finalists are decided: else more seeds are asked for
_MANY_SEEDS = 30


def baselines_of(records: Sequence[TrialRecord]) -> set[str]:
    """Their architectures, by id."""
    return {record.arch_id for record in records if record.purpose == "baseline"}


@dataclass(frozen=True, slots=True)
class Promotion:
    """Runs of one architecture after the search, over several seeds."""

    runs: tuple[TrialRecord, ...]
    is_baseline: bool

    @property
    def mean(self) -> float:
        """Mean final score."""
        return mean(run.rungs[-1].score for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one."""
        return stdev(run.rungs[-1].score for run in self.runs) if len(self.runs) > 1 else None


def promotions(records: Sequence[TrialRecord], budget: float | None = None) -> list[Promotion]:
    """What was trained again and finished, the best mean first.

    Args:
        records: of a study.
        budget: FLOPs, or tokens where training goes by them; None: the largest, where it was raised in between.
    """
    baselines = baselines_of(records)
    complete = [record for record in records if record.purpose == "promotion" and record.state == "complete"]
    asked = {record.number: budget_of(record) for record in complete}
    budget = budget or max(asked.values(), default=0.0)
    groups: dict[str, list[TrialRecord]] = {}
    for record in complete:
        if asked[record.number] == budget:
            key = f"{record.arch_id} {sorted(record.training.items())}"
            groups.setdefault(key, []).append(record)
    found = [Promotion(tuple(runs), runs[0].arch_id in baselines) for runs in groups.values()]
    return sorted(found, key=lambda group: group.mean)


@dataclass(frozen=True, slots=True)
class Finals:
    """What was trained again, held against each other over the same seeds."""

    groups: tuple[Promotion, ...]
    """The best mean first."""
    noise: float | None
    """Standard deviation of one run, what runs of one seed share taken out; None with one seed or one group."""
    freedom: int
    """Degrees of freedom of that."""

    def gap(self, first: Promotion, second: Promotion) -> tuple[float, float, float | None]:
        """Means of two over the seeds that both ended, and the standard error of their difference, if it is known."""
        a, b = ({run.seed: run.rungs[-1].score for run in group.runs} for group in (first, second))
        seeds = a.keys() & b.keys()
        if not seeds:
            return first.mean, second.mean, None
        error = None if self.noise is None else self.noise * math.sqrt(2 / len(seeds))
        return mean(a[seed] for seed in seeds), mean(b[seed] for seed in seeds), error

    def decided(self, first: Promotion, second: Promotion, *, among: int = 1) -> bool | None:
        """Whether the gap of two is beyond what seeds explain (t-test at 10 %, two-sided); None: it can't be told.

        Args:
            first: one of the groups.
            second: another.
            among: how many such gaps the one that is asked about was chosen from (Bonferroni).
        """
        a, b, error = self.gap(first, second)
        return None if error is None else bool(abs(a - b) > _factor(self.freedom, among) * error)

    def seeds_to_decide(self, share: float) -> int | None:
        """With how many seeds of each about this share of the pairs would be decided, if gaps and noise stay.

        None: not with `_MANY_SEEDS`, or the noise is not known.
        """
        if self.noise is None:
            return None
        gaps = sorted((abs(a.mean - b.mean) for a, b in combinations(self.groups, 2)), reverse=True)
        for seeds in range(2, _MANY_SEEDS + 1):
            error = self.noise * math.sqrt(2 / seeds)
            if gaps[math.ceil(share * len(gaps)) - 1] > _factor((len(self.groups) - 1) * (seeds - 1)) * error:
                return seeds
        return None


def _factor(freedom: int, among: int = 1) -> float:
    """By how many standard errors two means differ that are told apart (t-test, two-sided; Bonferroni)."""
    return float(stdtrit(freedom, 1 - _LEVEL / among / 2))


def finals(records: Sequence[TrialRecord]) -> Finals:
    """The promotions, and how far their means can be told apart.

    Runs of one seed see the same batches, so what is left after each group's and each seed's mean is the noise. Groups
    that lack a seed say nothing of it.
    """
    groups = promotions(records)
    every = {run.seed for group in groups for run in group.runs}
    whole = [group for group in groups if {run.seed for run in group.runs} == every]
    free = (len(whole) - 1) * (len(every) - 1)
    if not whole or not free:
        return Finals(tuple(groups), None, 0)
    scores = np.array([[_score(group, seed) for seed in sorted(every)] for group in whole])
    left = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    return Finals(tuple(groups), float(np.sqrt((left**2).sum() / free)), free)


def _score(group: Promotion, seed: int) -> float:
    return next(run.rungs[-1].score for run in group.runs if run.seed == seed)


def final_lines(records: Sequence[TrialRecord], corpus: Dataset) -> list[str]:
    """What the promotions say: who leads, whether the baseline is beaten, and how many pairs can be told apart."""
    found, headline = finals(records), corpus.headline
    baseline = next((group for group in found.groups if group.is_baseline), None)
    others = [group for group in found.groups if not group.is_baseline]
    if not others:
        return []
    first = others[0]
    runs, name = len(first.runs), summarize(first.runs[0].arch_spec())
    lines = []
    if baseline is not None:
        a, b, error = found.gap(first, baseline)
        sure = {
            True: f" (standard error {headline.spread(error or 0.0):.3f}), beyond what seeds explain of the best of "
            f"{len(others)}",
            False: f" (standard error {headline.spread(error or 0.0):.3f}): cannot tell, the best of {len(others)} may "
            "lie as far off by its seeds alone",
            None: ": cannot tell, as too few seeds ended to know what they explain",
        }[found.decided(first, baseline, among=len(others))]
        seeds = f"{runs} other seed{'s' if runs != 1 else ''}"
        lines.append(
            f"Trained again with {seeds}, the best found, {name}, is {headline.verdict(a, b)} than the baseline{sure}."
        )
    pairs = list(combinations(found.groups, 2))
    if found.noise is not None and len(pairs) > 1:
        decided = sum(bool(found.decided(*pair)) for pair in pairs)
        lines.append(
            f"Of the {len(pairs)} pairs of finalists {decided} are decided (at 10 % each); for the others seeds "
            "explain as much as schedules."
        )
        if decided < _ENOUGH * len(pairs):
            wanted = found.seeds_to_decide(_ENOUGH)
            lines.append(
                f"Two thirds would take more than {_MANY_SEEDS} seeds of each: take them for equal."
                if wanted is None
                else f"{wanted} seeds of each would decide two thirds, if gaps stay as they are "
                f"(search.promote.seeds={wanted} trains what is missing)."
            )
    return lines
