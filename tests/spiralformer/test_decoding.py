"""Decoding equals the parallel forward at every position, and costs what the cost model says."""

import pytest
import torch
from helpers import TOPOLOGIES, built, tiny_arch
from torch.utils.flop_counter import FlopCounterMode

from builder import build_model, compile_arch, estimate
from searchspace.nodes import PoolKind, UpscaleKind
from searchspace.tables import options


@torch.no_grad()
def check(model, length, batch=2, vocab=17):
    """In double precision, where the two ways differ by rounding alone."""
    model.double()
    tokens = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(length))
    whole = model(tokens)
    state = model.decode_state(batch, max_len=length)
    for i in range(length):
        torch.testing.assert_close(model.decode(tokens[:, i], state), whole[:, i], atol=1e-9, rtol=1e-9)
    for prompt in {1, length // 3 + 1, length - 1} - {0}:
        state = model.decode_state(batch, max_len=length)
        torch.testing.assert_close(model.prefill(tokens[:, :prompt], state), whole[:, prompt - 1], atol=1e-9, rtol=1e-9)
        for i in range(prompt, length):
            torch.testing.assert_close(model.decode(tokens[:, i], state), whole[:, i], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("upscale", options(UpscaleKind))
@pytest.mark.parametrize("pool", options(PoolKind))
def test_pools_upscales_offsets_delays_and_lengths(pool, upscale):
    for chunk in (2, 3, 5):
        for offset in range(chunk):
            level = {"chunk": chunk, "offset": offset, "pool": pool, "upscale": upscale}
            schedule = [{"level": "word", "delay": offset % 3}, "phrase", "token"]
            model = built({"levels": {"word": level}, "graph": {"h": {"schedule": schedule}}})
            for length in (2, chunk + 1, 4 * chunk - 1):
                check(model, length, batch=1 + offset % 2)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(
    "extra", [{}, {"recall": "linear", "norm": "rms", "step": "add"}, {"recall": "concat", "step": "scale"}], ids=str
)
def test_topologies_recalls_norms_and_steps(topology, extra):
    schedule = ["phrase", "word", "word", "token"]
    check(built({"graph": {"h": {"schedule": schedule, "topology": topology, **extra}}}), 23)


@pytest.mark.parametrize("place", ["pre", "peri", "post", "sandwich"])
@pytest.mark.parametrize("residual", ["add", "gate", "gru"])
@pytest.mark.parametrize("recall", [None, "add", "linear", "concat"])
def test_blocks(place, residual, recall):
    core = {"norm_place": place, "residual": residual, "recall": recall, "kv_heads": 1, "qk_norm": True}
    check(built({"blocks": {"core": core}}), 19)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_single_precision_at_initial_weights(topology):
    graph = compile_arch(
        tiny_arch(
            {"seq_len": 64, "graph": {"h": {"schedule": ["phrase", "word", "token", "token"], "topology": topology}}}
        )
    )
    model = build_model(graph)
    tokens = torch.randint(0, 17, (2, 50))
    whole, state = model(tokens), model.decode_state(2, max_len=50)
    for i in range(50):
        torch.testing.assert_close(model.decode(tokens[:, i], state), whole[:, i], atol=1e-4, rtol=1e-4)


def test_positions_of_latents():
    by_token = built({"levels": {"word": {"positions": "last_token"}, "phrase": {"positions": "last_token"}}})
    check(by_token, 29)
    tokens = torch.arange(29)[None] % 17
    assert not torch.allclose(by_token.float()(tokens), built()(tokens))


NESTED = {
    "a": {"pool": "word", "in": "x"}, "b": {"block": "core", "in": "a"}, "c": {"pool": "phrase", "in": "b"},
    "d": {"block": "core", "in": "c"}, "e": {"upscale": "word", "in": "d", "delay": 1}, "f": {"join": "sum", "in": ["e", "b"]},
    "g": {"upscale": "token", "in": "f"}, "y": {"join": "sum", "in": ["g", "x"]},
}  # fmt: skip


def test_a_pool_of_a_pool():
    graph = {"h": None, **NESTED, "logits": {"head": "lm", "in": "y"}}
    for offset in range(4):
        check(built({"levels": {"word": {"offset": offset}}, "graph": graph}), 31)


def test_an_own_chunk_read_delayed_enough():
    nodes = {
        "z": {"pool": "word", "in": "x"},
        "u": {"upscale": "token", "in": "z", "reads": "own_chunk", "delay": 3},
        "y": {"join": "residual", "in": ["u", "x"]},
    }
    check(built({"graph": {"h": None, **nodes, "logits": {"head": "lm", "in": "y"}}}), 22)


@pytest.mark.parametrize("schedule", [["token", "token"], ["phrase", "word", "token"], ["phrase", "word"]])
@pytest.mark.parametrize("pool", ["mean", "self_aggregate", "linear", "attention"])
def test_flops_and_cache_bytes_are_the_cost_models(schedule, pool):
    over = {
        "seq_len": 29,
        "levels": {"word": {"pool": pool}},
        "graph": {"h": {"schedule": schedule, "topology": "mesh", "recall": "linear"}},
    }
    graph = compile_arch(tiny_arch(over))
    cost, model = estimate(graph), build_model(graph, device="meta")
    state = model.decode_state(1, max_len=29, cache_dtype=torch.bfloat16)
    assert state.kv_cache_bytes == cost.kv_cache_bytes
    spent = []
    for _ in range(29):
        with FlopCounterMode(display=False) as counter:
            model.decode(torch.zeros(1, dtype=torch.long, device="meta"), state)
        spent.append(counter.get_total_flops())
    assert sum(spent) == cost.decode_flops
    assert max(spent) == cost.decode_flops_worst_token


def test_generation_with_and_without_cache_is_the_same():
    model = built({"graph": {"h": {"topology": "mesh"}}})
    prompt = torch.randint(0, 17, (3, 5))
    for settings in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}, {"top_k": 4, "seed": 1}):
        cached = model.generate(prompt, 20, **settings)
        assert torch.equal(cached, model.generate(prompt, 20, use_cache=False, **settings))


