"""What is measured inside a loop, held to literal computations on small models."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import run_cli, tiny_arch, tiny_data, tiny_study

from builder import build_model, compile_arch
from builder.laws import randomize
from builder.schedules import model_under, under
from searchspace.files import arch_from_data
from studies.probes import stability
from studies.probes.table import probe
from studies.probes.trace import Runner, Trace
from studies.records.reading import read_study

TOPOLOGIES = ["base", "residual", "anchor", "lstm", "hyper_connections", {"mesh": {"slots": 5}}, {"mix": {"of": ["residual", "anchor"], "weights": "dynamic"}}]  # fmt: skip


def looped(schedule=("token",) * 4, *, causal=True, d_model=16, block=None, **loop):
    given = {"schedule": list(schedule), "per": "loop", "topology": "residual", **loop}
    over = {"d_model": d_model, "causal": causal, "graph": {"h": given}, "blocks": {"core": block or {}}}
    arch = tiny_arch(over)
    return arch, randomize(build_model(compile_arch(arch))).double()


def tokens(rows=2, length=24):
    return torch.randint(0, 17, (rows, length), generator=torch.Generator().manual_seed(0))


def traced(arch, model, given=None):
    trace = Trace(model, arch, tokens() if given is None else given)
    return trace, trace.loop()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("schedule", [("token",) * 3, ("phrase", "word", "token")], ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_a_trace_is_the_forward(topology, schedule, causal):
    if topology == "base" and schedule[0] != "token":
        pytest.skip("has no first chunk")
    arch, model = looped(schedule, causal=causal, topology=topology, recall="linear", norm="rms")
    trace, loop = traced(arch, model)
    with torch.no_grad():
        assert torch.equal(trace.logits, model(tokens()))
        norm = model.get_submodule("head").norm
        assert torch.equal(model.get_submodule("head").logits(norm(loop.states[-1])), trace.logits)
    assert len(loop.states) == 4
    assert torch.equal(loop.states[0], model.get_submodule("embed")(tokens()))
    for t in (1, 2, 3):
        torch.testing.assert_close(trace.again(loop, t, loop.states[t - 1]), loop.states[t])
    assert not torch.equal(trace.again(loop, 3, loop.states[1]), loop.states[3])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("recall", [None, "linear", "concat"])
@pytest.mark.parametrize("length", [4, 11, 30])
def test_the_radius_is_the_explicit_jacobians(length, recall, causal):
    """Width 8: 32 rows are computed whole, 88 too; 240 by products."""
    arch, model = looped(d_model=8, causal=causal, recall=recall, block={"norm_place": "post"})
    given = tokens(2, length)
    trace, loop = traced(arch, model, given)
    radii = []
    for row in given:
        one, own = traced(arch, model, row[None])
        jacobian = torch.autograd.functional.jacobian(lambda x, one=one, own=own: one.again(own, 4, x), own.states[3])
        radii.append(np.abs(np.linalg.eigvals(jacobian.reshape(8 * length, 8 * length).numpy())).max())
    assert stability.jacobian_radius(trace, loop) == pytest.approx(np.mean(radii), rel=5e-3)


def test_an_iteration_that_does_nothing():
    arch, model = looped(topology="base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("out.weight"):
                p.zero_()
    trace, loop = traced(arch, model)
    found = {**stability.reachability(trace, loop), **stability.geometry(trace, loop)}
    assert found["step_cosine"] == pytest.approx(1)
    assert found["settles_at"] == 1
    assert found["norm_ratio"] == pytest.approx(1)
    assert found["jacobian_radius"] == pytest.approx(1)
    assert "recall_radius" not in found


def test_reachability_against_numpy():
    arch, model = looped(recall="linear")
    trace, loop = traced(arch, model)
    states = [state.numpy() for state in loop.states]
    cosines = [
        np.mean(np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        for a, b in pairwise(states)
    ]
    found = stability.reachability(trace, loop)
    assert found["step_cosine"] == pytest.approx(cosines[-1])
    assert found["settles_at"] == next((i for i, c in enumerate(cosines, 1) if c > 0.99), np.inf)
    norms = [np.linalg.norm(state, axis=-1).mean() for state in states[1:]]
    assert found["norm_ratio"] == pytest.approx(norms[-1] / norms[0])


@pytest.mark.parametrize(("growth", "stable"), [(0.9, 1.0), (1.01, 1.0), (1.05, 0.0), (1e9, 0.0)])
def test_a_loop_is_stable_if_it_stays_bounded_as_long_as_it_is_tried(growth, stable):
    """A state that is multiplied by a number: 1.01 ** 99 is 2.7, 1.05 ** 99 is 125; the schedule of two tells neither."""
    arch, model = looped(("token",) * 2, topology="base", recall="linear", iterations={"test": [4, 100]})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "recall.input.weight")):
                p.zero_()
            if name.endswith("recall.state.weight"):
                p.copy_(growth * torch.eye(16))
    trace, loop = traced(arch, model)
    found = stability.reachability(trace, loop)
    assert found["stable"] == stable
    whole = model_under(model, arch, {"h": 100})[1]
    runner = Runner(whole, under(arch, {"h": 100}))
    last = runner.states("h")[-1]
    found, kept = runner.lean(tokens(), {last})[last], Trace(whole, under(arch, {"h": 100}), tokens()).values[last]
    torch.testing.assert_close(found, kept, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_between_stages_the_state_is_where_the_next_one_begins():
    arch, model = looped(topology={"runge_kutta": {"tableau": "midpoint"}})
    trace, loop = traced(arch, model)
    block, x = model.get_submodule("blocks.core"), trace.values["x"]
    for t in (1, 3):
        half = x + 0.5 * block(x)
        torch.testing.assert_close(loop.states[t], half)
        x = x + block(half)
        torch.testing.assert_close(loop.states[t + 1], x)
    moved = loop.states[1] + 0.1 * torch.randn_like(loop.states[1])
    torch.testing.assert_close(trace.again(loop, 2, moved), trace.values["x"] + block(moved))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("topology", ["anchor", {"mesh": {"slots": 5}}, "hyper_connections"], ids=str)
def test_a_lean_run_keeps_what_is_asked_for_and_computes_the_same(topology, causal):
    arch, model = looped(("phrase", "word", "token"), topology=topology, recall="linear", causal=causal)
    runner, whole = Runner(model, arch), Trace(model, arch, tokens())
    wanted = {*runner.states("h")[1:], runner.output}
    found = runner.lean(tokens(), wanted)
    assert found.keys() == wanted
    assert all(torch.equal(found[name], whole.values[name]) for name in wanted)


@pytest.mark.parametrize("where", ["loop", "block"])
def test_recall_maps_against_numpy(where):
    arch, model = looped(recall="linear") if where == "loop" else looped(block={"recall": "linear"})
    found = {**stability.input_dependence(*traced(arch, model)), **stability.geometry(*traced(arch, model))}
    state, given = (
        next(p for name, p in model.named_parameters() if name.endswith(f"recall.{part}.weight")).detach().numpy()
        for part in ("state", "input")
    )
    assert found["recall_ratio"] == pytest.approx(np.linalg.norm(state, 2) / np.linalg.norm(given, 2))
    assert found["recall_radius"] == pytest.approx(np.abs(np.linalg.eigvals(state)).max())
    values = np.linalg.svd(state, compute_uv=False)
    assert found["recall_condition"] == pytest.approx(values[0] / values[10])


def test_tokens_that_are_one():
    arch, model = looped()
    trace, loop = traced(arch, model, torch.zeros(2, 1, dtype=torch.long).repeat(1, 9))
    assert stability.input_dependence(trace, loop)["token_cosine"] == pytest.approx(1, abs=0.05)
    trace, loop = traced(arch, model)
    last = loop.states[-1].numpy()
    unit = last / np.linalg.norm(last, axis=-1, keepdims=True)
    pairs = [unit[b, i] @ unit[b, j] for b in range(2) for i in range(24) for j in range(24) if i != j]
    assert stability.input_dependence(trace, loop)["token_cosine"] == pytest.approx(np.mean(pairs))


def test_noise_on_weights_leaves_them_as_they_were():
    arch, model = looped()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trace, loop = traced(arch, model)
    kept = stability.robustness(trace, loop)["noise_kept"]
    assert 0 < kept < 1
    assert kept == stability.robustness(trace, loop)["noise_kept"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_a_loop_has_none():
    plain = {"h": None, "y": {"block": "core", "in": "x"}, "logits": {"head": "lm", "in": "y"}}
    data = tiny_data({"graph": plain})
    arch = arch_from_data({**data, "graph": {name: node for name, node in data["graph"].items() if node}})
    assert Trace(build_model(compile_arch(arch)), arch, tokens()).loop() is None
    assert probe(("geometry",), build_model(compile_arch(arch)), arch, tokens()) == {}


@pytest.mark.parametrize("before", ["block", "loop", "no change"])
def test_a_loop_behind_another(before):
    """What a loop begins with is the last state of the one before, or what stands for its input."""
    first = {"block": {"block": "core", "in": "x"}, "loop": {"loop": "core", "in": "x", "schedule": ["token"], "topology": "base"},
             "no change": {"pool": "token", "in": "x"}}[before]  # fmt: skip
    loop = {"in": "a", "schedule": ["token"] * 4, "topology": "residual", "per": "loop"}
    arch = tiny_arch({"graph": {"a": first, "h": loop}})
    model = randomize(build_model(compile_arch(arch))).double()
    trace, found = traced(arch, model)
    assert len(found.states) == 5
    begun = model.get_submodule("embed")(tokens())
    if before != "no change":
        begun = model.get_submodule("blocks.core")(begun)
    assert torch.equal(found.states[0], begun)
    torch.testing.assert_close(trace.again(found, 4, found.states[3]), found.states[4])


def test_a_study_records_them_and_may_seek_one(tmp_path):
    over = {
        "baseline": [],
        "budget": {"flops_per_token": 1e9},
        "objectives": ["loss", "norm_ratio"],
        "search": {"num_trials": 2},
    }
    file = tiny_study(tmp_path, {**over, "training": {"probes": ["reachability", "geometry"]}})
    run_cli("search", file, "--dir", tmp_path / "run", "--serial")
    records, _, settings = read_study(tmp_path / "run")
    assert len(records) == 2
    for record in records:
        measured = record.rungs[-1].metrics
        assert {"bits_per_byte", "norm_ratio", "jacobian_radius"} <= measured.keys()
        assert record.objectives(settings.objectives)[1] == measured["norm_ratio"]
    plain = {"objectives": ["loss", "norm_ratio"], "training": {"probes": ["reachability"]}}
    assert "has no loop, in which the objective norm_ratio" in " ".join(
        run_cli("check", tiny_study(tmp_path, plain), code=2).split()
    )
    misspelt = tiny_study(tmp_path, {**over, "objectives": ["loss", "norm_rato"]})
    assert "did you mean 'norm_ratio'?" in " ".join(run_cli("check", misspelt, code=2).split())
    said = run_cli("check", tiny_study(tmp_path, over), code=2)
    assert "is measured by the probe reachability" in " ".join(said.split())


def test_a_state_without_bound_counts_as_the_worst():
    arch, model = looped(("token",) * 64, recall="linear")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("recall.state.weight")).mul_(1e30)
    found = probe(("reachability", "input_dependence", "geometry", "robustness"), model, arch, tokens())
    assert (found["step_cosine"], found["norm_ratio"], found["jacobian_radius"]) == (-1.0, 1e30, 1e30)
    assert found["stable"] == 0.0
    assert all(np.isfinite(value) for value in found.values())
