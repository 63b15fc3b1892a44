"""A model run operation by operation, its values kept: what probes look at.

Shape legend: B batch, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from builder.graph.compiler import compile_arch
from builder.graph.row import Kind
from builder.lowering import Step, seen_at, steps_of
from searchspace.arch import ArchSpec
from searchspace.nodes import LoopNode
from spiralformer import padding
from spiralformer.model import SpiralFormer


@dataclass(frozen=True, slots=True)
class LoopTrace:
    """One loop's states, in the order of its iterations."""

    name: str
    states: tuple[Tensor, ...]
    """That it starts from, then after each iteration, each (B, L', D) at the loop's own level."""
    _labels: tuple[str, ...]


class Trace:
    """Every value of one forward, without gradients.

    Args:
        model: in evaluation mode.
        arch: of it.
        tokens_BL: int64.
    """

    def __init__(self, model: SpiralFormer, arch: ArchSpec, tokens_BL: Tensor) -> None:
        graph = compile_arch(arch)
        self.arch, self.model = arch, model
        self.steps: list[Step] = [step for step in steps_of(graph) if step.row.gives is not Kind.LOSS]
        self.values: dict[str, Any] = {"self": model, "tokens": tokens_BL}
        if not graph.causal:
            levels = {level for step in self.steps for level in (step.source, step.node.level)}
            told = {seen_at(level): padding.visible(None, level.chunk, level.offset, tokens_BL) for level in levels}
            self.values.update(told)
        with torch.no_grad():
            self._run(self.steps, self.values)
        self.output = next(step.label for step in self.steps if step.node.name == graph.output)

    @property
    def logits(self) -> Tensor:
        """Of all positions, (B, L, V)."""
        found: Tensor = self.values[self.output]
        return found

    def loop(self) -> LoopTrace | None:
        """The loop of most iterations; None if there is none."""
        loops = [(len(node.schedule), name) for name, node in self.arch.graph.items() if isinstance(node, LoopNode)]
        count, name = max(loops, default=(0, ""))
        if count < 1:
            return None
        node = self.arch.graph[name]
        assert isinstance(node, LoopNode)
        own = [step for step in self.steps if step.node.iteration[0] == name]
        labels = []
        start = next((step for step in self.steps if step.node.name == node.input), None)
        if start is not None:
            labels.append(start.label)
        level = None if start is None else start.node.level
        for t in range(count):
            ends = [
                step.label
                for step in own
                if step.node.iteration[1] == t and step.row.gives is Kind.STREAM and level in (None, step.node.level)
            ]
            labels += ends[-1:]
        return LoopTrace(name, tuple(self.values[label] for label in labels), tuple(labels))

    def again(self, loop: LoopTrace, t: int, state_BLD: Tensor) -> Tensor:
        """Iteration ``t``, from 1, of a loop once more from another state; its memory and input stay as they were.

        Gradients flow from ``state_BLD``.
        """
        values = {**self.values, loop._labels[t - 1]: state_BLD}
        own = [step for step in self.steps if step.node.iteration == (loop.name, t - 1)]
        self._run(own, values)
        found: Tensor = values[loop._labels[t]]
        return found

    def _run(self, steps: Sequence[Step], values: dict[str, Any]) -> None:
        for step in steps:
            values[step.label] = eval(_compiled(step.call()), {}, values)


@lru_cache(maxsize=4096)
def _compiled(call: str) -> CodeType:
    return compile(call, "<trace>", "eval")
