"""The sections of a study file, as typed settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

from builder.pricing.cost import COSTS
from searchspace.arch import ArchSpec
from searchspace.choices import Categorical, Decision, Integer, Scalar, example
from searchspace.errors import SpecError, one_of, show
from searchspace.files import arch_from_data
from searchspace.plain import dataclass_decoder, decode, encode, expect_mapping, join_path, key
from searchspace.tables import Open
from searchspace.template import Decided, Template
from studies.probes.table import ProbeName

SamplerName: TypeAlias = Annotated[
    Literal["tpe", "random", "nsga2", "gp", "evolution", "grid", "one_change", "predictor"], Open("sampler")
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
    final_lr: float | None = key(
        "Learning rate at the end, as a share of the peak; default: by size.", default=None, low=0.0, high=1.0
    )
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
        "What to measure inside the loop of most iterations at each rung (docs/inside.md, docs/loops.md).",
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


def rooted(root: str, make: Any) -> Any:
    """Run ``make``, putting ``root`` before the path of its errors."""
    try:
        return make()
    except SpecError as error:
        if not error.file:
            error.path = join_path(root, error.path) if error.path else root
        raise
