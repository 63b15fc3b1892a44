"""Running trials on Ray workers that are reused between trials.

Ray is scratch: what it forgets is rebuilt from the journal, never by `Tuner.restore`. So the classes
below leave their state out when Ray pickles them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

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
from ray import cloudpickle, tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from searchspace.disk import private_folder, read_bytes
from searchspace.errors import SpecError
from studies.execution.base import Runner, Watcher
from studies.records.trial import MissingPluginError, Report, TrialSpec
from studies.sections import ResourcesConfig
from studies.strategy.driver import MAX_ATTEMPTS, StudyDriver

_LAST_ATTEMPT = 1 << 30  # above any that was begun: the driver takes it for no older one's word
_SCRATCH, _OWNER = "spiralformer-", "owner"
_LONGEST = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""Characters of Ray's folder, so that its sockets' names fit into what the system allows."""


def run_ray(driver: StudyDriver, watch: Watcher, *, address: str | None, run: Runner) -> None:
    """What `studies.execution.run.run_on_ray` does, once Ray is imported."""
    with _scratch() as scratch:
        local = {} if address else {"_temp_dir": str(scratch / "ray"), "num_gpus": torch.cuda.device_count()}
        try:
            _init(address, local, scratch)
            watch()
            resources = driver.study.resources
            _check_resources(resources)
            driver.learn_in_background()
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(Worker, pickled=_pickled(run), path=[*map(os.path.abspath, sys.path)]),
                    {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial},
                ),
                tune_config=tune.TuneConfig(
                    search_alg=DrivenSearcher(driver, watch),
                    scheduler=DrivenScheduler(driver, watch),
                    num_samples=-1,
                    reuse_actors=True,
                    max_concurrent_trials=resources.max_concurrent,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    storage_path=str(scratch / "tune"),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=MAX_ATTEMPTS - 1),
                ),
            )
            try:
                tuner.fit()
            except ray.exceptions.RayActorError as error:  # a machine that slept, for one
                reason = str(error).strip().splitlines()[0]
                driver.halted = driver.halted or f"Ray has lost a worker and gave up: {reason}"
        finally:
            ray.shutdown()


@contextmanager
def _scratch() -> Iterator[Path]:
    """A private folder for Ray's own, gone afterwards, with a short name; those of drivers that were killed go too.

    Ray opens its folder to everybody: it lies within this one.
    """
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    room = _LONGEST - len(f"/{_SCRATCH}12345678/ray")
    base = next((place for place in places if len(os.fsencode(place)) <= room and os.access(place, os.W_OK)), places[0])
    for old in base.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if old.lstat().st_uid == os.getuid() and not old.is_symlink() and _is_abandoned(old):
                shutil.rmtree(old)
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=base))
    try:
        with (folder / _OWNER).open("x") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether a scratch folder's driver is gone: its lock is free."""
    handle = os.open(folder / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _init(address: str | None, local: dict[str, Any], scratch: Path) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", **local}
    here = Path.cwd()
    os.chdir(scratch)  # Ray puts the working folder first where workers look for modules, ours among them
    try:
        # An address is the command line's to give, not the environment's (RAY_ADDRESS).
        ray.init(
            **({"address": "local", "include_dashboard": False} if address is None else {"address": address}),
            **settings,
        )
    except (ValueError, ConnectionError, RuntimeError) as error:
        if address is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            "--address", f"can't join {address}: {reason}", "give host:port of a running cluster"
        ) from error
    finally:
        os.chdir(here)


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

    def setup(self, config: dict[str, Any], pickled: bytes, path: list[str]) -> None:
        sys.path += [place for place in path if place not in sys.path and os.path.isdir(place)]  # as the driver's
        self._pickled, self._run = pickled, cast("Runner | None", None)
        self._last_words = Path()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        try:
            spec = TrialSpec.from_json(new_config["trial"])
        except MissingPluginError as error:
            self._timeout_s, self._reports = math.inf, _refusal("no_plugin", str(error))
            return True
        if self._run is None:  # what it holds may be of the trial's plugins, which are loaded now
            self._run = _unpickled(self._pickled)
        self._timeout_s = spec.timeout_s
        self._last_words = _last_words(spec)
        self._reports = _hung(self._last_words) or self._run(spec)
        return True

    def step(self) -> dict[str, Any]:
        with _watchdog(self._timeout_s, self._last_words):
            report = next(self._reports)
        return {"report": report.to_json(), "done": report.kind in ("done", "failed")}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


@contextmanager
def _watchdog(timeout_s: float, last_words: Path) -> Iterator[None]:
    """Kill this process if the body takes longer, leaving where it hung in a file; needs no cooperation of Python's."""
    if math.isinf(timeout_s):
        yield
        return
    handle = os.open(last_words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    last_words.unlink(missing_ok=True)


def _last_words(spec: TrialSpec) -> Path:
    """Where a hung worker of this trial says so; on this machine, for whoever tries again here."""
    return private_folder("spiralformer-hung") / hashlib.sha256(spec.folder.encode()).hexdigest()[:32]


def _hung(last_words: Path) -> Iterator[Report] | None:
    """The end of a trial whose earlier attempt hung: once is enough. The file goes with the report (`_watchdog`)."""
    try:
        text = read_bytes(last_words, 1 << 20).decode("utf-8", errors="replace")
    except SpecError:
        return None
    if not text:  # killed by somebody else
        return None
    return iter([Report(kind="failed", attempt=_LAST_ATTEMPT, reason="hung", error=text)])


def _pickled(run: Runner) -> bytes:
    """Once for all trials, whatever it holds. Raises `SpecError` if it holds what can't travel."""
    try:
        pickled: bytes = cloudpickle.dumps(run)
    except Exception as error:
        what = f"can't be sent to Ray's workers: {error}"
        raise SpecError(
            "train or data", what, "leave out locks, open files and the like, or run without ray"
        ) from error
    return pickled


def _unpickled(pickled: bytes) -> Runner:
    try:
        run: Runner = cloudpickle.loads(pickled)
    except Exception as error:  # whatever it is, the trial says it; else all that is known is that a worker died
        reason = f"what Python handed over can't be loaded by a worker: {error}"
        return lambda spec: _refusal("invalid", reason)
    return run


def _refusal(reason: str, error: str) -> Iterator[Report]:
    return iter([Report(kind="failed", attempt=_LAST_ATTEMPT, reason=reason, error=error)])


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

    def __init__(self, driver: StudyDriver, watch: Watcher) -> None:
        super().__init__(metric="report", mode="min")
        self.driver, self.watch = driver, watch
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        spec = self.driver.next_trial()
        self.watch()
        if spec is None:
            return Searcher.FINISHED if self.driver.finished else None
        self._numbers[trial_id] = spec.number
        return {"trial": spec.to_json(), "number": spec.number}

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
        goes_on = self.driver.report(trial.config["number"], Report.from_json(result["report"]))
        self.watch()
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        _forget_statistics(trial)
