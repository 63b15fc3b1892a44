"""Study files: a space, data, training, a budget and how to search, as typed settings.

A loaded study holds everything inline, so that its folder can be understood and resumed alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget, BudgetSpec
from builder.pricing.cost import COSTS, estimate
from searchspace.arch import NAME, ArchSpec
from searchspace.choices import Categorical, Decision, Integer, Scalar, check_value, example
from searchspace.errors import SpecError, one_of, show
from searchspace.files import arch_from_data, extend, find_file, located, merge, not_found, parse_overrides, read_data
from searchspace.plain import dataclass_decoder, decode, dump_yaml, encode, expect_mapping, join_path, key, plain_copy
from searchspace.plugin_loading import PluginRecord
from searchspace.plugins import decode_records, load_named, named_in, needing, provided
from searchspace.space import SpaceSpec
from searchspace.tables import Open
from searchspace.template import Decided, Template
from studies.data.dataset import added_metrics
from studies.data.settings import DataConfig, TextData
from studies.probes.table import ProbeName, probed_metrics
from studies.tasks.table import TASKS, Task, decode_data, task_of

SamplerName: TypeAlias = Annotated[
    Literal["tpe", "random", "nsga2", "gp", "evolution", "grid", "predictor"], Open("sampler")
]
LearnerName: TypeAlias = Literal["cost", "scaling_law", "tabular", "gnn"]
StopperName: TypeAlias = Literal["none", "asha", "median"]
TrackerName: TypeAlias = Literal["tensorboard", "mlflow", "wandb", "trackio"]
COST_OBJECTIVES = tuple(row.name for row in COSTS.values() if row.objective)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a study optimises: its task's score, a cost, or another metric of the task."""

    name: str
    label: str
    """Of a column."""
    is_raised: bool = False
    """Whether more of it is better; it is minimised with its sign turned."""


