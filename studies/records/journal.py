"""Writing the journal: one Optuna journal file per study, the only truth.

Three Optuna studies live in it: ``search``, ``baseline`` and ``promotion``. A launched trial carries its launch as a
user attribute; each rung is one more. `studies.records.reading` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from searchspace.choices import Scalar
from searchspace.disk import read_bytes, write_file
from searchspace.errors import SpecError
from studies.records.folder import JOURNAL, SUMS
from studies.records.reading import (
    CREATE_TRIAL,
    FORMAT,
    FORMAT_KEY,
    STATES,
    TRIAL_ATTR,
    TRIAL_PARAM,
    TRIAL_STATE,
    TRIAL_SYSTEM_ATTR,
    check_format,
    damaged,
    make_record,
    reading,
)
from studies.records.trial import Purpose, Rung, TrialRecord
from studies.sections import LOSS, Objective

optuna.logging.set_verbosity(optuna.logging.WARNING)

_MOST_BYTES = 64 * 2**30  # a million trials; what is larger is no journal
_CHECK = 8
"""Hexadecimal digits of a sum's own sum."""


def mend(folder: Path) -> str:
    """Make a journal fit to go on with, and say what was wrong with it; empty if nothing was.

    Beside the journal stand the checksums of its prefixes, one for each batch that was written, each written before
    its batch: so a batch that was torn is cut off whole, and a bit that flipped is found, and where. Each sum carries
    a sum of its own: one that is damaged itself says nothing of the journal.

    Raises:
        SpecError: if what was once written has changed; nothing is touched then.
    """
    path, sums = folder / JOURNAL, folder / SUMS
    if not path.is_file():
        return ""
    data = read_bytes(path, _MOST_BYTES)
    text = read_bytes(sums, _MOST_BYTES).decode("ascii", errors="replace") if sums.is_file() else ""
    notes, kept, lost = [], list[str](), list[int]()
    running, end = hashlib.sha256(), 0
    for line in text.splitlines():
        size, digest = _read_sum(line)
        if size is None or size <= end:
            continue
        if size > len(data):
            lost.append(size)
            continue
        running.update(data[end:size])
        if running.hexdigest() != digest:
            raise SpecError(
                f"bytes {end} to {size}",
                "are not what was written",
                f"restore it from a copy; or cut it to its first {end} bytes: what was journaled after runs again",
                file=str(path),
            )
        end = size
        kept.append(line)
    whole = end if lost else _whole_lines(data)
    if whole < len(data):
        notes.append(f"cut {len(data) - whole} torn bytes off the journal's end")
        os.truncate(path, whole)
    if len(lost) > 1:
        notes.append(f"the journal has lost what was written after byte {whole}; trials recorded there run again")
    if whole > end:
        running.update(data[end:whole])
        kept.append(_sum_line(whole, running.hexdigest()))
    mended = "".join(f"{line}\n" for line in kept)
    if mended != text:
        write_file(sums, mended)
    return "; ".join(notes)


def _sum_line(size: int, digest: str) -> str:
    return f"{size} {digest} {hashlib.sha256(f'{size} {digest}'.encode()).hexdigest()[:_CHECK]}"


def _read_sum(line: str) -> tuple[int | None, str]:
    """Size and digest of a prefix; no size if the line is damaged."""
    size, _, rest = line.partition(" ")
    digest = rest.partition(" ")[0]
    if not size.isdecimal() or len(size) > 18 or line != _sum_line(int(size), digest):
        return None, ""
    return int(size), digest


def _whole_lines(data: bytes) -> int:
    """Bytes up to the end of the last line that is whole JSON."""
    end = data.rstrip(b"\0").rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            if isinstance(json.loads(data[start:end]), dict):
                return end
        except (ValueError, RecursionError):
            pass
        end = start
    return 0


