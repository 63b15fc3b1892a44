"""Iterations that are drawn for each step of training: their laws, what they cost, and where gradients go."""

import collections
import math
from functools import cache

import pytest
import torch
from helpers import tiny_arch, tiny_data
from torch.utils.flop_counter import FlopCounterMode

from builder import build_model, compile_arch, estimate
from builder.iterations import drawn, runs_of
from builder.laws import randomize
from builder.schedules import model_under, tried_models
from searchspace import SpecError
from searchspace.files import arch_from_data

SAMPLINGS = ["uniform", "poisson_lognormal", "progressive"]


def looped(iterations=None, schedule=("token",) * 4, **more):
    loop = {"schedule": list(schedule), "per": "loop", "recall": "linear", **more}
    if iterations is not None:
        loop["iterations"] = iterations
    return tiny_arch({"graph": {"h": loop}})


def test_progressive_is_the_papers():
    """N of 0 .. 3 without gradient, then 1 .. 4 - n with it, each as often."""
    runs = runs_of(looped({"sample": "progressive"}).graph["h"])
    assert len(runs) == 10
    assert sum(share for share, _ in runs) == pytest.approx(1)
    assert {run: share for share, run in runs}[(4, 3)] == pytest.approx(1 / 4)
    assert {run: share for share, run in runs}[(4, 0)] == pytest.approx(1 / 16)


def test_poisson_lognormal_is_huginns():
    """Against a brute-force draw: r = Poisson(exp(N(ln 8 - 1/8, 1/2))) + 1."""
    import numpy as np

    draw = np.random.default_rng(0)
    counted = collections.Counter((draw.poisson(np.exp(draw.normal(math.log(8) - 1 / 8, 0.5, 400_000))) + 1).tolist())
    runs = runs_of(looped({"sample": "poisson_lognormal", "train": 8, "gradient_through": 3}).graph["h"])
    assert sum(share for share, _ in runs) == pytest.approx(1)
    for share, run in runs[:20]:
        assert run.held == max(0, run.total - 3)
        assert share == pytest.approx(counted[run.total] / 400_000, abs=3e-3)


@pytest.mark.parametrize("sample", SAMPLINGS)
def test_draws_are_of_the_step_and_as_often_as_they_say(sample):
    arch = looped({"sample": sample})
    found = collections.Counter(drawn(arch, 3, step)["h"] for step in range(4000))
    for share, run in runs_of(arch.graph["h"]):
        assert found[run] / 4000 == pytest.approx(share, abs=0.03)
    assert drawn(arch, 3, 17) == drawn(arch, 3, 17)
    assert [drawn(arch, 3, s) for s in range(20)] != [drawn(arch, 4, s) for s in range(20)]


def test_whole_turns_of_the_schedule():
    arch = looped({"sample": "uniform", "train": 9}, schedule=["phrase", "word", "token"])
    assert [run.total for _, run in runs_of(arch.graph["h"])] == [3, 6, 9]


@pytest.mark.parametrize("sample", ["fixed", *SAMPLINGS])
@pytest.mark.parametrize("schedule", [("token",) * 4, ("phrase", "word", "token")], ids=str)
def test_the_price_is_the_mean_of_what_steps_count(sample, schedule):
    """FLOPs of every run that may be drawn, counted on meta, forward and backward."""
    longest = len(schedule) * (1 if sample == "poisson_lognormal" else 2)  # of that, four times as long is drawn
    arch = looped({"sample": sample, "train": longest, "gradient_through": 2}, schedule, recall=None)
    graph, turn = compile_arch(arch), len(schedule)
    meta = build_model(graph, device="meta")

    @cache
    def forward(iterations):
        _, view = model_under(meta, arch, {"h": iterations})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            view(torch.zeros(1, arch.seq_len, dtype=torch.long, device="meta"))
        return counter.get_total_flops()

    outside = 2 * forward(turn) - forward(2 * turn)
    mean = 0.0
    for share, (total, held) in runs_of(arch.graph["h"]):
        mean += share * (3 * forward(total) - 2 * (forward(held) - outside if held else 0))
    assert estimate(graph).training_flops == pytest.approx(mean, abs=0.5)
    assert estimate(graph).flops == forward(turn)


