"""Trial records from a journal's lines, without Optuna: for all who only read.

The journal is Optuna's own (`studies.records.journal` writes it); of its lines the records need who was created where,
the states, and three user attributes: ``launch``, ``rung.N`` and ``result``.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from builder.pricing.cost import Cost
from searchspace.disk import open_regular
from searchspace.errors import SpecError, show
from searchspace.plugins import decode_records
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.records.folder import DATA, JOURNAL, read_settings
from studies.records.trial import Purpose, Rung, TrialRecord, TrialState
from studies.tasks.table import open_data

FORMAT = 4
"""Of launches, rungs and results; stands in the journal under `FORMAT_KEY`."""
FORMAT_KEY = "spiralformer_journal"

CREATE_STUDY, STUDY_ATTR, CREATE_TRIAL, TRIAL_PARAM, TRIAL_STATE, TRIAL_ATTR, TRIAL_SYSTEM_ATTR = 0, 2, 4, 5, 6, 8, 9
"""Kinds of entries in Optuna's journal."""
_OTHERS = (1, 3, TRIAL_PARAM, 7, TRIAL_SYSTEM_ATTR, 10)
STATES: dict[int, TrialState] = {0: "running", 1: "complete", 2: "stopped", 3: "failed"}
"""By Optuna's number; 4 is a proposal that waits, which nobody has launched."""

_LARGE = 16 * 2**20  # below it the garbage collector costs nothing

_BEGUN = re.compile(rb'\{"op_code":4,"study_id":(\d{1,9}),"state":(\d),"params":\{')
"""Begins the line that begins a trial, with all its parameters; the launch is a line of its own."""

_RESULT = {"tokens": int, "steps": int, "seconds": float, "reason": str, "error": str}
_LAUNCH = {
    "number": int, "name": str, "arch": dict, "arch_id": str, "choices": dict, "training": dict, "seed": int,
    "cost": dict, "origin": str, "size": str, "shares": list,
}  # fmt: skip
_RUNG = {"flops": float, "tokens": int, "score": float, "metrics": dict}
_COST = {f.name: f.type for f in fields(Cost)}


@dataclass(slots=True)
class _Trial:
    study: int
    state: int
    attrs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def reading(journal: Path) -> Iterator[None]:
    """What is made of a large journal inside is there to stay: the garbage collector leaves it alone, now and later.

    With ten thousand trials it would walk over millions of objects again and again, for a third of the time.
    """
    if not journal.is_file() or journal.stat().st_size < _LARGE or not gc.isenabled():
        yield
        return
    gc.collect()  # what is garbage now is not to stay
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def read_study(folder: Path) -> tuple[list[TrialRecord], Dataset, StudyConfig]:
    """A study folder's records, data and settings. Raises `SpecError` if it is none, or damaged."""
    records, settings = open_for_reading(folder), read_settings(folder)  # which say first what plugin is missing
    return records, open_data(folder / DATA), settings


def open_for_reading(folder: Path) -> list[TrialRecord]:
    """The records of a study folder, by number, without touching it; it may be written to at the same time.

    Raises:
        SpecError: if it is no study folder, or damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        what = "is not a study folder (no journal.log)"
        raise SpecError("", what, "give the folder that search made", file=str(folder))
    found = []
    with reading(path):
        try:
            with open_regular(path) as lines:
                studies, trials = _replay(lines)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SpecError):
                error.file = error.file or str(path)
                raise
            raise damaged(path, error) from error
        for trial in trials:
            purpose = studies[trial.study] if trial.study < len(studies) else ""
            if purpose in get_args(Purpose) and trial.state in STATES:
                record = make_record(purpose, STATES[trial.state], trial.attrs, path)  # type: ignore[arg-type]
                if record is not None:
                    found.append(record)
    return sorted(found, key=lambda record: record.number)


def has_launches(folder: Path) -> bool:
    """Whether a study folder's journal holds a launch; where it can't be read, which shows later, it may."""
    path = folder / JOURNAL
    if not path.is_file():
        return False
    with open_regular(path) as lines:
        return any(b'"user_attr":{"launch":' in line or not line.startswith(b'{"op_code":') for line in lines)


def damaged(path: Path, error: Exception) -> SpecError:
    """What to say of a journal that is no journal."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SpecError("", f"is damaged ({show(reason)})", "the search command mends it, or says where", file=str(path))


def check_format(found: object, path: Path | str) -> None:
    """Raise `SpecError` for the journal of a version that this one can't read."""
    if isinstance(found, dict) and found.get("format") == FORMAT:
        return
    version = show(found.get("version")) if isinstance(found, dict) else "an unknown version"
    what = f"was written by {version}; this version reads format {FORMAT}"
    raise SpecError("", what, "go on with the version that began it, or begin anew in another --dir", file=str(path))


