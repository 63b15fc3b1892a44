"""Telling experiment trackers what the journal holds. They are a view: a tracker that fails stops nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from searchspace.errors import SpecError
from searchspace.tables import complete, options, table
from studies.config import StudyConfig
from studies.records.folder import TRACKING
from studies.records.trial import TrialRecord
from studies.sections import TrackerName
from studies.show.summary import summarize


class Tracker(Protocol):
    """Somewhere that keeps runs, each with settings and metrics."""

    def rung(self, record: TrialRecord, index: int) -> None:
        """A trial's loss at one rung."""

    def end(self, record: TrialRecord) -> None:
        """How a trial ended."""


class TensorBoard:
    """Event files under ``tracking/tensorboard``; a step is a million training FLOPs, so that curves compare."""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        self._folder = folder / TRACKING / "tensorboard"
        self._writer = import_module("tensorboardX").SummaryWriter
        self._hparams = import_module("tensorboardX.summary").hparams

    def _open(self, record: TrialRecord, suffix: str) -> Any:
        """A file of its own for each point: names hold whole seconds, and nothing stays open."""
        return self._writer(str(self._folder / _run_name(record)), filename_suffix=suffix)

    def rung(self, record: TrialRecord, index: int) -> None:
        rung = record.rungs[index]
        with self._open(record, f".{index}") as writer:
            step = int(rung.flops / 1e6)
            for name, value in rung.metrics.items():
                writer.add_scalar(f"held_out/{name}", value, step)

    def end(self, record: TrialRecord) -> None:
        with self._open(record, ".end") as writer:
            facts = _facts(record)
            writer.add_text("trial", "\n".join(f"- {name}: {value}" for name, value in facts.items()))
            for tokens, loss in record.curve:
                writer.add_scalar("train/loss", loss, int(tokens * record.cost.training_flops_per_token / 1e6))
            plain = {name: value if isinstance(value, int | float) else str(value) for name, value in facts.items()}
            measured = record.rungs[-1].metrics if record.rungs else {}
            last = {f"held_out/{name}": value for name, value in measured.items()}
            for summary in self._hparams(plain, last):  # the HParams tab: scalars that this run has already
                writer.file_writer.add_summary(summary)


class MLflow:
    """Runs of the experiment named as the study; in ``tracking/mlflow.db``, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        client = import_module("mlflow").MlflowClient
        place = folder.absolute() / TRACKING
        place.mkdir(parents=True, exist_ok=True)
        self._client = client(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}"))
        known = self._client.get_experiment_by_name(study.name)
        location = (place / "mlflow-artifacts").as_uri()
        self._experiment = known.experiment_id if known else self._client.create_experiment(study.name, location)

    def _run(self, record: TrialRecord) -> str:
        """The trial's run, looked for first: a study that goes on makes none twice."""
        wanted = f"attributes.run_name = '{_run_name(record)}'"
        for run in self._client.search_runs([self._experiment], wanted, max_results=1):
            return str(run.info.run_id)
        run = self._client.create_run(self._experiment, run_name=_run_name(record))
        for name, value in _facts(record).items():
            self._client.log_param(run.info.run_id, name, value)
        return str(run.info.run_id)

    def rung(self, record: TrialRecord, index: int) -> None:
        run, rung = self._run(record), record.rungs[index]
        step = int(rung.flops / 1e6)
        for name, value in rung.metrics.items():
            self._client.log_metric(run, f"held_out_{name}", value, step=step)

    def end(self, record: TrialRecord) -> None:
        run = self._run(record)
        self._client.set_tag(run, "state", record.state)
        if record.reason:
            self._client.set_tag(run, "reason", record.reason)
        self._client.set_terminated(run, "FAILED" if record.state == "failed" else "FINISHED")


