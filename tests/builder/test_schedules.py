"""One set of weights under other schedules: what that asks of them, and that it is the model one would have built."""

import pytest
import torch
from helpers import run_cli, tiny_arch, tiny_data

from builder import build_model, compile_arch, estimate, load_bundle, save_bundle
from builder.laws import breaches, randomize, truth
from builder.schedules import model_under, read_schedules, under
from searchspace import SpecError
from searchspace.plain import dump_yaml

TOPOLOGIES = ["anchor", "lstm", "hyper_connections", {"mesh": {"slots": 5}}, {"mix": {"of": ["residual", "anchor"], "weights": "dynamic"}},
              {"mix": {"of": ["residual", "anchor"], "weights": "static"}}, {"runge_kutta": {"tableau": "midpoint", "learned": True}}]  # fmt: skip
SCHEDULE = ["phrase", "word", "token", "word"]


def looped(per, topology="anchor", schedule=SCHEDULE, **more):
    loop = {
        "schedule": schedule,
        "topology": topology,
        "per": per,
        "step": "add",
        "recall": "linear",
        "norm": "rms",
        **more,
    }
    return tiny_arch({"levels": {"word": {"pool": "linear"}, "phrase": {"pool": "attention"}}, "graph": {"h": loop}})


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("per", ["level", "loop"])
def test_shared_parts_hold_every_law_and_cost_what_they_are(per, topology):
    arch = looped(per, topology)
    assert list(breaches(arch, slow=False)) == []
    assert estimate(compile_arch(arch)).params < estimate(compile_arch(looped("iteration", topology))).params
    assert (estimate(compile_arch(arch)).params, estimate(compile_arch(arch)).flops) == truth(compile_arch(arch))


def test_who_shares_what():
    def owners(per):
        return {
            node.name: node.owner
            for node in compile_arch(looped(per, {"mesh": {"slots": 5}})).nodes
            if ".t" in node.name
        }

    level, loop = owners("level"), owners("loop")
    assert level["h.t1.pool"] == level["h.t3.pool"] == loop["h.t1.pool"] == "sites.h.chunk4.pool_linear"
    assert level["h.t1.write"] == level["h.t3.write"] != level["h.t0.write"]
    assert loop["h.t0.write"] == loop["h.t3.write"] == "sites.h.all.write"
    assert loop["h.t0.step"] == "sites.h.all.step"


