"""Graph to graph: rewrites that keep what the model computes. The verifier runs after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from builder.graph.ir import Graph, Node
from builder.graph.ops import OPS
from builder.graph.verify import verify
from searchspace.errors import SpecError

Pass: TypeAlias = Callable[[Graph], Graph]


def drop_identities_pass(graph: Graph) -> Graph:
    """Remove what gives its input as it is: pools and up-scalings within one level, and `join.base`."""
    stands_for: dict[str, str] = {}
    levels = {node.name: node.level for node in graph.nodes}
    kept: list[Node] = []
    for node in graph.nodes:
        inputs = tuple([stands_for.get(source, source) for source in node.inputs])
        if OPS[node.op].identity(node, [levels[source] for source in node.inputs]):
            stands_for[node.name] = inputs[0]
        else:
            kept.append(replace(node, inputs=inputs) if inputs != node.inputs else node)
    return graph.with_nodes(tuple(kept)) if stands_for else graph


def merge_duplicates_pass(graph: Graph) -> Graph:
    """Compute equal things once: same operation, inputs and owner. Dropout makes calls differ."""
    stands_for: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        inputs = tuple([stands_for.get(source, source) for source in node.inputs])
        signature = (node.op, inputs, node.level, node.owner, node.attrs)
        random = node.op == "block" and graph.block_of(node).dropout > 0
        if signature in first and not random and node.name not in graph.losses:
            stands_for[node.name] = first[signature]
        else:
            first[signature] = node.name
            kept.append(replace(node, inputs=inputs) if inputs != node.inputs else node)
    return graph.with_nodes(tuple(kept)) if stands_for else graph


def drop_unused_pass(graph: Graph) -> Graph:
    """Keep what the outputs need."""
    needed = {graph.output, *graph.losses}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    kept = tuple(node for node in graph.nodes if node.name in needed)
    return graph.with_nodes(kept) if len(kept) < len(graph.nodes) else graph


PASSES: tuple[Pass, ...] = (drop_identities_pass, merge_duplicates_pass, drop_unused_pass)


def simplify(graph: Graph) -> Graph:
    """All passes, without looking whether the graph is legal: for bounds on its cost."""
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph


def run_passes(graph: Graph, passes: tuple[Pass, ...] = PASSES) -> Graph:
    """Apply the passes in order, verifying before the first and after each.

    Raises:
        SpecError: from the verifier; a breach made by a pass names the pass.
    """
    verify(graph)
    for rewrite in passes:
        rewritten = rewrite(graph)
        if rewritten is not graph:
            try:
                verify(rewritten)
            except SpecError as error:
                raise AssertionError(f"{rewrite.__name__} broke the graph: {error}") from error
        graph = rewritten
    return graph


def without_losses(graph: Graph) -> Graph:
    """The graph of a trained model: what its own losses alone need is gone."""
    return drop_unused_pass(replace(graph, losses=()))
