"""Learning from an earlier study: its finished trials as evidence for the sampler, or its best as first proposals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget
from builder.pricing.cost import estimate
from searchspace.choices import Decision, FixedChooser, Scalar
from searchspace.errors import SpecError
from studies.candidates.distributions import distribution_of
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.records.reading import read_study
from studies.records.trial import TrialRecord
from studies.sections import MiddleChooser, check_training, decide_training
from studies.training.recipe import recipe_of

_FIRST = 5  # proposals taken over: the rest of the budget is for this study's own


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What an earlier study has to say to this one."""

    evidence: list[FrozenTrial]
    """Its trials with their losses, where these compare with this study's."""
    proposals: list[dict[str, Scalar]]
    """Otherwise its best candidates, to be trained here first."""
    note: str


def warm_start(source: Path, study: StudyConfig, budget: Budget, corpus: Dataset) -> WarmStart:
    """Read another study's folder; only trials whose decisions fit this study's space and budget count.

    Losses compare when data, training settings and objectives are the same: then they teach the sampler. If not,
    only the ranking carries over, and the best are proposed first.

    Raises:
        SpecError: if the folder holds no study.
    """
    try:
        records, its_corpus, other = read_study(source)
    except SpecError as error:
        raise SpecError("search.from", f"{source} {error.problem}", error.remedy) from error
    complete = [r for r in records if r.purpose == "search" and r.state == "complete"]
    fitting: list[tuple[TrialRecord, dict[str, BaseDistribution]]] = []
    misfits: list[str] = []
    for record in complete:
        try:
            fitting.append((record, _check(record, study, budget)))
        except SpecError as error:
            misfits.append(f"trial {record.number} ({error.path}: {error.problem})")
    differing = _difference(study, other, corpus, its_corpus)
    used = "its losses teach the sampler" if not differing else f"{differing} differs, so its best are tried first"
    note = (
        f"from {source}: {len(fitting)} of {len(complete)} finished trials fit; {used if fitting else 'none is used'}"
    )
    if misfits:
        note += f"\nleft out: {'; '.join(misfits[:5])}" + (f" and {len(misfits) - 5} more" if len(misfits) > 5 else "")
    if differing:
        best = sorted(fitting, key=lambda pair: pair[0].rungs[-1].score)[:_FIRST]
        return WarmStart([], [record.choices for record, _ in best], note)
    return WarmStart([_evidence(record, names, study, source) for record, names in fitting], [], note)


class _Distributions:
    """Replays decisions and notes their Optuna distributions."""

    def __init__(self, choices: dict[str, Scalar]) -> None:
        self._fixed = FixedChooser(choices)
        self.seen: dict[str, BaseDistribution] = {}

    def choose(self, decision: Decision) -> Scalar:
        value = self._fixed.choose(decision)
        self.seen[decision.name] = distribution_of(decision)
        return value


def _check(record: TrialRecord, study: StudyConfig, budget: Budget) -> dict[str, BaseDistribution]:
    """The distributions of a record's decisions in this study. Raises `SpecError` if they do not fit."""
    chooser = _Distributions(record.choices)
    candidate = study.space.draw(chooser)
    decide_training(study.training, chooser)
    for name in record.choices:
        if name not in chooser.seen:
            raise SpecError(name, "is no decision of this study", "")
    cost = estimate(compile_arch(candidate.arch))
    if not budget.allows(cost):
        over = [metric for metric, excess in budget.excesses(cost).items() if excess > 0]
        raise SpecError(over[0], "is over this study's budget", "")
    return chooser.seen


def _difference(study: StudyConfig, other: StudyConfig, corpus: Dataset, its_corpus: Dataset) -> str:
    """What keeps losses of two studies from being compared; empty if nothing does."""

    def settled(settings: StudyConfig) -> dict[str, Any]:
        return {
            name: value for name, value in settings.plain.get("training", {}).items() if not isinstance(value, dict)
        }

    if its_corpus.facts.content != corpus.facts.content:
        return "data"
    for name in sorted({*settled(study), *settled(other)}):
        if settled(study).get(name) != settled(other).get(name):
            return f"training.{name}"
    if _batch(study) != _batch(other):
        return "training.batch_tokens"
    return "" if study.objectives == other.objectives else "objectives"


def _batch(study: StudyConfig) -> int | None:
    """The batch that all candidates share, given or by the size of the first baseline."""
    config = check_training(decide_training(study.training, MiddleChooser()).tree)
    if config.batch_tokens is not None or not study.baselines:
        return config.batch_tokens
    arch = study.baselines[0]
    return recipe_of(config, arch, estimate(compile_arch(arch))).batch_tokens


def _evidence(
    record: TrialRecord, distributions: dict[str, BaseDistribution], study: StudyConfig, source: Path
) -> FrozenTrial:
    values = list(record.objectives(study.objectives))
    return optuna.trial.create_trial(
        values=values,
        params=dict(record.choices),
        distributions=distributions,
        user_attrs={"from": str(source), "trial": record.number},
    )
