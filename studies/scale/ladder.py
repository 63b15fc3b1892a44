"""A study's ladder: which runs it is made of, how each is trained, and its losses as the fit takes them.

Candidates are the baselines and the best that the search found. All runs of one size and seed see the same batches, at
the horizons of one trunk: its rate stays up, and decays in a branch for each horizon (WSD; Hägele et al., arXiv
2405.18392).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any, TypeAlias

from builder.graph.compiler import compile_arch
from builder.pricing.cost import Cost, estimate
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from studies.config import StudyConfig
from studies.data.dataset import DataFacts
from studies.records.trial import TrialRecord, budget_of
from studies.scale.law import Run
from studies.scale.sizes import scaled
from studies.sections import MiddleChooser, ScaleConfig, SizeConfig, check_training, decide_training
from studies.show.summary import summarize
from studies.tasks.table import Task
from studies.training.plan import make_plan
from studies.training.recipe import BYTES_PER_PARAMETER, batch_tokens, recipe_of, size_of

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal where it is not known how many bytes a token stands for (Chinchilla)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a ladder."""

    origin: str
    """The candidate's architecture, by its id."""
    size: SizeConfig
    seed: int


Key: TypeAlias = tuple[str, str, int, float, tuple[float, ...]]
"""Origin, size, seed, tokens, and the horizons as shares of them."""


def key_of(record: TrialRecord) -> Key:
    """Which run of a ladder a record is."""
    return record.origin, record.size, record.seed, float(record.training["tokens"]), tuple(record.shares)


@dataclass(frozen=True)
class LadderCandidate:
    """A candidate of a ladder."""

    origin: str
    arch: ArchSpec
    """As it stands in the study."""
    is_baseline: bool


@dataclass(frozen=True)
class Ladder:
    """A study's ladder: its candidates, the first baseline first.

    Args:
        study: with ``scale``.
        candidates: the candidates.
        facts: of the data.
    """

    study: StudyConfig
    candidates: tuple[LadderCandidate, ...]
    facts: DataFacts
    left_out: tuple[str, ...] = ()
    """What was found and can't be built at every size, and why."""

    def standing_in(self, arch: ArchSpec) -> Ladder:
        """This ladder, with one candidate where none is known yet: what can be told of it before the search."""
        return self if self.candidates else replace(self, candidates=(LadderCandidate("", arch, is_baseline=False),))

    @property
    def config(self) -> ScaleConfig:
        assert self.study.scale is not None
        return self.study.scale

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every run, small sizes first, then seed by seed."""
        seeds = range(self.study.search.seed, self.study.search.seed + self.config.seeds)
        rungs = [(size, seed) for size in self.config.sizes for seed in seeds]
        return tuple(Cell(candidate.origin, *rung) for rung in rungs for candidate in self.candidates)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The horizons as shares of the longest."""
        return shares_of(self.config)

    def arch(self, cell: Cell) -> ArchSpec:
        """What a cell trains. Raises `SpecError` if it can't be built."""
        return self._built(cell.origin, cell.size)[0]

    def cost(self, cell: Cell) -> Cost:
        """What it costs."""
        return self._built(cell.origin, cell.size)[1]

    def size(self, cell: Cell) -> int:
        """Parameters of its blocks and head."""
        return size_of(*self._built(cell.origin, cell.size))

    def flops(self, cell: Cell) -> float:
        """What its run takes in training, branches and all."""
        config = check_training(self.training(cell))
        plan = make_plan(config, self.arch(cell), self.cost(cell))
        steps = plan.num_steps + sum(
            plan.step_at(share) - plan.branch_at(share, config.decay) for share in self.shares[:-1]
        )
        return steps * plan.flops_per_step

    def key(self, cell: Cell) -> Key:
        """By which a record is known to be this run, at these horizons (`key_of`)."""
        tokens = self._tokens(size_of(*self._built(self.candidates[0].origin, cell.size)))
        return cell.origin, cell.size.label, cell.seed, float(tokens), self.shares

    def training(self, cell: Cell) -> dict[str, Any]:
        """Its settings, all decided. The rate and the batch that the study's file gives are for its own size."""
        asked = decide_training(self.study.training, MiddleChooser()).tree
        asked = {name: value for name, value in asked.items() if name not in ("flops", "lr", "beta2")}
        first = self._built(self.candidates[0].origin, cell.size)
        tokens = self._tokens(size_of(*first))
        middle = tokens * self.shares[0] ** 0.5  # one trunk has one batch, which suits the middle of its horizons
        batch = batch_tokens(middle, first[0].seq_len)
        settings = {**asked, "tokens": float(tokens), "batch_tokens": batch, "lr_schedule": "wsd"}
        return {**settings, **asdict(recipe_of(check_training(settings), *self._built(cell.origin, cell.size)))}

    def _tokens(self, size: int) -> int:
        """The longest horizon, of a baseline of so many parameters."""
        per_parameter = TOKENS_PER_PARAMETER
        if self.facts.task == "text_lm" and self.facts.says_bytes:
            per_parameter = BYTES_PER_PARAMETER / self.facts.bytes_per_token
        return round(self.config.horizons[-1] * per_parameter * size)

    @cached_property
    def _known(self) -> dict[tuple[str, str], tuple[ArchSpec, Cost]]:
        return {}

    def _built(self, origin: str, size: SizeConfig) -> tuple[ArchSpec, Cost]:
        if (found := self._known.get((origin, size.label))) is None:
            candidate = next(candidate for candidate in self.candidates if candidate.origin == origin)
            arch = scaled(candidate.arch, size)
            found = self._known[origin, size.label] = arch, estimate(compile_arch(arch))
        return found


