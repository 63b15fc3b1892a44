"""What a loop's state begins with, what moves it, and noise on it."""

import pytest
import torch
from helpers import tiny_arch

from builder import build_model, compile_arch
from builder.laws import breaches, randomize
from searchspace import SpecError
from studies.probes.trace import Trace


def looped(**more):
    return tiny_arch({"graph": {"h": {"schedule": ["token"] * 4, "topology": "residual", "per": "loop", **more}}})


@pytest.mark.parametrize(
    "over",
    [
        {"topology": {"velocity": {"momentum": 0.7}}},
        {"topology": "velocity", "schedule": ["phrase", "word", "token"]},
        {"noise": 0.3},
        {"noise": 0.3, "topology": {"mesh": {"slots": 4}}, "schedule": ["word", "token"]},
        {"start": "noise", "recall": "concat"},
        {"start": "noise", "topology": "anchor", "schedule": ["token", "token"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_laws(over, causal):
    arch = tiny_arch({"causal": causal, "graph": {"h": {"topology": "residual", "schedule": ["token"] * 3, **over}}})
    assert list(breaches(arch, slow=False)) == []


@torch.no_grad()
def test_a_velocity_is_a_heavy_ball():
    arch = looped(topology={"velocity": {"momentum": 0.7}})
    model = randomize(build_model(compile_arch(arch))).double()
    states = Trace(model, arch, torch.randint(0, 17, (2, 9))).loop().states
    block, state, velocity = model.get_submodule("blocks.core"), states[0], 0
    for given in states[1:]:
        velocity = 0.7 * velocity + block(state)
        state = state + velocity
        torch.testing.assert_close(given, state)


def test_without_momentum_it_is_residual():
    tokens = torch.randint(0, 17, (2, 9))
    logits = [
        randomize(build_model(compile_arch(looped(topology=topology))))(tokens)
        for topology in ({"velocity": {"momentum": 0.0}}, "residual")
    ]
    assert torch.equal(*logits)


@torch.no_grad()
def test_noise_is_of_training_alone():
    model = randomize(build_model(compile_arch(looped(noise=0.3))))
    plain = randomize(build_model(compile_arch(looped())))
    tokens = torch.randint(0, 17, (2, 9))
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(0)
    first = model(tokens)
    assert not torch.equal(first, model(tokens))
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens))


@torch.no_grad()
def test_a_random_start_is_normal_in_training_and_zero_after():
    arch = looped(start="noise", recall="concat")
    model = randomize(build_model(compile_arch(arch)))
    tokens = torch.zeros(64, 24, dtype=torch.long)
    assert not Trace(model, arch, tokens).values["h_start"].any()
    drawn = Trace(model.train(), arch, tokens).values["h_start"]
    assert abs(drawn.mean()) < 0.02
    assert drawn.std() == pytest.approx(0.993, abs=0.02)
    assert drawn.abs().max() <= 3


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"start": "noise"}, "noise leaves nothing of the input in the loop; give it a recall, or topology: anchor"),
        ({"start": "noise", "topology": "mesh"}, "noise has no meaning with topology mesh"),
        ({"noise": -1}, "graph.h.noise"),
        ({"topology": {"velocity": {"momentum": 1.5}}}, "graph.h.topology.velocity.momentum"),
    ],
)
def test_what_can_not_be_is_refused(over, told):
    with pytest.raises(SpecError) as caught:
        looped(**over)
    assert told in str(caught.value)
