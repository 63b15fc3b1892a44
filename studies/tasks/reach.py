"""Which cells of a maze can be reached: a small task that needs no text and sees its whole input.

An example is a square grid of walls, free cells and one start, row by row; for every free cell the model says whether
a way leads there from the start. How far the way is bounds how many steps it takes to find, so it is a task for loops.

Shape legend: B batch, N side of the grid, L = N x N cells, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import DataFacts, Examination, Headline, Metric
from studies.data.settings import DataConfig
from studies.tasks.pairs import LEFT_OUT, Pairs, prepare_pairs, shares_right

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

WALL, FREE, START, REACHED, CUT_OFF = range(5)
_SIGNS = {WALL: "█", FREE: "·", START: "S", REACHED: "+", CUT_OFF: "·"}
_BATCH = 256  # mazes at once when examining: some MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class ReachData(DataConfig):
    """Mazes, made as they are asked for; the same every time."""

    kind: Literal["reach"] = key("Source: mazes.", default="reach")
    size: int = key("Side of a grid; seq_len is its square.", default=8, low=3, high=64)
    walls: float = key("Share of the cells that are walls.", default=0.4, low=0.05, high=0.9)
    grids: int = key("Of them to train on.", default=20_000, low=16, high=10_000_000)
    held_out: int = key("More of them, to evaluate on.", default=1_000, low=16, high=1_000_000)


class Mazes(Pairs):
    """Prepared mazes: a grid's L cells, row by row, and an answer for each that is no wall."""

    nothing = WALL

    metrics = table(
        "a metric",
        (
            Metric("solved", "solved", "share of held-out mazes without a mistake", better="higher"),
            Metric("cells", "cells right", "share of held-out free cells that are right", better="higher"),
            Metric("loss", "nats/cell", "held-out loss, nats per free cell", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["solved"], -1.0)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        solved, right = shares_right(logits_BLV, targets_BL)
        return {"solved": solved, "cells": right, "loss": self.loss(logits_BLV, targets_BL)}

    def show(self, model: Any, seed: int = 0) -> tuple[str, str]:
        import torch

        rows = self.rows(self.val)
        inputs_BL, targets_BL = self.pairs(rows[seed % len(rows) :][:1])
        with torch.no_grad():
            said_BL = model(inputs_BL.to(next(model.parameters()).device)).argmax(dim=-1).cpu()
        wrong = int(((said_BL != targets_BL) & (targets_BL != LEFT_OUT)).sum())
        title = f"a held-out maze, + where a way leads, x where the model is wrong ({wrong} cells):"
        return title, drawn(inputs_BL[0], said_BL[0], targets_BL[0])


def drawn(inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
    """A maze in text, a cell two columns wide; what is wrong is marked ``x``."""
    side = round(len(inputs_L) ** 0.5)
    cells = []
    for given, said, right in zip(inputs_L.tolist(), said_L.tolist(), targets_L.tolist(), strict=True):
        mark = _SIGNS[given] if right == LEFT_OUT or given == START else _SIGNS.get(said, "?")
        cells.append("x" if right not in (LEFT_OUT, said) else mark)
    wide = [cell * 2 if cell == _SIGNS[WALL] else f"{cell} " for cell in cells]
    return "\n".join("".join(wide[i : i + side]).rstrip() for i in range(0, len(wide), side))


def examine(model: Any, config: ReachData, most_cells: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh mazes: all of them, and by how far the farthest reachable cell is."""
    import numpy as np
    import torch

    count = max(1, most_cells // config.size**2)
    rows, steps = make_mazes(count, config.size, config.walls, seed=2)
    device = next(model.parameters()).device
    solved, right, asked = [], 0, 0
    for first in range(0, count, _BATCH):
        inputs_BL, answers_BL = torch.from_numpy(rows[first : first + _BATCH].astype(np.int64)).chunk(2, dim=1)
        targets_BL = answers_BL.masked_fill(answers_BL == WALL, LEFT_OUT)
        with torch.no_grad():
            said_BL = model(inputs_BL.to(device)).argmax(dim=-1).cpu()
        asked_BL = targets_BL != LEFT_OUT
        right_BL = (said_BL == targets_BL) & asked_BL
        solved += (right_BL == asked_BL).all(dim=1).tolist()
        right, asked = right + int(right_BL.sum()), asked + int(asked_BL.sum())
    by_steps: list[tuple[str, float]] = []
    low = 0
    while low <= steps.max():
        high = max(2 * low - 1, low)
        here = [ok for ok, far in zip(solved, steps.tolist(), strict=True) if low <= far <= high]
        if here:
            by_steps.append((str(low) if low == high else f"{low}-{high}", sum(here) / len(here)))
        low = high + 1
    metrics = {"solved": sum(solved) / count, "cells": right / max(1, asked), "mazes": float(count)}
    return Examination(metrics, "By steps to the farthest cell", ("steps", "solved"), tuple(by_steps))


def make_mazes(count: int, size: int, walls: float, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mazes and their answers.

    Returns:
        Rows (count, 2 L) of uint8, and how many steps lead to the farthest cell that can be reached, (count,).
    """
    import numpy as np

    draw = np.random.Generator(np.random.Philox(key=[seed, size]))
    grids = np.where(draw.random((count, size, size)) < walls, WALL, FREE).astype(np.uint8)
    starts = draw.integers(0, size * size, size=count)
    grids.reshape(count, -1)[np.arange(count), starts] = START
    reached, steps = grids == START, np.zeros(count, np.int64)
    while True:
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= grids != WALL
        moved = (grown != reached).any(axis=(1, 2))
        if not moved.any():
            break
        reached, steps = grown, steps + moved
    answers = np.where(grids == WALL, WALL, np.where(reached, REACHED, CUT_OFF)).astype(np.uint8)
    return np.concatenate((grids.reshape(count, -1), answers.reshape(count, -1)), axis=1), steps


def prepare_mazes(config: ReachData, folder: Path, base: Path = Path()) -> Mazes:
    """Write mazes under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""

    def make(part: str) -> NDArray[Any]:
        count, seed = (config.grids, 0) if part == "train" else (config.held_out, 1)
        return make_mazes(count, config.size, config.walls, seed)[0]

    return prepare_pairs(Mazes, config, facts_of(config), folder, make)


def facts_of(config: ReachData) -> DataFacts:
    """What the data of these settings are, before they are made."""
    cells = config.size**2
    return DataFacts(
        kind="reach",
        task="reach",
        vocab_size=CUT_OFF + 1,
        dtype="uint8",
        train_tokens=2 * cells * config.grids,
        val_tokens=2 * cells * config.held_out,
        positions=cells,
        source=f"{config.grids} mazes of {config.size} x {config.size}, {config.walls:.0%} walls",
    )