@pytest.mark.parametrize("topology", ["residual", "anchor", {"mesh": {"slots": 5}}], ids=str)
@pytest.mark.parametrize("schedule", [["token"], ["word", "token"], ["word"]], ids=str)
def test_held_iterations_pass_no_gradient_and_others_all_of_it(topology, schedule):
    """Against autograd on the written-out loop, cut where the held ones end."""
    arch = looped(schedule=schedule, topology=topology, norm="rms")
    model = randomize(build_model(compile_arch(arch)))
    tokens = torch.randint(0, 17, (2, 24))
    total, held = 6, 4
    _, view = model_under(model, arch, {"h": total}, {"h": held})
    _, whole = model_under(model, arch, {"h": total})
    torch.testing.assert_close(view.with_losses(tokens)[0], whole(tokens))
    calls = []
    block = model.get_submodule("blocks.core")
    hook = block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    view.with_losses(tokens)[0].square().sum().backward()
    hook.remove()
    assert calls == [False] * held + [True] * (total - held)
    assert block.layers[0].attn.branch.out.weight.grad.abs().sum() > 0
    recall = next(p for name, p in model.named_parameters() if name.endswith("recall.input.weight"))
    assert recall.grad.abs().sum() > 0
    assert model.get_parameter("embed.weight").grad.abs().sum() > 0, "by recall, or the anchor"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_weights_cast_where_no_gradient_passes_get_one_where_it_does():
    """Autocast keeps what it has cast, with or without a gradient."""
    arch = looped()
    model = randomize(build_model(compile_arch(arch)))
    _, view = model_under(model, arch, {"h": 4}, {"h": 2})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, *_ = view.with_losses(torch.randint(0, 17, (2, 24)))
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_submodule("blocks.core").parameters())


def test_internal_recall_is_read_by_iterations_that_pass_a_gradient():
    """Its pool is computed once, in an iteration that is held."""
    arch = tiny_arch({"blocks": {"core": {"recall": "linear"}}, "graph": {"h": {"schedule": ["word"] * 2, "per": "loop", "topology": "residual"}}})  # fmt: skip
    model = randomize(build_model(compile_arch(arch)))
    _, view = model_under(model, arch, {"h": 4}, {"h": 3})
    view.with_losses(torch.randint(0, 17, (2, 24)))[0].square().sum().backward()
    assert model.get_parameter("embed.weight").grad.abs().sum() > 0


def test_tried_in_other_numbers():
    arch = looped({"test": [2, 9]})
    model = build_model(compile_arch(arch))
    tokens = torch.randint(0, 17, (2, 24))
    assert [*tried_models(model, arch)] == [2, 9]
    with torch.no_grad():
        assert torch.equal(tried_models(model, arch)[9](tokens), model_under(model, arch, {"h": 9})[1](tokens))
    assert tried_models(model, looped()) == {}


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"per": "iteration"}, "graph.h.per: iterations that have weights of their own"),
        ({"topology": "mesh"}, "graph.h.topology.mesh.slots: goes by the number of iterations, which varies; give"),
        ({"schedule": ["word", "token"], "iterations": {"train": 3}}, "3 iterations are no whole turns of 2"),
        ({"topology": {"runge_kutta": {"tableau": "midpoint"}}, "iterations": {"test": [3]}}, "3 ends within a step"),
        ({"iterations": {"test": [9, 3]}}, "no numbers of iterations in order"),
        ({"iterations": {"test": [0]}}, "from 1 to 512"),
        ({"iterations": {"sample": "poisson_lognormal", "train": 200}}, "has up to 800 iterations in all its loops"),
        ({"topology": "velocity", "iterations": {"segments": 3}}, "more than a stream that a segment could begin with"),
        ({"topology": {"mesh": {"slots": 4}}, "iterations": {"segments": 2}}, "take one of: base, residual, anchor"),
        ({"iterations": {"segments": 0}}, "graph.h.iterations.segments"),
        ({"iterations": {"sample": "poisson"}}, "choose one of: fixed, uniform, poisson_lognormal"),
    ],
)
def test_what_does_not_fit_is_refused(over, told):
    loop = {"schedule": ["token"] * 4, "per": "loop", "iterations": {"sample": "uniform"}, **over}
    with pytest.raises(SpecError) as caught:
        arch_from_data(tiny_data({"graph": {"h": loop}}))
    assert told in str(caught.value)


