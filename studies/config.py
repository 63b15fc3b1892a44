"""Study files: a space, data, training, a budget and how to search, as typed settings.

A loaded study holds everything inline, so that its folder can be understood and resumed alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget, BudgetSpec
from builder.pricing.cost import COSTS, estimate
from searchspace.arch import NAME, ArchSpec
from searchspace.choices import check_value
from searchspace.errors import SpecError, one_of, show
from searchspace.files import arch_from_data, extend, find_file, located, merge, not_found, parse_overrides, read_data
from searchspace.nodes import LoopNode
from searchspace.plain import decode, dump_yaml, expect_mapping, key, plain_copy
from searchspace.plugin_loading import PluginRecord
from searchspace.plugins import decode_records, load_named, named_in, needing, provided
from searchspace.space import SpaceSpec
from searchspace.template import Template
from studies.data.dataset import added_metrics
from studies.data.settings import DataConfig, TextData
from studies.probes.table import probed_metrics
from studies.sections import (
    COST_OBJECTIVES,
    LOSS,
    MiddleChooser,
    Objective,
    ResourcesConfig,
    ScaleConfig,
    SearchConfig,
    TrackerName,
    TrainingConfig,
    check_training,
    decide_training,
    rooted,
)
from studies.tasks.table import TASKS, Task, decode_data, task_of


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study. Build it with `load_study` or `study_from_data`."""

    name: str
    space: SpaceSpec
    data: DataConfig
    training: Template
    budget: BudgetSpec
    baselines: tuple[ArchSpec, ...]
    objectives: tuple[Objective, ...]
    search: SearchConfig
    scale: ScaleConfig | None
    resources: ResourcesConfig
    train: str | None
    tracking: tuple[TrackerName, ...]
    plugins: tuple[PluginRecord, ...] = ()
    plain: dict[str, Any] = field(repr=False)
    """Everything above as plain data, files inlined."""
    base: Path = Path()
    """The folder of the study's file, where the relative paths in it begin."""

    @property
    def task(self) -> Task:
        """What is learned."""
        return task_of(self.data)

    @property
    def is_custom(self) -> bool:
        """Whether training or data are somebody's own code, which may be mended while the study stands."""
        return self.train is not None or self.task.name == "custom"

    def absolute_budget(self) -> Budget:
        """The budget with every limit absolute, relative to the first baseline. Raises `SpecError`."""
        baseline = estimate(compile_arch(self.baselines[0])) if self.baselines else None
        return self.budget.resolve(baseline)

    def to_yaml(self) -> str:
        """The study as one self-contained YAML text."""
        return dump_yaml(self.plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyKeys:
    """The keys of a study file; parts that may hold open choices stay plain here."""

    name: str = key("What people call it.", default="study")
    data: DataConfig = key("What to train on.", default=TextData(), decoder=decode_data)
    budget: BudgetSpec = key("Limits on every candidate.", default=BudgetSpec())
    objectives: tuple[str, ...] = key(
        "What to optimise; the first is loss: the task's first metric, whose name may stand there too. Then costs, and "
        "further metrics of the task.",
        default=("loss",),
    )
    search: SearchConfig = key("How to propose.", default=SearchConfig())
    scale: ScaleConfig | None = key(
        "A ladder of sizes that the best go up after the search; default: none.", default=None
    )
    resources: ResourcesConfig = key("What a trial occupies.", default=ResourcesConfig())
    train: str | None = key(
        "The training function that `studies.search` was given, by name; such a study goes on from Python.",
        default=None,
    )
    tracking: TrackerName | tuple[TrackerName, ...] = key(
        "Experiment trackers that are told of every trial.", default=("tensorboard",)
    )
    plugins: tuple[PluginRecord, ...] = key(
        "Plugins that it needs: name, version and sha256 of each; a search notes those that it uses.",
        default=(),
        decoder=decode_records,
    )


_SECTIONS = {
    "training": {f.name for f in fields(TrainingConfig)},
    "search": {f.name for f in fields(SearchConfig)},
    "scale": {f.name for f in fields(ScaleConfig)},
    "data": {f.name for task in TASKS.values() for f in fields(task.config)},
    "resources": {f.name for f in fields(ResourcesConfig)},
}


def num_baselines(study: StudyConfig) -> int:
    """Baselines trained at the search's budget: none where there is a ladder alone, which they go up at once."""
    return 0 if study.scale is not None and not study.search.num_trials else len(study.baselines)


def num_promotions(study: StudyConfig) -> int:
    """Runs of the best, and of a baseline, after the search; none where nothing is searched."""
    promote = study.search.promote
    wanted = promote.trials and study.search.num_trials
    return promote.seeds * (promote.trials + bool(study.baselines)) if wanted else 0


def num_climbers(study: StudyConfig) -> int:
    """Candidates of its ladder, at most."""
    found = 0 if study.scale is None else min(study.scale.candidates, study.search.num_trials)
    return len(study.baselines) + found


def most_trials(study: StudyConfig) -> int:
    """How many trials a study has at most: search, baselines, promotions, and its ladder's runs."""
    rungs = 0 if study.scale is None else len(study.scale.sizes) * study.scale.seeds
    return study.search.num_trials + num_baselines(study) + num_promotions(study) + rungs * num_climbers(study)


def load_study(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file and the files it names.

    Args:
        path: a file, the name of a shipped study (``quickstart``), or what such a file would hold.
        overrides: ``dotted.path=value`` texts laid over it.

    Raises:
        SpecError: with file, line, path, and what would be right.
    """
    if isinstance(path, Mapping):
        data = merge(_inline(extend(plain_copy(path), Path.cwd()), Path.cwd()), _laid_over(overrides))
        return replace(_with_plugins(study_from_data(data)), base=Path.cwd())
    file = find_study(path)
    with located(file, overrides):
        names = [text for text in overrides if text.partition("=")[0] in ("space", "baseline")]
        data = _inline(read_data(file, names), file.parent)
        data = merge(data, _laid_over([text for text in overrides if text not in names]))
        data.setdefault("name", file.stem)
        resources = data.get("resources")
        if (
            isinstance(resources, dict)
            and isinstance(place := resources.get("checkpoints"), str)
            and "://" not in place
        ):
            here = os.path.abspath(file.parent / os.path.expanduser(place))  # commands on the folder know no file
            data["resources"] = {**resources, "checkpoints": here if place.strip() else place}
        return replace(_with_plugins(study_from_data(data)), base=file.parent)


def _laid_over(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides say: of training FLOPs and tokens the one that is given takes the other's place."""
    given: dict[str, Any] = parse_overrides(overrides)
    training = given.get("training")
    if isinstance(training, dict):
        for one, other in (("flops", "tokens"), ("tokens", "flops")):
            if training.get(one) is not None and other not in training:
                given["training"] = {**training, other: None}
    return given


def _with_plugins(study: StudyConfig) -> StudyConfig:
    """The study, that says which plugins it uses."""
    load_named(study.plain)
    plain = {name: value for name, value in study.plain.items() if name != "plugins"}
    found = named_in(plain, *(f"metric:{row.name}" for row in added_metrics(study.task.name)))
    if found:
        plain["plugins"] = [record.to_plain() for record in found]
    return replace(study, plugins=found, plain=plain)


def find_study(path: str | Path) -> Path:
    """A study file, as given or among those shipped."""
    shipped = Path(__file__).parent / "configs" / f"{Path(path).stem}.yaml"
    if not os.path.isfile(path) and Path(path).parent == Path() and os.path.isfile(shipped):
        return shipped
    try:
        return find_file(path)
    except SpecError as error:
        if error.problem != "no such file":
            raise
        raise not_found(Path(path), [file.stem for file in shipped.parent.glob("*.yaml")], "studies") from error


def study_from_data(data: Mapping[str, Any], *, exact: bool = True) -> StudyConfig:
    """Build a study from inlined plain data.

    Args:
        data: as a file holds it.
        exact: refuse plugins of another version than it says.

    Raises:
        SpecError: for a plugin that it lacks, before anything else.
    """
    with needing(decode_records(data.get("plugins", []), "plugins"), exact=exact):
        return _study_from_data(data)


def _study_from_data(data: Mapping[str, Any]) -> StudyConfig:
    open_parts = ("space", "training", "baseline")
    search = data.get("search")
    ladder_alone = isinstance(search, dict) and search.get("num_trials") == 0 and data.get("scale") is not None
    if "space" not in data and ladder_alone and isinstance(data.get("baseline"), list) and data["baseline"]:
        data = {**data, "space": data["baseline"][0]}
    if "space" not in data:
        raise SpecError("", "the key 'space' is missing", "add 'space: FILE'")
    known = [*open_parts, *(f.name for f in fields(StudyKeys))]
    for name in data:
        if name not in known:
            home = [f"{part}.{name}" for part, keys in _SECTIONS.items() if name in keys]
            raise SpecError(name, "unknown key", f"did you mean {home[0]}?" if home else one_of(known, name))
    keys = decode(StudyKeys, {k: v for k, v in data.items() if k not in open_parts})
    if not NAME.fullmatch(keys.name):
        raise SpecError("name", f"{show(keys.name)} can't be used as a name", "use letters, digits, '_', '-' and '.'")
    _check_resources(keys.resources)
    if len(keys.search.enqueue) > keys.search.num_trials:
        what = f"lists {len(keys.search.enqueue)} candidates, search.num_trials is {keys.search.num_trials}"
        raise SpecError("search.enqueue", what, "raise num_trials, or list fewer")
    if not keys.search.num_trials and keys.scale is None:
        raise SpecError("search.num_trials", "is 0, and there is no ladder", "give 1 or more, or a section scale")
    training = Template({"training": expect_mapping(data.get("training", {}), "training")})
    probes = check_training(decide_training(training, MiddleChooser()).tree).probes
    objectives = _check_objectives(keys.objectives, task_of(keys.data), probes)
    listed = data.get("baseline", [])
    if not isinstance(listed, list):
        raise SpecError("baseline", f"expected a list, got {show(listed)}", "write a list of architectures")
    baselines = tuple(rooted(f"baseline.{i}", lambda arch=arch: arch_from_data(arch)) for i, arch in enumerate(listed))
    study = StudyConfig(
        name=keys.name,
        space=rooted("space", lambda: SpaceSpec(data["space"])),
        data=keys.data,
        training=training,
        budget=keys.budget,
        baselines=baselines,
        objectives=objectives,
        search=keys.search,
        scale=keys.scale,
        resources=keys.resources,
        train=keys.train,
        plugins=keys.plugins,
        tracking=(keys.tracking,) if isinstance(keys.tracking, str) else tuple(dict.fromkeys(keys.tracking)),
        plain=dict(data),
    )
    _check_enqueued(study)
    _check_probed(study)
    return study


_OF_DECISIONS = ("gp", "nsga2")
"""Samplers of Optuna that learn from the decisions that all trials share."""


def _check_probed(study: StudyConfig) -> None:
    """Raise `SpecError` for a baseline without a loop where an objective is measured in one."""
    asked = [each.name for each in study.objectives if each.name in probed_metrics()]
    for i, arch in enumerate(study.baselines if asked else ()):
        if not any(isinstance(node, LoopNode) for node in arch.graph.values()):
            what = f"has no loop, in which the objective {asked[0]} is measured"
            raise SpecError(f"baseline.{i}", what, "leave it out, or the objective")


def _check_enqueued(study: StudyConfig) -> None:
    """Raise `SpecError` if a decision that is to be launched is none of the study's."""
    if study.search.sampler in _OF_DECISIONS and any(given.arch is not None for given in study.search.enqueue):
        what = f"holds an architecture; {study.search.sampler} learns from decisions alone, and would from nothing"
        raise SpecError("search.enqueue", what, "give decisions, or another search.sampler")
    asked = {name for given in study.search.enqueue for name in given.decisions}
    known = {d.name: d for d in (*study.space.decisions, *study.training.decisions())} if asked else {}
    for i, given in enumerate(study.search.enqueue):
        for name, value in given.decisions.items():
            path = f"search.enqueue.{i}"
            if name not in known:
                raise SpecError(f"{path}.{name}", "is no decision of this study", one_of(known, name))
            rooted(path, lambda name=name, value=value: check_value(known[name], value))


def _check_resources(resources: ResourcesConfig) -> None:
    if resources.gpus_per_trial > 1:
        what = f"{resources.gpus_per_trial:g} GPUs for a trial: a trial trains on one, the others would stand idle"
        raise SpecError("resources.gpus_per_trial", what, "give 1, or a fraction for several trials on one")
    place = resources.checkpoints
    if place is not None and ("\0" in place or not place.strip()):
        raise SpecError(
            "resources.checkpoints", f"{show(place)} is no place", "give a folder, or a URL that fsspec knows"
        )
    if place is not None and "://" in place and "::" in place:
        what = f"{show(place)} is a chain of file systems, of which fsspec keeps only the first"
        raise SpecError("resources.checkpoints", what, "give one URL")


def _check_objectives(names: tuple[str, ...], task: Task, probes: tuple[str, ...]) -> tuple[Objective, ...]:
    """The objectives, the task's headline by the name ``loss``."""
    for name in names:
        provided("metric", name)
    known = {"loss": LOSS, task.headline.name: LOSS}
    known |= {name: Objective(name, COSTS[name].label) for name in COST_OBJECTIVES}
    for metric in task.metrics.values():
        known.setdefault(metric.name, Objective(metric.name, metric.label, metric.better == "higher"))
    for i, name in enumerate(names):
        if name not in known and name in probed_metrics():
            row, metric = probed_metrics()[name]
            if row.name not in probes:
                what = f"is measured by the probe {row.name}, which training.probes does not list"
                remedy = f"write training: {{probes: [{', '.join([*probes, row.name])}]}}"
                raise SpecError(f"objectives.{i}", what, remedy)
            known[name] = Objective(name, metric.label, metric.better == "higher")
        if name not in known:
            raise SpecError(
                f"objectives.{i}", f"unknown objective {show(name)}", one_of([*known, *probed_metrics()], name)
            )
    found = tuple(known[name] for name in names)
    if found[:1] != (LOSS,) or len(set(found)) < len(found):
        raise SpecError("objectives", f"{list(names)} is not a list of objectives", "put loss first, each once")
    return found


def _inline(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Replace the file names under ``space`` and ``baseline``, and in their ``extends``, by what the files hold."""
    data = dict(data)
    if isinstance(data.get("space"), str):
        file = _named(data["space"], "space", "spaces", base)
        with located(file):
            data["space"] = read_data(file)
            SpaceSpec(data["space"])
    elif isinstance(data.get("space"), dict):
        data["space"] = rooted("space", lambda: extend(data["space"], base))
    baselines = data.get("baseline", [])
    inlined = []
    for i, baseline in enumerate(baselines if isinstance(baselines, list) else [baselines]):
        if isinstance(baseline, str):
            file = _named(baseline, f"baseline.{i}", "architectures", base)
            with located(file):
                baseline = read_data(file)
                arch_from_data(baseline)
        elif isinstance(baseline, dict):
            baseline = rooted(f"baseline.{i}", lambda given=baseline: extend(given, base))
        inlined.append(expect_mapping(baseline, f"baseline.{i}", "an architecture file"))
    data["baseline"] = inlined
    search = data.get("search")
    if isinstance(search, dict) and isinstance(search.get("enqueue"), list):
        listed = [_enqueued(given, f"search.enqueue.{i}", base) for i, given in enumerate(search["enqueue"])]
        data["search"] = {**search, "enqueue": listed}
    return data


def _enqueued(given: object, path: str, base: Path) -> object:
    """An architecture's file as what it holds; decisions as they are."""
    if isinstance(given, str):
        file = _named(given, path, "architectures", base)
        with located(file):
            return read_data(file)
    return rooted(path, lambda: extend(given, base)) if isinstance(given, dict) and "extends" in given else given


def _named(name: str, path: str, folder: str, base: Path) -> Path:
    try:
        return find_file(name, folder=folder, base=base)
    except SpecError as error:
        raise SpecError(path, f"no such file: {name}", error.remedy) from error