class _OneWriter:
    """Journal lock for a folder that `folder.exclusive` holds already: nothing to wait for, nothing to go stale."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, written in batches, each after the checksum of the whole with it (`mend`).

    Optuna writes and syncs a line for every decision it takes; one write for a whole launch is as safe, as nothing
    runs before it, and tens of times faster.
    """

    def __init__(self, folder: Path) -> None:
        self._journal, self._sums = folder / JOURNAL, folder / SUMS
        super().__init__(str(self._journal), lock_obj=_OneWriter())  # type: ignore[arg-type]
        data = read_bytes(self._journal, _MOST_BYTES)
        self._hash, self._end, self._lines = hashlib.sha256(data), len(data), data.count(b"\n")
        begins = b'{"op_code":4,'
        self._trials = data.startswith(begins) + data.count(b"\n" + begins)
        self._pending: list[dict[str, Any]] = []
        self._text: list[bytes] = []
        self.batching = False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._pending.extend(logs)
        # As text now: Optuna's own trials share these dicts, and change them before the batch is written.
        self._text.extend(_line(log) for log in logs)
        if not self.batching:
            self.flush()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Entries from a number on, as Optuna counts what it wrote: a fold is for who reads the file anew."""
        if log_number_from < self._lines:
            yield from super().read_logs(log_number_from)
        yield from self._pending[max(0, log_number_from - self._lines) :]

    def flush(self) -> None:
        """Write what is pending, durably; what can't be written whole leaves the files as they were."""
        if not self._pending:
            return
        (data, begun), number = _fold(self._text, self._trials), len(self._pending)
        self._pending, self._text = [], []
        running = self._hash.copy()
        running.update(data)
        sums_end = self._sums.stat().st_size if self._sums.exists() else 0
        try:
            _append(self._sums, f"{_sum_line(self._end + len(data), running.hexdigest())}\n".encode())
            _append(self._journal, data)
        except OSError:
            for path, end in ((self._journal, self._end), (self._sums, sums_end)):
                if path.exists():
                    os.truncate(path, end)
            raise
        self._hash, self._end, self._lines = running, self._end + len(data), self._lines + number
        self._trials += begun


def _line(log: Mapping[str, Any]) -> bytes:
    return json.dumps(log, separators=(",", ":")).encode() + b"\n"


def _fold(lines: Iterable[bytes], first: int) -> tuple[bytes, int]:
    """A batch as it is written: what it says of a trial that it begins in one line, but for its launch and its end.

    Optuna writes a line for each parameter, with its distribution: three quarters of a journal's lines, and most of
    the time to read it.

    Args:
        lines: entries of Optuna's journal.
        first: number of the first trial they begin.

    Returns:
        The lines to write, and how many trials they begin.
    """
    kept: list[dict[str, Any]] = []
    begun: dict[int, dict[str, Any]] = {}
    for line in lines:
        log = json.loads(line)
        operation, trial = log["op_code"], begun.get(log.get("trial_id", -1))
        if operation == CREATE_TRIAL:
            # Kind, study and state first: who only reads needs no more of it (`records`).
            given = {"op_code": operation, "study_id": 0, "state": OptunaState.RUNNING.value, "params": {}}
            log = begun[first + len(begun)] = {
                **given,
                "distributions": {},
                "user_attrs": {},
                "system_attrs": {},
                **log,
            }
        elif trial is not None and operation == TRIAL_PARAM:
            trial["params"][log["param_name"]] = log["param_value_internal"]
            trial["distributions"][log["param_name"]] = log["distribution"]
            continue
        elif trial is not None and operation == TRIAL_SYSTEM_ATTR:
            trial["system_attrs"].update(log["system_attr"])
            continue
        elif trial is not None and operation == TRIAL_ATTR and "launch" not in log["user_attr"]:
            trial["user_attrs"].update(log["user_attr"])
            continue
        elif trial is not None and operation == TRIAL_STATE and "datetime_start" in log:
            trial.update(state=log["state"], datetime_start=log["datetime_start"])
            trial["system_attrs"].pop("fixed_params", None)  # what was enqueued is its parameters now
            continue
        kept.append(log)
    return b"".join(map(_line, kept)), len(begun)