def test_loops_go_in_segments_together():
    loops = {name: {"loop": "core", "in": read, "schedule": ["token"], "iterations": {"segments": count}}
             for name, read, count in (("h", "x", 2), ("k", "h", 4))}  # fmt: skip
    with pytest.raises(SpecError, match=r"graph.k.iterations.segments: loops train a batch in 2 and 4 segments"):
        tiny_arch({"graph": {**loops, "logits": {"in": "k"}}})


def test_a_factor_of_the_number_of_layers_is_refused():
    with pytest.raises(SpecError, match="residual_scale goes by the number of layers, and its iterations vary"):
        tiny_arch({"residual_scale": "inverse_depth", "graph": {"h": {"per": "loop", "iterations": {"test": [9]}}}})


def test_how_it_is_trained_is_part_of_its_identity():
    ids = {compile_arch(looped(given)).arch_id for given in (None, {"sample": "uniform"}, {"gradient_through": 1})}
    assert len(ids) == 3


TOPOLOGIES_THAT_CARRY = ["base", "residual", "anchor", "anchor_star", {"mix": {"of": ["residual", "anchor"]}}]


@pytest.mark.parametrize("start", ["input", "noise"])
@pytest.mark.parametrize("topology", TOPOLOGIES_THAT_CARRY, ids=str)
@pytest.mark.parametrize("schedule", [("token",) * 3, ("phrase", "word", "token")], ids=str)
def test_a_segment_goes_on_from_the_state_of_the_one_before(schedule, topology, start):
    """Three segments are three times the iterations, and gradients pass through the last alone."""
    given = {"schedule": list(schedule), "per": "loop", "recall": "linear", "topology": topology, "start": start}
    if topology == "base" and len({*schedule}) > 1:
        pytest.skip("base reads what no chunk has closed")
    arch = tiny_arch({"graph": {"h": {**given, "iterations": {"segments": 3}}}})
    model = build_model(compile_arch(arch)).eval()
    randomize(model)
    tokens = torch.randint(0, 17, (2, 24))
    calls, carried = [], None
    model.get_submodule("blocks.core").register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for segment in range(1, 4):
        logits, _, carried = model.with_losses(tokens, carried)
        whole = model_under(model, arch, {"h": segment * len(schedule)})[1]
        torch.testing.assert_close(logits, whole(tokens))
        assert not carried["h"].requires_grad
    _, training = model_under(model, arch, {"h": len(schedule)}, {"h": 1})
    torch.testing.assert_close(training.with_losses(tokens, carried)[0], model.with_losses(tokens, carried)[0])
    assert len(calls) == len(schedule) * (3 + 1 + 2 + 3 + 2)


def test_loops_side_by_side_carry_a_state_each():
    """They begin with the same stream, and end with another."""
    over = {"schedule": ["token"], "per": "loop", "iterations": {"segments": 2}}
    loops = {"h": over, "k": {"loop": "core", "in": "x", "topology": "base", **over}}
    arch = tiny_arch({"graph": {**loops, "both": {"join": "sum", "in": ["h", "k"]}, "logits": {"in": "both"}}})
    model = build_model(compile_arch(arch)).eval()
    randomize(model)
    carried = model.with_losses(torch.randint(0, 17, (2, 24)))[2]
    assert set(carried) == {"h", "k"}
    assert not torch.allclose(carried["h"], carried["k"])
