"""One trial: what is run, what it reports, and the record that stays.

A worker holds no truth: `run_trial` yields reports, the driver journals them. Failure is data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias

from builder.cost import Cost
from searchspace.arch import ArchSpec
from searchspace.choices import Scalar
from searchspace.decode import decode

ReportKind: TypeAlias = Literal["progress", "rung", "done", "failed"]
TrialState: TypeAlias = Literal["running", "complete", "stopped", "failed"]
Purpose: TypeAlias = Literal["search", "baseline", "promotion"]

_PROGRESS_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything a worker needs, as JSON-able values."""

    number: int
    arch: dict[str, Any]
    arch_id: str
    training: dict[str, Any]
    seed: int
    corpus: str
    """Folder of the prepared data."""
    data: str
    """Digest of the prepared data."""
    folder: str
    """The trial's own place, a folder or fsspec URL; each attempt writes under ``attempt-N``."""
    study: str
    """The study's mark, which its attempts bear."""
    rungs: tuple[float, ...]
    """Shares of the budget at which it is evaluated; the last is 1."""
    device: str
    threads: int
    timeout_s: float = 1800.0
    """Seconds without a report after which the worker is taken for hung."""

    @property
    def identity(self) -> str:
        """Digest of all that decides its losses; a checkpoint of another identity is another trial's."""
        return identity_of(self.arch_id, self.seed, self.training, self.rungs, self.data)

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
    """failed: diverged, out_of_memory, disk_full, hung, invalid, worker_died or error."""
    error: str = ""
    memory_gib: float = 0.0
    """out_of_memory: what was asked for in vain, as far as it is known."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Report:
        data = json.loads(text)
        return Report(**{**data, "rungs": tuple(Rung(**rung) for rung in data["rungs"])})


@dataclass(frozen=True, kw_only=True)
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

    def objective(self, name: str) -> float:
        """The value of one objective: the last loss, or a cost."""
        return self.rungs[-1].loss if name == "loss" else float(getattr(self.cost, name) or 0)

    def arch_spec(self) -> ArchSpec:
        """The architecture, decoded."""
        return self._decoded

    @cached_property
    def _decoded(self) -> ArchSpec:
        return decode(ArchSpec, self.arch)


def identity_of(arch_id: str, seed: int, training: Mapping[str, Any], rungs: Sequence[float], data: str) -> str:
    """`TrialSpec.identity`."""
    facts = [arch_id, seed, sorted(training.items()), list(rungs), data]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def run_trial(spec: TrialSpec) -> Generator[Report, None, None]:
    """Train one candidate, reporting progress, each rung, and how it ended.

    Goes on from the newest whole checkpoint of an earlier attempt. Never raises for what happens in
    training: the last report says ``done`` or ``failed`` with a reason.
    """
    import torch

    from studies.checkpoint import (
        attempt_number,
        attempts_in,
        claim_attempt,
        load_checkpoint,
        open_store,
        remove_attempts,
        save_checkpoint,
    )
    from studies.config import check_training
    from studies.training import DivergedError, Trainer

    torch.set_num_threads(spec.threads)
    rungs: list[Rung] = []
    attempt = 1
    try:
        place = open_store(spec.folder)
        earlier = attempts_in(place)
        own = claim_attempt(place, spec.study)
        attempt = attempt_number(own)
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
            state = {**trainer.state(), "rungs": [asdict(rung) for rung in rungs]}
            save_checkpoint(own, state, trainer.step, spec.identity)

        if (state := load_checkpoint(earlier, spec.identity)) is not None:
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
        remove_attempts(earlier, spec.study)
        yield report("done")
    except DivergedError as error:
        yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason="diverged", error=str(error))
    except Exception as error:  # the process boundary: whatever went wrong is told as data
        reason, text = _reason(error), traceback.format_exc()
        if reason == "out_of_memory":
            text = str(error) or "out of memory"
        yield Report(
            kind="failed",
            attempt=attempt,
            rungs=tuple(rungs),
            reason=reason,
            error=text,
            memory_gib=_memory_asked(error) if reason == "out_of_memory" else 0.0,
        )


def _reason(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # PyTorch's CPU allocator
        return "out_of_memory"
    if is_disk_full(error):
        return "disk_full"
    return "invalid" if isinstance(error, ValueError) else "error"


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _memory_asked(error: Exception) -> float:
    """GiB, from what PyTorch says; 0 if it does not say."""
    if match := re.search(r"[Tt]ried to allocate ([\d.]+) (KiB|MiB|GiB|bytes)", str(error)):
        return float(match[1]) / {"bytes": 2**30, "KiB": 2**20, "MiB": 2**10, "GiB": 1}[match[2]]
    return 0.0


@lru_cache(maxsize=4)
def _corpus(folder: str) -> Any:
    from studies.data import Corpus

    return Corpus(folder)
