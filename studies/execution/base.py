"""What runs trials is called with, whatever it runs them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from studies.records.trial import Report, TrialSpec

Watcher: TypeAlias = Callable[[], None]
"""Called after every report and launch."""


Runner: TypeAlias = Callable[[TrialSpec], Iterator[Report]]
"""Runs one trial: `run_trial`, or a stand-in for tests and simulations."""
