"""``studies.search``: a study from Python, in this process or on Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from searchspace.arch import ArchSpec
from searchspace.choices import Scalar
from searchspace.errors import SpecError, one_of, show
from searchspace.plain import encode
from searchspace.plugins import names, provided
from searchspace.space import SpaceSpec
from studies.api.study import Study
from studies.commands.search import run_study
from studies.config import StudyConfig, load_study
from studies.execution.base import Runner
from studies.execution.custom import CustomTraining, TrainingFunction, name_of
from studies.strategy.driver import Listener
from studies.tasks.custom import CustomData, Data, describe_data
from studies.tasks.table import TASKS, sources, task_named
from studies.training.run_trial import run_trial

Architecture: TypeAlias = str | Path | Mapping[str, Any] | ArchSpec
"""A file, a shipped name, what such a file would hold, or an architecture."""

_TRAINING = {"tokens": 1.0e6}
"""Where nobody says how long: a million tokens, minutes a trial at tens of thousands of parameters."""


def search(
    space: str | Path | Mapping[str, Any] | SpaceSpec | StudyConfig,
    *,
    dir: str | Path,
    data: Mapping[str, Any] | Data | None = None,
    task: str | None = None,
    train: TrainingFunction | None = None,
    objectives: Sequence[str] = ("loss",),
    baseline: Architecture | Sequence[Architecture] = (),
    training: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    num_trials: int = 16,
    enqueue: Sequence[Architecture | Mapping[str, Scalar]] = (),
    settings: Mapping[str, Any] | None = None,
    ray: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    progress: bool = True,
) -> Study:
    """Search a space, or go on with it: the same call continues what an interrupted one has left in ``dir``.

    Args:
        space: a file, a shipped name, what such a file would hold, a `SpaceSpec`; or a whole study (`load_study`),
            which says all that the arguments from ``data`` to ``settings`` say.
        dir: the study's folder.
        data: the section ``data`` of a study (``{"kind": "text", "path": "*.txt"}``), or an object with the methods of
            `studies.Data`; by default this Python's library, and nothing where ``train`` is given.
        task: what is learned, where ``data`` leaves it open: ``text_lm``, ``reach``.
        train: trains one candidate in place of the product's own loop, see `studies.TrainingFunction`.
        objectives: the first is ``loss``; others are costs, such as ``decode_flops_per_token``, or metrics of the task.
        baseline: architectures trained in full for comparison; limits in ``budget`` may be relative to the first.
        training: the section ``training``; by default a million tokens.
        budget: the section ``budget``, such as ``{"params": "110% of baseline"}``.
        num_trials: candidates to launch.
        enqueue: candidates of one's own, launched first: architectures, or decisions by name.
        settings: further sections of a study: ``search``, ``scale``, ``resources``, ``tracking``, ``name``.
        ray: run trials on Ray workers, by default one after another in this process.
        address: of a Ray cluster to join.
        listener: told of every rung and end, once they are journaled; what it raises is noted, and stops nothing.
        progress: show it on stderr.

    Returns:
        The study, with all its trials.

    Raises:
        SpecError: for settings that are wrong, or a folder that holds something else.
        StudyHaltedError: if it can't go on now (too many failures in a row, a full disk), or no trial completed.
        KeyboardInterrupt: after Ctrl-C; what was journaled stays.
    """
    study = _study(
        space, dir, data, task, train, objectives, baseline, training, budget, num_trials, enqueue, settings or {}
    )
    run: Runner = run_trial
    if train is not None:
        run = CustomTraining(train)
    elif _is_object(data):
        run = partial(run_trial, data=data)
    console = Console(stderr=True, quiet=not progress)
    serial = not (ray or address)
    run_study(study, Path(dir), console, serial=serial, address=address, run=run, listener=listener, farewell=False)
    return Study(dir)


def _study(
    space: Any,
    dir: str | Path,
    data: Any,
    task: str | None,
    train: TrainingFunction | None,
    objectives: Sequence[str],
    baseline: Any,
    training: Mapping[str, Any] | None,
    budget: Mapping[str, Any] | None,
    num_trials: int,
    enqueue: Sequence[Any],
    settings: Mapping[str, Any],
) -> StudyConfig:
    """The arguments of `search` as a study."""
    if train is not None and not callable(train):
        raise SpecError("train", f"is {show(train)}", "give a function of a TrialSpec")
    if isinstance(enqueue, Mapping | str):
        raise SpecError("enqueue", f"is {show(enqueue)}", "give a list")
    if isinstance(space, StudyConfig):
        if _is_object(data) and describe_data(data, _context(space)) == space.data:
            data = None  # the same that the study began with
        given = {"data": data, "task": task, "training": training, "budget": budget}
        if train is not None and space.train != name_of(train):
            raise SpecError("train", "is given beside a whole study", "say train: in the study, by its name")
        if also := [name for name, value in given.items() if value is not None]:
            raise SpecError(also[0], "is given beside a whole study, which says it", "say it in one place")
        return space
    known = ("name", "search", "scale", "resources", "tracking")
    for name in settings:
        if name not in known:
            raise SpecError(f"settings.{name}", "is no further section of a study", one_of(known, name))
    listed = [baseline] if isinstance(baseline, str | Path | Mapping | ArchSpec) else list(baseline)
    own = settings.get("search", {})
    if not isinstance(own, Mapping):
        raise SpecError("settings.search", f"is {show(own)}", "give a mapping, such as {'sampler': 'random'}")
    for name in own:
        if name in ("num_trials", "enqueue"):
            raise SpecError(f"settings.search.{name}", "is an argument of its own", f"give {name}=")
    plain = {
        "space": space.data if isinstance(space, SpaceSpec) else space,
        "data": {} if _is_object(data) else _data(data, task, train),
        "training": training or _TRAINING,
        "budget": budget or {},
        "baseline": [_plain(each) for each in listed],
        "objectives": list(objectives),
        **({"train": name_of(train)} if train is not None else {}),
        **settings,
        "search": {"num_trials": num_trials, "enqueue": [_plain(each) for each in enqueue], **own},
    }
    plain.setdefault("name", re.sub(r"[^\w.-]", "-", Path(dir).resolve().name).lstrip(".-") or "study")
    study = load_study(plain)
    study.space.check()
    if not _is_object(data):
        return study
    if task not in (None, "custom"):
        raise SpecError("task", "an object of one's own has a task of its own", "leave it out")
    return load_study({**plain, "data": describe_data(data, _context(study)).settings()})


def _is_object(data: Any) -> bool:
    """Whether data are somebody's own object, not a section of a study."""
    return data is not None and not isinstance(data, Mapping)


def _context(study: StudyConfig) -> int:
    return study.space.sample(study.search.seed).arch.seq_len


def _plain(given: Any) -> Any:
    return encode(given) if isinstance(given, ArchSpec) else given


def _data(data: Mapping[str, Any] | None, task: str | None, train: TrainingFunction | None) -> dict[str, Any]:
    """The section ``data``."""
    if task is not None and task_named(task) is None:
        raise SpecError("task", f"unknown task {task!r}", one_of((*TASKS, *names("task")), task))
    if data is None:
        if task is None and train is not None:
            return CustomData().settings()
        return {"kind": TASKS[task].kinds[0]} if task is not None else {}
    known = sources()
    kind = data.get("kind", next(iter(known)) if task is None else TASKS[task].kinds[0])
    known = sources() if provided("task", kind) else known
    if task is not None and kind in known and known[kind].name != task:
        raise SpecError("task", f"{kind} are data of the task {known[kind].name}, not {task}", "leave it out")
    return {**data, "kind": kind}
