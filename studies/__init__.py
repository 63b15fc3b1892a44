"""Data, training, search, execution, reports and the command line. The only package that knows Ray or Optuna.

Names are imported on first use: reading a study never imports Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studies.api.search import search
    from studies.api.study import Study, open_study
    from studies.commands.export import Format
    from studies.config import StudyConfig, load_study
    from studies.data.dataset import AddedMetric, DataFacts, Dataset, Headline, Metric
    from studies.data.settings import DataConfig
    from studies.execution.custom import TrainingFunction
    from studies.records.trial import Report, Rung, TrialRecord, TrialSpec
    from studies.strategy.driver import Listener, StudyHaltedError
    from studies.strategy.samplers import Asked, Sampler
    from studies.tasks.custom import Data
    from studies.tasks.pairs import Pairs, prepare_pairs
    from studies.tasks.table import Task, open_data

_HOME = {
    "api.search": ("search",),
    "api.study": ("Study", "open_study"),
    "config": ("StudyConfig", "load_study"),
    "commands.export": ("Format",),
    "data.dataset": ("DataFacts", "Dataset", "Headline", "Metric"),
    "data.settings": ("DataConfig",),
    "execution.custom": ("TrainingFunction",),
    "records.trial": ("Report", "Rung", "TrialRecord", "TrialSpec"),
    "strategy.driver": ("Listener", "StudyHaltedError"),
    "strategy.samplers": ("Asked", "Sampler"),
    "tasks.custom": ("Data",),
    "tasks.pairs": ("Pairs", "prepare_pairs"),
    "tasks.table": ("AddedMetric", "Task", "open_data"),  # which knows what names are taken
}

__all__ = [
    "AddedMetric",
    "Asked",
    "Data",
    "DataConfig",
    "DataFacts",
    "Dataset",
    "Format",
    "Headline",
    "Listener",
    "Metric",
    "Pairs",
    "Report",
    "Rung",
    "Sampler",
    "Study",
    "StudyConfig",
    "StudyHaltedError",
    "Task",
    "TrainingFunction",
    "TrialRecord",
    "TrialSpec",
    "load_study",
    "open_data",
    "open_study",
    "prepare_pairs",
    "search",
]


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"studies.{module}"), name)
    raise AttributeError(f"module 'studies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
