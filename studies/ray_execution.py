"""Running trials on Ray workers that are reused between trials.

Ray is scratch: what it forgets is rebuilt from the journal, never by `Tuner.restore`. So the classes
below leave their state out when Ray pickles them.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

for _name, _value in {  # read by Ray when it is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in Ray 2.60 this alone puts every listener on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_WARN_THRESHOLD_S": "60",
}.items():
    os.environ.setdefault(_name, _value)

import ray
import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from searchspace.errors import SpecError
from studies.config import ResourcesConfig
from studies.execution import Runner, Watcher
from studies.searcher import MAX_ATTEMPTS, StudyDriver
from studies.trial import Report, TrialSpec

_LAST_ATTEMPT = 1 << 30


def run_ray(driver: StudyDriver, watch: Watcher, *, address: str | None, run: Runner) -> None:
    """What `studies.execution.run_on_ray` does, once Ray is imported."""
    scratch = tempfile.mkdtemp(prefix="spiralformer-ray-")
    local: dict[str, Any] = {} if address else {"_temp_dir": scratch, "num_gpus": torch.cuda.device_count()}
    try:
        _init(address, local)
        watch()
        resources = driver.study.resources
        _check_resources(resources)
        driver.learn_in_background()
        tuner = tune.Tuner(
            tune.with_resources(Worker, {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}),
            tune_config=tune.TuneConfig(
                search_alg=DrivenSearcher(driver, watch, run),
                scheduler=DrivenScheduler(driver, watch),
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=resources.max_concurrent,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch, verbose=0, failure_config=tune.FailureConfig(max_failures=MAX_ATTEMPTS - 1)
            ),
        )
        tuner.fit()
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _init(address: str | None, local: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", **local}
    if address is None:
        ray.init(include_dashboard=False, **settings)
        return
    try:
        ray.init(address=address, **settings)
    except (ValueError, ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            "--address", f"can't join {address}: {reason}", "give host:port of a running cluster"
        ) from error


def _check_resources(resources: ResourcesConfig) -> None:
    """Ray would wait for ever for what no node has."""
    for name, asked in (("CPU", resources.cpus_per_trial), ("GPU", resources.gpus_per_trial)):
        most = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        if asked > most:
            raise SpecError(
                f"resources.{name.lower()}s_per_trial", f"asks for {asked:g}, the largest node has {most:g}", "lower it"
            )


class Worker(tune.Trainable):  # type: ignore[misc]
    """One Ray actor; `step` hands on the trial's next report."""

    def setup(self, config: dict[str, Any]) -> None:
        module, _, name = config["run"].partition(":")
        run: Runner = getattr(import_module(module), name)
        spec = TrialSpec.from_json(config["trial"])
        self._timeout_s = spec.timeout_s
        self._last_words = _last_words(spec)
        self._reports = _hung(self._last_words) or run(spec)

    def step(self) -> dict[str, Any]:
        with _watchdog(self._timeout_s, self._last_words):
            report = next(self._reports)
        return {"report": report.to_json(), "done": report.kind in ("done", "failed")}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


@contextmanager
def _watchdog(timeout_s: float, last_words: Path) -> Iterator[None]:
    """Kill this process if the body takes longer, leaving where it hung in a file; needs no cooperation of Python's."""
    with last_words.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    last_words.unlink(missing_ok=True)


def _last_words(spec: TrialSpec) -> Path:
    """Where a hung worker of this trial says so; on this machine, for whoever tries again here."""
    folder = Path(tempfile.gettempdir()) / f"spiralformer-hung-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / hashlib.sha256(spec.folder.encode()).hexdigest()[:32]


def _hung(last_words: Path) -> Iterator[Report] | None:
    """The end of a trial whose earlier attempt hung: once is enough. The file goes with the report (`_watchdog`)."""
    try:
        text = last_words.read_text(encoding="utf-8")
    except OSError:
        return None
    if not text:  # killed by somebody else
        return None
    return iter([Report(kind="failed", attempt=_LAST_ATTEMPT, reason="hung", error=text)])


class _Driven:
    """Holds what must not be pickled or copied."""

    driver: StudyDriver
    watch: Watcher

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class DrivenSearcher(_Driven, Searcher):  # type: ignore[misc]
    """Hands the driver's trials to Tune, and their last reports back."""

    def __init__(self, driver: StudyDriver, watch: Watcher, run: Runner) -> None:
        super().__init__(metric="report", mode="min")
        self.driver, self.watch, self._run = driver, watch, f"{run.__module__}:{run.__qualname__}"
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        spec = self.driver.next_trial()
        self.watch()
        if spec is None:
            return Searcher.FINISHED if self.driver.finished else None
        self._numbers[trial_id] = spec.number
        return {"trial": spec.to_json(), "run": self._run}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id)
        if error or result is None:
            self.driver.lost(number, f"the worker died {MAX_ATTEMPTS} times")
        else:
            self.driver.report(number, Report.from_json(result["report"]))
        self.watch()

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


def _forget_statistics(trial: Any) -> None:
    """Ray keeps running means of every number reported, 13 KiB for each trial that ever ran; nobody reads them."""
    trial.run_metadata.metric_analysis = {}
    trial.run_metadata.metric_n_steps = {}


class DrivenScheduler(_Driven, FIFOScheduler):  # type: ignore[misc]
    """Asks the driver after each report whether the trial goes on."""

    def __init__(self, driver: StudyDriver, watch: Watcher) -> None:
        super().__init__()
        self.driver, self.watch = driver, watch

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = TrialSpec.from_json(trial.config["trial"]).number
        goes_on = self.driver.report(number, Report.from_json(result["report"]))
        self.watch()
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        _forget_statistics(trial)
