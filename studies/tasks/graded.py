"""Tasks with levels of difficulty: trained on easy examples, tried on harder ones, which are made as they are needed.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from studies.data.dataset import DataFacts, Examination, Metric
from studies.tasks.pairs import Pairs, without_mistake

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

HARDER = (
    Metric("hard_accuracy", "hard", "share of the hardest examples without a mistake", better="higher"),
    Metric(
        "extrapolation",
        "harder",
        "share without a mistake, mean over levels beyond training and numbers of iterations",
        better="higher",
    ),
)
"""Metrics of every task with levels: hard_accuracy with the most iterations that the model is tried in."""
GradedType = TypeVar("GradedType", bound="Graded")
_HARD_SEED = 2
"""Training and held-out examples have 0 and 1."""
_LEAST, _MOST = 16, 500
_POSITIONS = 1 << 14  # of a batch of hard examples


class Graded(Pairs):
    """Pairs whose facts name levels (`DataFacts.levels`), that of training first, the hardest last.

    A model is right about an example if it is right about every answer in it.
    """

    @classmethod
    def of(cls: type[GradedType], facts: DataFacts) -> GradedType:
        """Of facts alone, with nothing prepared: its levels can be made all the same."""
        data = cls.__new__(cls)
        data.facts = facts
        return data

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        """Rows (count, 2 L) of a level: inputs, then answers; the same every time."""
        raise NotImplementedError

    def name(self, level: int) -> str:
        """Of a level, for people."""
        return str(level)

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        """One example as text, with what the model says of it."""
        raise NotImplementedError

    def measure_model(self, model: Any, positions: int, tried: Mapping[int, Any]) -> dict[str, float]:
        """On levels beyond that of training: of the hardest, and the mean over levels and numbers of iterations."""
        models, levels = list(tried.values()) or [model], self.facts.levels[1:] or self.facts.levels
        found = [[self.accuracy(each, level, positions) for level in levels] for each in models]
        mean = sum(map(sum, found)) / sum(map(len, found))
        return {"hard_accuracy": found[-1][-1], "extrapolation": mean}

    def accuracy(self, model: Any, level: int, positions: int) -> float:
        """Share of examples of a level, about so many positions of them, that the model is right about."""
        right = [without_mistake(said, targets) for _, said, targets in self.answers(model, level, positions)]
        return float(sum(int(each.sum()) for each in right) / sum(map(len, right)))

    def answers(self, model: Any, level: int, positions: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, what the model says, and what is right, batch by batch, on the CPU."""
        import torch

        found, device = [], next(model.parameters()).device
        for inputs_BL, targets_BL in self.tried(level, positions):
            with torch.no_grad():
                found.append((inputs_BL, model(inputs_BL.to(device)).argmax(dim=-1).cpu(), targets_BL))
        return found

    def tried(self, level: int, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of a level, about so many positions of them, in batches."""
        length = self.make(level, 1, _HARD_SEED).shape[1] // 2
        rows = self.make(level, max(_LEAST, min(_MOST, positions // length)), _HARD_SEED)
        size = max(1, _POSITIONS // length)
        yield from (self.pairs(rows[first : first + size]) for first in range(0, len(rows), size))

    def show(self, model: Any, seed: int = 0) -> tuple[str, str]:
        """One example that the model is right about, the hardest such, and one that it fails, the easiest."""
        solved = failed = ""
        for level in self.facts.levels:
            for inputs_BL, said_BL, targets_BL in self.answers(model, level, 0):
                for i, ok in enumerate(without_mistake(said_BL, targets_BL).tolist()):
                    picture = self.draw(inputs_BL[i], said_BL[i], targets_BL[i])
                    drawn = f"level {self.name(level)}, {'solved' if ok else 'failed'}:\n{picture}"
                    solved, failed = (drawn, failed) if ok else (solved, failed or drawn)
        return "what it does, x where it is wrong:", "\n\n".join(text for text in (solved, failed) if text)

    def examine(self, model: Any, positions: int, tried: Mapping[int, Any]) -> Examination:
        """By level, and by how many iterations the model runs where it is tried in several numbers."""
        models = {"solved": model, **{f"{count} iterations": each for count, each in tried.items()}}
        found = {
            self.name(level): [self.accuracy(each, level, positions) for each in models.values()]
            for level in self.facts.levels
        }
        accuracies = [*found.values()]
        metrics = {"accuracy": accuracies[0][0], "hard_accuracy": accuracies[-1][-1]}
        rows: tuple[tuple[str | float, ...], ...] = tuple((name, *row) for name, row in found.items())
        return Examination(metrics, "By difficulty", ("level", *models), rows)
