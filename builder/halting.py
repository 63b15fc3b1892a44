"""A trained model whose loop of most iterations ends where it has come to rest, and what it then costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from builder.code import Ending, steps_of
from builder.graph.compiler import compile_arch
from builder.lowering import build_view
from builder.pricing.cost import estimate, flops_of
from builder.schedules import under
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, show
from searchspace.nodes import LoopNode
from spiralformer.model import SpiralFormer


@dataclass(frozen=True, slots=True)
class Halt:
    """When a row's loop stops; see `spiralformer.halting.Halting`."""

    by: Literal["state", "logits"]
    threshold: float

    @staticmethod
    def read(text: object, key: str = "--halt") -> Halt:
        """``state=0.01`` or ``logits=5e-4``. Raises `SpecError`."""
        by, _, value = str(text).partition("=")
        try:
            threshold = float(value)
        except ValueError:
            threshold = 0.0
        if by not in ("state", "logits") or not 0 < threshold < 1e9:
            raise SpecError(key, f"can't read {show(text)}", "write state=0.01, or logits=5e-4")
        return Halt("state" if by == "state" else "logits", threshold)

    def __str__(self) -> str:
        return f"{self.by}={self.threshold:g}"


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
    """Where the loop of most iterations ends. Raises `SpecError` if there is none."""
    if not (loop := longest_loop(arch)):
        raise SpecError("--halt", "there is no loop that could stop", "leave it out")
    node = arch.graph[loop]
    assert isinstance(node, LoopNode)
    return Ending(loop, halt.by, halt.threshold, node.topology.row.stages(node.topology.settings))


def told(arch: ArchSpec, halt: Halt, used: Sequence[int]) -> dict[str, float]:
    """Iterations of rows, and forward FLOPs per token, in the mean and of the row that took most.

    By logits, what follows the loop runs after each iteration, and counts.

    Args:
        arch: of the model.
        halt: when it stops.
        used: iterations of each row.
    """
    loop = longest_loop(arch)
    node = arch.graph[loop]
    assert isinstance(node, LoopNode)
    turn = node.turn
    one, two = (estimate(compile_arch(under(arch, {loop: n * turn}))).flops_per_token for n in (1, 2))
    each, again, ending = (two - one) / turn, 0.0, ending_of(arch, halt)
    if halt.by == "logits":
        graph = compile_arch(arch)
        after = ending.parts(steps_of(graph)).after
        again = flops_of(graph, {step.node.name for step in after}) / graph.seq_len

    def total(iterations: float) -> float:
        return one + (iterations - turn) * each + max(0.0, iterations / ending.every - 1) * again

    mean, most = sum(used) / max(1, len(used)), max(used, default=0)
    return {
        "iterations": mean,
        "most_iterations": float(most),
        "flops_per_token": total(mean),
        "worst_flops_per_token": total(most),
    }
