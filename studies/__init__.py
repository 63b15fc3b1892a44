"""Data, training, search, execution, reports and the command line. The only package that knows Ray or Optuna.

Names are imported on first use: reading a study never imports Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studies.api.search import search
    from studies.api.study import Study, open_study
    from studies.config import StudyConfig, load_study
    from studies.data.dataset import Dataset
    from studies.execution.custom import TrainingFunction
    from studies.records.trial import Report, Rung, TrialRecord, TrialSpec
    from studies.strategy.driver import Listener, StudyHaltedError
    from studies.tasks.custom import Data
    from studies.tasks.table import open_data

_HOME = {
    "api.search": ("search",),
    "api.study": ("Study", "open_study"),
    "config": ("StudyConfig", "load_study"),
    "data.dataset": ("Dataset",),
    "execution.custom": ("TrainingFunction",),
    "records.trial": ("Report", "Rung", "TrialRecord", "TrialSpec"),
    "strategy.driver": ("Listener", "StudyHaltedError"),
    "tasks.custom": ("Data",),
    "tasks.table": ("open_data",),
}

__all__ = [
    "Data",
    "Dataset",
    "Listener",
    "Report",
    "Rung",
    "Study",
    "StudyConfig",
    "StudyHaltedError",
    "TrainingFunction",
    "TrialRecord",
    "TrialSpec",
    "load_study",
    "open_data",
    "open_study",
    "search",
]


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"studies.{module}"), name)
    raise AttributeError(f"module 'studies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
