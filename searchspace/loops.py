"""What of a loop's settings fits together."""

from __future__ import annotations

from collections.abc import Sequence

from searchspace.errors import SpecError
from searchspace.nodes import IterationsSpec, LoopNode
from searchspace.topologies import TOPOLOGIES, MeshSettings

MOST_ITERATIONS = 512
"""A loop is written out: compiling stays under a second."""


def check_loop(node: LoopNode, path: str, *, core_recalls: bool, embeds: Sequence[str]) -> None:
    """Raise `SpecError` if the settings of a loop do not fit together.

    Args:
        node: the loop.
        path: its key.
        core_recalls: whether its block recalls by itself.
        embeds: the embeddings that it may read.
    """
    if not 1 <= len(node.schedule) <= MOST_ITERATIONS:
        what = f"has {len(node.schedule)} iterations"
        raise SpecError(f"{path}.schedule", what, f"give 1 to {MOST_ITERATIONS} levels")
    stages = node.topology.row.stages(node.topology.settings)
    if len(node.schedule) % stages:
        raise SpecError(
            f"{path}.schedule",
            f"has {len(node.schedule)} iterations, but its {node.topology.kind} takes {stages} a step",
            f"give a multiple of {stages}",
        )
    if node.start == "noise":
        _check_start(node, path, core_recalls=core_recalls)
    if node.iterations is not None:
        _check_iterations(node, node.iterations, path)
    if node.reads_embedding and node.embedding is None and len(embeds) != 1:
        raise SpecError(
            f"{path}.embedding", f"there are {len(embeds)} embeds to choose from", f"name one of: {', '.join(embeds)}"
        )


def _check_start(node: LoopNode, path: str, *, core_recalls: bool) -> None:
    """A loop that begins with noise must hear its input in another way."""
    if node.topology.kind in ("mesh", "runge_kutta"):
        what = f"noise has no meaning with topology {node.topology.kind}"
        raise SpecError(f"{path}.start", what, "leave it out, or take another topology")
    hears = node.recall is not None or core_recalls
    if not hears and node.topology.kind not in ("anchor", "anchor_star", "mix"):
        what = "noise leaves nothing of the input in the loop"
        raise SpecError(f"{path}.start", what, "give it a recall, or topology: anchor")


def _check_iterations(node: LoopNode, given: IterationsSpec, path: str) -> None:
    """Other numbers of iterations need weights that are no iteration's own."""
    train, own, turn = given.train or len(node.schedule), len(node.schedule), node.turn
    if train % turn or (given.sample != "fixed" and own % turn):
        what = f"{train if train % turn else own} iterations are no whole turns of {turn}"
        raise SpecError(f"{path}.iterations.train", what, f"give a multiple of {turn}")
    if not 1 <= min(given.test, default=1) <= max(given.test, default=1) <= MOST_ITERATIONS or list(
        given.test
    ) != sorted({*given.test}):
        what = f"{[*given.test]} are no numbers of iterations in order, from 1 to {MOST_ITERATIONS}"
        raise SpecError(f"{path}.iterations.test", what, f"give e.g. [{own}, {2 * own}]")
    if odd := [n for n in given.test if n % node.topology.row.stages(node.topology.settings)]:
        raise SpecError(f"{path}.iterations.test", f"{odd[0]} ends within a step of the topology", "give multiples")
    if node.varies and node.per == "iteration":
        what = "iterations that have weights of their own can't be more or fewer than the schedule's"
        raise SpecError(f"{path}.per", what, "set per: loop, or per: level")
    if given.segments > 1 and not node.topology.row.carries:
        what = f"the state of topology {node.topology.kind} is more than a stream that a segment could begin with"
        kinds = [row.name for row in TOPOLOGIES.values() if row.carries]
        raise SpecError(f"{path}.iterations.segments", what, f"leave it out, or take one of: {', '.join(kinds)}")
    if node.varies and node.topology.kind == "mesh" and _slots(node) == "auto":
        what = "goes by the number of iterations, which varies"
        raise SpecError(f"{path}.topology.mesh.slots", what, f"give a number, e.g. {own + 3}")


def _slots(node: LoopNode) -> int | str:
    settings = node.topology.settings
    return settings.slots if isinstance(settings, MeshSettings) else "auto"
