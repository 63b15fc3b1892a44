"""The law of legal graphs, in one place; run after the frontend and after every pass.

A causal graph's logits must have lookahead <= 0. The rule is sound (what passes never leaks) and may
refuse a causal graph in rare combinations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from builder.graph.ir import Graph, Level, Node
from builder.graph.ops import OPS
from builder.graph.row import Kind
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
        _check_attrs(node)
        _check_ports(node, inputs)
        levels = [source.level for source in inputs]
        if problem := row.level(node, levels):
            what, _, remedy = problem.partition("; ")
            raise _error(node, what, remedy)
        _check_join_base(node, inputs, nodes)
        _check_owner(graph, node, levels, owners)
        nodes[node.name] = node
        ahead[node.name] = row.lookahead(graph, node, levels, [ahead[source] for source in node.inputs])
    output = nodes.get(graph.output)
    if output is None or OPS[output.op].gives is not Kind.LOGITS:
        raise SpecError("graph", f"its output '{graph.output}' gives no logits", "end in {head: lm, in: ...}")
    for name in graph.losses:
        if name not in nodes or OPS[nodes[name].op].gives is not Kind.LOSS:
            raise SpecError(f"graph.{name}", "gives no loss", "write {loss: z, in: ...}")
    if graph.causal and ahead[graph.output] > 0:
        raise _leak(graph, nodes, ahead)


def _error(node: Node, problem: str, remedy: str) -> SpecError:
    """Names the key that the user wrote, and the operation written out of it where that has a name of its own."""
    own = f"graph.{node.name}"
    at = (
        ""
        if node.key in ("", own) or (own.startswith(f"{node.key}.") and "." not in node.name)
        else f" (at {node.name})"
    )
    return SpecError(node.key or own, problem + at, remedy)


def _check_attrs(node: Node) -> None:
    given = tuple([(name, type(value)) for name, value in node.attrs])
    if problem := _wrong_attrs(node.op, given):
        raise _error(node, *problem)


@lru_cache(maxsize=4096)
def _wrong_attrs(op: str, given: tuple[tuple[str, type], ...]) -> tuple[str, str] | None:
    """What is wrong with attributes of these names and types, and what would be right."""
    known = {name.rstrip("?"): kind for name, kind in OPS[op].attrs.items()}
    for name in OPS[op].attrs:
        if not name.endswith("?") and name not in dict(given):
            return f"{op} has no attribute '{name}'", "give it one"
    for name, kind in given:
        if name not in known:
            return f"{op} has no use for the attribute '{name}'", one_of(known, name) or "leave it out"
        if kind is not known[name]:
            return f"its attribute {name} is of type {kind.__name__}", f"give {known[name].__name__}"
    return None


def _check_ports(node: Node, inputs: Sequence[Node]) -> None:
    wrong, kinds = _kinds_of(node.op, node.ports)
    if wrong:
        raise _error(node, *wrong)
    for wanted, source in zip(kinds, inputs, strict=True):
        given = OPS[source.op].gives
        if given is not wanted:
            remedy = "read the memory first" if given is Kind.MEMORY else f"name a node that gives a {wanted.value}"
            what = f"'{source.name}' gives {given.value}, {node.op} takes a {wanted.value} there"
            raise _error(node, what, remedy)


@lru_cache(maxsize=4096)
def _kinds_of(op: str, read_as: tuple[str, ...]) -> tuple[tuple[str, str] | None, tuple[Kind, ...]]:
    """What is wrong with reading nodes as these ports, and what would be right; or the kind of each."""
    known = {port.name: port for port in OPS[op].ports}
    for port in known.values():
        count = read_as.count(port.name)
        if count == 0 and not port.optional:
            return (f"{op} reads nothing as '{port.name}'", f"name a node that gives {port.kind.value}"), ()
        if count > 1 and not port.many:
            return (f"{op} reads {count} nodes as '{port.name}'", "give it one"), ()
    for name in read_as:
        if name not in known:
            return (f"{op} has no input '{name}'", one_of(known, name) or "give it none"), ()
    return None, tuple(known[name].kind for name in read_as)


def _check_join_base(node: Node, inputs: Sequence[Node], nodes: Mapping[str, Node]) -> None:
    if (
        node.op == "join.base"
        and OPS[inputs[0].op].family == "upscale"
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
        node.attr("block", str) if node.op == "block" else OPS[node.op].params(graph, node, levels),
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
    first = nodes[gains[0][0]]
    can_wait = first.op == "block" or first.get("reads", "")
    remedy = "use causal blocks and closed reads, delay the read, or declare causal: false"
    worst = "any number of" if math.isinf(ahead[graph.output]) else f"{ahead[graph.output]:g}"
    return CausalityError(
        first.key or f"graph.{first.name}",
        f"the logits look {worst} tokens ahead, along {path}",
        remedy if can_wait else "leave it out, or declare causal: false",
    )


def _why(graph: Graph, node: Node) -> str:
    if node.op == "block":
        return f"block {node.attr('block', str)} is bidirectional"
    return f"reads {reads}" if (reads := node.get("reads", "")) else f"{node.op} reads what stands behind"
