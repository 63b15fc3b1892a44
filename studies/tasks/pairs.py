"""Tasks whose examples are rows of one length: inputs, and an answer for each position.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from searchspace.disk import write_file
from studies.data.dataset import DataFacts, Dataset, prepare_once
from studies.data.settings import DataConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LEFT_OUT = -100
"""A target that no loss and no metric counts."""
PairsType = TypeVar("PairsType", bound="Pairs")


class Pairs(Dataset):
    """Rows of ``train.bin`` and ``val.bin`` hold L inputs, then L answers; L is ``facts.positions``."""

    nothing: int | None = None
    """An answer that is left out of loss and metrics."""

    def rows(self, part: NDArray[Any]) -> NDArray[Any]:
        """Examples of one of the arrays, (N, 2 L)."""
        return part.reshape(-1, 2 * self.facts.positions)

    def pairs(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, L) of int64."""
        import numpy as np
        import torch

        inputs_BL, answers_BL = torch.from_numpy(rows.astype(np.int64)).chunk(2, dim=1)
        return inputs_BL, answers_BL if self.nothing is None else answers_BL.masked_fill(
            answers_BL == self.nothing, LEFT_OUT
        )

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        import numpy as np

        rows = self.rows(self.train)
        draw = np.random.Generator(np.random.Philox(key=[seed, step]))
        return self.pairs(rows[draw.integers(0, len(rows), size=batch_size)])

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.rows(self.val)
        count = max(1, min(len(rows), tokens // seq_len))
        batch_size = min(batch_size, count)
        for first in range(0, count - count % batch_size, batch_size):
            yield self.pairs(rows[first : first + batch_size])

    def loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), ignore_index=LEFT_OUT)


def without_mistake(said_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """Which rows are right in every answer, (B,)."""
    return ((said_BL == targets_BL) | (targets_BL == LEFT_OUT)).all(dim=1)


def shares_right(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Share of rows without a mistake, and of answers that are right."""
    asked_BL, said_BL = targets_BL != LEFT_OUT, logits_BLV.argmax(dim=-1)
    right = ((said_BL == targets_BL) & asked_BL).sum() / asked_BL.sum()
    return without_mistake(said_BL, targets_BL).float().mean(), right


def prepare_pairs(
    kind: type[PairsType],
    config: DataConfig,
    facts: DataFacts,
    folder: Path,
    make: Callable[[str], NDArray[Any]],
) -> PairsType:
    """Write the rows of each part under ``folder``, once.

    Args:
        kind: of data.
        config: of the study.
        facts: what the data are.
        folder: where to.
        make: the rows (N, 2 L) of ``train`` and of ``val``, the same every time.

    Raises:
        SpecError: if the folder holds other data, or something else.
    """

    def write(work: Path) -> DataFacts:
        for part in ("train", "val"):
            write_file(work / f"{part}.bin", make(part).astype(facts.dtype).tobytes())
        return facts

    return prepare_once(kind, config, folder, write)
