"""A trained model whose loop of most iterations ends where it has come to rest, and what it then costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Literal

from builder.code import Ending, Step, steps_of
from builder.graph.compiler import compile_arch
from builder.lowering import build_view
from builder.pricing.cost import flops_of
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, show
from searchspace.nodes import LoopNode
from spiralformer.model import SpiralFormer

_FORMS = "write state=0.01, logits=5e-4, or none"


@dataclass(frozen=True, slots=True)
class Halt:
    """When a row's loop stops, by what `spiralformer.halting.Halting` measures; `read` takes it as text.

    Raises:
        SpecError: for another rule, or a threshold that is not above zero.
    """

    by: Literal["state", "logits", "none"]
    """none: as its schedule says, though a bundle may say otherwise."""
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.by != "none" and not _measures(self.by, self.threshold):
            raise SpecError("halt", f"{show(self.by)} at {show(self.threshold)} tells nothing", _FORMS)

    @staticmethod
    def read(text: object, key: str = "--halt") -> Halt:
        """``state=0.01``, ``logits=5e-4`` or ``none``. Raises `SpecError`."""
        if text == "none":
            return Halt("none")
        by, _, value = str(text).partition("=")
        try:
            threshold = float(value)
        except ValueError:
            threshold = 0.0
        if not _measures(by, threshold):
            raise SpecError(key, f"can't read {show(text)}", _FORMS)
        return Halt("state" if by == "state" else "logits", threshold)

    def __str__(self) -> str:
        return "none" if self.by == "none" else f"{self.by}={self.threshold:g}"


def _measures(by: str, threshold: object) -> bool:
    return by in ("state", "logits") and isinstance(threshold, int | float) and 0 < threshold < 1e9


def longest_loop(arch: ArchSpec) -> str:
    """The loop of most iterations; empty if there is none."""
    loops = [(len(node.schedule), name) for name, node in arch.graph.items() if isinstance(node, LoopNode)]
    return max(loops, default=(0, ""))[1]


def halting(model: SpiralFormer, arch: ArchSpec, halt: Halt) -> SpiralFormer:
    """A model that shares its parameters with one that was trained, and ends its loop row by row.

    It can't decode: a token that is added may change where its row rests.

    Args:
        model: trained.
        arch: of it; as many iterations as its schedule has are run at most.
        halt: when to stop.

    Raises:
        SpecError: if it has no loop, or something else reads from within the loop.
    """
    graph = compile_arch(arch)
    return build_view(graph, model, graph, ending=ending_of(arch, halt))


def ending_of(arch: ArchSpec, halt: Halt) -> Ending:
    """Where the loop of most iterations may end: after those at its finest level, that are the last of a step.

    What a coarse iteration adds is small, whatever is still to come.

    Raises:
        SpecError: if there is no loop, or nowhere to end before it does anyway.
    """
    if not (loop := longest_loop(arch)):
        raise SpecError("--halt", "there is no loop that could stop", "leave it out")
    node = arch.graph[loop]
    assert isinstance(node, LoopNode)
    chunks, stages = [arch.levels[use.level].chunk for use in node.schedule], node.topology.row.stages
    every, most = stages(node.topology.settings), len(chunks)
    ends = [t for t in range(every, most, every) if chunks[t - 1] == min(chunks)]
    if not ends:
        what = f"loop {loop} could only stop at its end: it stops after iterations at its finest level"
        raise SpecError("--halt", what, f"let it run longer: --schedule {loop}={4 * node.turn}; or give --halt none")
    return Ending(loop, halt.by, halt.threshold, (*ends, most))


def told(arch: ArchSpec, halt: Halt, used: Sequence[int]) -> dict[str, float]:
    """Iterations of rows, and forward FLOPs per token, in the mean and of the row that took most.

    By logits, what follows the loop runs each time that it may end, and counts.

    Args:
        arch: of the model.
        halt: when it stops.
        used: iterations of each row.
    """
    graph, ending = compile_arch(arch), ending_of(arch, halt)
    parts = ending.parts(steps_of(graph))

    def flops(steps: Sequence[Step]) -> float:
        return flops_of(graph, {step.node.name for step in steps}) / graph.seq_len

    rounds, after = [*accumulate(map(flops, parts.rounds))], flops(parts.after)
    ran = {end: i for i, end in enumerate(ending.ends)}
    cost = {
        count: flops(parts.before) + rounds[ran[count]] + after * (1 + ran[count] * (halt.by == "logits"))
        for count in {*used}
    }
    return {
        "iterations": mean(used),
        "most_iterations": float(max(used)),
        "flops_per_token": mean(cost[count] for count in used),
        "worst_flops_per_token": max(cost.values()),
    }
