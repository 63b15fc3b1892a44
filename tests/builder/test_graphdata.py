"""The encoding for predictors: complete, deterministic, blind to names, and it shows sharing."""

import pytest
import torch
from helpers import ARCHITECTURES, TOPOLOGIES, tiny_arch

from builder import compile_arch, estimate
from builder.graphdata import BLOCK_FEATURES, COST_FEATURES, OP_FEATURES, encode_graph
from searchspace import load_arch


def encode(arch):
    graph = compile_arch(arch)
    return graph, encode_graph(graph, estimate(graph))


def column(data, kind, name):
    names = OP_FEATURES if kind == "op" else BLOCK_FEATURES
    return data[kind].x[:, names.index(name)]


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda file: file.stem)
def test_every_shipped_architecture_encodes(file):
    graph, data = encode(load_arch(file))
    data.validate()
    assert data["op"].x.shape == (len(graph.nodes), len(OP_FEATURES))
    assert data["op", "next", "op"].edge_index.shape[1] == sum(len(node.inputs) for node in graph.nodes)
    calls = [node for node in graph.nodes if node.op == "block"]
    assert data["op", "uses", "block"].edge_index.shape[1] == len(calls)
    assert len(data["block"].x) == len({node.attr("block", str) for node in calls})
    assert torch.isfinite(data["op"].x).all()
    assert data["op"].x.abs().max() < 20
    assert column(data, "op", "flops_share").sum() == pytest.approx(1.0, abs=1e-5)
    assert (column(data, "block", "uses") * 8).sum() == pytest.approx(len(calls))
    assert data.cost.shape == (1, len(COST_FEATURES))


def test_names_do_not_matter_and_sharing_does():
    loop = {"loop": "other", "in": "x", "schedule": ["phrase", "word", "token"], "topology": "anchor"}
    named = tiny_arch({"blocks": {"core": None, "other": {"layers": 1, "heads": 2}}, "graph": {"h": loop}})
    shared, again = encode(tiny_arch())[1], encode(named)[1]
    for kind in ("op", "block"):
        assert torch.equal(shared[kind].x, again[kind].x)
    assert column(shared, "block", "uses").tolist() == [3 / 8]


@pytest.mark.parametrize("topology", [t for t in TOPOLOGIES if "runge_kutta" not in t], ids=str)
def test_topologies_differ(topology):
    graph, base = encode(tiny_arch({"graph": {"h": {"topology": "anchor"}}}))
    other_graph, other = encode(tiny_arch({"graph": {"h": {"topology": topology}}}))
    assert same(base, other) == (graph.arch_id == other_graph.arch_id)


def same(a, b):
    next_ = ("op", "next", "op")
    return (
        a["op"].x.shape == b["op"].x.shape
        and torch.equal(a["op"].x, b["op"].x)
        and torch.equal(a[next_].edge_index, b[next_].edge_index)
    )


def test_they_batch_with_pygs_own_loader():
    items = [encode(tiny_arch({"graph": {"h": {"schedule": levels}}}))[1] for levels in (["word"], ["phrase", "token"])]
    from torch_geometric.loader import DataLoader  # seconds to import, for this test alone

    batch = next(iter(DataLoader(items, batch_size=2)))
    batch.validate()
    assert batch.num_graphs == 2
    assert batch.cost.shape == (2, len(COST_FEATURES))
    assert batch["op", "uses", "block"].edge_index[0].max() >= len(items[0]["op"].x)
