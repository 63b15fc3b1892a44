"""Prepared data of a task: arrays written once for a study, memory-mapped by every trial; and how a result is told.

A batch is a function of (seed, step) alone, so a resumed trial sees what it would have seen.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from searchspace.disk import new_folder, open_regular, read_json, write_file
from searchspace.errors import SpecError
from searchspace.plain import decode, expect_mapping, key
from searchspace.tables import Table, complete, table
from studies.data.codec import TOKENIZER, TextForm
from studies.data.settings import DataConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

FACTS = "corpus.json"
PARTS = ("train.bin", "val.bin")
DatasetType = TypeVar("DatasetType", bound="Dataset")
# Corpus.json takes kilobytes; a digest reads 256 MiB at most.
_FACTS_BYTES, _DIGESTED, _BLOCKS = 1 << 20, 1 << 16, 1 << 12


@complete
@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a task measures on held-out data."""

    name: str
    label: str
    """Short, of a column and behind a value: ``bits/byte``."""
    words: str
    """Of an axis: what it is, with its unit."""
    better: Literal["lower", "higher"]


@complete
@dataclass(frozen=True, slots=True)
class AddedMetric(Metric):
    """A plugin's metric of a task that is there already."""

    task: str
    measure: Callable[[Tensor, Tensor], Tensor]
    """(logits (B, L, V), targets (B, L), -100 left out) -> one number, the mean over the targets."""


ADDED_METRICS: Table[AddedMetric] = table("a metric", (), places="metric", of=AddedMetric)


def added_metrics(task: str) -> list[AddedMetric]:
    """What plugins measure on a task."""
    return [row for row in ADDED_METRICS.values() if row.task == task]


@dataclass(frozen=True, slots=True)
class Headline:
    """How people are told a score, of which less is better: as the task's first metric, ``scale`` times the score."""

    metric: Metric
    scale: float

    @property
    def label(self) -> str:
        return self.metric.label

    def value(self, score: float) -> float:
        """The metric; also of a difference of scores."""
        return self.scale * score

    def spread(self, score: float) -> float:
        """The metric's, of a score's."""
        return abs(self.scale) * score

    def text(self, score: float) -> str:
        """With its label."""
        return f"{self.value(score):.3f} {self.label}"

    def change(self, score: float, base: float) -> str:
        """The difference of the values as they are shown."""
        return f"{round(self.value(score), 3) - round(self.value(base), 3):+.3f}"

    def verdict(self, score: float, base: float) -> str:
        """How far ``score`` is from ``base``, in words."""
        gap = abs(round(self.value(score), 3) - round(self.value(base), 3))
        return f"{gap:.3f} {self.label} {'better' if score < base else 'worse'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """What prepared data are; kept beside their arrays as ``corpus.json``."""

    kind: str = key("Of the source that they come from.")
    task: str = key("What is learned from them.", default="text_lm")
    vocab_size: int = key("Largest token id + 1, or more.", low=1, high=1 << 24)
    bytes_per_token: float = key("Of text, on average.", default=1.0, low=1e-3, high=1e6)
    dtype: Literal["uint8", "uint16", "uint32"] = key("Of the arrays.")
    train_tokens: int = key("Elements of train.bin; of pairs, inputs and answers.", low=0, high=1 << 48)
    val_tokens: int = key("Elements of val.bin.", low=0, high=1 << 48)
    text: TextForm = key("What the tokens stand for.", default="none")
    says_bytes: bool = key(
        "Whether bytes_per_token is known; if not it is 1, and bits per byte are bits per token.", default=True
    )
    positions: int = key("Of one example; 0: as many as the architecture takes.", default=0, low=0, high=1 << 24)
    levels: tuple[int, ...] = key("Of difficulty: that of training first, the hardest last.", default=())
    settings: Mapping[str, Any] = key(
        "That they were made with, where their task makes more of them.", default=dict, decoder=expect_mapping
    )
    source: str = key("What they were made from, for records.")
    digest: str = key("Of the settings they were made with.", default="")
    content: str = key("Of the arrays.", default="")
    notes: tuple[str, ...] = key("What whoever trains on them should know.", default=())


def read_facts(folder: Path) -> DataFacts:
    """The ``corpus.json`` of a folder. Raises `SpecError`."""
    file = folder / FACTS
    try:
        return decode(DataFacts, read_json(file, _FACTS_BYTES))
    except SpecError as error:
        error.file = error.file or str(file)
        raise


@dataclass(frozen=True, slots=True)
class Examination:
    """How a finished model does on examples that it was neither trained nor chosen on."""

    metrics: Mapping[str, float]
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    """By how hard the examples are: how hard, and a metric; or several, one for each number of iterations."""


class Dataset:
    """Training and held-out examples of a task, in a prepared folder.

    Raises:
        SpecError: if something is missing, or its size is not what ``corpus.json`` says.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    """The first is the headline."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self.train = self._map("train", self.facts.train_tokens)
        self.val = self._map("val", self.facts.val_tokens)

    def _map(self, part: str, tokens: int) -> NDArray[Any]:
        import numpy as np

        file = self.folder / f"{part}.bin"
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != (expected := tokens * np.dtype(self.facts.dtype).itemsize):
                what = f"has {size:,} bytes, {FACTS} says {expected:,}: it was cut or changed since it was prepared"
                raise SpecError("", what, "restore it, or begin anew in another folder", file=str(file))
            return np.memmap(opened, dtype=self.facts.dtype, mode="r")

    def check_content(self) -> None:
        """Raise `SpecError` if the arrays are not those that were prepared."""
        if content_digest(self.folder) != self.facts.content:
            what = "is not the data that was prepared here: its digest has changed"
            raise SpecError(
                "data", what, "restore train.bin and val.bin, or begin anew in another folder", str(self.folder)
            )

    @property
    def headline(self) -> Headline:
        """How a score is told."""
        raise NotImplementedError

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, each (B, L) of int64; a target of -100 is left out."""
        raise NotImplementedError

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same held-out examples every time, at least one, in batches of one size."""
        raise NotImplementedError

    def loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """What training lowers, mean of a batch."""
        raise NotImplementedError

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        """Means of a batch by name; `result` makes metrics of their means over batches."""
        raise NotImplementedError

    def measure_all(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        """The same, and what plugins measure. Raises `SpecError` for a plugin's that is no number."""
        import torch

        measured = self.measure(logits_BLV, targets_BL)
        for row in added_metrics(self.facts.task):
            value = torch.as_tensor(row.measure(logits_BLV, targets_BL), dtype=torch.float32)
            if value.dim() or not value.isfinite():
                what = f"gives {value.item() if not value.dim() else f'a tensor of shape {tuple(value.shape)}'}"
                raise SpecError(f"metric {row.name}", what, "give one finite number, the mean over the batch")
            measured[row.name] = value
        return measured

    def measure_model(self, model: Any, positions: int, tried: Mapping[int, Any]) -> dict[str, float]:
        """Metrics that ask the model more than the held-out examples.

        Args:
            model: in evaluation mode.
            positions: about so many of each kind.
            tried: the model by how many iterations its loops run, as its file says (`IterationsSpec.test`).
        """
        return {}

    def result(self, means: Mapping[str, float]) -> dict[str, float]:
        """Every metric, from means over batches."""
        return dict(means)

    def score(self, metrics: Mapping[str, float]) -> float:
        """What is ranked, of which less is better: the headline, by its direction and scale."""
        return metrics[self.headline.metric.name] / self.headline.scale

    def show(self, model: Any, seed: int = 0) -> tuple[str, str] | None:
        """What a finished model does: a title, and a text of some lines. The model is in evaluation mode."""
        return None


