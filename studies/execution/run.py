"""Running trials in this process, or on Ray. Both ask the same driver for trials and hand it reports."""

from __future__ import annotations

import os
import secrets

from studies.execution.base import Runner, Watcher
from studies.strategy.driver import StudyDriver
from studies.training.run_trial import run_trial


def run_serial(driver: StudyDriver, watch: Watcher = lambda: None, *, run: Runner = run_trial) -> None:
    """Run every trial here, one after another."""
    while (spec := driver.next_trial()) is not None:
        watch()
        for report in run(spec):
            goes_on = driver.report(spec.number, report)
            watch()
            if not goes_on:
                break


def run_on_ray(
    driver: StudyDriver, watch: Watcher = lambda: None, *, address: str | None = None, run: Runner = run_trial
) -> None:
    """Run every trial on Ray workers.

    A cluster started here listens on loopback only, and to nobody without its token, which stands in this process's
    environment and in no file. A cluster that is joined brings its own.

    Args:
        driver: of the study.
        watch: called after every report and launch.
        address: of a running cluster; None starts one on this machine.
        run: runs one trial; sent to the workers, as Ray pickles functions.
    """
    if address is None:  # Ray reads these when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from studies.execution.on_ray import run_ray

    run_ray(driver, watch, address=address, run=run)