class _RunBased:
    """Trackers with one ``init`` for a run and one ``log`` for a point."""

    module = ""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        self._study, self._folder = study, folder
        self._library = import_module(self.module)

    def _init(self, record: TrialRecord) -> Any:
        raise NotImplementedError

    def rung(self, record: TrialRecord, index: int) -> None:
        """All at the end: these libraries hold one run open at a time."""

    def end(self, record: TrialRecord) -> None:
        run = self._init(record)
        for rung in record.rungs:
            told = {f"held_out_{name}": value for name, value in rung.metrics.items()}
            run.log({**told, "training_flops": rung.flops})
        run.finish()


class WandB(_RunBased):
    """Weights & Biases; without a login, offline runs for ``wandb sync``."""

    module = "wandb"

    def _init(self, record: TrialRecord) -> Any:
        place = self._folder / TRACKING
        place.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run_id = f"{self._study.name}-{record.number}".replace(".", "-")
        return self._library.init(
            project=self._study.name, name=_run_name(record), id=run_id, resume="allow", mode=mode,
            dir=str(place), config=_facts(record), reinit="finish_previous",
        )  # fmt: skip


class Trackio(_RunBased):
    """Trackio, kept on this machine."""

    module = "trackio"

    def _init(self, record: TrialRecord) -> Any:
        return self._library.init(project=self._study.name, name=_run_name(record), config=_facts(record))


@complete
@dataclass(frozen=True, slots=True)
class TrackerRow:
    """A tracker, and what it needs."""

    name: str
    make: Callable[[StudyConfig, Path], Tracker]
    module: str
    package: str
    """To install."""


TRACKERS = table(
    "a tracker",
    (
        TrackerRow("tensorboard", TensorBoard, "tensorboardX", "tensorboardX"),
        TrackerRow("mlflow", MLflow, "mlflow", "mlflow-skinny"),
        TrackerRow("wandb", WandB, "wandb", "wandb"),
        TrackerRow("trackio", Trackio, "trackio", "trackio"),
    ),
    options(TrackerName),
)


class Tracking:
    """All of a study's trackers, told in a thread of their own; one that raises is left alone from then on, and named.

    Args:
        study: of which ``tracking`` names them.
        folder: of the study.
        listener: somebody else who is told the same.

    Raises:
        SpecError: if a tracker's package is missing.
    """

    def __init__(self, study: StudyConfig, folder: Path, listener: Tracker | None = None) -> None:
        check_trackers(study)
        self._trackers: dict[str, Tracker] = {name: TRACKERS[name].make(study, folder) for name in study.tracking}
        if listener is not None:
            self._trackers["the listener"] = listener
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self.note = ""
        """Which tracker failed, and why."""

    def rung(self, record: TrialRecord, index: int) -> None:
        """A trial has reached a rung."""
        self._thread.submit(self._tell, lambda tracker: tracker.rung(record, index))

    def end(self, record: TrialRecord) -> None:
        """A trial has ended."""
        self._thread.submit(self._tell, lambda tracker: tracker.end(record))

    def close(self) -> None:
        """Wait until all is told."""
        self._thread.shutdown()

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # a third party's service: whatever it raises, the search goes on
                del self._trackers[name]
                self.note = f"{name} is told nothing more: {type(error).__name__}: {error}"


def check_trackers(study: StudyConfig) -> None:
    """Raise `SpecError` if the package of one of a study's trackers is missing."""
    for name in study.tracking:
        row = TRACKERS[name]
        if find_spec(row.module) is None:
            raise SpecError("tracking", f"{row.module} is not installed", f"pip install {row.package}")


def _run_name(record: TrialRecord) -> str:
    return f"{record.purpose}-{record.number:05d}"


def _facts(record: TrialRecord) -> dict[str, Any]:
    settings = {f"training.{name}": value for name, value in record.training.items()}
    return {
        "architecture": summarize(record.arch_spec()),
        "arch_id": record.arch_id,
        "params": record.cost.params,
        "flops_per_token": record.cost.flops_per_token,
        "seed": record.seed,
        **settings,
        **record.choices,
    }
