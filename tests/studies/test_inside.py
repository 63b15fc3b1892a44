"""What is seen inside a loop, held to literal NumPy."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_arch

from builder import build_model, compile_arch
from builder.laws import randomize
from spiralformer.rope import rotate
from studies.probes import inside
from studies.probes.table import probe
from studies.probes.trace import Trace


def looped(schedule=("token",) * 3, *, causal=True, block=None, **loop):
    given = {"schedule": list(schedule), "topology": "residual", **loop}
    arch = tiny_arch({"d_model": 16, "causal": causal, "graph": {"h": given}, "blocks": {"core": block or {}}})
    return arch, randomize(build_model(compile_arch(arch))).double()


def traced(arch, model, length=24):
    tokens = torch.randint(0, 17, (3, length), generator=torch.Generator().manual_seed(0))

    def judge(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()

    trace = Trace(model, arch, tokens, judge)
    return trace, trace.loop()


def still(model):
    """A core that is the identity."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                p.zero_()


@pytest.mark.parametrize("block", [{}, {"kv_heads": 1}, {"window": 5}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("schedule", [("token",) * 3, ("phrase", "word", "token")], ids=str)
def test_attention_is_the_literal_one(schedule, causal, block):
    """Queries and keys are taken from the weights; entropy, distance in tokens and local mass as their definitions."""
    arch, model = looped(schedule, causal=causal, block=block)
    trace, loop = traced(arch, model)
    for (call,), use in zip(inside.loop_calls(inside.attended(trace), loop.name), schedule, strict=True):
        chunk = arch.levels[use].chunk
        core = model.get_submodule(call.step.target)
        assert call.entropy.shape == (len(core.layers), 2)
        layer = core.layers[0].attn
        x = layer.pre_norm(trace.values[call.step.inputs[0]])
        attention, count = layer.branch, x.shape[1]
        settings = {k: int(v) for k, v in call.step.settings.items() if k in ("stride", "first")}
        cos, sin = core.rotary(count, settings.get("stride", 1), settings.get("first", 0), x.device)
        kv = attention.kv_heads
        qkv = attention.qkv(x).view(3, count, 2 + 2 * kv, -1).transpose(1, 2)
        q, k = (rotate(part.double(), cos, sin).detach().numpy() for part in (qkv[:, :2], qkv[:, 2 : 2 + kv]))
        found = np.zeros((3, 2))
        for head in range(2):
            for b in range(3):
                for i in range(count):
                    if causal:
                        seen = [j for j in range(i + 1) if not block.get("window") or j > i - 5]
                    else:
                        seen = [j for j in range(count) if not block.get("window") or abs(i - j) <= 2]
                    scores = np.array([q[b, head, i] @ k[b, head % kv, j] for j in seen]) / math.sqrt(q.shape[-1])
                    w = np.exp(scores - scores.max())
                    w /= w.sum()
                    if len(seen) > 1:
                        several = count - 1 if causal else count
                        found[0, head] += -(w * np.log(w)).sum() / np.log(len(seen)) / several / 3
                    apart = np.abs(i - np.array(seen)) * chunk
                    found[1, head] += (w * apart).sum() / count / 3
                    found[2, head] += w[apart < 1].sum() / count / 3
        for got, right in zip((call.entropy, call.distance, call.local), found, strict=True):
            np.testing.assert_allclose(got[0].numpy(), right, rtol=2e-5)


def test_uniform_attention_has_entropy_one_and_a_chunk_of_four_distance_four():
    arch, model = looped(("word", "token"), topology="anchor", block={"layers": 1})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name:
                p[: 2 * 8].zero_()  # no query asks for anything
    trace, loop = traced(arch, model, length=96)
    (word,), (token,) = inside.loop_calls(inside.attended(trace), loop.name)
    for call, count in ((word, trace.values[word.step.label].shape[1]), (token, 96)):
        assert call.entropy.numpy() == pytest.approx(1)
        chunk = call.step.node.level.chunk
        assert call.distance.numpy() == pytest.approx(
            chunk * np.mean([np.mean(np.arange(i + 1)) for i in range(count)])
        )
    assert word.step.node.level.chunk == 4


def test_a_core_that_does_nothing_moves_nothing_and_its_states_are_one():
    arch, model = looped(topology="base")
    still(model)
    trace, loop = traced(arch, model)
    assert [(each.core, each.state) for each in inside.moved(trace, loop)] == [(0, 0)] * 3
    torch.testing.assert_close(inside.similarity(inside.sampled(loop)), torch.ones(4, 4, dtype=torch.float64))
    assert inside.ablated(trace, loop) == [0, 0, 0]


@pytest.mark.parametrize("topology", ["residual", {"mesh": {"slots": 4}}], ids=str)
def test_states_are_compared_as_numpy_does(topology):
    arch, model = looped(("word", "token"), topology=topology)
    trace, loop = traced(arch, model)
    states = [state.flatten(0, 1).numpy() for state in loop.states]
    count, kernels = len(states[0]), []
    for x in states:
        apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
        width = np.sort(apart[~np.eye(count, dtype=bool)])[(count * (count - 1) - 1) // 2]
        centre = np.eye(count) - 1 / count
        kernels.append(centre @ np.exp(-(apart**2) / (2 * width**2)) @ centre)
    right = [[(a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for b in kernels] for a in kernels]
    np.testing.assert_allclose(inside.similarity(inside.sampled(loop)).numpy(), right, rtol=1e-6)
    values, ranks = inside.spectra(inside.sampled(loop))
    for x, own, rank in zip(states, values.numpy(), ranks.tolist(), strict=True):
        singular = np.linalg.svd(x, compute_uv=False)
        np.testing.assert_allclose(own, singular / singular[0], atol=1e-9)
        p = singular / singular.sum()
        assert rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    for (before, after), each in zip(
        zip(loop.states, loop.states[1:], strict=False), inside.moved(trace, loop), strict=True
    ):
        a, b = before.flatten(1).numpy(), after.flatten(1).numpy()
        own = [2 * np.linalg.norm(y - x) / (np.linalg.norm(y) + np.linalg.norm(x)) for x, y in zip(a, b, strict=True)]
        assert each.state == pytest.approx(np.mean(own))


def test_an_update_that_is_left_out_is_a_forward_without_it():
    """In a residual loop, that of the shorter schedule; routers' weights are shares."""
    arch, model = looped(per="loop")
    trace, loop = traced(arch, model)
    shorter, parts = looped(("token",) * 2, per="loop")
    parts.load_state_dict(model.state_dict())
    other, _ = traced(shorter, parts)
    assert inside.ablated(trace, loop)[2] == pytest.approx(trace.judge(other.logits) - trace.judge(trace.logits))
    for topology in ({"mesh": {"slots": 4}}, {"mix": {"of": ["residual", "anchor"], "weights": "dynamic"}}):
        trace, _ = traced(*looped(topology=topology))
        found = inside.routed(trace)
        assert len(found) >= 3
        assert all(sum(each.weights) == pytest.approx(1) for each in found)


def test_numbers_of_a_trial():
    arch, model = looped(("word", "token", "token"))
    trace, _ = traced(arch, model)
    found = probe(("attention", "updates", "states", "ablation"), model, arch, trace.values["tokens"], trace.judge)
    assert set(found) >= {
        "attention_entropy",
        "focusing",
        "update_ratio",
        "state_cka",
        "effective_rank",
        "least_update_worth",
    }
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["attention_entropy"] <= 1
