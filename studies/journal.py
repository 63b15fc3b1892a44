"""The journal: one Optuna journal file per study, the only truth.

Three Optuna studies live in it: ``search``, ``baseline`` and ``promotion``. A launched trial carries its launch as a
user attribute; each rung is one more; `TrialRecord` is how everything else reads them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from builder.cost import Cost
from searchspace.errors import SpecError
from studies.trial import Purpose, Rung, TrialRecord, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)

JOURNAL, SUMS = "journal.log", "journal.sums"
STATES: dict[OptunaState, TrialState] = {
    OptunaState.RUNNING: "running",
    OptunaState.COMPLETE: "complete",
    OptunaState.PRUNED: "stopped",
    OptunaState.FAIL: "failed",
}


class StudyLockedError(SpecError):
    """Another process drives this study."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the study folder; the system lets go when the process ends, however it ends.

    Raises:
        StudyLockedError: naming the owner's process id.
    """
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise StudyLockedError(
                "",
                f"is in use by process {file.read().strip() or 'unknown'}",
                "wait for it, or stop it",
                file=str(folder),
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}")
        file.flush()
        yield


def is_driven(folder: Path) -> bool:
    """Whether some process holds the study folder now."""
    try:
        with (folder / "lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def repair_tail(path: Path) -> int:
    """Cut a torn or zero-filled end after the last whole line. Returns the bytes cut."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data.rstrip(b"\0")
    end = whole.rfind(b"\n") + 1
    while end:
        start = whole.rfind(b"\n", 0, end - 1) + 1
        try:
            json.loads(whole[start:end])
            break
        except ValueError:
            end = start
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return len(data) - end


def mend(folder: Path) -> str:
    """Make a journal fit to go on with, and say what was wrong with it; empty if nothing was.

    Beside the journal stand checksums of all its prefixes, so that a bit that flipped is found, and where.

    Raises:
        SpecError: if what was once written has changed; nothing is touched then.
    """
    path, sums = folder / JOURNAL, folder / SUMS
    torn = repair_tail(path)
    notes = [f"cut {torn} torn bytes off the journal's end"] if torn else []
    if not path.is_file() or not sums.is_file():
        return "".join(notes)
    data, running, end, whole = path.read_bytes(), hashlib.sha256(), 0, []
    for line in sums.read_text(encoding="ascii", errors="replace").splitlines():
        size, _, digest = line.partition(" ")
        if not size.isdigit() or len(digest) != 64:  # torn, as the journal's own end may be
            break
        if int(size) > len(data):
            notes.append(
                f"the journal has lost what was written after byte {len(data)}; trials recorded there run again"
            )
            break
        running.update(data[end : int(size)])
        if running.hexdigest() != digest:
            raise SpecError(
                f"bytes {end} to {size}",
                "are not what was written",
                f"restore the file from a backup; or, to go on from before the damage, cut it to its first {end} bytes",
                file=str(path),
            )
        end = int(size)
        whole.append(line)
    sums.write_text("".join(f"{line}\n" for line in whole), encoding="ascii")
    return "; ".join(notes)


class _OneWriter:
    """Journal lock for a folder that `exclusive` holds already: nothing to wait for, nothing to go stale."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, written in batches, with a checksum of the whole after each in a file beside it.

    Optuna writes and syncs a line for every decision it takes; one write for a whole launch is as safe, as nothing
    runs before it, and tens of times faster.
    """

    def __init__(self, folder: Path) -> None:
        self._journal, self._sums = folder / JOURNAL, folder / SUMS
        super().__init__(str(self._journal), lock_obj=_OneWriter())  # type: ignore[arg-type]
        self._hash, self._end, self._lines = hashlib.sha256(), 0, 0
        self._note(self._journal.read_bytes())
        self._pending: list[dict[str, Any]] = []
        self.batching = False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._pending.extend(logs)
        if not self.batching:
            self.flush()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        if log_number_from < self._lines:
            yield from super().read_logs(log_number_from)
        yield from self._pending[max(0, log_number_from - self._lines) :]

    def flush(self) -> None:
        """Write what is pending, durably."""
        if not self._pending:
            return
        super().append_logs(self._pending)
        self._pending = []
        with self._journal.open("rb") as file:
            file.seek(self._end)
            self._note(file.read())
        with self._sums.open("a", encoding="ascii") as sums:
            sums.write(f"{self._end} {self._hash.hexdigest()}\n")

    def _note(self, written: bytes) -> None:
        self._hash.update(written)
        self._end += len(written)
        self._lines += written.count(b"\n")


