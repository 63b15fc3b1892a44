"""Running one trial.

A worker holds no truth: `run_trial` yields reports, the driver journals them. Failure is data.
"""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Generator
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from studies.records.trial import Report, ReportKind, Rung, TrialSpec

_PROGRESS_S = 2.0  # a word to the driver this often, far within any timeout


def run_trial(spec: TrialSpec, *, data: Any = None) -> Generator[Report, None, None]:
    """Train one candidate, reporting progress, each rung, and how it ended.

    Args:
        spec: what to train.
        data: an object of one's own to train on (`studies.tasks.custom.Data`), where the study's data are one.

    Goes on from the newest whole checkpoint of an earlier attempt. Never raises for what happens in
    training: the last report says ``done`` or ``failed`` with a reason.
    """
    import torch

    from studies.training.checkpoint import (
        attempt_number,
        attempts_in,
        claim_attempt,
        load_checkpoint,
        open_store,
        remove_attempts,
        save_checkpoint,
    )
    from studies.training.trainer import DivergedError, Trainer

    torch.set_num_threads(spec.threads)
    rungs: list[Rung] = []
    attempt = 1
    try:
        place = open_store(spec.folder)
        earlier = attempts_in(place)
        own = claim_attempt(place, spec.study)
        attempt = attempt_number(own)
        corpus = _corpus(spec.corpus) if data is None else _corpus(spec.corpus).bound_to(data)
        trainer = Trainer(spec.arch, spec.training, corpus, seed=spec.seed, device=spec.device)

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
                curve=() if kind == "progress" else tuple(trainer.curve),
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
                leaves = trainer.plan.branch_at(share, spec.training.decay) if spec.decayed and share < 1 else until
                if trainer.step == leaves:
                    trainer.branch(until)
                train_loss = trainer.train(leaves if trainer.step < leaves else until, time_limit_s=_PROGRESS_S)
                due = time.monotonic() - saved > spec.training.checkpoint_every_s and trainer.step < until
                if due or time.time() > spec.until - 2 * _PROGRESS_S:  # the study may stop at this report
                    save()
                    saved = time.monotonic()
                yield report("progress", train_loss)
            score, metrics = trainer.evaluate()
            rungs.append(Rung(flops=trainer.flops, tokens=trainer.tokens, score=score, metrics=metrics))
            trainer.rejoin()
            save()
            saved = time.monotonic()
            if len(rungs) < len(spec.rungs):
                yield report("rung")
        remove_attempts(earlier, spec.study)
        yield report("done")
    except DivergedError as error:
        yield Report(kind="failed", attempt=attempt, rungs=tuple(rungs), reason="diverged", error=str(error))
    except Exception as error:  # the process boundary: whatever went wrong is told as data
        reason, text = reason_of(error), traceback.format_exc()
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


def reason_of(error: Exception) -> str:
    """What kind of failure this is, as a `Report` says it."""
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
    from studies.tasks.table import open_data

    return open_data(folder)