def test_what_can_not_be_decoded_says_why_and_still_generates():
    both_ways = built({"causal": False, "graph": {"h": {"topology": "residual"}}})
    with pytest.raises(ValueError, match="sees its whole input"):
        both_ways.decode_state(1, 8)
    paid_later = {
        "a": {"pool": "phrase", "in": "x"}, "b": {"upscale": "word", "in": "a", "delay": 1},
        "w": {"pool": "word", "in": "x"}, "b2": {"join": "sum", "in": ["b", "w"]},
        "c": {"upscale": "token", "in": "b", "reads": "own_chunk"}, "d": {"upscale": "token", "in": "b2"},
        "y": {"join": "sum", "in": ["c", "d", "x"]},
    }  # fmt: skip
    model = built({"graph": {"h": None, **paid_later, "logits": {"head": "lm", "in": "y"}}})
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), 4).shape == (1, 7)


def test_misuse_is_told():
    model = built()
    state = model.decode_state(2, max_len=3)
    with pytest.raises(ValueError, match="2 sequences"):
        model.prefill(torch.zeros(1, 2, dtype=torch.long), state)
    with pytest.raises(ValueError, match="room for 3 tokens, not 4"):
        model.prefill(torch.zeros(2, 4, dtype=torch.long), state)
    model.prefill(torch.zeros(2, 3, dtype=torch.long), state)
    with pytest.raises(ValueError, match="takes an empty one"):
        model.prefill(torch.zeros(2, 1, dtype=torch.long), state)
    with pytest.raises(ValueError, match="larger max_len"):
        model.decode(torch.zeros(2, dtype=torch.long), state)


def test_a_copied_model_decodes_too():
    import copy

    check(copy.deepcopy(built()), 13)