class Journal:
    """Launches, rungs and ends of a study's trials.

    Only the process inside `exclusive` may write. What is finished is never changed.
    """

    def __init__(self, folder: Path | None, directions: int = 1, *, create: bool = True) -> None:
        """Open a folder's journal; without a folder, one in memory."""
        storage: BaseStorage = InMemoryStorage()
        self._file = None if folder is None else _JournalFile(folder)
        if self._file is not None:
            storage = JournalStorage(self._file)
        self._distributions: dict[str, BaseDistribution] = {}
        known = {study.study_name for study in storage.get_all_studies()}
        purposes: tuple[Purpose, ...] = ("search", "baseline", "promotion")
        for purpose in purposes:
            if purpose not in known and create:  # `load_if_exists` would write even when it only loads
                storage.create_new_study([StudyDirection.MINIMIZE] * directions, study_name=purpose)
        self.studies: dict[Purpose, optuna.Study] = {
            purpose: optuna.load_study(study_name=purpose, storage=storage)
            for purpose in purposes
            if create or purpose in known
        }

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Write all that is journaled inside at once, at the end."""
        if self._file is None:
            yield
            return
        self._file.batching = True
        try:
            yield
        finally:
            self._file.batching = False
            self._file.flush()

    def launched(self) -> list[tuple[FrozenTrial, TrialRecord]]:
        """Every launched trial with its record, by number."""
        pairs = [
            (trial, record)
            for purpose, study in self.studies.items()
            for trial in study.get_trials(deepcopy=False)
            if (record := _record(purpose, trial)) is not None
        ]
        return sorted(pairs, key=lambda pair: pair[1].number)

    def launch(self, trial: optuna.Trial, record: TrialRecord) -> TrialRecord:
        """Journal that ``trial`` is about to run; gives the record over the journal's own copy of what it holds."""
        plain = asdict(record)
        for name in ("state", "rungs", "tokens", "steps", "seconds", "reason", "error", "purpose"):
            del plain[name]
        trial.set_user_attr("launch", plain)
        frozen = trial.study._storage.get_trial(trial._trial_id)
        for name, distribution in frozen.distributions.items():  # one object for all trials, not one for each
            frozen.distributions[name] = self._distributions.setdefault(repr(distribution), distribution)
        kept = frozen.user_attrs["launch"]
        return replace(record, arch=kept["arch"], choices=kept["choices"], training=kept["training"])

    def rung(self, trial: optuna.Trial, index: int, rung: Rung) -> None:
        """Journal one rung; Optuna's intermediate value too where there is one objective."""
        trial.set_user_attr(f"rung.{index}", asdict(rung))
        if len(trial.study.directions) == 1:
            trial.report(rung.loss, index)

    def finish(
        self, trial: optuna.Trial, state: OptunaState, values: list[float] | None, facts: Mapping[str, Any]
    ) -> None:
        """Journal the end, exactly once; telling a finished trial again changes nothing."""
        try:
            trial.set_user_attr("result", dict(facts))
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        trial.study.tell(trial, values, state=state)


def open_for_reading(folder: Path) -> list[TrialRecord]:
    """The records of a study folder, without touching it.

    Raises:
        SpecError: if it is no study folder.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise SpecError(
            "", "is not a study folder (no journal.log)", "give the folder that search made", file=str(folder)
        )
    try:
        return [record for _, record in Journal(folder, create=False).launched()]
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError("", "is damaged", "the search command says where, and goes on", file=str(path)) from error


def revive(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """A running trial of an earlier process, to be written to again."""
    return optuna.Trial(study, trial._trial_id)


def _record(purpose: Purpose, trial: FrozenTrial) -> TrialRecord | None:
    launch = trial.user_attrs.get("launch")
    if launch is None:
        return None
    rungs: list[Rung] = []
    while (rung := trial.user_attrs.get(f"rung.{len(rungs)}")) is not None:
        rungs.append(Rung(**rung))
    result = trial.user_attrs.get("result", {})
    return TrialRecord(
        **{**launch, "cost": Cost(**launch["cost"])},
        purpose=purpose,
        state="failed" if result.get("reason") else STATES[trial.state],
        rungs=tuple(rungs),
        **result,
    )
