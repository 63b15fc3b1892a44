"""Six small tasks that stand for what a language model must do (mechanistic architecture design, arXiv 2403.17844).

Other searches rank architectures by them, as they take minutes. Harder the longer the row. Differences from the paper:
keys of one recall are drawn evenly, and compression asks for the row at marks behind it, where the paper has a decoder
of its own.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from searchspace.errors import SpecError
from searchspace.plain import decode, key
from searchspace.tables import complete, options, table
from studies.data.dataset import DataFacts, Examination, Headline, Metric
from studies.data.settings import DataConfig
from studies.tasks.graded import HARDER, Graded
from studies.tasks.pairs import LEFT_OUT, prepare_pairs, shares_right

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

SyntheticName: TypeAlias = Literal[
    "in_context_recall", "noisy_recall", "fuzzy_recall", "memorization", "selective_copying", "compression"
]
BLANK, MARK, FIRST = 0, 1, 2
"""Tokens: nothing (also an answer that is left out), a place to answer at, and the first of the vocabulary."""
_SHOWN = 24  # tokens of a row


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticData(DataConfig):
    """Rows of a synthetic task, made as they are asked for; the same every time."""

    kind: Literal["synthetic"] = key("Source: one of six synthetic tasks.", default="synthetic")
    task: SyntheticName = key(
        "in_context_recall, noisy_recall, fuzzy_recall: the value that stood behind a key before, between noise, or of "
        "keys and values of one to three tokens. memorization: values that are the same in all rows. "
        "selective_copying: the tokens among blanks, in order. compression: the whole row.",
        default="in_context_recall",
    )
    vocabulary: int = key("Tokens; of recalls, half are keys and half values.", default=16, low=4, high=4096)
    length: int = key("Of a row to train on; seq_len is as many.", default=64, low=16, high=4096)
    rows: int = key("Of them to train on.", default=20_000, low=16, high=10_000_000)
    held_out: int = key("More of them, to evaluate on.", default=1_000, low=16, high=1_000_000)
    test_lengths: tuple[int, ...] = key("Of longer rows to try it on, the hardest last.", default=(128, 256))
    noise: float = key("noisy_recall: share of pairs behind which noise stands.", default=0.2, low=0.0, high=0.9)
    copied: int = key("selective_copying: tokens among the blanks.", default=8, low=1, high=1024)

    def __post_init__(self) -> None:
        if list(self.test_lengths) != sorted({*self.test_lengths}) or any(n <= self.length for n in self.test_lengths):
            what = f"{[*self.test_lengths]} are not lengths beyond {self.length}, in order"
            raise SpecError("data.test_lengths", what, f"give e.g. [{2 * self.length}, {4 * self.length}]")
        if self.task == "selective_copying" and 2 * self.copied > self.length:
            what = f"{self.copied} tokens and as many marks do not fit into {self.length}"
            raise SpecError("data.copied", what, f"use {self.length // 2} or less")


Row: TypeAlias = tuple[list[int], list[int]]
"""Inputs and answers, `BLANK` where nothing is asked."""


@complete
@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """One of the tasks."""

    name: str
    make: Callable[[SyntheticData, int, Generator], Row]
    """(settings, length, draw) -> a row, cut to the length by whoever asks."""


def _halves(config: SyntheticData) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keys and values."""
    import numpy as np

    half = config.vocabulary // 2
    return np.arange(FIRST, FIRST + half), np.arange(FIRST + half, FIRST + config.vocabulary)


def _recall(config: SyntheticData, length: int, draw: Generator) -> Row:
    """Keys, each before its value, which is asked for at a key that has been seen; between pairs there may be noise."""
    keys, values = _halves(config)
    noise = config.noise if config.task == "noisy_recall" else 0.0
    value_of = dict(zip(keys.tolist(), draw.choice(values, len(keys)).tolist(), strict=True))
    given: list[int] = []
    asked: list[int] = []
    seen: set[int] = set()
    while len(given) < length:
        drawn = int(draw.choice(keys))
        given += [drawn, value_of[drawn]]
        asked += [value_of[drawn] if drawn in seen else BLANK, BLANK]
        seen.add(drawn)
        if draw.random() < noise:
            given.append(int(draw.integers(FIRST + config.vocabulary, size_of(config))))
            asked.append(BLANK)
    return given, asked


def _fuzzy_recall(config: SyntheticData, length: int, draw: Generator) -> Row:
    """Keys and values of one to three tokens; no key begins another, so that each ends where it can be told."""
    keys, values = _halves(config)
    motifs: dict[tuple[int, ...], list[int]] = {}
    for _ in range(min(len(keys), length)):  # more do not fit
        drawn = tuple(draw.choice(keys, draw.integers(1, 4)).tolist())
        if not any(drawn[: len(other)] == other[: len(drawn)] for other in motifs):
            motifs[drawn] = draw.choice(values, draw.integers(1, 4)).tolist()
    known = list(motifs)
    given: list[int] = []
    asked: list[int] = []
    seen: set[tuple[int, ...]] = set()
    while len(given) < length:
        drawn = known[draw.integers(len(known))]
        value = motifs[drawn]
        given += [*drawn, *value]
        asked += [BLANK] * (len(drawn) - 1) + (value if drawn in seen else [BLANK] * len(value)) + [BLANK]
        seen.add(drawn)
    return given, asked


