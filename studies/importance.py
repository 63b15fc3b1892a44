"""Which decisions a study's own trials say matter, by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna

from studies.config import StudyConfig
from studies.trial import TrialRecord

_FEWEST = 8


def measured_importance(records: Sequence[TrialRecord], settings: StudyConfig) -> dict[str, float]:
    """Share of the loss's variance among complete trials that each decision explains (PED-ANOVA, arXiv 2304.10255).

    Only decisions that every trial took can be judged; empty where there are too few trials.
    """
    from studies.warm_start import distribution_of

    complete = [r for r in records if r.purpose == "search" and r.state == "complete"]
    decisions = {d.name: d for d in (*settings.space.decisions, *settings.training.decisions())}
    shared = [name for name in decisions if all(name in record.choices for record in complete)]
    shared = [name for name in shared if len({str(record.choices[name]) for record in complete}) > 1]
    if len(complete) < _FEWEST or not shared:
        return {}
    study = optuna.create_study()
    for record in complete:
        study.add_trial(
            optuna.trial.create_trial(
                value=record.rungs[-1].loss,
                params={name: record.choices[name] for name in shared},
                distributions={name: distribution_of(decisions[name]) for name in shared},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
