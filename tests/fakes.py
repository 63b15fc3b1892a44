"""Stand-ins for a trial, importable by Ray's workers, and a way to run a study with one of them."""

import os
import random
import signal
import time
from pathlib import Path

from studies.records.trial import Report, Rung
from studies.training.run_trial import run_trial


def noop(spec):
    """Report at once, with a loss made of the trial's decisions."""
    rungs = tuple(Rung(flops=share, tokens=1, score=1.0 + len(str(spec.arch)) % 17) for share in spec.rungs)
    yield Report(kind="done", attempt=1, rungs=rungs)


def hang(spec):
    """The second trial ignores SIGTERM and never says a word."""
    if spec.number == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    yield from noop(spec)


def raise_often(spec):
    """One trial in five ends with an error, by its number alone; each try leaves a mark."""
    with (Path(spec.folder).parent.parent / "tries").open("a") as file:
        file.write(f"{spec.number}\n")
    if spec.number and random.Random(spec.number).random() < 0.2:
        yield Report(kind="failed", attempt=1, reason="error", error="ValueError: as it had to come")
    else:
        yield from noop(spec)


def slow(spec):
    """The real thing, but no faster than a few reports a second."""
    for report in run_trial(spec):
        time.sleep(0.2)
        yield report


def main(study, folder, name, *overrides):
    """Run a study with the stand-in of that name; for a process of its own."""
    import fakes

    from studies.commands.search import prepare_data
    from studies.config import load_study
    from studies.execution.run import run_on_ray
    from studies.records.folder import study_folder
    from studies.records.journal import mend
    from studies.records.resume import keep_settings
    from studies.strategy.driver import StudyDriver

    folder = Path(folder)
    with study_folder(folder):
        mend(folder)
        settings = load_study(study, overrides)
        keep_settings(settings, folder)
        driver = StudyDriver(settings, folder, prepare_data(settings, folder))

        def watch():
            for record in driver.progress().events:
                print(f"ended {record.number} {record.state} {record.reason}", flush=True)

        run_on_ray(driver, watch, address=os.environ.get("CLUSTER"), run=getattr(fakes, name))
        print(f"over: {driver.halted}", flush=True)
