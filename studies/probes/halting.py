"""A loop that stops where it has come to rest, row by row: by its state, or by its logits (arXiv 2502.05171).

Shape legend: B batch, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate, flops_of
from builder.schedules import under
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, show
from searchspace.nodes import LoopNode
from spiralformer.model import SpiralFormer
from studies.probes.trace import Runner


@dataclass(frozen=True, slots=True)
class Halt:
    """When a row's loop stops.

    By state: its relative change in norm, over all positions, is below ``threshold``. By logits: the Kullback-Leibler
    divergence between two iterations' predictions is, mean over positions, in nats (arXiv 2502.05171).
    """

    by: Literal["state", "logits"]
    threshold: float

    @staticmethod
    def read(text: str) -> Halt:
        """``state=0.01`` or ``logits=5e-4``. Raises `SpecError`."""
        by, _, value = text.partition("=")
        try:
            threshold = float(value)
        except ValueError:
            threshold = 0.0
        if by not in ("state", "logits") or not 0 < threshold < 1e9:
            raise SpecError("--halt", f"can't read {show(text)}", "write state=0.01, or logits=5e-4")
        return Halt("state" if by == "state" else "logits", threshold)


@dataclass
class Used:
    """How many iterations rows took, in all that was run."""

    counts: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.counts) / max(1, len(self.counts))

    @property
    def most(self) -> int:
        return max(self.counts, default=0)


class HaltingModel(nn.Module):
    """A model whose loop of most iterations stops, row by row, where it has come to rest.

    Args:
        model: trained, in evaluation mode; its iterations share their weights (``per: level`` or ``loop``).
        arch: of it; as many iterations as its schedule has are run at most.
        halt: when to stop.

    Shape:
        tokens (B, L) -> logits (B, L, V).

    Raises:
        SpecError: if it has no loop.
    """

    def __init__(self, model: SpiralFormer, arch: ArchSpec, halt: Halt) -> None:
        super().__init__()
        self._runner = Runner(model, arch)
        if not (loop := self._runner.longest_loop()):
            raise SpecError("--halt", "there is no loop that could stop", "leave it out")
        self.model, self.arch, self.loop, self.halt, self.used = model, arch, loop, halt, Used()
        self._labels = self._runner.states(loop)
        self.most = len(self._labels) - 1
        own = {step.label for step in self._runner.steps if step.node.iteration[0] == self.loop}
        first = min(i for i, step in enumerate(self._runner.steps) if step.label in own)
        self._before = self._runner.steps[:first]
        self._after = [step for step in self._runner.steps[first:] if step.label not in own]
        self._iterations = [
            [step for step in self._runner.steps if step.node.iteration == (self.loop, t)] for t in range(self.most)
        ]

    @torch.no_grad()
    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits, those of each row as of its last iteration."""
        runner, values = self._runner, self._runner.begin(tokens_BL)
        runner.run(self._before, values)
        batch = len(tokens_BL)
        used = [self.most] * batch
        done_B = torch.zeros(batch, dtype=torch.bool, device=tokens_BL.device)
        state: Tensor = values[self._labels[0]]
        logits = before = None
        for t in range(self.most):
            runner.run(self._iterations[t], values)
            new: Tensor = torch.where(done_B[:, None, None], state, values[self._labels[t + 1]])
            values[self._labels[t + 1]] = new
            if self.halt.by == "logits":
                logits = self._finish(values, new)
                rests_B = torch.zeros_like(done_B)
                if before is not None:
                    rests_B = _divergence(logits, before) < self.halt.threshold
                before = logits
            else:
                change_B = (new - state).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1).clamp_min(1e-30)
                rests_B = change_B < self.halt.threshold
            for row in (rests_B & ~done_B).nonzero().flatten().tolist():
                used[row] = t + 1
            done_B, state = done_B | rests_B, new
            if bool(done_B.all()):
                break
        self.used.counts += used
        return self._finish(values, state) if logits is None else logits

    def _finish(self, values: dict[str, Any], state_BLD: Tensor) -> Tensor:
        """What follows the loop, from a state."""
        ending = {**values, self._labels[-1]: state_BLD}
        self._runner.run(self._after, ending)
        found: Tensor = ending[self._runner.output]
        return found

    @property
    def told(self) -> dict[str, float]:
        """Iterations and FLOPs of what has been run, for people."""
        mean, most = self.flops_per_token()
        return {
            "iterations": self.used.mean,
            "most_iterations": float(self.used.most),
            "flops_per_token": mean,
            "worst_flops_per_token": most,
        }

    def flops_per_token(self) -> tuple[float, float]:
        """Forward FLOPs per token of the mean row so far, and of the one that ran most.

        By logits, what follows the loop runs after each iteration, and counts.
        """
        node = self.arch.graph[self.loop]
        assert isinstance(node, LoopNode)
        turn = node.turn
        one, two = (estimate(compile_arch(under(self.arch, {self.loop: n * turn}))).flops_per_token for n in (1, 2))
        each, again = (two - one) / turn, 0.0
        if self.halt.by == "logits":
            graph = compile_arch(self.arch)
            again = flops_of(graph, {step.node.name for step in self._after}) / graph.seq_len

        def total(iterations: float) -> float:
            return one + (iterations - turn) * each + max(0.0, iterations - 1) * again

        return total(self.used.mean), total(self.used.most)


def _divergence(logits_BLV: Tensor, before_BLV: Tensor) -> Tensor:
    """KL(now || before) of each row, mean over positions, in nats."""
    now, then = logits_BLV.float().log_softmax(-1), before_BLV.float().log_softmax(-1)
    return (now.exp() * (now - then)).sum(-1).mean(-1)
