"""The cost model against the built module: equal, not close."""

import pytest
import torch
from helpers import BY_SIZE, SPACES, TOPOLOGIES, tiny_arch
from torch.utils.flop_counter import FlopCounterMode

from builder import Cost, breakdown, build_model, compile_arch, estimate
from builder.graph.ir import Level
from builder.laws import truth
from searchspace import load_arch, load_space


@pytest.mark.parametrize("file", BY_SIZE)
def test_shipped_architectures(file):
    graph = compile_arch(load_arch(file))
    cost = estimate(graph)
    assert (cost.params, cost.flops) == truth(graph)
    assert sum(part.params for part in breakdown(graph)) == cost.params
    assert sum(part.flops for part in breakdown(graph)) == cost.flops


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(
    "loop", [{}, {"recall": "linear", "norm": "layer", "step": "add"}, {"recall": "concat"}], ids=str
)
def test_topologies(topology, loop):
    schedule = ["phrase", "word", "word", "token"]
    over = {
        "blocks": {"core": {"recall": loop.get("recall")}},
        "graph": {"h": {"schedule": schedule, "topology": topology, **loop}},
    }
    graph = compile_arch(tiny_arch(over))
    cost = estimate(graph)
    assert (cost.params, cost.flops) == truth(graph)


def check_random(file, seeds):
    space = load_space(file)
    for seed in seeds:
        graph = compile_arch(space.sample(seed).arch)
        cost = estimate(graph)
        assert (cost.params, cost.flops) == truth(graph), f"{file.stem}, seed {seed}"


@pytest.mark.parametrize("file", SPACES, ids=lambda p: p.stem)
def test_random_architectures(file):
    check_random(file, range(40))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", SPACES, ids=lambda p: p.stem)
def test_many_random_architectures(file):
    check_random(file, range(1000, 2000))


def test_training_flops_are_three_times_the_forward():
    graph = compile_arch(tiny_arch())
    model = build_model(graph, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long, device="meta")).sum().backward()
    cost = estimate(graph)
    assert counter.get_total_flops() == 3 * cost.flops
    assert cost.training_flops_per_token == 3 * cost.flops_per_token


def test_embeddings_are_left_out_of_non_embedding_parameters():
    untied = estimate(compile_arch(tiny_arch()))
    tied = estimate(compile_arch(tiny_arch({"tie_embeddings": True})))
    assert untied.params - untied.params_non_embedding == 2 * 17 * 16
    assert tied.params - tied.params_non_embedding == 17 * 16
    assert tied.params_non_embedding == untied.params_non_embedding


def brute_force_decode(arch) -> tuple[int, int, int]:
    """Total and worst decode FLOPs, and cache bytes, node by node and token by token."""
    graph = compile_arch(arch)
    from builder.graph.ops import OPS

    levels = {node.name: node.level for node in graph.nodes}
    works = [w for n in graph.nodes for w in OPS[n.op].works(graph, n, [levels[i] for i in n.inputs])]
    per_token = []
    for token in range(graph.seq_len):
        flops = 0
        for work in works:
            if (token + work.level.offset + 1) % work.level.chunk == 0:
                keys = (token + work.level.offset + 1) // work.level.chunk
                flops += work.per_position + keys * work.per_pair
        per_token.append(flops)
    cached = sum(w.cached * w.level.closed_chunks(graph.seq_len) for w in works)
    return sum(per_token), max(per_token), 2 * cached


@pytest.mark.parametrize("schedule", [["token"], ["phrase", "word", "token"], ["phrase", "phrase"], ["word"]])
@pytest.mark.parametrize("seq_len", [7, 24, 61])
def test_decode_cost(schedule, seq_len):
    arch = tiny_arch({"seq_len": seq_len, "graph": {"h": {"schedule": schedule}}})
    cost = estimate(compile_arch(arch))
    assert (cost.decode_flops, cost.decode_flops_worst_token, cost.kv_cache_bytes) == brute_force_decode(arch)


def test_no_decoding_without_causality():
    cost = estimate(compile_arch(tiny_arch({"causal": False})))
    assert cost.decode_flops is None
    assert cost.decode_flops_per_token is None
    assert cost.kv_cache_bytes_per_token is None


def test_offset_of_half_a_chunk_evens_out_decoding():
    """papers.md 1.2: with offsets g/2 a power-of-two ladder closes at most one level per token."""

    def worst(offset):
        levels = {
            f"l{g}": {"chunk": g, "offset": offset(g), "pool": "mean", "upscale": "uniform"} for g in (16, 8, 4, 2)
        }
        schedule = [f"l{g}" for g in (16, 8, 4, 2)]
        graph = compile_arch(tiny_arch({"seq_len": 64, "levels": levels, "graph": {"h": {"schedule": schedule}}}))
        closing = [
            sum((token + n.level.offset + 1) % n.level.chunk == 0 for n in graph.nodes if n.op == "block")
            for token in range(64)
        ]
        return max(closing)

    assert worst(lambda g: g // 2) == 1
    assert worst(lambda g: 0) == 4


def test_closed_chunks():
    assert [Level(4, 1).closed_chunks(n) for n in range(9)] == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_cost_is_a_plain_record():
    cost = estimate(compile_arch(tiny_arch()))
    assert isinstance(cost, Cost)
    assert isinstance(cost.flops, int)
    assert cost.flops_per_token * cost.seq_len == cost.flops
