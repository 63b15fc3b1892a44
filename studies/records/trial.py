"""One trial: what is run, what it reports, and the record that stays."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeAlias

from builder.pricing.cost import COSTS, Cost
from searchspace.arch import ArchSpec
from searchspace.choices import Scalar
from searchspace.errors import SpecError
from searchspace.plain import decode, encode
from searchspace.plugin_loading import PluginRecord
from searchspace.plugins import load_for
from studies.sections import LOSS, Objective, TrainingConfig, check_training

ReportKind: TypeAlias = Literal["progress", "rung", "done", "failed"]


TrialState: TypeAlias = Literal["running", "complete", "stopped", "failed"]


Purpose: TypeAlias = Literal["search", "baseline", "promotion", "ladder"]


class MissingPluginError(RuntimeError):
    """A worker lacks a plugin that its trial uses, or has another version of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything a worker needs, decoded; it travels as JSON."""

    number: int
    arch: ArchSpec
    arch_id: str
    training: TrainingConfig
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
    decayed: bool = False
    """Each rung is the end of a decay of its own, off one trunk (``lr_schedule: wsd``)."""
    device: str
    threads: int
    timeout_s: float = 1800.0
    """Seconds without a report after which the worker is taken for hung."""
    until: float = math.inf
    """When the study's time is over, in seconds since the epoch: near it a trial saves at every report."""
    plugins: tuple[PluginRecord, ...] = ()
    """That a worker must have, the same ones."""

    @property
    def identity(self) -> str:
        """Digest of all that decides its losses; a checkpoint of another identity is another trial's."""
        return identity_of(self.arch_id, self.seed, self.training, self.rungs, self.data, decayed=self.decayed)

    def to_json(self) -> str:
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plugins = [asdict(record) for record in self.plugins]
        return json.dumps({**plain, "arch": encode(self.arch), "training": encode(self.training), "plugins": plugins})

    @staticmethod
    def from_json(text: str) -> TrialSpec:
        """What `to_json` wrote; its plugins are loaded. Raises `MissingPluginError` for one that this worker lacks."""
        data = json.loads(text)
        plugins = tuple(PluginRecord(**record) for record in data["plugins"])
        try:
            load_for(plugins)
        except SpecError as error:
            raise MissingPluginError(str(error)) from error
        arch, training = decode(ArchSpec, data["arch"]), check_training(data["training"])
        return TrialSpec(
            **{**data, "arch": arch, "training": training, "rungs": tuple(data["rungs"]), "plugins": plugins}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A held-out loss, and what had been spent for it."""

    flops: float
    tokens: int
    score: float
    """Of which less is better: what training lowers, or a metric that it is to raise, with its sign turned."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that the task measures, by name."""


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
    curve: tuple[tuple[int, float], ...] = ()
    """Training loss over tokens, some thirty points; told with the end."""
    reason: str = ""
    """failed: diverged, out_of_memory, disk_full, no_plugin, hung, invalid, worker_died or error."""
    error: str = ""
    memory_gib: float = 0.0
    """out_of_memory: what was asked for in vain, as far as it is known."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Report:
        data = json.loads(text)
        rungs, curve = tuple(Rung(**rung) for rung in data["rungs"]), tuple(tuple(point) for point in data["curve"])
        return Report(**{**data, "rungs": rungs, "curve": curve})


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
    origin: str = ""
    """Of a ladder's runs: the candidate's architecture, as it stands in the study, by its id."""
    size: str = ""
    """Of a ladder's runs: its `studies.sections.SizeConfig`, by its label."""
    shares: Sequence[float] = ()
    """Of a ladder's runs: its horizons, as shares of the longest."""
    rungs: tuple[Rung, ...] = ()
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""
    error: str = field(default="", repr=False)
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    """Training loss: tokens seen, and the mean since the point before, in nats; of trials of the product's own loop."""
    plugins: tuple[PluginRecord, ...] = ()
    """That its architecture or its task uses."""

    @property
    def ranks(self) -> bool:
        """Whether it is ranked with others at the search's own budget."""
        return self.purpose in ("search", "baseline")

    @property
    def score(self) -> float | None:
        """After the full budget; None if it was not reached."""
        return self.rungs[-1].score if self.state == "complete" else None

    @property
    def flops(self) -> float:
        """Training FLOPs at its last rung, and of the branches that a ladder's run left for its decays."""
        if not self.rungs:
            return 0.0
        branches = sum(rung.flops for rung in self.rungs[:-1]) if self.purpose == "ladder" else 0.0
        return self.rungs[-1].flops + (check_training(self.training).decay * branches if branches else 0.0)

    def value(self, name: str, rung: int = -1) -> float:
        """A cost, or what was measured at a rung: ``loss`` is the score, other metrics are as the task tells them."""
        if name == LOSS.name:
            return self.rungs[rung].score
        return float(getattr(self.cost, name) or 0) if name in COSTS else self.rungs[rung].metrics[name]

    def objectives(self, of: Sequence[Objective], rung: int = -1) -> tuple[float, ...]:
        """What is minimised."""
        return tuple(-self.value(each.name, rung) if each.is_raised else self.value(each.name, rung) for each in of)

    def arch_spec(self) -> ArchSpec:
        """The architecture, decoded."""
        return self._decoded

    @cached_property
    def _decoded(self) -> ArchSpec:
        return decode(ArchSpec, self.arch)


def budget_of(record: TrialRecord) -> float:
    """What its training was to spend: FLOPs, or tokens where training goes by them."""
    return float(record.training.get("flops") or record.training.get("tokens") or 0.0)


def identity_of(
    arch_id: str, seed: int, training: TrainingConfig, rungs: Sequence[float], data: str, *, decayed: bool = False
) -> str:
    """`TrialSpec.identity`."""
    facts = [arch_id, seed, sorted(encode(training).items()), list(rungs), data, *(["decayed"] if decayed else [])]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
