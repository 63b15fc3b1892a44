"""What a loop's state begins with, what moves it, and noise on it."""

import numpy as np
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
        {"topology": {"hyper_connections": {"lanes": 3}}, "norm": "rms"},
        {"topology": "hyper_connections", "schedule": ["phrase", "word", "token"], "per": "level", "step": "add"},
        {"topology": "lstm", "per": "loop", "start": "noise", "recall": "linear"},
        {"topology": "lstm", "schedule": ["phrase", "word", "token"]},
        {"iterations": {"segments": 3}, "topology": "anchor"},
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


@torch.no_grad()
@pytest.mark.parametrize("per", ["iteration", "loop"])
def test_hyper_connections_against_a_literal_reading(per):
    """Lanes that begin alike, are mixed and written to, and read with one lane's factor raised by one."""
    arch = looped(topology={"hyper_connections": {"lanes": 3}}, per=per)
    model = randomize(build_model(compile_arch(arch))).double()
    trace = Trace(model, arch, torch.randint(0, 17, (2, 9)))
    block, parts = model.get_submodule("blocks.core"), dict(model.named_modules())
    x, states = trace.values["x"], trace.loop().states
    lanes = [x.numpy()] * 3

    def read(factors, t):
        own = np.array(factors.tolist()) + np.eye(3)[t % 3 if per == "iteration" or t == 0 else 0]
        return sum(f * lane for f, lane in zip(own, lanes, strict=True))

    state = read(parts["sites.h.start.read"].factors, 0)
    for t in range(4):
        at = f"sites.h.t{t}" if per == "iteration" else "sites.h.all"
        write = parts[f"{at}.write"]
        mixing = np.exp(np.array(write.mix.tolist()).reshape(3, 3) + 3 * np.eye(3))
        for _ in range(20):
            mixing = mixing / mixing.sum(axis=0, keepdims=True)
            mixing = mixing / mixing.sum(axis=1, keepdims=True)
        assert np.allclose(mixing.sum(axis=0), 1, atol=1e-3)
        update = block(torch.from_numpy(state)).numpy()
        lanes = [sum(mixing[i, j] * lanes[j] for j in range(3)) + write.take[i].item() * update for i in range(3)]
        state = read(parts[f"{at}.read"].factors, t + 1)
        torch.testing.assert_close(states[t + 1], torch.from_numpy(state), atol=1e-5, rtol=1e-5)


def test_lanes_grow_apart_in_training():
    """All of them begin as the input: what is learned must tell them from each other, with shared weights too."""
    arch = looped(topology={"hyper_connections": {"lanes": 4}}, per="loop")
    model = build_model(compile_arch(arch))
    optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.randint(0, 17, (8, 24))
    for _ in range(10):
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    take = model.get_submodule("sites.h.all.write").take
    assert len({round(value, 3) for value in take.tolist()}) == 4


@torch.no_grad()
def test_an_lstm_is_pytorchs():
    """The core's update is its input, the loop's state its hidden state; its forget gate is open by one more."""
    arch = looped(topology="lstm")
    model = randomize(build_model(compile_arch(arch))).double()
    states = Trace(model, arch, torch.randint(0, 17, (2, 9))).loop().states
    cell, out = model.get_submodule("sites.h.all.cell"), model.get_submodule("sites.h.all.state")
    theirs = torch.nn.LSTMCell(16, 16).double()
    for name, ours in (("ih", "from_update"), ("hh", "from_state")):
        forget, take, new = getattr(cell, ours).weight.chunk(3)
        getattr(theirs, f"weight_{name}").copy_(torch.cat((take, forget, new, getattr(out, ours).weight)))
    forget, take, new = cell.from_update.bias.chunk(3)
    theirs.bias_ih.copy_(torch.cat((take, forget + 1, new, out.from_update.bias)))
    theirs.bias_hh.zero_()
    block, held = model.get_submodule("blocks.core"), (states[0].reshape(-1, 16),) * 2
    for given in states[1:]:
        held = theirs(block(held[0].view(2, 9, 16)).reshape(-1, 16), held)
        torch.testing.assert_close(given, held[0].view(2, 9, 16))


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
        ({"topology": {"hyper_connections": {"lanes": 1}}}, "graph.h.topology.hyper_connections.lanes"),
        ({"topology": {"lstm": {"lanes": 3}}}, "graph.h.topology.lstm: takes no settings; write topology: lstm"),
        ({"topology": {"lstm": {}}}, "graph.h.topology.lstm: takes no settings; write topology: lstm"),
        ({"topology": {"velocity": {}, "lstm": {}}}, "graph.h.topology: names 2 topologies: velocity, lstm; keep one"),
        ({"topology": {}}, "graph.h.topology: unknown topology"),
    ],
)
def test_what_can_not_be_is_refused(over, told):
    with pytest.raises(SpecError) as caught:
        looped(**over)
    assert told in str(caught.value)
