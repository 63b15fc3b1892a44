"""Data of one's own, handed over from Python (`studies.search`): an object with a few methods, in place of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from searchspace.disk import write_file
from searchspace.errors import SpecError
from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import PARTS, DataFacts, Dataset, Headline, Metric, prepare_once, read_facts
from studies.data.settings import DataConfig
from studies.tasks.pairs import LEFT_OUT

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Data(Protocol):
    """What `studies.search` takes as ``data``.

    A batch must be a function of its arguments alone, so that a trial that is resumed, and every candidate, sees the
    same. It may have further methods: ``loss(logits, targets)``, what training lowers, a mean over the batch, by
    default the cross-entropy of the targets that are not -100; ``measure(logits, targets)``, a mapping of further
    metrics to means over the batch, which are averaged over batches; and an attribute ``digest``, a text that changes
    when the data do, by default of some of their batches.

    Shape legend: B batch, L positions, V vocabulary.
    """

    vocab_size: int
    """Inputs are whole numbers from 0 to below it."""

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, each (``batch_size``, ``seq_len``) of int64."""
        ...

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out examples of about ``tokens`` positions, the same every time, in batches of one size, as above."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomData(DataConfig):
    """An object of one's own, handed to `studies.search`; the command line can't start such a study."""

    kind: Literal["custom"] = key("Source: an object handed over from Python.", default="custom")
    name: str = key("What it is, for records.", default="none")
    vocab_size: int = key("Of its tokens; 1: any.", default=1, low=1, high=1 << 24)
    version: str = key("Its digest, where it has one.", default="")


def describe_data(data: Data, seq_len: int) -> CustomData:
    """What is recorded of an object, some of its batches looked at. Raises `SpecError` if it is not as it should be."""
    if isinstance(data, type):
        raise SpecError("data", f"is the class {data.__name__}", f"give an object: {data.__name__}()")
    if not isinstance(data, Data):
        lacks = [name for name in ("vocab_size", "batch", "eval_batches") if not hasattr(data, name)]
        raise SpecError("data", f"{type(data).__name__} lacks {', '.join(lacks)}", "see docs/python.md")
    size = data.vocab_size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 1 << 24:
        raise SpecError("data.vocab_size", f"is {size!r}, no number of tokens", "give a whole number, 1 or more")
    kind, version, looked_at = type(data), getattr(data, "digest", None), _digest_of(data, size, seq_len)
    if version is None:
        version = looked_at
    elif not isinstance(version, str):
        raise SpecError("data.digest", f"is {type(version).__name__}", "give a text, as an attribute")
    return CustomData(name=f"{kind.__module__}.{kind.__qualname__}", vocab_size=size, version=version)


def _digest_of(data: Data, vocab_size: int, seq_len: int) -> str:
    digest = hashlib.sha256()
    pairs = [data.batch(0, 0, 2, seq_len), data.batch(0, 1, 2, seq_len), *islice(data.eval_batches(64, 2, seq_len), 2)]
    for pair in pairs:
        inputs_BL, targets_BL = _checked_pair("data", pair, vocab_size, 2, seq_len)
        wrong_BL = (targets_BL != LEFT_OUT) & ((targets_BL < 0) | (targets_BL >= vocab_size))
        if wrong_BL.any() and not hasattr(data, "loss"):
            what = f"gives the target {int(targets_BL[wrong_BL][0])}"
            raise SpecError(
                "data", what, f"give tokens from 0 to {vocab_size - 1}, and {LEFT_OUT} for what is left out"
            )
        for part in (inputs_BL, targets_BL):
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked_pair(where: str, pair: Any, vocab_size: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets. Raises `SpecError` if they are not what a model takes."""
    import torch

    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, torch.Tensor) for x in pair)):
        parts = f" of {type(pair[0]).__name__}" if isinstance(pair, tuple | list) and pair else ""
        raise SpecError(where, f"gives {type(pair).__name__}{parts}", "give a pair of tensors: inputs and targets")
    inputs_BL, targets_BL = pair
    for name, part in (("inputs", inputs_BL), ("targets", targets_BL)):
        if part.dtype != torch.int64 or part.shape != (batch_size, seq_len):
            what = f"gives {name} of shape {tuple(part.shape)} and {str(part.dtype).removeprefix('torch.')}"
            raise SpecError(where, what, f"give {(batch_size, seq_len)}, batch and positions, of int64")
    low, high = int(inputs_BL.min()), int(inputs_BL.max())
    if low < 0 or high >= vocab_size:
        raise SpecError(where, f"gives inputs from {low} to {high}", f"give tokens from 0 to {vocab_size - 1}")
    return inputs_BL, targets_BL


class CustomDataset(Dataset):
    """What a study keeps of such data; `bound_to` them it trains."""

    metrics = table("a metric", (Metric("loss", "loss", "held-out loss", better="lower"),))

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self._data: Any = None

    def bound_to(self, data: Data) -> CustomDataset:
        """The same, of this object."""
        bound = CustomDataset(self.folder)
        bound._data = data
        return bound

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["loss"], 1.0)

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        pair = self._given().batch(seed, step, batch_size, seq_len)
        return _checked_pair("data.batch", pair, self.facts.vocab_size, batch_size, seq_len)

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = 0
        for count, pair in enumerate(self._given().eval_batches(tokens, batch_size, seq_len), start=1):  # noqa: B007
            yield _checked_pair("data.eval_batches", pair, self.facts.vocab_size, batch_size, seq_len)
        if not count:
            raise SpecError("data.eval_batches", "gives nothing", "give at least one batch")

    def loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        if hasattr(self._given(), "loss"):
            given: Tensor = self._given().loss(logits_BLV, targets_BL)
            if not hasattr(given, "backward") or given.dim():
                what = f"gives {type(given).__name__}" + (
                    f" of shape {tuple(given.shape)}" if hasattr(given, "dim") else ""
                )
                raise SpecError("data.loss", what, "give a tensor with one number, the mean over the batch")
            return given
        from torch.nn import functional

        logits, targets = logits_BLV.flatten(0, 1).float(), targets_BL.flatten()
        summed = functional.cross_entropy(logits, targets, ignore_index=LEFT_OUT, reduction="sum")
        return summed / (targets != LEFT_OUT).sum().clamp(min=1)  # a part of a batch may have none

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        import torch

        more = self._given().measure(logits_BLV, targets_BL) if hasattr(self._given(), "measure") else {}
        if not isinstance(more, Mapping):
            raise SpecError("data.measure", f"gives {type(more).__name__}", "give a mapping of names to numbers")
        measured = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in more.items()}
        return {**measured, "loss": self.loss(logits_BLV, targets_BL)}

    def _given(self) -> Any:
        if self._data is None:
            what = f"are an object of {self.facts.source}, which a study's folder does not hold"
            raise SpecError("data", what, "call studies.search with it")
        return self._data


def facts_of_custom(config: CustomData) -> DataFacts:
    """What such data are said to be."""
    return DataFacts(
        kind="custom",
        task="custom",
        vocab_size=config.vocab_size,
        dtype="uint32",
        train_tokens=0,
        val_tokens=0,
        says_bytes=False,
        source=config.name,
    )


def prepare_custom(config: CustomData, folder: Path, base: Path = Path()) -> CustomDataset:
    """Note under ``folder`` what the data are; the object itself stays with whoever has it."""

    def write(work: Path) -> DataFacts:
        for name in PARTS:  # their digest is that of the data: it is all that is known of them
            write_file(work / name, json.dumps(config.settings()))
        return facts_of_custom(config)

    return prepare_once(CustomDataset, config, folder, write)
