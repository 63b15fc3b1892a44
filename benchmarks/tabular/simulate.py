"""Whole searches in seconds: our driver, with losses looked up in the table instead of trained."""

from __future__ import annotations

import heapq
import json
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from searchspace.files import read_data
from studies.config import StudyConfig, study_from_data
from studies.data.corpus import Corpus, prepare_corpus
from studies.data.settings import TextData
from studies.records.journal import Journal
from studies.records.trial import Report, Rung
from studies.strategy.driver import StudyDriver

HERE = Path(__file__).parent

Trace = list[tuple[float, float]]
"""Full trainings spent, and the best feasible full-budget loss by then; a pair at each improvement."""


@dataclass
class Table:
    """Every candidate's losses at every rung."""

    file: Path = HERE / "table.json"
    data: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.data = json.loads(self.file.read_text(encoding="utf-8"))

    @property
    def rungs(self) -> list[float]:
        rungs: list[float] = self.data["rungs"]
        return rungs

    @property
    def training(self) -> dict[str, float]:
        """FLOPs and batch of every training."""
        found: dict[str, float] = self.data["training"]
        return found

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By architecture."""
        return {row["arch_id"]: row for row in self.data["rows"]}

    def loss(self, arch_id: str, rung: int) -> float:
        """The first seed's loss, nats per token."""
        losses: list[float] = self.rows[arch_id]["losses"]["0"]
        return losses[rung]

    def best(self, max_flops_per_token: float) -> float:
        """The lowest full-budget loss within the budget."""
        return min(self.loss(i, -1) for i, row in self.rows.items() if row["flops_per_token"] <= max_flops_per_token)


def study(search: dict[str, Any], max_flops_per_token: float | None) -> StudyConfig:
    """A study over the table's space."""
    data = {
        "name": "tabular",
        "space": read_data(HERE / "space.yaml"),
        "training": Table().training,
        "budget": {} if max_flops_per_token is None else {"flops_per_token": max_flops_per_token},
        "search": {"num_trials": 100_000, **search},
    }
    return study_from_data(data)


def corpus() -> Corpus:
    """The data's facts are all that a simulated study needs."""
    return prepare_corpus(TextData(), Path(tempfile.gettempdir()) / "spiralformer-tabular-data")


def simulate(
    settings: StudyConfig, table: Table, data: Corpus, *, spend: float, max_flops_per_token: float, workers: int = 4
) -> Trace:
    """Run one search until ``spend`` full trainings have been spent, on workers that work at the same speed.

    Only candidates within ``max_flops_per_token`` count, whatever the study's own budget is.
    """
    with tempfile.TemporaryDirectory() as folder:
        driver = StudyDriver(settings, Path(folder), data, journal=Journal(None, settings.objectives))
        shares = [min(range(len(table.rungs)), key=lambda i: abs(table.rungs[i] - share)) for share in driver.shares]
        queue: list[tuple[float, int, int]] = []  # time of the next report, trial, its rung
        spent, best, trace = 0.0, float("inf"), Trace()
        now = 0.0
        while True:
            while len(queue) < workers and (spec := driver.next_trial()) is not None:
                heapq.heappush(queue, (now + driver.shares[0], spec.number, 0))
            if not queue or spent >= spend:
                return trace
            now, number, index = heapq.heappop(queue)
            spent += driver.shares[index] - (driver.shares[index - 1] if index else 0.0)
            record = driver.record(number)
            row = table.rows[record.arch_id]
            rungs = tuple(
                Rung(flops=share * table.training["flops"], tokens=1, score=table.loss(record.arch_id, shares[i]))
                for i, share in enumerate(driver.shares[: index + 1])
            )
            done = index + 1 == len(driver.shares)
            goes_on = driver.report(number, Report(kind="done" if done else "rung", attempt=1, rungs=rungs))
            if done and row["flops_per_token"] <= max_flops_per_token and rungs[-1].score < best:
                best = rungs[-1].score
                trace.append((spent, best))
            if goes_on:
                heapq.heappush(queue, (now + driver.shares[index + 1] - driver.shares[index], number, index + 1))