@torch.no_grad()
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(
    "given", [8, 2, ["word", "word"], ["token", "phrase", "word", "phrase", "word", "token"]], ids=str
)
def test_a_model_under_another_schedule_is_the_one_built_from_it(topology, given):
    arch = looped("loop", topology)
    model = randomize(build_model(compile_arch(arch)))
    other, view = model_under(model, arch, {"h": given})
    levels = [use.level for use in other.graph["h"].schedule]
    assert levels == ((SCHEDULE * 2)[:given] if isinstance(given, int) else given)
    built = build_model(compile_arch(looped("loop", topology, levels)), seed=None)
    built.load_state_dict(view.state_dict())
    tokens = torch.randint(0, 17, (2, 20))
    assert torch.equal(view(tokens), built.eval()(tokens))
    assert {id(p) for p in view.parameters()} <= {id(p) for p in model.parameters()}
    state = view.decode_state(2)
    steps = [view.prefill(tokens[:, :9], state), *[view.decode(tokens[:, i], state) for i in range(9, 20)]]
    torch.testing.assert_close(torch.stack(steps, 1), view(tokens)[:, 8:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arch", "given", "told"),
    [
        (
            looped("iteration"),
            8,
            "h.t4.* is of one iteration alone, and none was trained for another; train with per: level",
        ),
        (looped("loop", "mesh"), 8, "goes by the number of iterations; give mesh.slots a number"),
        (looped("level", schedule=["word"]), ["phrase"], "belongs to a level that was not trained"),
        (looped("loop"), 0, "0 are no iterations"),
        (looped("loop"), ["nowhere"], "no level is called 'nowhere'"),
        (
            tiny_arch({"residual_scale": "inverse_depth", "graph": {"h": {"per": "loop"}}}),
            9,
            "goes by the number of layers, 3 when",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arch, given, told):
    import re

    with pytest.raises(SpecError, match=re.escape(told).replace(r"\*", r"\S*")):
        model_under(build_model(compile_arch(arch)), arch, {"h": given})


def test_what_a_command_line_says():
    arch = looped("loop")
    assert read_schedules(["8"], arch) == read_schedules(["h=8"], arch) == {"h": 8}
    assert read_schedules(["word, token"], arch) == {"h": ["word", "token"]}
    two = tiny_arch({"graph": {"g": {"loop": "core", "in": "x", "schedule": ["token"]}, "h": {"in": "g"}}})
    with pytest.raises(SpecError, match="names no loop, and there are 2; write one of: h=8, g=8"):
        read_schedules(["8"], two)
    with pytest.raises(SpecError, match="there is no loop 'k'"):
        under(arch, {"k": 3})


def test_from_a_bundle_in_every_command(tmp_path):
    arch = tiny_arch(
        {**tiny_data(), "vocab_size": 256, "graph": {"h": {"topology": {"mesh": {"slots": 4}}, "per": "loop"}}}
    )
    save_bundle(tmp_path / "bundle", arch, randomize(build_model(compile_arch(arch))), facts={"metrics": {"loss": 1.0}})
    (tmp_path / "text.txt").write_text("two three five seven " * 50)
    scores = {
        given: run_cli("eval", tmp_path / "bundle", "--data", tmp_path / "text.txt", *given)
        for given in ((), ("--schedule", "h=3"), ("--schedule", "h=9"), ("--schedule", "h=word,token"))
    }
    same, again, *others = scores.values()
    assert same == again
    assert len({same, *others}) == 3
    assert run_cli("generate", tmp_path / "bundle", "-n", 5, "--schedule", 6)
    long = load_bundle(tmp_path / "bundle", schedules=["6"])
    run_cli("export", tmp_path / "bundle", "--schedule", "h=6", "-o", tmp_path / "longer")
    written = load_bundle(tmp_path / "longer")
    tokens = torch.randint(0, 256, (1, 20))
    assert torch.equal(written.model(tokens), long.model(tokens))
    assert written.manifest["trained"] == {"trained_arch_id": compile_arch(arch).arch_id, "metrics": {"loss": 1.0}}
    assert "metrics" not in written.manifest
    assert "is a bundle already" in run_cli("export", tmp_path / "bundle", code=2)


def test_an_export_for_transformers_is_of_the_new_schedule(tmp_path):
    arch = tiny_arch({"graph": {"h": {"per": "loop"}}})
    save_bundle(tmp_path / "bundle", arch, randomize(build_model(compile_arch(arch))))
    said = run_cli("export", tmp_path / "bundle", "--format", "hf", "--schedule", "h=5", "-o", tmp_path / "hf")
    assert "under h=5" in " ".join(said.split())
    assert "h_t4_block" in (tmp_path / "hf/modeling_spiralformer.py").read_text()


def test_a_space_may_ask_who_shares(tmp_path):
    (tmp_path / "space.yaml").write_text(
        dump_yaml(tiny_data({"graph": {"h": {"per": {"choice": ["iteration", "level", "loop"]}}}}))
    )
    assert "3 candidates" in run_cli("count", tmp_path / "space.yaml")


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["=3"], "'=3' names no loop; choose one of: h"),
        (["h=3", "h=4"], "says twice how 'h' runs; keep one"),
        (["3", "h=4"], "says twice how 'h' runs"),
        (["h=-3"], "'-3' is no number of iterations; write e.g. h=8, or h=LEVEL,LEVEL"),
        (["h=1.5"], "'1.5' is no number of iterations"),
        (["h=inf"], "'inf' is no number of iterations"),
    ],
)
def test_what_can_not_be_read_is_answered(texts, told):
    with pytest.raises(SpecError) as caught:
        read_schedules(texts, tiny_arch())
    assert told in str(caught.value)
