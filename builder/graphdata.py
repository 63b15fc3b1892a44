"""A compiled graph as a `torch_geometric` heterogeneous graph, for predictors that learn from finished trials.

Node types: ``op``, one for each operation of the unrolled graph, and ``block``, one for each shared block. Edges:
``op -next-> op`` along the data, ``op -back-> op`` against it, ``op -uses-> block`` and ``block -used_by-> op``:
through the last two a predictor sees which iterations share weights. Features: `OP_FEATURES` and `BLOCK_FEATURES`, in
this order; all are of order one. The encoding depends on the canonical graph alone, not on names.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.graph.blocks import ffn_dim
from builder.graph.ir import Graph
from builder.graph.ops import OPS
from builder.pricing.cost import Cost
from searchspace.arch import BlockSpec

if TYPE_CHECKING:
    import torch
    from torch_geometric.data import HeteroData

KINDS = tuple(sorted(OPS))

OP_FEATURES = (
    *(f"is_{kind}" for kind in KINDS),
    "log2_chunk",  # of the level it gives, over 4
    "offset",  # as a share of the chunk
    "delay",  # in chunks
    "layers",  # of the block it calls, over 4
    "depth",  # block calls on the longest path to it, over those of the whole graph
    "to_go",  # block calls on the longest path from it to the logits, likewise
    "iteration",  # within its loop, over 8; 0 outside
    "flops_share",  # of the forward's FLOPs
    "inputs",  # how many, over 4
)
BLOCK_FEATURES = (
    "layers",  # over 4
    "log2_heads",  # over 4
    "kv_share",  # key-value heads over heads
    "ffn_ratio",  # inner width over width, over 4
    "uses",  # calls, over 8
    "params_share",  # of the model's parameters
    "flops_share",
)
COST_FEATURES = ("log_params", "log_flops_per_token", "log_kv_bytes_per_token", "log2_width")
"""Of the whole graph, in ``data.cost``; predictors standardise them."""

_ITERATION = re.compile(r"\.t(\d+)\.")


@dataclass(frozen=True, slots=True, eq=False)
class GraphFeatures:
    """A graph's features and edges, as numbers."""

    ops: list[list[float]]
    """`OP_FEATURES` of each operation."""
    blocks: list[list[float]]
    """`BLOCK_FEATURES` of each block."""
    cost: list[float]
    """`COST_FEATURES`."""
    next: list[tuple[int, int]]
    """Operations, from and to."""
    uses: list[tuple[int, int]]
    """Operation and block."""


def encode_graph(graph: Graph, cost: Cost) -> HeteroData:
    """The graph's nodes, edges and features for `torch_geometric`.

    Args:
        graph: verified.
        cost: its price.

    Returns:
        ``op.x`` (N, len(OP_FEATURES)), ``block.x`` (M, len(BLOCK_FEATURES)), ``edge_index`` (2, E) of the four edge
        types, and ``cost`` (1, len(COST_FEATURES)).
    """
    return hetero_data(graph_features(graph, cost))


def hetero_data(features: GraphFeatures) -> HeteroData:
    """See `encode_graph`."""
    import torch
    from torch_geometric.data import HeteroData  # seconds to import, for the graph network alone

    data = HeteroData()
    data["op"].x = torch.tensor(features.ops, dtype=torch.float32)
    data["block"].x = torch.tensor(features.blocks, dtype=torch.float32).view(-1, len(BLOCK_FEATURES))
    data["op", "next", "op"].edge_index = _edges(features.next)
    data["op", "back", "op"].edge_index = _edges([(b, a) for a, b in features.next])
    data["op", "uses", "block"].edge_index = _edges(features.uses)
    data["block", "used_by", "op"].edge_index = _edges([(b, a) for a, b in features.uses])
    data.cost = torch.tensor([features.cost])
    return data


def graph_features(graph: Graph, cost: Cost) -> GraphFeatures:
    """The graph's nodes, edges and features.

    Args:
        graph: verified.
        cost: its price.
    """
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    levels = {node.name: node.level for node in graph.nodes}
    next_edges = [(place[source], place[node.name]) for node in graph.nodes for source in node.inputs]
    called = sorted({n.attr("block", str) for n in graph.nodes if n.op == "block"}, key=_first_call(graph).__getitem__)
    block_place = {name: i for i, name in enumerate(called)}
    uses = [(place[n.name], block_place[n.attr("block", str)]) for n in graph.nodes if n.op == "block"]
    flops, params = [0.0] * len(place), [0.0] * len(called)
    for node in graph.nodes:
        inputs = [levels[source] for source in node.inputs]
        for work in OPS[node.op].works(graph, node, inputs):
            positions = work.level.closed_chunks(graph.seq_len)
            flops[place[node.name]] += positions * work.per_position + positions * positions * work.per_pair
        if node.op == "block":
            params[block_place[node.attr("block", str)]] = OPS[node.op].params(graph, node, inputs)
    before, after = _depths(graph)
    deepest = max(1, *before.values())
    op_rows = [
        [
            *(float(node.op == kind) for kind in KINDS),
            math.log2(node.level.chunk) / 4,
            node.level.offset / node.level.chunk,
            float(node.get("delay", 0)),
            graph.block_of(node).layers / 4 if node.op == "block" else 0.0,
            before[node.name] / deepest,
            after[node.name] / deepest,
            int(match[1]) / 8 if (match := _ITERATION.search(node.name)) else 0.0,
            flops[i] / cost.flops,
            len(node.inputs) / 4,
        ]
        for i, node in enumerate(graph.nodes)
    ]
    block_rows = [
        _block_row(
            graph,
            graph.blocks[name],
            calls=[i for i, b in uses if b == place_],
            flops=flops,
            params_share=params[place_] / cost.params,
            whole=cost.flops,
        )
        for name, place_ in block_place.items()
    ]
    logs = [math.log(cost.params), math.log(cost.flops_per_token), math.log1p(cost.kv_cache_bytes_per_token or 0.0)]
    return GraphFeatures(op_rows, block_rows, [*logs, math.log2(graph.d_model)], next_edges, uses)


def _block_row(
    graph: Graph, block: BlockSpec, *, calls: list[int], flops: list[float], params_share: float, whole: float
) -> list[float]:
    return [
        block.layers / 4,
        math.log2(block.heads) / 4,
        (block.kv_heads or block.heads) / block.heads,
        ffn_dim(block, graph.d_model) / graph.d_model / 4,
        len(calls) / 8,
        params_share,
        sum(flops[i] for i in calls) / whole,
    ]


def _first_call(graph: Graph) -> dict[str, int]:
    """Where each block is called first, so that the order does not depend on names."""
    first: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        if node.op == "block":
            first.setdefault(node.attr("block", str), i)
    return first


def _depths(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """Block calls on the longest path up to each node, and from it to the logits."""
    before: dict[str, int] = {}
    for node in graph.nodes:
        before[node.name] = max((before[source] for source in node.inputs), default=0) + (node.op == "block")
    after = {node.name: 0 for node in graph.nodes}
    for node in reversed(graph.nodes):
        for source in node.inputs:
            after[source] = max(after[source], after[node.name] + (node.op == "block"))
    return before, after


def _edges(pairs: list[tuple[int, int]]) -> torch.Tensor:
    import torch

    return torch.tensor(pairs, dtype=torch.long).T.contiguous().view(2, len(pairs))
