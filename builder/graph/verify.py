"""The law of legal graphs, in one place; run after the frontend and after every pass.

A causal graph's logits must have lookahead <= 0. The rule is sound (what passes never leaks) and may
refuse a causal graph in rare combinations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from builder.graph.ir import Graph, Level, Node
from builder.graph.ops import LOGITS, MEMORY, OPS, OpRow
from searchspace.errors import CausalityError, SpecError, one_of


def verify(graph: Graph) -> None:
    """Check every node against its row in the table, and the whole against causality.

    Raises:
        SpecError: naming the node, what is wrong with it, and what would be right.
        CausalityError: naming the path along which later tokens reach the logits.
    """
    nodes: dict[str, Node] = {}
    ahead: dict[str, float] = {}
    owners: dict[str, tuple[object, ...]] = {}
    for node in graph.nodes:
        row = OPS.get(node.op)
        if row is None:
            raise _error(node, f"unknown operation '{node.op}'", one_of(OPS, node.op))
        if node.name in nodes:
            raise _error(node, "two nodes have this name", "rename one")
        for source in node.inputs:
            if source not in nodes:
                raise _error(
                    node, f"reads '{source}', which is not before it", "order the nodes, or name an earlier one"
                )
        inputs = [nodes[source] for source in node.inputs]
        _check_kinds(node, row, inputs)
        levels = [source.level for source in inputs]
        if problem := row.level(node, levels):
            what, _, remedy = problem.partition("; ")
            raise _error(node, what, remedy)
        _check_join_base(node, inputs, nodes)
        _check_owner(graph, node, levels, owners)
        nodes[node.name] = node
        ahead[node.name] = row.lookahead(graph, node, levels, [ahead[source] for source in node.inputs])
    output = nodes.get(graph.output)
    if output is None or OPS[output.op].gives != LOGITS:
        raise SpecError("graph", f"its output '{graph.output}' gives no logits", "end in {head: lm, in: ...}")
    if graph.causal and ahead[graph.output] > 0:
        raise _leak(graph, nodes, ahead)


def _error(node: Node, problem: str, remedy: str) -> SpecError:
    return SpecError(f"graph.{node.name}", problem, remedy)


def _check_kinds(node: Node, row: OpRow, inputs: Sequence[Node]) -> None:
    takes = row.takes
    if takes and takes[-1] == "...":
        takes = (*takes[:-1], *[takes[-2]] * (len(inputs) - len(takes) + 1))
    if len(takes) != len(inputs):
        raise _error(node, f"{node.op} has {len(inputs)} inputs", f"give it {len(takes)}: {', '.join(takes)}")
    for source, wanted in zip(inputs, takes, strict=True):
        given = OPS[source.op].gives
        if given != wanted:
            remedy = "read the memory first" if given == MEMORY else f"name a node that gives a {wanted}"
            raise _error(node, f"'{source.name}' gives {given}, {node.op} takes a {wanted} there", remedy)


def _check_join_base(node: Node, inputs: Sequence[Node], nodes: Mapping[str, Node]) -> None:
    if (
        node.op == "join.base"
        and inputs[0].op.startswith("upscale.")
        and nodes[inputs[0].inputs[0]].level != node.level
    ):
        raise _error(
            node,
            f"join base takes the up-scaled '{inputs[0].name}' alone: tokens before its first chunk closes are zero",
            "use residual, anchor, anchor_star or mesh",
        )


def _check_owner(graph: Graph, node: Node, levels: Sequence[Level], owners: dict[str, tuple[object, ...]]) -> None:
    if not node.owner:
        return
    shape: tuple[object, ...] = (
        node.op,
        node.attr("block") if node.op == "block" else OPS[node.op].params(graph, node, levels),
    )
    if owners.setdefault(node.owner, shape) != shape:
        raise _error(
            node, f"shares the weights '{node.owner}' with a node of another kind or shape", "give it a name of its own"
        )


def _leak(graph: Graph, nodes: Mapping[str, Node], ahead: Mapping[str, float]) -> CausalityError:
    """Walk back along the inputs that look furthest ahead."""
    trail, name = [graph.output], graph.output
    while nodes[name].inputs:
        name = max(nodes[name].inputs, key=lambda source: ahead[source])
        trail.append(name)
    gains = []
    for name in reversed(trail):
        node = nodes[name]
        before = max((ahead[source] for source in node.inputs), default=0)
        if ahead[name] > before:
            gains.append((name, f"{name} ({_why(graph, node)})"))
    path = " -> ".join(dict(gains).get(name, name) for name in reversed(trail))
    worst = "any number of" if math.isinf(ahead[graph.output]) else f"{ahead[graph.output]:g}"
    return CausalityError(
        f"graph.{gains[0][0]}",
        f"the logits look {worst} tokens ahead, along {path}",
        "use causal blocks and closed reads, delay the read, or declare causal: false",
    )


def _why(graph: Graph, node: Node) -> str:
    return f"block {node.attr('block')} is bidirectional" if node.op == "block" else f"reads {node.attr('reads')}"