def shares_of(config: ScaleConfig) -> tuple[float, ...]:
    """The horizons as shares of the longest."""
    return tuple(horizon / config.horizons[-1] for horizon in config.horizons)


def ladder_of(study: StudyConfig, records: Sequence[TrialRecord], facts: DataFacts) -> Ladder:
    """The ladder that a study's trials lead to: its baselines, then the best that were found, each architecture once.

    Args:
        study: with ``scale``.
        records: of its trials. What was trained again comes first, by its mean.
        facts: of its data.
    """
    assert study.scale is not None
    complete = [record for record in records if record.state == "complete"]
    promoted = [record for record in complete if record.purpose == "promotion"]
    longest = max((budget_of(record) for record in promoted), default=0.0)
    again: dict[str, list[float]] = {}
    for record in promoted:
        if budget_of(record) == longest:
            again.setdefault(record.arch_id, []).append(record.rungs[-1].score)

    def place(record: TrialRecord) -> tuple[bool, float]:
        scores = again.get(record.arch_id)
        return scores is None, mean(scores) if scores else record.rungs[-1].score

    found = sorted((record for record in complete if record.purpose == "search"), key=place)
    if not study.baselines and (first := next((r.origin for r in records if r.purpose == "ladder"), None)):
        found.sort(key=lambda record: record.arch_id != first)  # what it began with goes on deciding texts and batches
    offered = [LadderCandidate(compile_arch(arch).arch_id, arch, is_baseline=True) for arch in study.baselines]
    offered += [LadderCandidate(record.arch_id, record.arch_spec(), is_baseline=False) for record in found]
    taken: dict[str, LadderCandidate] = {}
    left_out: dict[str, str] = {}
    searched = 0
    for one in offered:
        if (
            one.origin in taken
            or one.origin in left_out
            or (not one.is_baseline and searched >= study.scale.candidates)
        ):
            continue
        if reason := _unfit(one.arch, study.scale, next(iter(taken.values()), one).arch):
            left_out[one.origin] = f"{summarize(one.arch)} can't go up the ladder: {reason}."
            continue
        taken[one.origin] = one
        searched += not one.is_baseline
    return Ladder(study, tuple(taken.values()), facts, tuple(left_out.values()))


def _unfit(arch: ArchSpec, scale: ScaleConfig, first: ArchSpec) -> str:
    """Why an architecture can't be held against the first at every size; empty if it can."""
    if arch.seq_len != first.seq_len:
        return f"it reads {arch.seq_len} tokens at once, the first {first.seq_len}, so they can't see the same batches"
    try:
        for size in scale.sizes:
            compile_arch(scaled(arch, size))
    except SpecError as error:
        return f"{error.path} {error.problem}"
    return ""


_APART = ", "  # between size and tokens, in the name of a rung


def size_of_rung(rung: str) -> str:
    """The label of a rung's size, as `runs_of` names rungs."""
    return rung.partition(_APART)[0]


def runs_of(records: Sequence[TrialRecord], task: Task) -> list[Run]:
    """The measured points of a ladder, one for each horizon of each run that has come so far.

    Losses are the task's scores where its headline is a loss, else the loss that it measures beside it: what is right
    or wrong follows no power of the size.
    """
    by_score = task.headline.better == "lower"
    runs = []
    for record in records:
        if record.purpose != "ladder":
            continue
        size = size_of(record.arch_spec(), record.cost)
        for rung in record.rungs:
            where = f"{record.size}{_APART}{rung.tokens}"
            loss = rung.score if by_score else rung.metrics["loss"]
            runs.append(Run(record.origin, size, rung.tokens, loss, where, record.seed, flops=rung.flops))
    return runs