def _append(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class Journal:
    """Launches, rungs and ends of a study's trials.

    Only the process inside `folder.exclusive` may write. What is finished is never changed.

    Args:
        folder: of the study; None keeps the journal in memory.
        objectives: what is minimised; one that is to be raised stands there as ``-NAME``.

    Raises:
        SpecError: if the file is damaged, or of another version.
    """

    def __init__(self, folder: Path | None, objectives: Sequence[Objective] = (LOSS,)) -> None:
        storage: BaseStorage = InMemoryStorage()
        self._path = Path(JOURNAL) if folder is None else folder / JOURNAL
        self._file = None if folder is None else _JournalFile(folder)
        self._distributions: dict[str, BaseDistribution] = {}
        purposes: tuple[Purpose, ...] = get_args(Purpose)
        self.studies: dict[Purpose, optuna.Study] = {}
        try:
            if self._file is not None:
                with reading(self._path):
                    storage = JournalStorage(self._file)
            known = {study.study_name for study in storage.get_all_studies()}
            if "search" in known:  # before anything is written
                before = optuna.load_study(study_name="search", storage=storage)
                if FORMAT_KEY in before.user_attrs:
                    check_format(before.user_attrs[FORMAT_KEY], self._path)
            with self.batch():
                for purpose in purposes:
                    if purpose not in known:  # `load_if_exists` would write even when it only loads
                        storage.create_new_study([StudyDirection.MINIMIZE] * len(objectives), study_name=purpose)
                    study = self.studies[purpose] = optuna.load_study(study_name=purpose, storage=storage)
                    if purpose not in known:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                            study.set_metric_names([f"-{o.name}" if o.is_raised else o.name for o in objectives])
                search = self.studies["search"]
                if FORMAT_KEY not in search.user_attrs and not any(
                    study.get_trials(deepcopy=False) for study in self.studies.values()
                ):
                    search.set_user_attr(FORMAT_KEY, {"format": FORMAT, "version": _version()})
        except SpecError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(self._path, error) from error
        check_format(self.studies["search"].user_attrs.get(FORMAT_KEY), self._path)

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
        with reading(self._path):
            pairs = [
                (trial, record)
                for purpose, study in self.studies.items()
                for trial in study.get_trials(deepcopy=False)
                if trial.state in STATES
                and (record := make_record(purpose, STATES[trial.state], trial.user_attrs, self._path)) is not None
            ]
        return sorted(pairs, key=lambda pair: pair[1].number)

    def interrupted(self) -> Iterator[optuna.Trial]:
        """Proposals that an earlier process journaled and did not live to launch or reject, to be rejected."""
        for study in self.studies.values():
            for trial in study.get_trials(deepcopy=False):
                if trial.state.is_finished() or "launch" in trial.user_attrs:
                    continue
                if trial.state == OptunaState.WAITING:
                    study._storage.set_trial_state_values(trial._trial_id, OptunaState.RUNNING)
                yield revive(study, trial)

    def launch(self, trial: optuna.Trial, record: TrialRecord, shown: Mapping[str, Any]) -> TrialRecord:
        """Journal that ``trial`` is about to run; gives the record over the journal's own copy of what it holds.

        ``shown`` is what Optuna's own tables and plots are to show of it.
        """
        for name, value in shown.items():
            trial.set_user_attr(name, value)
        plain = asdict(record)
        for name in ("state", "rungs", "tokens", "steps", "seconds", "reason", "error", "curve", "purpose"):
            del plain[name]
        used = [each.to_plain() for each in record.plugins]
        plain = {**plain, "plugins": used} if used else {n: value for n, value in plain.items() if n != "plugins"}
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
            trial.report(rung.score, index)

    def finish(
        self,
        trial: optuna.Trial,
        state: OptunaState,
        values: list[float] | None,
        facts: Mapping[str, Any],
        shown: Mapping[str, Any],
    ) -> None:
        """Journal the end, exactly once; telling a finished trial again changes nothing."""
        try:
            for name, value in shown.items():
                trial.set_user_attr(name, value)
            trial.set_user_attr("result", dict(facts))
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        trial.study.tell(trial, values, state=state)


def settle(trial: optuna.Trial, decided: Mapping[str, Scalar]) -> None:
    """Make a trial's parameters what was decided, which its sampler then learns from, where it had asked for others."""
    storage, frozen = trial.study._storage, trial.study._storage.get_trial(trial._trial_id)
    for name, value in decided.items():
        if frozen.params.get(name, value) != value:
            distribution = frozen.distributions[name]
            storage.set_trial_param(trial._trial_id, name, distribution.to_internal_repr(value), distribution)


def revive(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """A running trial of an earlier process, to be written to again."""
    return optuna.Trial(study, trial._trial_id)


def _version() -> str:
    try:
        return f"spiralformer {version('spiralformer')}"
    except PackageNotFoundError:
        return "spiralformer"