LOSS = Objective("loss", "loss")
"""The task's score, of which less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How one architecture is trained: until it has spent ``flops``, or seen ``tokens``.

    What is left open is decided by the size of the model and of the data it sees (`studies.training.recipe`).
    """

    flops: float | None = key("Training FLOPs (3x forward) to spend.", default=None, low=1.0)
    tokens: float | None = key("Tokens to see, instead of flops.", default=None, low=1.0)
    batch_tokens: int | None = key(
        "Tokens in one step, over all its sequences; default: by size.", default=None, low=1, high=1 << 26
    )
    micro_batches: int = key("Parts of a step whose gradients are summed, to save memory.", default=1, low=1, high=4096)
    optimizer: Literal["adamw", "muon"] = key(
        "adamw, or muon for the blocks' matrices and adamw for the rest.", default="adamw"
    )
    muon_lr: float = key("Muon's peak learning rate, for updates of AdamW's size.", default=3e-3, low=1e-9, high=10.0)
    lr: float | None = key("Peak learning rate; default: by size.", default=None, low=1e-9, high=10.0)
    final_lr: float = key("Learning rate at the end, as a share of the peak.", default=0.1, low=0.0, high=1.0)
    lr_schedule: Literal["cosine", "wsd"] = key("cosine, or warm-up, stable, then linear decay.", default="cosine")
    warmup: float = key("Share of the steps that warm up.", default=0.05, low=0.0, high=0.5)
    decay: float = key("Share of the steps that decay (wsd).", default=0.2, low=0.0, high=1.0)
    weight_decay: float = key("On matrices only.", default=0.1, low=0.0, high=10.0)
    beta2: float | None = key("AdamW's second moment; default: by the batch.", default=None, low=0.0, high=0.99999)
    clip: float = key("Largest gradient norm.", default=1.0, low=1e-6)
    precision: Literal["auto", "fp32", "bf16"] = key("auto: bf16 on a GPU, fp32 on a CPU.", default="auto")
    compile: Literal["auto", "none", "blocks"] = key(
        "torch.compile each block's layers; auto: on a GPU only.", default="auto"
    )
    recompute: Literal["none", "loop"] = key(
        "loop: keep only the inputs of blocks used more than once, and run them again backward.", default="none"
    )
    eval_tokens: int = key("Held-out tokens of each evaluation.", default=65536, low=1, high=1 << 30)
    probes: tuple[ProbeName, ...] = key(
        "What to measure inside the loop of most iterations at each rung (arXiv 2604.15259): reachability, "
        "input_dependence, geometry, robustness.",
        default=(),
    )
    checkpoint_every_s: float = key("Seconds between checkpoints, besides those at rungs.", default=60.0, low=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StopperConfig:
    """When to end a trial early: ``none``, ``asha`` or ``median``, or one of them with settings: ``{asha: {...}}``."""

    kind: StopperName = key("Which one; written as the mapping's only key.", default="none")
    rungs: int = key("Evaluations of a trial, the last at its full budget.", default=3, low=1, high=12)
    reduction: int = key(
        "Rungs are this factor apart; asha lets one in this many go on at each.", default=3, low=2, high=16
    )
    startup: int = key("median: trials to see at a rung before any is stopped there.", default=5, low=1)

    @staticmethod
    def __decode__(data: object, path: str) -> StopperConfig:
        kinds = get_args(StopperName)
        settings: object = {}
        if isinstance(data, dict) and len(data) == 1:
            data, settings = next(iter(data.items()))
        elif data == "none":
            settings = {"rungs": 1}
        if not isinstance(data, str) or data not in kinds:
            raise SpecError(path, f"unknown stopper {show(data)}", "write none, asha, median, or {asha: {rungs: 3}}")
        at = join_path(path, data)
        settings = expect_mapping(settings, at)
        for name in settings:
            if name not in ("rungs", "reduction", "startup"):
                raise SpecError(join_path(at, name), "unknown key", one_of(("rungs", "reduction", "startup"), name))
        decoded: StopperConfig = _decode_stopper({**settings, "kind": data}, at)
        return decoded

    def __encode__(self) -> object:
        if self == StopperConfig(rungs=1):
            return "none"
        return {self.kind: {"rungs": self.rungs, "reduction": self.reduction, "startup": self.startup}}


_decode_stopper = dataclass_decoder(StopperConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteConfig:
    """After the search, the best are trained again, with other seeds and perhaps for longer; a number is ``trials``.

    The best baseline is trained beside them.
    """

    trials: int = key("How many of the best.", default=0, low=0, high=1000)
    seeds: int = key("Runs of each, every one with a seed of its own.", default=2, low=1, high=100)
    factor: float = key("Their training budget, as a multiple of the search's.", default=1.0, low=0.01, high=1e6)

    @staticmethod
    def __decode__(data: object, path: str) -> PromoteConfig:
        if not isinstance(data, int | dict) or isinstance(data, bool):
            raise SpecError(
                path, f"can't read {show(data)}", "write how many of the best, e.g. 3, or {trials: 3, seeds: 2}"
            )
        decoded: PromoteConfig = _decode_promote({"trials": data} if isinstance(data, int) else data, path)
        return decoded


_decode_promote = dataclass_decoder(PromoteConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Enqueued:
    """A candidate of one's own: an architecture, or decisions by name, of which those not given are drawn."""

    arch: ArchSpec | None = None
    decisions: Mapping[str, Scalar] = field(default_factory=dict)

    @staticmethod
    def __decode__(data: object, path: str) -> Enqueued:
        mapping = expect_mapping(data, path, "an architecture, or decisions such as {core.layers: 2}")
        if "graph" in mapping:
            return Enqueued(arch=rooted(path, lambda: arch_from_data(mapping)))
        for name, value in mapping.items():
            if not isinstance(value, Scalar):
                raise SpecError(f"{path}.{name}", f"expected a number or text, got {show(value)}", "give one option")
        return Enqueued(decisions=cast("dict[str, Scalar]", mapping))

    def __encode__(self) -> object:
        return encode(self.arch) if self.arch is not None else dict(self.decisions)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How candidates are proposed."""

    sampler: SamplerName = key("Who proposes.", default="tpe")
    predictor: LearnerName = key("Of the sampler predictor: what it learns with.", default="tabular")
    num_trials: int = key(
        "Trials to launch, baselines not counted; 0 with scale: the baselines go up the ladder at once.",
        default=16,
        low=0,
        high=1_000_000,
    )
    stopper: StopperConfig = key("When trials are ended early.", default=StopperConfig(kind="median"))
    seed: int = key("Of proposals, initial weights and batches.", default=0, low=0, high=2**31)
    narrow: bool = key("Steer proposals into the budget while they are decided.", default=True)
    promote: PromoteConfig = key("What is trained again after the search.", default=PromoteConfig())
    enqueue: tuple[Enqueued, ...] = key(
        "Candidates of one's own, launched first: architectures (files, or themselves), or decisions by name.",
        default=(),
    )
    from_: str | None = key("Folder of an earlier study to learn from.", default=None, name="from")
    time_budget_s: float | None = key(
        "Seconds after which a search stops; what runs then is gone on with when the same command is given again.",
        default=None,
        low=1.0,
    )
    max_failures: int = key("Failed trials in a row that end the study.", default=5, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeConfig:
    """A size of a ladder: a width, or a width and how many times deeper: ``{d_model: 64, depth: 2}``."""

    d_model: int = key("Width; heads keep theirs, feed-forward layers grow along.", low=2, high=1 << 17)
    depth: int = key("Layers of every block, as a multiple of the candidate's.", default=1, low=1, high=512)

    @property
    def label(self) -> str:
        """Short and unique: ``64``, ``64x2``."""
        return f"{self.d_model}" if self.depth == 1 else f"{self.d_model}x{self.depth}"

    @staticmethod
    def __decode__(data: object, path: str) -> SizeConfig:
        if not isinstance(data, int | dict) or isinstance(data, bool):
            raise SpecError(path, f"can't read {show(data)}", "write a width, e.g. 64, or {d_model: 64, depth: 2}")
        decoded: SizeConfig = _decode_size({"d_model": data} if isinstance(data, int) else data, path)
        return decoded

    def __encode__(self) -> object:
        return self.d_model if self.depth == 1 else {"d_model": self.d_model, "depth": self.depth}


_decode_size = dataclass_decoder(SizeConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """After the search, the best and the baselines are trained at several sizes, to tell who wins at a larger one."""

    sizes: tuple[SizeConfig, ...] = key("Three or more, from small to large.")
    horizons: tuple[float, ...] = key(
        "Lengths of training, 1 for 60 bytes per parameter (20 tokens where bytes are unknown); all off one run.",
        default=(0.5, 1.0),
    )
    seeds: int = key("Runs of each candidate at each size.", default=2, low=1, high=100)
    candidates: int = key("How many of the best that were found.", default=5, low=0, high=1000)
    target: float | None = key(
        "Parameters of the size that the answer is about; default: ten times the largest.", default=None, low=1.0
    )
    allot: bool = key(
        "Train first what decides the order soonest, and leave out what can't change it; false: everything.",
        default=True,
    )

    def __post_init__(self) -> None:
        if len(self.sizes) < LEAST_SIZES:
            what = f"{len(self.sizes)} are too few for a law"
            raise SpecError("scale.sizes", what, f"give {LEAST_SIZES} or more, each about three times the parameters")
        order = [(size.d_model, size.depth) for size in self.sizes]
        if len(set(order)) < len(order) or order != sorted(order, key=lambda at: at[0] ** 2 * at[1]):
            raise SpecError("scale.sizes", "are not in order, from small to large", "sort them, each once")
        wrong = [horizon for horizon in self.horizons if not 0.01 <= horizon <= 1000]
        if not self.horizons or wrong or list(self.horizons) != sorted(set(self.horizons)):
            what = f"{[*self.horizons]} are no lengths of training in order"
            raise SpecError("scale.horizons", what, "give numbers from 0.01 to 1000, from short to long, e.g. [0.5, 1]")


LEAST_SIZES = 3
"""With two, one curve of any exponent goes through both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig:
    """What one trial occupies."""

    cpus_per_trial: int = key("CPU cores, and threads.", default=1, low=1, high=1024)
    gpus_per_trial: float = key("GPUs, or a fraction of one.", default=0.0, low=0.0, high=64.0)
    max_concurrent: int | None = key("Trials at once; default: as many as fit.", default=None, low=1)
    trial_timeout_s: float = key(
        "Seconds without a word after which a trial has hung and its worker is killed.", default=1800.0, low=1.0
    )
    checkpoints: str | None = key("Where checkpoints go, any fsspec path; default: the study folder.", default=None)


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
        data = merge(_inline(extend(plain_copy(path), Path.cwd()), Path.cwd()), parse_overrides(overrides))
        return replace(_with_plugins(study_from_data(data)), base=Path.cwd())
    file = find_study(path)
    with located(file, overrides):
        names = [text for text in overrides if text.partition("=")[0] in ("space", "baseline")]
        data = _inline(read_data(file, names), file.parent)
        data = merge(data, parse_overrides([text for text in overrides if text not in names]))
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
    objectives = _check_objectives(keys.objectives, task_of(keys.data), training)
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
    check_training(decide_training(training, MiddleChooser()).tree)
    _check_enqueued(study)
    return study


_OF_DECISIONS = ("gp", "nsga2")
"""Samplers of Optuna that learn from the decisions that all trials share."""


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


def decide_training(template: Template, chooser: Any) -> Decided:
    """Decide the open choices of ``training``; the names begin with ``training.``."""
    decided = template.decide(chooser)
    return Decided(expect_mapping(decided.tree["training"], "training"), decided.choices)


def check_training(tree: Mapping[str, Any]) -> TrainingConfig:
    """Decode decided training settings. Raises `SpecError`."""
    config = decode(TrainingConfig, dict(tree), "training")
    if (config.flops is None) == (config.tokens is None):
        raise SpecError("training", "needs exactly one of flops and tokens", "write flops: 4.0e11, or tokens: 1.0e6")
    return config


class MiddleChooser:
    """Takes the first option, and the (geometric) middle of a range: how baselines decide ``training``."""

    def choose(self, decision: Decision) -> Scalar:
        if isinstance(decision, Categorical):
            return example(decision)
        middle = (decision.low * decision.high) ** 0.5 if decision.log else (decision.low + decision.high) / 2
        if isinstance(decision, Integer):
            return decision.low + round((middle - decision.low) / decision.step) * decision.step
        if decision.step is not None:
            return decision.at(round((middle - decision.low) / decision.step))
        return float(middle)


def _check_objectives(names: tuple[str, ...], task: Task, training: Template) -> tuple[Objective, ...]:
    """The objectives, the task's headline by the name ``loss``."""
    probes = decide_training(training, MiddleChooser()).tree.get("probes", ())
    for name in names:
        provided("metric", name)
    known = {"loss": LOSS, task.headline.name: LOSS}
    known |= {name: Objective(name, COSTS[name].label) for name in COST_OBJECTIVES}
    for metric in task.metrics.values():
        known.setdefault(metric.name, Objective(metric.name, metric.label, metric.better == "higher"))
    for i, name in enumerate(names):
        if name not in known and name in probed_metrics():
            row, metric = probed_metrics()[name]
            if not isinstance(probes, list) or row.name not in probes:
                what = f"is measured by the probe {row.name}, which training.probes does not list"
                raise SpecError(f"objectives.{i}", what, f"write training: {{probes: [{row.name}]}}")
            known[name] = Objective(name, metric.label, metric.better == "higher")
        if name not in known:
            raise SpecError(f"objectives.{i}", f"unknown objective {show(name)}", one_of(known, name))
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


def rooted(root: str, make: Any) -> Any:
    """Run ``make``, putting ``root`` before the path of its errors."""
    try:
        return make()
    except SpecError as error:
        if not error.file:
            error.path = join_path(root, error.path) if error.path else root
        raise
