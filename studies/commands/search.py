"""A study from start to results: what ``spiralformer search`` does, and how its folder is laid out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from builder.exchange.bundle import load_bundle, read_manifest
from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from searchspace.arch import ArchSpec
from searchspace.disk import write_file
from searchspace.errors import SpecError
from searchspace.plain import encode
from studies.commands.live import StudyView, failure_of
from studies.commands.preflight import device_of, look_at_data, preflight
from studies.commands.results import show_results, write_page
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.execution.base import Runner
from studies.execution.run import run_on_ray, run_serial
from studies.records.folder import BEST, DATA, SHOWN, is_study, remove_study, study_folder
from studies.records.journal import mend
from studies.records.resume import check_settings, keep_settings
from studies.report.finalists import baselines_of
from studies.report.ranking import best_of, leader, rest_of_front
from studies.report.tracking import Tracking
from studies.sections import MiddleChooser, check_training, decide_training
from studies.show.terminal import say
from studies.strategy.driver import Listener, StudyDriver, StudyHaltedError
from studies.tasks.custom import CustomData
from studies.tasks.table import check_fit
from studies.tasks.table import prepare_data as make_data
from studies.training.plan import make_plan
from studies.training.run_trial import run_trial

_EXITS = {signal.SIGTERM: 143, signal.SIGHUP: 129}


class NothingCompleteError(StudyHaltedError):
    """All is done, and there is no result."""


def run_study(
    settings: StudyConfig,
    folder: Path,
    console: Console,
    *,
    serial: bool,
    address: str | None,
    run: Runner = run_trial,
    listener: Listener | None = None,
    farewell: bool = True,
) -> None:
    """Start a study, or go on with it, and show its results.

    Args:
        settings: the study's.
        folder: its folder.
        console: where to tell of it.
        serial: run trials here, one after another, not on Ray.
        address: of a Ray cluster to join.
        run: runs one trial.
        listener: told of rungs and ends, beside the study's trackers.
        farewell: show the results, and export the best.

    Raises:
        SpecError: if the folder holds something else or is in use, or nothing is feasible.
        StudyHaltedError: if it can't go on now (too many failures in a row, a full disk), or no trial completed.
    """
    here = address is None
    if not is_study(folder):  # what is wrong whatever the data holds is said before they are prepared
        preflight(settings, look_at_data(settings, prepare=False), here=here)
    with study_folder(folder):
        if damage := mend(folder):
            say(console, damage)
        check_settings(settings, folder)
        with console.status("preparing data"):
            corpus = prepare_data(settings, folder)
        with console.status("looking at what is within the budget"):
            found = preflight(settings, corpus.facts, here=here)
        what = f"{found.survey.share:.1%} of {found.survey.looked_at} looked at are within the budget"
        console.print(f"[bold]{settings.name}[/]: {found.survey.size} candidates, {what}", highlight=False)
        for note in found.notes:
            say(console, f"note: {note}")
        keep_settings(settings, folder)
        driver = StudyDriver(settings, folder, corpus, device_of(settings))
        if driver.warm_start_note:
            say(console, driver.warm_start_note)
        now = driver.progress()
        ended = now.complete + now.stopped + now.failed
        if now.launched:
            say(console, f"going on: {ended} trials ended before")
        if not driver.finished:
            _check_runner(settings, run)
            if not serial:
                say(console, "starting workers")
            _run_trials(driver, corpus, console, listener, run, serial=serial, address=address)
        if driver.halted and not driver.out_of_time:
            raise StudyHaltedError(driver.halted)
        unfinished = driver.out_of_time and driver.is_unfinished
        if unfinished:
            left = sum(record.state == "running" for record in driver.records)
            say(console, f"{driver.halted}: {left} trials stand still on their way; the same command goes on")
        if note := driver.progress().note:
            say(console, note)
        if waiting := driver.num_waiting:
            say(console, f"note: {waiting} of search.enqueue wait; raise search.num_trials to launch them")
        if farewell:
            _farewell(driver, folder, corpus, console)
        sought = "search" if settings.search.num_trials else "ladder"
        complete = any(record.purpose == sought and record.state == "complete" for record in driver.records)
        if not complete and not unfinished:
            raise NothingCompleteError(_why_nothing(driver))


def _check_runner(settings: StudyConfig, run: Runner) -> None:
    """Raise `SpecError` if what Python handed over when the study began is not handed over again."""
    if run is not run_trial:
        return
    data = settings.data.name if isinstance(settings.data, CustomData) else None
    for path, what in (("train", settings.train), ("data", data)):
        if what is not None:
            remedy = f"call studies.search with it as {path}="
            raise SpecError(path, f"is {what}, which was handed over from Python", remedy)


def train_one(arch: ArchSpec, settings: StudyConfig, out: Path, device: str, console: Console) -> Path:
    """Train one architecture with a study's data and training settings, and save its bundle.

    An interrupted run goes on from a hidden folder beside the bundle's.

    Raises:
        SpecError: if it can't be trained.
        StudyHaltedError: if the training failed.
    """
    from studies.commands.export import export_trial

    plain = {**settings.plain, "baseline": [encode(arch)]}
    search = replace(settings.search, num_trials=0)
    settings = replace(settings, baselines=(arch,), search=search, scale=None, plain=plain)
    training = check_training(decide_training(settings.training, MiddleChooser()).tree)
    check_fit(arch, look_at_data(settings, prepare=False))
    make_plan(training, arch, estimate(compile_arch(arch)))
    folder = out.with_name(f".{out.name}-run")
    with study_folder(folder):
        mend(folder)
        check_settings(settings, folder)
        corpus = prepare_data(settings, folder)
        keep_settings(settings, folder)
        driver = StudyDriver(settings, folder, corpus, device)
        with StudyView(driver, corpus, console) as view:
            run_serial(driver, view)
        if driver.halted:
            raise StudyHaltedError(driver.halted)
        record = driver.records[0]
        if record.state == "complete":
            export_trial(driver.records, folder, corpus, settings, number=0, out=out)
        driver.forget(record)
        remove_study(folder)
    if record.state != "complete":
        raise StudyHaltedError(f"training failed with {failure_of(record)}; change what it names, or lower lr")
    return out


def _run_trials(
    driver: StudyDriver,
    corpus: Dataset,
    console: Console,
    listener: Listener | None,
    run: Runner,
    *,
    serial: bool,
    address: str | None,
) -> None:
    driver.tracking = tracking = Tracking(driver.study, driver.folder, listener)
    with contextlib.closing(tracking), StudyView(driver, corpus, console) as view, _Signals() as signals:

        def watch() -> None:
            signals.check()
            view()

        if serial:
            run_serial(driver, watch, run=run)
        else:
            run_on_ray(driver, watch, address=address, run=run)
    if tracking.note:
        say(console, tracking.note)


def _farewell(driver: StudyDriver, folder: Path, corpus: Dataset, console: Console) -> None:
    """What is shown and written once all trials have ended. The trials are the result: what fails here is a note."""
    with _decorative("no ranking", console):
        show_results(driver.records, folder, corpus, console, driver.study)
    if best_of(driver.records) is None:
        return
    from studies.commands.export import export_trial
    from studies.commands.probe import probe_study

    with _decorative("the best trial is not exported", console, "; `spiralformer export --trial N` takes another"):
        bundle = export_trial(driver.records, folder, corpus, driver.study, out=folder / BEST)
        say(console, f"exported the best trial to {bundle}")
        number = read_manifest(bundle)["trial"]
        if others := rest_of_front(driver.records, driver.study.objectives, number, corpus):
            say(console, f"it is {others}")
        if (first := leader(driver.records)).purpose != "search" and first.arch_id in baselines_of(driver.records):
            say(console, f"the baseline {first.name} is better still: export it with --trial {first.number}")
        with _decorative("no look inside", console):
            probe_study(driver.records, folder, corpus, driver.study, console)
        with _decorative("no sample", console):
            if (shown := corpus.show(load_bundle(bundle).model)) is not None:
                console.print(shown[0], highlight=False)
                say(console, shown[1])
                write_file(folder / SHOWN, json.dumps({"trial": number, "title": shown[0], "text": shown[1]}))
        with _decorative("no report", console):
            write_page(driver.records, folder, corpus, driver.study)


@contextlib.contextmanager
def _decorative(what: str, console: Console, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the study is whole
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(console, f"note: {what}: {reason}{remedy}")


def _why_nothing(driver: StudyDriver) -> str:
    sought = "search" if driver.study.search.num_trials else "ladder"
    failed = [record for record in driver.records if record.purpose == sought and record.state == "failed"]
    if failed:
        first = failed[0]
        return f"{len(failed)} failed, the first, trial {first.number}, with {failure_of(first)}"
    stopped = sum(record.purpose == sought for record in driver.records)
    return (
        f"{stopped} were launched and all of them stopped early" if stopped else driver.progress().note or "none fits"
    )


class _Signals:
    """SIGINT ends the study at the next report, a second one at once; SIGTERM and SIGHUP at once.

    An exception raised inside a library may be swallowed there: it is raised again at the next report.
    """

    def __enter__(self) -> _Signals:
        self._raised: BaseException | None = None
        own = threading.current_thread() is threading.main_thread()  # others may set no handlers
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_EXITS) if own}
        self._before = {number: how for number, how in before.items() if how != signal.SIG_IGN}  # nohup
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        first = self._raised is None
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(_EXITS[signal.Signals(number)])
        if not (first and number == signal.SIGINT):
            raise self._raised
        os.write(2, b"\nstopping at the next report; once more stops at once\n")

    def check(self) -> None:
        """Raise what came and was lost; take the handlers back from whoever replaced them (Ray does)."""
        for number in self._before:
            signal.signal(number, self._on_signal)
        if self._raised is not None:
            raise self._raised


def prepare_data(settings: StudyConfig, folder: Path) -> Dataset:
    """The study's data, written once under its folder."""
    return make_data(settings.data, folder.absolute() / DATA, settings.base)
