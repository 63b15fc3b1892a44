"""A loop that stops at rest, row by row: its logits are those of the iteration at which it stopped."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from helpers import run_cli, tiny_arch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builder import build_model, compile_arch, estimate, load_bundle, save_bundle
from builder.halting import Halt, halting, told
from builder.laws import randomize
from builder.schedules import model_under, under
from searchspace import SpecError
from studies.probes.trace import Trace

TOPOLOGIES = ["residual", "anchor", "lstm", "hyper_connections", {"mesh": {"slots": 5}}]


def looped(topology="anchor", schedule=("token",) * 12, *, causal=True, **more):
    core = {"recall": "linear", "norm_place": "post"}
    graph = {"p": {"block": "outer", "in": "x"}, "h": {"in": "p", "schedule": list(schedule), "topology": topology, "per": "loop", "norm": "rms", **more},
             "z": {"block": "outer", "in": "h"}, "logits": {"in": "z"}}  # fmt: skip
    arch = tiny_arch({"causal": causal, "blocks": {"core": core, "outer": {"layers": 1, "heads": 2}}, "graph": graph})
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
    ending = halting(model, arch, Halt(by, threshold))
    logits = ending(given)
    for row in range(5):
        stop = next((t for t, change in enumerate(changes[:, row].tolist(), 1) if change < threshold), 12)
        assert ending.iterations_used[row] == stop
        torch.testing.assert_close(logits[row], each[stop - 1][row], atol=2e-5, rtol=1e-4)
    assert len(set(ending.iterations_used)) > 1, "rows stop where each of them rests"
    torch.testing.assert_close(ending.train()(given), model(given))  # in training it runs all of them


@torch.no_grad()
@pytest.mark.parametrize("by", ["state", "logits"])
@pytest.mark.parametrize(("tableau", "stages"), [("midpoint", 2), ("rk4", 4)])
def test_a_step_of_several_stages_ends_whole(tableau, stages, by):
    """Between them the state is only where the next stage begins."""
    arch, model = looped({"runge_kutta": {"tableau": tableau}}, norm=None)
    given, whole = tokens(), range(stages, 13, stages)
    each = {n: model_under(model, arch, {"h": n})[1](given) for n in whole}
    for threshold in torch.logspace(1, -6, 60).tolist():  # the first by which rows differ
        ending = halting(model, arch, Halt(by, threshold))
        logits = ending(given)
        if len(set(ending.iterations_used)) > 1:
            break
    assert set(ending.iterations_used) <= {*whole}
    for row, used in enumerate(ending.iterations_used):
        torch.testing.assert_close(logits[row], each[used][row], atol=2e-5, rtol=1e-4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        halting(model, arch, Halt(by, 1e-30))(torch.zeros(1, arch.seq_len, dtype=torch.long))
    assert told(arch, Halt(by, 1e-30), [12])["flops_per_token"] == counter.get_total_flops() / arch.seq_len


@torch.no_grad()
def test_never_and_at_once():
    arch, model = looped(schedule=["word", "token"] * 3)
    given = tokens()
    never, at_once = (halting(model, arch, Halt("state", threshold)) for threshold in (1e-12, 1e8))
    torch.testing.assert_close(never(given), model(given))
    assert never.iterations_used == [6] * 5
    torch.testing.assert_close(at_once(given), model_under(model, arch, {"h": 2})[1](given))
    assert at_once.iterations_used == [2] * 5, "a coarse iteration is no place to stop"


@torch.no_grad()
@pytest.mark.parametrize("by", ["state", "logits"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_tell_when_a_row_rests(side, causal, by):
    """Each row alone, and in a batch with longer ones, whatever stands in the padding."""
    arch, model = looped(schedule=["word", "token"] * 6, causal=causal)
    rows = [tokens(1)[0, :length] for length in (20, 13, 8)]
    for threshold in torch.logspace(0, -6, 40).tolist():  # the first by which rows differ
        ending, alone, used = halting(model, arch, Halt(by, threshold)), [], []
        for row in rows:
            alone.append(ending(row[None])[0])
            used += ending.iterations_used
        if len(set(used)) > 1:
            break
    batch, mask = torch.full((3, 20), 5), torch.zeros(3, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(20 - len(row), None) if side == "left" else slice(len(row))
        batch[i, at], mask[i, at] = row, 1
    together = ending(batch, mask)
    assert ending.iterations_used == used
    assert len(set(used)) > 1
    for i in range(3):
        torch.testing.assert_close(together[i][mask[i] == 1], alone[i], atol=2e-5, rtol=1e-4)


def test_it_goes_on_without_a_cache():
    arch, model = looped(schedule=["token"] * 6)
    ending = halting(model, arch, Halt("state", 1e-12))
    with pytest.raises(ValueError, match="its loop h ends where the whole row has come to rest"):
        ending.decode_state(1)
    given = tokens(2)
    assert torch.equal(ending.generate(given, 5, temperature=0.0), model.generate(given, 5, temperature=0.0))


def test_what_is_read_after_an_iteration_that_may_not_come_is_refused():
    """The block that stands outside computes what the first iteration does, so it is computed there."""
    graph = {"h": {"schedule": ["token"] * 3, "per": "loop", "topology": "residual"}, "o": {"block": "core", "in": "x"},
             "z": {"join": "sum", "in": ["h", "o"]}, "logits": {"in": "z"}}  # fmt: skip
    arch = tiny_arch({"graph": graph})
    with pytest.raises(SpecError, match="'h_t0_block' is of an iteration, and read after the loop"):
        halting(build_model(compile_arch(arch)), arch, Halt("state", 0.1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["states", "finish", "carried", "halting"])
def test_nodes_may_be_called_what_the_code_uses(name):
    graph = {name: {"block": "outer", "in": "x"}, "h": {"in": name, "schedule": ["token"] * 4, "per": "loop"}}
    blocks = {"outer": {"layers": 1, "heads": 2}}
    arch = tiny_arch({"blocks": blocks, "graph": {**graph, "h": {**graph["h"], "iterations": {"segments": 2}}}})
    model = randomize(build_model(compile_arch(arch)))
    torch.testing.assert_close(halting(model, arch, Halt("state", 1e-30))(tokens()), model(tokens()))
    torch.testing.assert_close(model.with_losses(tokens()).logits, model(tokens()))


@torch.no_grad()
def test_what_it_costs():
    arch, _ = looped()
    never = told(arch, Halt("state", 1e-12), [12])
    whole = estimate(compile_arch(arch)).flops_per_token
    assert never["flops_per_token"] == never["worst_flops_per_token"] == whole
    some = told(arch, Halt("state", 0.1), [3, 5])
    assert some["iterations"] == 4
    assert some["flops_per_token"] == pytest.approx(estimate(compile_arch(under(arch, {"h": 4}))).flops_per_token)


@torch.no_grad()
@pytest.mark.parametrize("by", ["state", "logits"])
@pytest.mark.parametrize("schedule", [["word", "token", "token", "token"], ["phrase", "word", "token"] * 3], ids=str)
def test_the_price_is_of_the_levels_that_ran(schedule, by):
    """Each place to stop, counted: the first by which a row rests, tightened until it does not."""
    arch, model = looped(schedule=schedule)
    given, seen = torch.randint(0, 17, (1, arch.seq_len), generator=torch.Generator().manual_seed(1)), set()
    for threshold in torch.logspace(3, -6, 60).tolist():
        ending = halting(model, arch, Halt(by, threshold))
        ending(given)
        (used,) = ending.iterations_used
        assert schedule[used - 1] == "token"
        if used in seen:
            continue
        seen.add(used)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            ending(given)
        found = told(arch, Halt(by, threshold), [used])
        assert found["flops_per_token"] == found["worst_flops_per_token"] == counter.get_total_flops() / arch.seq_len
    assert len(seen) > 1


@torch.no_grad()
def test_by_logits_what_follows_the_loop_counts():
    arch, model = looped()
    ending = halting(model, arch, Halt("logits", 1e-30))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ending(torch.zeros(1, arch.seq_len, dtype=torch.long))
    found = told(arch, Halt("logits", 1e-30), ending.iterations_used)
    assert found["flops_per_token"] == counter.get_total_flops() / arch.seq_len


@pytest.mark.parametrize("text", ["", "state", "state=0", "state=x", "norm=0.1", "state=-1", "logits=inf", "state=nan"])
def test_what_can_not_be_read_is_refused(text):
    with pytest.raises(SpecError, match=r"write state=0.01, logits=5e-4, or none"):
        Halt.read(text)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halting")
    arch = tiny_arch({"vocab_size": 256, "graph": {"h": {"topology": "anchor", "per": "loop"}}})
    save_bundle(folder / "bundle", arch, randomize(build_model(compile_arch(arch))), facts={"data": {"text": "bytes"}})
    (folder / "text.txt").write_text("two three five seven " * 50)
    return folder / "bundle"


def test_in_eval(bundle):
    to = ("--data", bundle.parent / "text.txt")
    plain = json.loads(run_cli("eval", bundle, *to, "--json"))
    stopped = json.loads(run_cli("eval", bundle, *to, "--json", "--halt", "state=1e8", "--schedule", "h=9"))
    assert plain["halted"] == {}
    assert stopped["halted"]["iterations"] == 3.0
    assert stopped["loss"] == plain["loss"]
    assert "iterations 9, most_iterations 9" in run_cli(
        "eval", bundle, *to, "--halt", "logits=1e-30", "--schedule", "h=9"
    )
    assert "can't read 'often'" in run_cli("eval", bundle, *to, "--halt", "often", code=2)


def test_in_generate(bundle):
    given = ("generate", bundle, "-n", "12", "--prompt", "two ", "--temperature", "0")
    said = run_cli(*given, "--schedule", "h=9")
    never = run_cli(*given, "--halt", "state=1e-12", "--schedule", "h=9")
    assert never.startswith(said)
    assert "times for a token in the mean, 9 at most" in never
    assert "the loop ran 6.0 times" in run_cli(*given, "--halt", "logits=1e8", "--schedule", "h=9")
    told = run_cli(*given, "--halt", "state=0.1", code=2)
    assert "could only stop at its end" in told
    assert "--schedule h=12" in told


def test_in_bundles_and_exports(bundle, tmp_path):
    """What is exported to end at rest does so wherever it is run, and says when."""
    transformers = pytest.importorskip("transformers")
    long = ("--schedule", "h=9", "--halt", "state=0.9")
    assert "halt: state=0.9" in run_cli("export", bundle, "-o", tmp_path / "ends", *long)
    ends, given = (
        load_bundle(tmp_path / "ends"),
        torch.randint(0, 256, (12, 20), generator=torch.Generator().manual_seed(0)),
    )
    assert str(ends.halt) == "state=0.9"
    with torch.no_grad():
        logits = ends.model(given)
        assert min(used := ends.model.iterations_used) < 9
        run_cli("export", tmp_path / "ends", "--format", "hf", "-o", tmp_path / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
        torch.testing.assert_close(theirs(given).logits, logits)
        assert theirs.model.halting.used == used
        mask = torch.ones_like(given)
        mask[0, :8] = mask[1, 12:] = 0
        padded = theirs(given, attention_mask=mask).logits
        torch.testing.assert_close(padded[mask == 1], ends.model(given, mask)[mask == 1])
    assert theirs.config.halt == "state=0.9"
    longer = ends.under({"h": 12})
    assert longer.halt == ends.halt
    longer.model(given)
    assert all(a == b for a, b in zip(longer.model.iterations_used, used, strict=True) if b < 9)
    with pytest.raises(ValueError, match="not of a loop that ends at rest"):
        theirs(given, output_hidden_states=True)
    assert "runs all iterations" in run_cli(
        "export", tmp_path / "ends", "--format", "torch", "-o", tmp_path / "x.pt2", code=2
    )
    text = ("--data", bundle.parent / "text.txt")
    assert "--halt none" in run_cli("eval", tmp_path / "ends", *text, "--schedule", "h=1", code=2)
    assert "iterations" not in run_cli("eval", tmp_path / "ends", *text, "--halt", "none")
    run_cli("export", tmp_path / "ends", "--halt", "none", "-o", tmp_path / "whole")
    assert load_bundle(tmp_path / "whole").halt is None
    assert "is given 2 times" in run_cli("eval", bundle, *text, "--halt", "state=1", "--halt", "state=2", code=2)
    assert "is what is read" in run_cli("export", bundle, *long, "-o", bundle, code=2)
    run_cli("export", tmp_path / "whole", *long)
    assert load_bundle(tmp_path / "whole").halt is None, "what is read stays as it is"
    assert load_bundle(tmp_path / "whole-changed", halt="none").halt is None
    assert load_bundle(tmp_path / "whole", schedules="h=9", halt="state=0.9").halt == Halt("state", 0.9)
    with pytest.raises(ValueError, match="input_ids: has no tokens"):
        theirs(given[:, :0])
    assert "ends where a row has come to rest (state=0.9)" in (tmp_path / "hf/README.md").read_text()
    with pytest.raises(ValueError, match=r"config.halt: is state=0.1, this model's is state=0.9 for good"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, halt="state=0.1")
    assert "all its iterations are shown" in run_cli("probe", tmp_path / "ends", *text, "--tokens", 48)
    by_logits = ("--format", "hf", "-o", tmp_path / "y", "--halt", "logits=0.1", "--schedule", "h=9")
    assert "stop it by its state" in run_cli("export", bundle, *by_logits, code=2)
    assert (
        "iterations"
        in json.loads(run_cli("eval", tmp_path / "ends", "--data", bundle.parent / "text.txt", "--json"))["halted"]
    )


@pytest.mark.parametrize("given", [("stat", 0.1), ("state", -1), ("state", float("nan")), ("state", "0.1"), ("state",)])
def test_a_rule_that_tells_nothing_is_refused(given):
    with pytest.raises(SpecError, match=r"tells nothing; write state=0.01, logits=5e-4, or none"):
        Halt(*given)


def test_a_manifest_that_ends_otherwise_is_refused(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "odd")
    file = tmp_path / "odd/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "halt": "often"}))
    with pytest.raises(SpecError, match=r"manifest.json: halt: can't read 'often'"):
        load_bundle(tmp_path / "odd")
