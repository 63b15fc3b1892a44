"""A loop that stops at rest, row by row: its logits are those of the iteration at which it stopped."""

import json
from itertools import pairwise

import pytest
import torch
from helpers import run_cli, tiny_arch

from builder import build_model, compile_arch, estimate, save_bundle
from builder.laws import randomize
from builder.schedules import model_under, under
from searchspace import SpecError
from studies.probes.halting import Halt, HaltingModel
from studies.probes.trace import Trace

TOPOLOGIES = ["residual", "anchor", {"mesh": {"slots": 5}}]


def looped(topology="anchor", schedule=("token",) * 12, **more):
    core = {"recall": "linear", "norm_place": "post"}
    graph = {"p": {"block": "outer", "in": "x"}, "h": {"in": "p", "schedule": list(schedule), "topology": topology, "per": "loop", "norm": "rms", **more},
             "z": {"block": "outer", "in": "h"}, "logits": {"in": "z"}}  # fmt: skip
    arch = tiny_arch({"blocks": {"core": core, "outer": {"layers": 1, "heads": 2}}, "graph": graph})
    return arch, randomize(build_model(compile_arch(arch)))


def tokens(rows=5):
    return torch.randint(0, 17, (rows, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("by", ["state", "logits"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_logits_are_those_of_the_iteration_at_which_a_row_stopped(topology, by):
    arch, model = looped(topology)
    given = tokens()
    states = Trace(model, arch, given).loop().states
    changes = torch.stack([(b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in pairwise(states)])
    each = [model_under(model, arch, {"h": n})[1](given) for n in range(1, 13)]
    if by == "logits":
        logs = torch.stack([logits.log_softmax(-1) for logits in each])
        moved = (logs[1:].exp() * (logs[1:] - logs[:-1])).sum(-1).mean(-1)
        changes = torch.cat((torch.full((1, 5), 9.0), moved))
    threshold = float(changes[2:8].median())
    halting = HaltingModel(model, arch, Halt(by, threshold))
    logits = halting(given)
    for row in range(5):
        stop = next((t for t, change in enumerate(changes[:, row].tolist(), 1) if change < threshold), 12)
        assert halting.used.counts[row] == stop
        torch.testing.assert_close(logits[row], each[stop - 1][row], atol=2e-5, rtol=1e-4)
    assert len(set(halting.used.counts)) > 1, "rows stop where each of them rests"


@torch.no_grad()
def test_never_and_at_once():
    arch, model = looped(schedule=["word", "token"] * 3)
    given = tokens()
    never, at_once = (HaltingModel(model, arch, Halt("state", threshold)) for threshold in (1e-12, 1e8))
    torch.testing.assert_close(never(given), model(given))
    assert never.used.counts == [6] * 5
    torch.testing.assert_close(at_once(given), model_under(model, arch, {"h": 1})[1](given))
    assert at_once.used.counts == [1] * 5


@torch.no_grad()
def test_what_it_costs():
    arch, model = looped()
    halting = HaltingModel(model, arch, Halt("state", 1e-12))
    halting(tokens(1))
    assert (
        halting.told["flops_per_token"]
        == halting.told["worst_flops_per_token"]
        == estimate(compile_arch(arch)).flops_per_token
    )
    halting.used.counts = [3, 5]
    assert halting.told["iterations"] == 4
    assert halting.told["flops_per_token"] == estimate(compile_arch(under(arch, {"h": 4}))).flops_per_token


@torch.no_grad()
def test_by_logits_what_follows_the_loop_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    arch, model = looped()
    halting = HaltingModel(model, arch, Halt("logits", 1e-30))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        halting(torch.zeros(1, arch.seq_len, dtype=torch.long))
    assert halting.told["flops_per_token"] == counter.get_total_flops() / arch.seq_len


@pytest.mark.parametrize("text", ["", "state", "state=0", "state=x", "norm=0.1", "state=-1", "logits=inf", "state=nan"])
def test_what_can_not_be_read_is_refused(text):
    with pytest.raises(SpecError, match=r"write state=0.01, or logits=5e-4"):
        Halt.read(text)


def test_in_eval(tmp_path):
    arch = tiny_arch({"vocab_size": 256, "graph": {"h": {"topology": "anchor", "per": "loop"}}})
    save_bundle(tmp_path / "bundle", arch, randomize(build_model(compile_arch(arch))))
    (tmp_path / "text.txt").write_text("two three five seven " * 50)
    to = ("--data", tmp_path / "text.txt")
    plain = json.loads(run_cli("eval", tmp_path / "bundle", *to, "--json"))
    stopped = json.loads(
        run_cli("eval", tmp_path / "bundle", *to, "--json", "--halt", "state=1e8", "--schedule", "h=9")
    )
    assert plain["halted"] == {}
    assert stopped["halted"]["iterations"] == 1.0
    assert stopped["loss"] != plain["loss"]
    assert "iterations 9, most_iterations 9" in run_cli(
        "eval", tmp_path / "bundle", *to, "--halt", "logits=1e-30", "--schedule", "h=9"
    )
    assert "can't read 'often'" in run_cli("eval", tmp_path / "bundle", *to, "--halt", "often", code=2)