def _replay(lines: Iterable[bytes]) -> tuple[list[str], list[_Trial]]:
    studies: list[str] = []
    trials: list[_Trial] = []
    waiting = ""
    for line in lines:
        if waiting:
            raise ValueError(waiting)
        if line[:11] == b'{"op_code":' and line[12:13] == b"," and line[11] in b"13579":
            continue  # intermediate values and attributes of the samplers
        if (begun := _BEGUN.match(line)) and line.endswith(b"}\n"):  # a third of the file is its parameters
            trials.append(_Trial(int(begun[1]), int(begun[2])))
            continue
        try:
            entry = json.loads(line.decode())
        except ValueError as error:
            waiting = str(error)  # the end may be half written, nothing else
            continue
        if not line.endswith(b"\n"):
            break
        operation = entry["op_code"]
        if operation == CREATE_STUDY:
            studies.append(entry["study_name"])
        elif operation == STUDY_ATTR and FORMAT_KEY in entry["user_attr"]:
            check_format(entry["user_attr"][FORMAT_KEY], "")
        elif operation == CREATE_TRIAL:
            state = 0 if entry.get("state") is None else entry["state"]
            attrs = entry.get("user_attrs") or {}
            trials.append(_Trial(_number(entry["study_id"]), _number(state), dict(attrs)))
        elif operation == TRIAL_STATE:
            trial = trials[_number(entry["trial_id"])]
            if trial.state in (0, 4):  # what has ended does not change
                trial.state = _number(entry["state"])
        elif operation == TRIAL_ATTR:
            trial = trials[_number(entry["trial_id"])]
            if trial.state in (0, 4):
                trial.attrs.update(entry["user_attr"])
        elif operation not in _OTHERS:
            raise ValueError(f"an entry of unknown kind {operation}")
    return studies, trials


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{show(value)} is no number of a trial, a study or a state")
    return value


def make_record(purpose: Purpose, state: TrialState, attrs: Mapping[str, Any], path: Path) -> TrialRecord | None:
    """The record of a journaled trial; None for a proposal that was never launched. Raises `SpecError`."""
    launch = attrs.get("launch")
    if launch is None:
        return None
    where = f"trial {launch.get('number')}" if isinstance(launch, dict) else "a trial"
    try:
        used = decode_records(launch.get("plugins", ()), "launch.plugins") if isinstance(launch, dict) else ()
        launch = {n: v for n, v in launch.items() if n != "plugins"} if isinstance(launch, dict) else launch
        _check(launch, _LAUNCH, "launch")
        cost = _cost(launch["cost"])
        rungs: list[Rung] = []
        while (rung := attrs.get(f"rung.{len(rungs)}")) is not None:
            _check(rung, _RUNG, f"rung {len(rungs)}")
            if rung["flops"] < 0:
                raise ValueError(f"rung {len(rungs)} has spent less than nothing")
            if not all(isinstance(value, int | float) for value in rung["metrics"].values()):
                raise ValueError(f"rung {len(rungs)} has a metric that is no number")
            rungs.append(Rung(**rung))
        result: dict[str, Any] = {}
        if "result" in attrs:
            result = _result(attrs["result"])
        if state in ("complete", "stopped") and not rungs and not result.get("reason"):
            raise ValueError(f"it is {state} without a result")
        return TrialRecord(
            **{**launch, "cost": cost},
            purpose=purpose,
            state="failed" if result.get("reason") else state,
            rungs=tuple(rungs),
            plugins=used,
            **result,
        )
    except ValueError as error:
        remedy = "the journal is damaged, or another version wrote it; restore it, or begin anew in another --dir"
        raise SpecError(where, f"can't be read: {error}", remedy, file=str(path)) from error


def _result(found: object) -> dict[str, Any]:
    """How a trial ended; a curve is told where there is one."""
    if not isinstance(found, dict) or "curve" not in found:
        return _check(found, _RESULT, "result")
    result, points = {name: value for name, value in found.items() if name != "curve"}, found["curve"]
    if not isinstance(points, list | tuple) or not all(_is_point(point) for point in points):
        raise ValueError(f"result.curve is {show(points)}")
    return {**_check(result, _RESULT, "result"), "curve": tuple((tokens, float(loss)) for tokens, loss in points)}


def _is_point(point: object) -> bool:
    return (
        isinstance(point, list | tuple)
        and len(point) == 2
        and type(point[0]) is int
        and type(point[1]) in (int, float)
        and math.isfinite(point[1])
    )


def _check(found: object, known: Mapping[str, type], what: str) -> dict[str, Any]:
    """``found``. Raises ValueError unless it has these fields, each of its type and every number finite."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {show(found)}")
    if found.keys() != known.keys():
        more, less = sorted(found.keys() - known.keys()), sorted(known.keys() - found.keys())
        raise ValueError(
            f"{what} " + " and ".join([*(f"has {n}" for n in more[:3]), *(f"lacks {n}" for n in less[:3])])
        )
    for name, kind in known.items():
        value = found[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{what}.{name} is {show(value)}")
    return found


def _cost(found: Any) -> Cost:
    if {*found, "training_flops"} != _COST.keys():  # which earlier versions did not write
        raise ValueError("cost has other fields")
    for name, value in found.items():
        least = 0 if name in ("params_non_embedding", "kv_cache_bytes") else 1
        if not (type(value) is int and value >= least) and not (
            value is None and name.startswith(("decode", "training"))
        ):
            raise ValueError(f"cost.{name} is {show(value)}")
    return Cost(**found)
