"""Prefix sums: of every prefix of a row of bits, whether its sum is odd; harder the longer the row.

The first bit is a token of its own (2 or 3): attention takes means, so that without a beginning every place of a row of
ones would look the same.

An easy-to-hard task of the stability framework (arXiv 2604.15259, after Schwarzschild et al., arXiv 2106.04537): a loop
that carries one bit along the row solves rows of any length, with as many iterations as they are long.

Shape legend: B batch, L bits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchspace.errors import SpecError
from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import DataFacts, Examination, Headline, Metric
from studies.data.settings import DataConfig
from studies.tasks.graded import HARDER, Graded
from studies.tasks.pairs import prepare_pairs, shares_right

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


_SHOWN = 96  # bits of a row


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSumsData(DataConfig):
    """Rows of bits, made as they are asked for; the same every time."""

    kind: Literal["prefix_sums"] = key("Source: bits.", default="prefix_sums")
    bits: int = key("Of a row to train on; seq_len is as many.", default=32, low=2, high=4096)
    rows: int = key("Of them to train on.", default=20_000, low=16, high=10_000_000)
    held_out: int = key("More of them, to evaluate on.", default=1_000, low=16, high=1_000_000)
    test_bits: tuple[int, ...] = key("Of longer rows to try it on, the hardest last.", default=(64, 128, 256, 512))

    def __post_init__(self) -> None:
        if list(self.test_bits) != sorted({*self.test_bits}) or any(n <= self.bits for n in self.test_bits):
            what = f"{[*self.test_bits]} are not lengths beyond {self.bits}, in order"
            raise SpecError("data.test_bits", what, f"give e.g. [{2 * self.bits}, {4 * self.bits}]")


class PrefixSums(Graded):
    """Prepared rows of bits, and of each prefix whether its sum is odd."""

    metrics = table(
        "a metric",
        (
            Metric("solved", "solved", "share of held-out rows without a mistake", better="higher"),
            *HARDER,
            Metric("bits", "bits right", "share of held-out prefixes that are right", better="higher"),
            Metric("loss", "nats/bit", "held-out loss, nats per bit", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["solved"], -1.0)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        solved, right = shares_right(logits_BLV, targets_BL)
        return {"solved": solved, "bits": right, "loss": self.loss(logits_BLV, targets_BL)}

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        return make_rows(count, level, seed)

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        given, right = ("".join(map(str, row.tolist())) for row in (inputs_L % 2, targets_L))
        said = "".join("x" if a != b else str(a) for a, b in zip(said_L.tolist(), targets_L.tolist(), strict=True))
        shown = [f"{name} {text[:_SHOWN]}" for name, text in (("bits", given), ("sums", right), ("says", said))]
        return "\n".join(line + ("..." if len(given) > _SHOWN else "") for line in shown)


def make_rows(count: int, bits: int, seed: int) -> NDArray[Any]:
    """Rows (count, 2 L) of uint8: bits, the first plus two, and the parity of each prefix."""
    import numpy as np

    draw = np.random.Generator(np.random.Philox(key=[seed, bits]))
    given = draw.integers(0, 2, size=(count, bits), dtype=np.uint8)
    sums = np.bitwise_xor.accumulate(given, axis=1)
    given[:, 0] += 2
    return np.concatenate((given, sums), axis=1)


def prepare_prefix_sums(config: PrefixSumsData, folder: Path, base: Path = Path()) -> PrefixSums:
    """Write rows under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""

    def make(part: str) -> NDArray[Any]:
        count, seed = (config.rows, 0) if part == "train" else (config.held_out, 1)
        return make_rows(count, config.bits, seed)

    return prepare_pairs(PrefixSums, config, facts_of(config), folder, make)


def examine(model: Any, config: PrefixSumsData, most_bits: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh rows, by their length."""
    return PrefixSums.of(facts_of(config)).examine(model, most_bits, tried)


def facts_of(config: PrefixSumsData) -> DataFacts:
    """What the data of these settings are, before they are made."""
    return DataFacts(
        kind="prefix_sums",
        task="prefix_sums",
        vocab_size=4,
        dtype="uint8",
        train_tokens=2 * config.bits * config.rows,
        val_tokens=2 * config.bits * config.held_out,
        positions=config.bits,
        levels=(config.bits, *config.test_bits),
        source=f"{config.rows} rows of {config.bits} bits",
    )
