"""Training functions of one's own: what they yield, as the driver's reports."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from searchspace.errors import SpecError, show
from studies.data.dataset import Headline
from studies.records.trial import Report, Rung, TrialSpec
from studies.tasks.table import open_data
from studies.training.plan import make_plan
from studies.training.run_trial import reason_of

Yielded: TypeAlias = Report | float | Mapping[str, float]
TrainingFunction: TypeAlias = Callable[[TrialSpec], Iterable[Yielded]]
"""Trains ``spec.arch`` and yields, for each of ``spec.rungs`` in order, what it measured when that share of the budget
was spent: the score, of which less is better, or metrics by name with the task's first among them. A `Report` goes to
the driver as it is."""


def name_of(train: object) -> str:
    """What a training function is called in the records, with the arguments that are bound to it."""
    if isinstance(train, partial):
        bound = [*map(repr, train.args), *(f"{name}={value!r}" for name, value in sorted(train.keywords.items()))]
        return f"{name_of(train.func)}({', '.join(bound)})"
    kind = train if hasattr(train, "__qualname__") else type(train)
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, slots=True)
class CustomTraining:
    """A runner of trials that calls such a function. What it raises ends the trial as failed, not the study."""

    train: TrainingFunction

    def __call__(self, spec: TrialSpec) -> Iterator[Report]:
        from studies.training.checkpoint import attempt_number, claim_attempt, open_store

        attempt, rungs = 1, list[Rung]()
        try:
            attempt = attempt_number(claim_attempt(open_store(spec.folder), spec.study))
            plan = make_plan(spec.training, spec.arch, estimate(compile_arch(spec.arch)))
            headline = open_data(spec.corpus).headline
            begun = time.monotonic()
            told = self.train(spec)
            if not isinstance(told, Iterable) or isinstance(told, str):
                what = f"gives {type(told).__name__}"
                raise SpecError("train", what, "yield one number for each share of the budget in spec.rungs")
            for given in told:
                if isinstance(given, Report):
                    rungs = list(given.rungs) or rungs
                    if given.kind == "done" and len(rungs) < len(spec.rungs):
                        break
                    yield replace(given, attempt=attempt, rungs=tuple(rungs))
                    if given.kind in ("done", "failed"):
                        return
                    continue
                if len(rungs) == len(spec.rungs):
                    what = f"yields more than the {len(rungs)} results that spec.rungs asks for"
                    raise SpecError("train", what, "yield one for each")
                score, metrics = _measured(given, headline)
                steps = plan.step_at(spec.rungs[len(rungs)])
                flops, tokens = steps * plan.flops_per_step, steps * plan.tokens_per_step
                rungs.append(Rung(flops=flops, tokens=tokens, score=score, metrics=metrics))
                if len(rungs) < len(spec.rungs):
                    yield Report(
                        kind="rung",
                        attempt=attempt,
                        flops=flops,
                        tokens=tokens,
                        steps=steps,
                        seconds=time.monotonic() - begun,
                        rungs=tuple(rungs),
                    )
            if len(rungs) < len(spec.rungs):
                what = f"yields {len(rungs)} of the {len(spec.rungs)} numbers that spec.rungs asks for"
                raise SpecError("train", what, "yield one for each share of the budget in spec.rungs")
            last = rungs[-1]
            yield Report(
                kind="done",
                attempt=attempt,
                flops=last.flops,
                tokens=last.tokens,
                steps=plan.num_steps,
                seconds=time.monotonic() - begun,
                rungs=tuple(rungs),
            )
        except Exception as error:  # the process boundary
            text = str(error) if isinstance(error, SpecError) else traceback.format_exc()
            yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason=reason_of(error), error=text)


def _measured(given: object, headline: Headline) -> tuple[float, dict[str, float]]:
    """Score and metrics of what was yielded."""
    name = headline.metric.name
    if isinstance(given, Mapping):
        metrics = {key: _number(value, key) for key, value in given.items()}
        for key, value in metrics.items():
            if key != name and not math.isfinite(value):
                raise SpecError("train", f"yields {value} as {key}", "yield finite numbers")
        if name not in metrics:
            what = f"yields {sorted(map(str, metrics))} without {name}"
            raise SpecError("train", what, f"name one of them {name}")
        return metrics[name] / headline.scale, metrics
    score = _number(given, name)
    return score, {name: headline.value(score)}


def _number(value: object, name: str) -> float:
    """A number, or a tensor or array with one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        what = f"yields {show(value)} as {name}"
        raise SpecError("train", what, "yield a number, a mapping of numbers, or a Report") from error