def _memorization(config: SyntheticData, length: int, draw: Generator) -> Row:
    """Keys, each before a mark, where its value is asked for; values are those of every row."""
    import numpy as np

    keys, values = _halves(config)
    always = np.random.Generator(np.random.Philox(key=[config.vocabulary, 0])).choice(values, len(keys))
    chosen = draw.integers(len(keys), size=(length + 1) // 2)
    given = [token for i in chosen for token in (int(keys[i]), MARK)]
    return given, [token for i in chosen for token in (BLANK, int(always[i]))]


def _selective_copying(config: SyntheticData, length: int, draw: Generator) -> Row:
    """Tokens among blanks, then as many marks."""
    room, count = length - config.copied, config.copied
    tokens = draw.integers(FIRST, FIRST + config.vocabulary, count).tolist()
    given = [BLANK] * room
    for place, token in zip(sorted(draw.choice(room, count, replace=False).tolist()), tokens, strict=True):
        given[place] = token
    return given + [MARK] * count, [BLANK] * room + tokens


def _compression(config: SyntheticData, length: int, draw: Generator) -> Row:
    """A row, then as many marks."""
    half = length // 2
    tokens = draw.integers(FIRST, FIRST + config.vocabulary, half).tolist()
    return tokens + [MARK] * (length - half), [BLANK] * half + tokens + [BLANK] * (length - 2 * half)


SYNTHETICS = table(
    "a synthetic task",
    (
        SyntheticRow("in_context_recall", _recall),
        SyntheticRow("noisy_recall", _recall),
        SyntheticRow("fuzzy_recall", _fuzzy_recall),
        SyntheticRow("memorization", _memorization),
        SyntheticRow("selective_copying", _selective_copying),
        SyntheticRow("compression", _compression),
    ),
    options(SyntheticName),
)


class Synthetic(Graded):
    """Prepared rows; the headline is the share of answers that are right."""

    nothing = BLANK

    metrics = table(
        "a metric",
        (
            Metric("right", "right", "share of held-out answers that are right", better="higher"),
            *HARDER,
            Metric("solved", "solved", "share of held-out rows without a mistake", better="higher"),
            Metric("loss", "nats/answer", "held-out loss, nats per answer", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["right"], -1.0)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        solved, right = shares_right(logits_BLV, targets_BL)
        return {"solved": solved, "right": right, "loss": self.loss(logits_BLV, targets_BL)}

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        config = decode(SyntheticData, dict(self.facts.settings))
        return make_rows(config, count, level, seed)

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        """``3>7``: at 3 it says 7, as it should; ``3>x``: it does not."""
        shown = []
        for given, said, right in zip(inputs_L.tolist(), said_L.tolist(), targets_L.tolist(), strict=True):
            sign = {BLANK: ".", MARK: "?"}.get(given, str(given - FIRST))
            shown.append(sign if right == LEFT_OUT else f"{sign}>{said - FIRST if said == right else 'x'}")
        return " ".join(shown[:_SHOWN]) + (" ... " + " ".join(shown[-_SHOWN:]) if len(shown) > _SHOWN else "")


def size_of(config: SyntheticData) -> int:
    """Tokens in all: blank, mark, the vocabulary, and noise."""
    return FIRST + config.vocabulary + max(1, config.vocabulary // 4)


def make_rows(config: SyntheticData, count: int, length: int, seed: int) -> NDArray[Any]:
    """Rows (count, 2 L) of uint16: inputs, then answers; every row asks for something."""
    import numpy as np

    draw = np.random.Generator(np.random.Philox(key=[seed, length]))
    rows = np.zeros((count, 2 * length), np.uint16)
    for row in rows:
        while not row[length:].any():
            given, asked = SYNTHETICS[config.task].make(config, length, draw)
            row[:length], row[length:] = given[:length], asked[:length]
    return rows


def prepare_synthetic(config: SyntheticData, folder: Path, base: Path = Path()) -> Synthetic:
    """Write rows under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""

    def make(part: str) -> NDArray[Any]:
        count, seed = (config.rows, 0) if part == "train" else (config.held_out, 1)
        return make_rows(config, count, config.length, seed)

    return prepare_pairs(Synthetic, config, facts_of(config), folder, make)


def examine(model: Any, config: SyntheticData, most_tokens: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh rows, by their length."""
    return Synthetic.of(facts_of(config)).examine(model, most_tokens, tried)


def facts_of(config: SyntheticData) -> DataFacts:
    """What the data of these settings are, before they are made."""
    return DataFacts(
        kind="synthetic",
        task="synthetic",
        vocab_size=size_of(config),
        dtype="uint16",
        train_tokens=2 * config.length * config.rows,
        val_tokens=2 * config.length * config.held_out,
        positions=config.length,
        levels=(config.length, *config.test_lengths),
        settings=config.settings(),
        source=f"{config.rows} rows of {config.task.replace('_', ' ')}, {config.length} tokens each",
    )
