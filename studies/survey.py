"""What a study would search, before anything starts: size, feasible share, FLOPs, time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from builder.budget import Budget
from builder.compiler import compile_arch
from builder.cost import Cost, estimate
from searchspace.errors import SpecError
from searchspace.space import Candidate, SpaceSize, SpaceSpec
from studies.config import MiddleChooser, StudyConfig, check_training, decide_training
from studies.data import Corpus
from studies.training import Trainer

_SAMPLES = 300
_EXHAUSTIVE = 5000
_HOPELESS = 5
_COUNTABLE = 20_000
_COUNTED_SAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Survey:
    """Feasibility of a space under a budget."""

    size: SpaceSize
    looked_at: int
    feasible: int
    exhaustive: bool
    """Whether all candidates were looked at."""
    nearest: tuple[Candidate, Cost, str, float] | None
    """If none is feasible: the candidate that misses least, its cost, the metric, the excess."""

    @property
    def share(self) -> float:
        """Share of candidates that are feasible."""
        return self.feasible / max(1, self.looked_at)


def survey(space: SpaceSpec, budget: Budget) -> Survey:
    """Price random candidates, or all of them where a sample finds none feasible.

    Raises:
        SpecError: if nothing is feasible, naming the tightest limit and the nearest candidate.
    """
    size = space.count()
    found = _look(size, _samples(space, _SAMPLES), budget, exhaustive=False)
    if not found.feasible and size.high <= _EXHAUSTIVE:
        found = _look(size, space.enumerate(), budget, exhaustive=True)
    elif not found.feasible:
        found = _look(size, _samples(space, _EXHAUSTIVE), budget, exhaustive=False)
    if not found.feasible:
        raise SpecError("budget", _nothing_feasible(found, budget), "loosen that limit, or change the space")
    return found


def count_feasible(space: SpaceSpec, budget: Budget) -> str:
    """How many candidates there are and how many keep the budget: counted, or estimated with a 95 % interval."""
    size = space.count()
    if size.high <= _COUNTABLE:
        found = _look(size, space.enumerate(), budget, exhaustive=True)
        return f"{found.looked_at:,} candidates, {found.feasible:,} within the budget ({found.share:.2%})"
    found = _look(size, _samples(space, _COUNTED_SAMPLES), budget, exhaustive=False)
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


def _look(size: SpaceSize, candidates: Iterable[Candidate], budget: Budget, *, exhaustive: bool) -> Survey:
    looked_at = feasible = 0
    nearest: tuple[Candidate, Cost, str, float] | None = None
    for candidate in candidates:
        looked_at += 1
        try:
            cost = estimate(compile_arch(candidate.arch))
        except SpecError:  # a combination that does not compile is not feasible
            continue
        if budget.allows(cost):
            feasible += 1
            continue
        excesses = budget.excesses(cost)
        metric = max(excesses, key=lambda name: excesses[name])
        if nearest is None or excesses[metric] < nearest[3]:
            nearest = (candidate, cost, metric, excesses[metric])
    return Survey(size, looked_at, feasible, exhaustive, nearest)


def _nothing_feasible(found: Survey, budget: Budget) -> str:
    scope = f"none of all {found.looked_at:,}" if found.exhaustive else f"none of {found.looked_at:,} random"
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


def measure_speed(study: StudyConfig, corpus: Corpus, device: str, *, for_s: float = 3.0) -> float:
    """Training FLOPs per second of one worker, from a short run of the first baseline or a sample."""
    arch = study.baselines[0] if study.baselines else study.space.sample(0).arch
    config = check_training(decide_training(study.training, MiddleChooser()).tree)
    torch.set_num_threads(study.resources.cpus_per_trial)
    trainer = Trainer(arch, config, corpus, seed=0, device=device)
    trainer.train(1)  # warm-up; the schedule of the learning rate does not matter here
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < for_s:
        trainer.train(trainer.step + 1)
        steps += 1
    return steps * trainer.plan.flops_per_step / (time.perf_counter() - start)
