"""Which decisions a study's own trials say matter, by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna

from studies.candidates.distributions import distribution_of
from studies.config import StudyConfig
from studies.records.trial import TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)  # of the studies that are made here, nobody need know

_FEWEST = 8  # trials: with fewer, shares of variance are noise
_MOST_JUDGED, _MOST_DRAWN = 500, 200  # trials: PED-ANOVA and the parallel plot take a second for so many


def measured_importance(records: Sequence[TrialRecord], settings: StudyConfig) -> dict[str, float]:
    """Share of the loss's variance among complete trials that each decision explains (PED-ANOVA, arXiv 2304.10255).

    Only decisions that every trial took can be judged; empty where there are too few trials.
    """
    study = _decided(records, settings, _MOST_JUDGED)
    if study is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def optuna_figures(records: Sequence[TrialRecord], settings: StudyConfig) -> dict[str, Any]:
    """Optuna's own plots of the searched trials: how the best loss fell, and decisions against loss."""
    study = _decided(records, settings, _MOST_DRAWN, prefix="graph.")
    if study is None:
        return {}
    losses = optuna.create_study()
    losses.add_trials([optuna.trial.create_trial(value=record.rungs[-1].score) for record in _complete(records)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = optuna.visualization.plot_optimization_history(losses, target_name="loss, nats per token")
        parallel = optuna.visualization.plot_parallel_coordinate(study, target_name="loss")
    for figure in (history, parallel):
        figure.update_layout(title=None, margin={"l": 60, "r": 60, "t": 90, "b": 40})
    history.update_layout(legend={"orientation": "h", "y": 1.15})
    return {"history": history, "parallel": parallel}


def _decided(records: Sequence[TrialRecord], settings: StudyConfig, most: int, prefix: str = "") -> optuna.Study | None:
    """Complete trials, at most so many and evenly spaced, with the decisions that all took and not all alike.

    A prefix is cut off their names. None if there are too few.
    """
    complete = _complete(records)
    complete = [complete[i * len(complete) // most] for i in range(most)] if len(complete) > most else complete
    decisions = {d.name: d for d in (*settings.space.decisions, *settings.training.decisions())}
    shared = [name for name in decisions if all(name in record.choices for record in complete)]
    shared = [name for name in shared if len({str(record.choices[name]) for record in complete}) > 1]
    if len(complete) < _FEWEST or not shared:
        return None
    study = optuna.create_study()
    distributions = {name.removeprefix(prefix): distribution_of(decisions[name]) for name in shared}
    for record in complete:
        params = {name.removeprefix(prefix): record.choices[name] for name in shared}
        study.add_trial(
            optuna.trial.create_trial(value=record.rungs[-1].score, params=params, distributions=distributions)
        )
    return study


def _complete(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.purpose == "search" and record.state == "complete"]
