"""One trial: what is run, what it reports, and the record that stays.

A worker holds no truth: `run_trial` yields reports, the driver journals them. Failure is data.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from builder.cost import Cost
from searchspace.arch import ArchSpec
from searchspace.choices import Scalar
from searchspace.decode import decode

ReportKind: TypeAlias = Literal["progress", "rung", "done", "failed"]
TrialState: TypeAlias = Literal["running", "complete", "stopped", "failed"]
Purpose: TypeAlias = Literal["search", "baseline"]

_PROGRESS_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything a worker needs, as JSON-able values."""

    number: int
    arch: dict[str, Any]
    training: dict[str, Any]
    seed: int
    corpus: str
    """Folder of the prepared data."""
    folder: str
    """The trial's own folder; each attempt writes under ``attempt-N``."""
    rungs: tuple[float, ...]
    """Shares of the budget at which it is evaluated; the last is 1."""
    device: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> TrialSpec:
        data = json.loads(text)
        return TrialSpec(**{**data, "rungs": tuple(data["rungs"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A held-out loss, and what had been spent for it."""

    flops: float
    tokens: int
    loss: float
    """Nats per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a worker says."""

    kind: ReportKind
    attempt: int
    flops: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Spent training, evaluation left out."""
    train_loss: float | None = None
    rungs: tuple[Rung, ...] = ()
    """All rungs measured so far."""
    reason: str = ""
    """failed: diverged, out_of_memory, invalid or error."""
    error: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Report:
        data = json.loads(text)
        return Report(**{**data, "rungs": tuple(Rung(**rung) for rung in data["rungs"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One launched trial as the journal tells it. Finished records never change."""

    number: int
    purpose: Purpose
    name: str
    state: TrialState
    arch: dict[str, Any] = field(repr=False)
    arch_id: str
    choices: dict[str, Scalar]
    training: dict[str, Any]
    seed: int
    cost: Cost
    rungs: tuple[Rung, ...] = ()
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""
    error: str = field(default="", repr=False)

    @property
    def loss(self) -> float | None:
        """Held-out loss after the full budget; None if it was not reached."""
        return self.rungs[-1].loss if self.state == "complete" else None

    @property
    def flops(self) -> float:
        """Training FLOPs at its last rung."""
        return self.rungs[-1].flops if self.rungs else 0.0

    def arch_spec(self) -> ArchSpec:
        """The architecture, decoded."""
        return decode(ArchSpec, self.arch)


def run_trial(spec: TrialSpec) -> Generator[Report, None, None]:
    """Train one candidate, reporting progress, each rung, and how it ended.

    Goes on from the newest whole checkpoint of an earlier attempt. Never raises for what happens in
    training: the last report says ``done`` or ``failed`` with a reason.
    """
    import torch

    from studies.checkpoint import newest_checkpoint, save_checkpoint
    from studies.config import check_training
    from studies.training import DivergedError, Trainer

    torch.set_num_threads(spec.threads)
    folder = Path(spec.folder)
    earlier = sorted(folder.glob("attempt-*"))
    own = _claim_attempt(folder)
    attempt = int(own.name.rpartition("-")[2])
    rungs: list[Rung] = []
    try:
        config = check_training(spec.training)
        trainer = Trainer(decode(ArchSpec, spec.arch), config, _corpus(spec.corpus), seed=spec.seed, device=spec.device)

        def report(kind: ReportKind, train_loss: float | None = None) -> Report:
            return Report(
                kind=kind,
                attempt=attempt,
                flops=trainer.flops,
                tokens=trainer.tokens,
                steps=trainer.step,
                seconds=trainer.seconds,
                train_loss=train_loss,
                rungs=tuple(rungs),
            )

        def save() -> None:
            save_checkpoint(own, {**trainer.state(), "rungs": [asdict(rung) for rung in rungs]}, trainer.step)

        if (state := newest_checkpoint(earlier)) is not None:
            trainer.restore(state)
            rungs.extend(Rung(**rung) for rung in state["rungs"])
            save()  # before the earlier attempts go
            if 0 < len(rungs) < len(spec.rungs):
                yield report("rung")  # a stop may be due that the driver did not live to tell
        saved = time.monotonic()
        for share in spec.rungs[len(rungs) :]:
            until = trainer.plan.step_at(share)
            while trainer.step < until:
                train_loss = trainer.train(until, time_limit_s=_PROGRESS_S)
                if time.monotonic() - saved > config.checkpoint_every_s and trainer.step < until:
                    save()
                    saved = time.monotonic()
                yield report("progress", train_loss)
            rungs.append(Rung(flops=trainer.flops, tokens=trainer.tokens, loss=trainer.evaluate()))
            save()
            saved = time.monotonic()
            if len(rungs) < len(spec.rungs):
                yield report("rung")
        for old in earlier:
            shutil.rmtree(old, ignore_errors=True)
        yield report("done")
    except DivergedError as error:
        yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason="diverged", error=str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason="out_of_memory", error=str(error))
    except Exception as error:  # the process boundary: whatever went wrong is told as data
        reason = "invalid" if isinstance(error, ValueError) else "error"
        yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason=reason, error=traceback.format_exc())


def _claim_attempt(folder: Path) -> Path:
    """Make the next ``attempt-N``; two workers never get the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name.rpartition("-")[2]) for p in folder.glob("attempt-*")), default=0)
    while True:
        try:
            (folder / f"attempt-{number:03d}").mkdir()
            return folder / f"attempt-{number:03d}"
        except FileExistsError:
            number += 1


@lru_cache(maxsize=4)
def _corpus(folder: str) -> Any:
    from studies.data import Corpus

    return Corpus(folder)
