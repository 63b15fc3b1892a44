"""Parametrizations: nothing changes at the base, activations keep their size away from it, rates follow roles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TOPOLOGIES, run_cli, tiny_arch, tiny_data

from builder import build_model, compile_arch, estimate
from builder.parametrization import READOUTS, factors_of
from searchspace import SpecError, load_arch
from searchspace.arch import BaseSpec
from searchspace.files import arch_from_data
from studies.commands.coordinates import repeated
from studies.scale.sizes import scaled
from studies.sections import SizeConfig, TrainingConfig
from studies.training.coordinates import slopes
from studies.training.recipe import Recipe, peak_rate, recipe_of, size_of
from studies.training.trainer import make_optimizers


def under(arch, kind, d_model=None, layers=None):
    base = {
        "standard": None,
        "mup": BaseSpec(d_model=d_model or arch.d_model),
        "completep": BaseSpec(d_model=d_model or arch.d_model, layers=layers or compile_arch(arch).num_layers),
    }[kind]
    return replace(arch, parametrization=kind, base=base)


def optimizer_of(arch, **over):
    graph = compile_arch(arch)
    model = build_model(graph)
    config = TrainingConfig(**{"tokens": 1.0} | over)
    return model, make_optimizers(model, config, Recipe(64, 0.01, 0.95, 1.0), factors_of(model, graph))


@pytest.mark.parametrize("kind", ["mup", "completep"])
@pytest.mark.parametrize("scale", ["none", "inverse_sqrt_depth", "inverse_depth"])
def test_at_the_base_nothing_changes(kind, scale):
    arch = tiny_arch({"residual_scale": scale})
    plain, other = compile_arch(arch), compile_arch(under(arch, kind))
    assert other.branch_scale == plain.branch_scale
    weights = [build_model(graph, seed=3).state_dict() for graph in (plain, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (_, (standard,)), (_, (carried,)) = optimizer_of(arch), optimizer_of(under(arch, kind))
    for ours, theirs in zip(standard.param_groups, carried.param_groups, strict=True):
        assert [ours[k] for k in ("lr", "weight_decay", "eps")] == [theirs[k] for k in ("lr", "weight_decay", "eps")]
    assert plain.arch_id != other.arch_id  # grown, they part


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_readouts_are_what_does_not_grow_with_width(topology):
    levels = {"word": {"chunk": 4, "pool": "self_aggregate"}, "phrase": {"chunk": 8, "pool": "linear"}}
    arch = tiny_arch({"levels": levels, "graph": {"h": {"topology": topology, "schedule": ["phrase", "word"] * 2}}})
    narrow, wide = (build_model(compile_arch(scaled(arch, SizeConfig(d_model=d))), device="meta") for d in (16, 48))
    other = dict(wide.named_modules())
    seen = set()
    for path, module in narrow.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert other[path].in_features == 3 * module.in_features or path.endswith("ffn.branch.out")
            seen.add(path)
            assert (other[path].out_features == module.out_features) == (path.rpartition(".")[2] in READOUTS), path
    assert any(path.endswith("logits") for path in seen)


def test_rates_and_decay_go_by_role():
    arch = under(tiny_arch(), "completep", d_model=4, layers=1)
    model, (optimizer,) = optimizer_of(arch, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"], group["eps"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found["embed.weight"] == pytest.approx((0.01, 0.1, 1e-8))
    assert found["blocks.core.layers.0.attn.branch.qkv.weight"] == pytest.approx((0.01 / 4, 0.4, 1e-8 / 12))
    assert found["head.logits.weight"] == pytest.approx((0.01 / 4, 0.4, 1e-8))
    assert {found[name] for name in found if name.endswith("norm.weight")} == {(0.01, 0.0, 1e-8)}
    _, (adamw, muon) = optimizer_of(arch, optimizer="muon", weight_decay=0.1)
    assert muon.param_groups[0]["lr"] == pytest.approx(3e-3 / 2)
    assert muon.param_groups[0]["weight_decay"] == pytest.approx(0.2)
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.01)


def test_initial_logits_shrink_and_hidden_sizes_stay():
    arch = load_arch("three_layers")
    for kind, ratio in (("standard", 1.0), ("mup", 0.25**0.5)):
        stds = []
        for width in (32, 128):
            grown = scaled(under(arch, kind, d_model=32), SizeConfig(d_model=width))
            model = build_model(compile_arch(grown), seed=0)
            tokens = torch.arange(128)[None]
            stds.append(model(tokens).std().item())
        assert stds[1] / stds[0] == pytest.approx(ratio, rel=0.15)


def test_the_branch_factor_goes_by_uses():
    arch = under(replace(load_arch("three_layers"), residual_scale="inverse_sqrt_depth"), "completep", layers=3)
    assert compile_arch(arch).branch_scale == pytest.approx(3**-0.5)
    assert compile_arch(repeated(arch, 7)).branch_scale == pytest.approx(3**-0.5 * 3 / 9)
    assert compile_arch(scaled(arch, SizeConfig(d_model=32, depth=4))).branch_scale == pytest.approx(3**-0.5 / 4)


def test_a_rate_by_size_is_the_bases():
    arch = under(tiny_arch(), "mup", d_model=8)
    cost = estimate(compile_arch(arch))
    grown = recipe_of(TrainingConfig(tokens=4e6), arch, cost)
    assert grown.lr == peak_rate(round(size_of(arch, cost) / 4), 1e6)


def power(found, part=""):
    slopes_ = [abs(each.slope) for each in found if each.step > 0 and part in each.site]
    return np.median(slopes_), np.percentile(slopes_, 90)


def test_coordinates_are_flat_over_width_under_mup_alone():
    arch = load_arch("three_layers", ["seq_len=48", "graph.h.schedule=[word,token]", "graph.h.topology=mesh"])
    widths = (32, 64, 128, 256)
    standard, mup = (
        power(slopes({w: scaled(under(arch, kind, d_model=32), SizeConfig(d_model=w)) for w in widths}, lr=0.01, seeds=2))
        for kind in ("standard", "mup")
    )  # fmt: skip
    assert standard[0] > 0.2
    assert standard[1] > 0.5
    assert mup[0] < 0.03
    assert mup[1] < 0.1


def test_coordinates_are_flat_over_uses_under_completep_alone():
    arch = load_arch("three_layers", ["seq_len=48", "residual_scale=none"])
    standard, completep = (
        power(slopes({n: repeated(under(arch, kind, layers=3), n) for n in (1, 2, 4, 8)}, lr=0.01, seeds=2), "coda")
        for kind in ("standard", "completep")
    )
    assert completep[0] < 0.03
    assert standard[0] > 3 * completep[0]


def test_call_sites_are_told_apart():
    arch = load_arch("three_layers", ["seq_len=32", "graph.h.schedule=[token,token,token]"])
    found = {each.site for each in slopes({1.0: arch, 2.0: arch}, lr=0.01, seeds=1, steps=(0,))}
    assert {"blocks.core#0", "blocks.core#1", "blocks.core#2", "blocks.core#-1", "blocks.coda#0"} <= found
    assert "blocks.coda#1" not in found


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"parametrization": "mup"}, "base: is missing"),
        ({"base": {"d_model": 8}}, "base: has no meaning"),
        ({"parametrization": "completep", "base": {"d_model": 8}}, "base.layers: is missing"),
        ({"parametrization": "mup", "base": {"d_model": 8, "layers": 2}}, "base.layers: has no meaning"),
        ({"parametrization": "mup", "base": {"d_model": 8}, "tie_embeddings": True}, "tie_embeddings"),
        ({"parametrization": "mupp", "base": {"d_model": 8}}, "did you mean 'mup'"),
    ],
)
def test_what_is_wrong_is_said(over, says):
    with pytest.raises(SpecError) as error:
        arch_from_data(tiny_data(over))
    assert says in str(error.value)


def test_the_command():
    args = ["three_layers", "seq_len=32", "--lr", "0.01", "--seeds", "1"]
    text = " ".join(run_cli("coordinates", *args, "--widths", "16,32").split())
    assert "sizes of activations go with widths" in text
    assert "standard parametrization" in text
    text = run_cli("coordinates", *args, "--uses", "1,2")
    assert "blocks.core" not in text
    assert "blocks.coda" in text
    for wrong, says in (
        (["--widths", "16"], "alone has no slope"),
        (["--widths", "16,x"], "can't read"),
        (["--widths", "16,32", "--uses", "1,2"], "either widths or uses"),
        ([], "either widths or uses"),
    ):
        assert says in run_cli("coordinates", *args, *wrong, code=2)
    assert "has no loop" in run_cli("coordinates", "plain_4", "--uses", "1,2", code=2)
