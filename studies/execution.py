"""Running trials in this process. `studies.ray_execution` does the same on Ray workers.

Both ask the same driver for trials and hand it reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from studies.searcher import StudyDriver
from studies.trial import run_trial

Watcher: TypeAlias = Callable[[], None]
"""Called after every report and launch."""


def run_serial(driver: StudyDriver, watch: Watcher = lambda: None) -> None:
    """Run every trial here, one after another."""
    while (spec := driver.next_trial()) is not None:
        watch()
        for report in run_trial(spec):
            goes_on = driver.report(spec.number, report)
            watch()
            if not goes_on:
                break