def prepare_once(
    kind: type[DatasetType], config: DataConfig, folder: Path, write: Callable[[Path], DataFacts]
) -> DatasetType:
    """Data under ``folder``: those that are there, or those that ``write`` makes; from then on they are the data.

    Args:
        kind: of data.
        config: what they are made of.
        folder: where to.
        write: writes ``train.bin`` and ``val.bin`` into a folder, the same every time, and says what they are.

    Raises:
        SpecError: if the folder holds other data, or something else.
    """
    digest = hashlib.sha256(json.dumps(config.settings()).encode()).hexdigest()
    if (folder / FACTS).is_file():
        known = kind(folder)
        if known.facts.digest != digest:
            raise SpecError("data", "differs from the data prepared here", "use another folder", file=str(folder))
        known.check_content()
        return known
    with new_folder(folder, lambda _: None, "prepared data") as work:
        facts = write(work)
        facts = replace(facts, digest=digest, content=content_digest(work))
        write_file(work / FACTS, json.dumps(asdict(facts), indent=2))
    return kind(folder)


def content_digest(folder: Path) -> str:
    """Of the arrays and the tokenizer; of large files, evenly spread blocks."""
    digest = hashlib.sha256()
    for name in (*PARTS, TOKENIZER):
        if name == TOKENIZER and not (folder / name).exists():
            continue
        with open_regular(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {size}\n".encode())
            for start in _spread(size):
                file.seek(start)
                digest.update(file.read(_DIGESTED))
    return digest.hexdigest()


def _spread(size: int) -> Iterator[int]:
    """Where blocks begin: one after another up to 256 MiB, then as many, the first and the last among them."""
    blocks = -(-size // _DIGESTED)
    if blocks <= _BLOCKS:
        yield from range(0, size, _DIGESTED)
    else:
        yield from ((size - _DIGESTED) * i // (_BLOCKS - 1) for i in range(_BLOCKS))
