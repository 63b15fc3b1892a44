"""Candidates in an order of their own, for samplers that learn nothing: all of a space, or one change at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from searchspace.choices import Decision, Real, Scalar
from searchspace.errors import ConstraintError, SpecError
from searchspace.space import assignments, values_of
from searchspace.template import Template
from studies.config import StudyConfig

_MOST_LISTED = 20_000  # candidates: they are held in memory


def list_all(study: StudyConfig) -> list[dict[str, Scalar]]:
    """Every way to decide a study, in one shuffled order for all seeds, so that the first n are a fair sample of all.

    Raises:
        SpecError: if a range is continuous, or there are more than 20,000.
    """
    for decision in (*study.space.decisions, *study.training.decisions()):
        if isinstance(decision, Real) and decision.step is None and decision.low < decision.high:
            raise SpecError(
                decision.name, "is continuous, so a grid can't list it", "give it a step, or use another sampler"
            )
    size = study.space.count().high * study.training.size()
    if size > _MOST_LISTED:
        raise SpecError(
            "search.sampler",
            f"a grid of {size:,.0f} candidates (with the open choices of training) is too many to list",
            f"narrow it to {_MOST_LISTED:,}, or use another sampler",
        )
    trainings = list(assignments(study.training))
    choices = [{**a, **t} for a in assignments(study.space.template) for t in trainings]
    random.Random("grid").shuffle(choices)
    return choices


def list_changes(study: StudyConfig) -> list[dict[str, Scalar]]:
    """The first option of every decision, then every other option of one of them alone: an ablation.

    What a change decides anew takes its first option too; a change that a constraint forbids alone is left out.

    Raises:
        SpecError: if a range is continuous, or there are more than 20,000.
    """
    templates = (study.space.template, study.training)
    first = {name: value for each in templates for name, value in next(assignments(each)).items()}
    found = [first]
    for template in templates:
        for name, values in _options(template, first).items():
            for value in values:
                if value != first[name]:
                    found += [{**first, **changed} for changed in _decided(template, {**first, name: value})]
            if len(found) > _MOST_LISTED:
                raise SpecError(name, f"has more than {_MOST_LISTED:,} values", "give it a larger step")
    return found


LISTINGS: Mapping[str, Callable[[StudyConfig], list[dict[str, Scalar]]]] = MappingProxyType(
    {"grid": list_all, "one_change": list_changes}
)
"""By the name of the sampler."""


class _First:
    """Given decisions where they are allowed, else the first option."""

    def __init__(self, given: Mapping[str, Scalar]) -> None:
        self._given = given
        self.options: dict[str, tuple[Scalar, ...]] = {}

    def choose(self, decision: Decision) -> Scalar:
        options = self.options[decision.name] = tuple(values_of(decision))
        given = self._given.get(decision.name, options[0])
        return given if given in options else options[0]


def _options(template: Template, given: Mapping[str, Scalar]) -> dict[str, tuple[Scalar, ...]]:
    chooser = _First(given)
    template.decide(chooser)
    return chooser.options


def _decided(template: Template, given: Mapping[str, Scalar]) -> list[dict[str, Scalar]]:
    try:
        return [template.decide(_First(given)).choices]
    except ConstraintError:
        return []
