"""A model run operation by operation, its values kept: what probes look at.

Shape legend: B batch, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from builder.code import Step, seen_at, steps_of
from builder.graph.compiler import compile_arch
from builder.graph.row import Kind
from builder.halting import longest_loop
from searchspace.arch import ArchSpec
from searchspace.nodes import LoopNode, node_inputs
from spiralformer import padding
from spiralformer.model import SpiralFormer

Around: TypeAlias = Callable[[Step], AbstractContextManager[None]]


class Runner:
    """The code of a model, step by step.

    Args:
        model: built from ``arch``.
        arch: of it.
    """

    def __init__(self, model: SpiralFormer, arch: ArchSpec) -> None:
        graph = compile_arch(arch)
        self.model, self.arch, self.causal = model, arch, graph.causal
        self.steps: list[Step] = [step for step in steps_of(graph) if step.row.gives is not Kind.LOSS]
        self.output = next(step.label for step in self.steps if step.node.name == graph.output)

    def begin(self, tokens_BL: Tensor) -> dict[str, Any]:
        """Values before the first step, by label."""
        values: dict[str, Any] = {"self": self.model, "tokens": tokens_BL}
        if not self.causal:
            levels = {level for step in self.steps for level in (step.source, step.node.level)}
            told = {seen_at(level): padding.visible(None, level.chunk, level.offset, tokens_BL) for level in levels}
            values.update(told)
        return values

    def run(self, steps: Sequence[Step], values: dict[str, Any], around: Around = lambda step: nullcontext()) -> None:
        """Add the values of these steps, each computed within ``around``."""
        for step in steps:
            with around(step):
                values[step.label] = eval(_compiled(step.call()), {}, values)

    def lean(self, tokens_BL: Tensor, wanted: Collection[str]) -> dict[str, Any]:
        """The values of these labels, of one forward; others are dropped when nothing reads them any more."""
        values = self.begin(tokens_BL)  # these stay: calls name them beside their inputs
        last = {name: i for i, step in enumerate(self.steps) for name in {*step.inputs, step.label} - values.keys()}
        with torch.no_grad():
            for i, step in enumerate(self.steps):
                self.run([step], values)
                for name in {*step.inputs, step.label} - {*wanted}:
                    if last.get(name) == i:
                        values.pop(name)
        return {name: values[name] for name in wanted}

    def states(self, loop: str) -> tuple[str, ...]:
        """The labels of a loop's states: the one it begins with, then one after each iteration."""
        node = self.arch.graph[loop]
        assert isinstance(node, LoopNode)
        named = {step.node.name: step for step in self.steps}
        begun = named.get(f"{loop}.carry") or named.get(f"{loop}.start") or self._giving(node.input, named)
        labels, level = [begun.label], begun.node.level
        for t in range(len(node.schedule)):
            ends = [
                step.label
                for step in self.steps
                if step.node.iteration == (loop, t) and step.row.gives is Kind.STREAM and level == step.node.level
            ]
            labels += ends[-1:]
        return tuple(labels)

    def _giving(self, name: str, named: Mapping[str, Step]) -> Step:
        """The step that gives what a node of the file does: a loop's last, or what an identity stands for."""
        while name not in named:
            node = self.arch.graph[name]
            if isinstance(node, LoopNode):
                label = self.states(name)[-1]
                return next(step for step in self.steps if step.label == label)
            name = next(source for _, source in node_inputs(node))
        return named[name]


@lru_cache(maxsize=4096)
def _compiled(call: str) -> CodeType:
    return compile(call, "<trace>", "eval")


@dataclass(frozen=True, slots=True)
class LoopTrace:
    """One loop's states, in the order of its iterations."""

    name: str
    states: tuple[Tensor, ...]
    """That it starts from, then after each iteration, each (B, L', D) at the loop's own level."""
    labels: tuple[str, ...]


class Trace:
    """Every value of one forward, without gradients.

    Args:
        model: in evaluation mode.
        arch: of it.
        tokens_BL: int64.
        judge: the loss of logits (B, L, V), in nats; for probes that ask what a part is worth.
        around: within which each step is computed.
    """

    def __init__(
        self,
        model: SpiralFormer,
        arch: ArchSpec,
        tokens_BL: Tensor,
        judge: Callable[[Tensor], float] | None = None,
        around: Around = lambda step: nullcontext(),
    ) -> None:
        self.runner, self.model, self.arch, self.judge = Runner(model, arch), model, arch, judge
        self.values = self.runner.begin(tokens_BL)
        with torch.no_grad():
            self.runner.run(self.runner.steps, self.values, around)

    @property
    def logits(self) -> Tensor:
        """Of all positions, (B, L, V)."""
        found: Tensor = self.values[self.runner.output]
        return found

    def loop(self, name: str = "") -> LoopTrace | None:
        """A loop by name, or that of most iterations; None if there is none."""
        if not (name := name or longest_loop(self.arch)):
            return None
        labels = self.runner.states(name)
        return LoopTrace(name, tuple(self.values[label] for label in labels), labels)

    def again(self, loop: LoopTrace, t: int, state_BLD: Tensor) -> Tensor:
        """Iteration ``t``, from 1, of a loop once more from another state; its memory and input stay as they were.

        Gradients flow from ``state_BLD``.
        """
        values = {**self.values, loop.labels[t - 1]: state_BLD}
        self.runner.run([step for step in self.runner.steps if step.node.iteration == (loop.name, t - 1)], values)
        found: Tensor = values[loop.labels[t]]
        return found
