"""What a study would search, before anything starts: size, feasible share, FLOPs, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget
from builder.pricing.cost import Cost, estimate
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.space import Candidate, SpaceSize, SpaceSpec

_SAMPLES = 300  # a share is known to about three points
_EXHAUSTIVE = 5000  # ways: looked at one by one in some seconds
_HOPELESS = 5  # draws that all end in an error: the space itself is wrong
_COUNTABLE = 20_000  # ways: counted one by one in some ten seconds
_COUNTED_SAMPLES = 4000  # a share is known to under one point


Runnable: TypeAlias = Callable[[ArchSpec, Cost], None]
"""Raises `SpecError` if a candidate can't be trained, whatever the budget says."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Which candidates of a space keep a budget and can be trained."""

    size: SpaceSize
    looked_at: int
    feasible: int
    exhaustive: bool
    """Whether all candidates were looked at."""
    nearest: tuple[Candidate, Cost, str, float] | None
    """If none is feasible: the candidate that misses the budget least, its cost, the metric, the excess."""
    refused: Mapping[str, tuple[int, SpecError]]
    """Candidates that can't be compiled or trained: how many, and the first error, by reason."""
    seq_lens: frozenset[int]
    """Lengths of the feasible."""
    example: Candidate | None
    """The first of the feasible."""

    @property
    def share(self) -> float:
        """Share of candidates that are feasible."""
        return self.feasible / max(1, self.looked_at)


def survey(space: SpaceSpec, budget: Budget, runnable: Runnable = lambda arch, cost: None) -> Survey:
    """Price all candidates where they are few, else random ones, and more where a sample finds none feasible.

    Raises:
        SpecError: if nothing is feasible: why it can't be trained, or the tightest limit and the nearest candidate.
    """
    size = space.count()
    few = size.high <= _SAMPLES
    candidates = space.enumerate() if few else _samples(space, _SAMPLES)
    found = _look(size, candidates, budget, runnable, exhaustive=few)
    if not found.feasible and not few:
        listed = size.high <= _EXHAUSTIVE
        candidates = space.enumerate() if listed else _samples(space, _EXHAUSTIVE)
        found = _look(size, candidates, budget, runnable, exhaustive=listed)
    if found.feasible:
        return found
    scope = f"all {found.looked_at:,}" if found.exhaustive else f"{found.looked_at:,} random"
    count, error = max(found.refused.values(), key=lambda pair: pair[0], default=(0, None))
    if error is not None and count >= found.looked_at - sum(n for n, _ in found.refused.values()):
        whom = f"{scope} candidates"
        if count < found.looked_at:
            whom = f"{count:,} of {whom}; none of the others is feasible either"
        raise SpecError(error.path, f"{error.problem} (so it is for {whom})", error.remedy)
    raise SpecError(
        "budget", _nothing_feasible(found, budget, f"none of {scope}"), "loosen that limit, or change the space"
    )


def count_feasible(space: SpaceSpec, budget: Budget) -> str:
    """How many candidates there are and how many keep the budget: counted, or estimated with a 95 % interval."""
    size = space.count()
    if size.high <= _COUNTABLE:
        found = _look(size, space.enumerate(), budget, _any, exhaustive=True)
        return f"{found.looked_at:,} candidates, {found.feasible:,} within the budget ({found.share:.2%})"
    found = _look(size, _samples(space, _COUNTED_SAMPLES), budget, _any, exhaustive=False)
    n, share = found.looked_at, found.share
    # Wilson's interval, which also bounds a share of which no example was seen.
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (
        f"{size} candidates, {share:.2%} of {n:,} random ones within the budget "
        f"(95 % interval {max(0.0, middle - half):.2%} .. {middle + half:.2%})"
    )


def _samples(space: SpaceSpec, count: int) -> Iterator[Candidate]:
    """Random candidates; draws that give no architecture are left out, unless none of the first gives one."""
    error: SpecError | None = None
    for seed in range(count):
        try:
            yield space.sample(seed)
            error = None
        except SpecError as problem:
            if seed == 0 or error is not None:
                error = problem
            if error is not None and seed == _HOPELESS:
                raise error from None


def _any(arch: ArchSpec, cost: Cost) -> None:
    return None


def _look(
    size: SpaceSize, candidates: Iterable[Candidate], budget: Budget, runnable: Runnable, *, exhaustive: bool
) -> Survey:
    looked_at = feasible = 0
    nearest: tuple[Candidate, Cost, str, float] | None = None
    refused: dict[str, tuple[int, SpecError]] = {}
    seq_lens = set()
    example: Candidate | None = None
    for candidate in candidates:
        looked_at += 1
        try:
            cost = estimate(compile_arch(candidate.arch))
            runnable(candidate.arch, cost)
        except SpecError as error:  # a combination that does not compile is not feasible
            reason = f"{error.path}: {error.remedy or error.problem}"
            count, first = refused.get(reason, (0, error))
            refused[reason] = (count + 1, first)
            continue
        if budget.allows(cost):
            feasible, example = feasible + 1, example or candidate
            seq_lens.add(candidate.arch.seq_len)
            continue
        excesses = budget.excesses(cost)
        metric = max(excesses, key=lambda name: excesses[name])
        if nearest is None or excesses[metric] < nearest[3]:
            nearest = (candidate, cost, metric, excesses[metric])
    return Survey(size, looked_at, feasible, exhaustive, nearest, refused, frozenset(seq_lens), example)


def _nothing_feasible(found: Survey, budget: Budget, scope: str) -> str:
    if found.nearest is None:
        return f"{scope} candidates compiles"
    candidate, cost, metric, excess = found.nearest
    limit = next(limit for limit in budget.limits if limit.metric == metric)
    band = f"{limit.min or 0:,.0f} .. {limit.max:,.0f}" if limit.max is not None else f"at least {limit.min:,.0f}"
    decisions = ", ".join(f"{name}={value}" for name, value in candidate.choices.items())
    return (
        f"{scope} candidates keeps the budget; the nearest misses {metric} ({band}) by {excess:.1%} "
        f"with {getattr(cost, metric):,.0f}: {decisions or 'no decisions'}"
    )
