"""Frontend and passes: expansion, offsets, canonical form, and that rewrites keep the numbers."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from helpers import ARCHITECTURES, ROOT, tiny_arch

from builder import build_model, compile_arch
from builder.graph.ir import Level
from builder.graph.passes import PASSES, drop_identities_pass, merge_duplicates_pass, run_passes
from builder.graph.unroll import lower_arch
from builder.laws import randomize
from searchspace import SpecError, load_arch, load_space

GOLDEN = ROOT / "tests/builder/golden"


@pytest.mark.parametrize(
    "file", [p for p in ARCHITECTURES if p.stem.endswith(("small", "160m_mesh", "160m_b"))], ids=lambda p: p.stem
)
def test_text_form_is_stable(file, request):
    """Run with ``--update-golden`` after a deliberate change, and read the difference."""
    golden = GOLDEN / f"{file.stem}.txt"
    text = compile_arch(load_arch(file)).to_text()
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_loop_writes_itself_out():
    graph = compile_arch(tiny_arch())
    names = [node.name for node in graph.nodes]
    assert names == [
        "x", "h.t0.pool", "h.t0.block", "h.t0.upscale", "h.t0.join", "h.t1.pool", "h.t1.block", "h.t1.upscale",
        "h.t1.join", "h.t2.block", "h.t2.join", "logits",
    ]  # fmt: skip
    assert [n.owner for n in graph.nodes if n.op == "block"] == ["blocks.core"] * 3


def test_mesh_has_a_transitional_write_and_read():
    graph = compile_arch(tiny_arch({"graph": {"h": {"topology": "mesh"}}}))
    ops = [node.op for node in graph.nodes]
    assert (ops.count("write"), ops.count("read")) == (4, 4)  # iterations + 1
    assert graph.by_name()["h.memory"].attr("slots", int) == 6  # iterations + 3


def test_auto_offset_is_half_a_chunk_or_the_nearest_that_nests():
    def level(name, over):
        return next(n.level for n in compile_arch(tiny_arch(over)).nodes if n.name == name)

    assert level("h.t0.pool", {}) == Level(8, 4)
    nested = {
        "h": None,
        "a": {"pool": "word", "in": "x"},
        "b": {"pool": "phrase", "in": "a"},
        "c": {"upscale": "word", "in": "b"},
        "d": {"join": "sum", "in": ["c", "a"]},
        "e": {"upscale": "token", "in": "d"},
        "y": {"join": "sum", "in": ["e", "x"]},
        "logits": {"head": "lm", "in": "y"},
    }
    assert level("a", {"graph": nested}) == Level(4, 2)
    assert level("b", {"graph": nested}) == Level(8, 2)  # 2 and 6 nest; 2 is the lower of the two nearest to 4
    assert level("b", {"graph": nested, "levels": {"word": {"offset": 1}}}) == Level(8, 5)
    assert level("a", {"graph": nested, "levels": {"phrase": {"offset": 5}}}) == Level(4, 1)
    used = {**nested, "b": {"pool": {"level": "phrase", "offset": 7}, "in": "a"}}
    assert level("a", {"graph": used}) == Level(4, 3)
    with pytest.raises(SpecError, match="does not divide"):
        level("b", {"graph": nested, "levels": {"phrase": {"chunk": 10, "offset": 2}}})


def test_arch_id_ignores_names_and_written_defaults():
    plain = compile_arch(tiny_arch()).arch_id
    renamed = {
        "name": "other",
        "blocks": {"core": None, "body": {"layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 48}},
        "levels": {"phrase": {"offset": 4}},
        "graph": {"h": None, "state": {"loop": "body", "in": "x", "schedule": ["phrase", "word", "token"],
                  "topology": "anchor"}, "logits": {"head": "lm", "in": "state"}},
    }  # fmt: skip
    assert compile_arch(tiny_arch(renamed)).arch_id == plain
    graph = compile_arch(tiny_arch())
    assert graph.arch_id == plain
    assert dataclasses.replace(graph, seq_len=99).arch_id != plain
    for change in (
        {"d_model": 32},
        {"seq_len": 25},
        {"blocks": {"core": {"layers": 2}}},
        {"levels": {"word": {"pool": "mean"}}},
        {"levels": {"word": {"offset": 0}}},
        {"graph": {"h": {"schedule": ["phrase", "token", "word"]}}},
        {"graph": {"h": {"topology": "residual"}}},
        {"graph": {"h": {"norm": "rms"}}},
        {"residual_scale": "inverse_depth"},
        {"graph": {"z": {"loss": "z", "in": "logits"}}},
    ):
        assert compile_arch(tiny_arch(change)).arch_id != plain, change


def test_sharing_is_part_of_the_identity():
    two_blocks = {
        "blocks": {"other": {"layers": 1, "heads": 2}},
        "graph": {
            "h": None,
            "a": {"block": "core", "in": "x"},
            "b": {"block": "core", "in": "a"},
            "logits": {"head": "lm", "in": "b"},
        },
    }
    shared = compile_arch(tiny_arch(two_blocks)).arch_id
    two_blocks["graph"]["b"] = {"block": "other", "in": "a"}
    assert compile_arch(tiny_arch(two_blocks)).arch_id != shared


def test_residual_and_anchor_of_one_iteration_are_one_architecture():
    ids = {
        compile_arch(tiny_arch({"graph": {"h": {"schedule": ["word"], "topology": kind}}})).arch_id
        for kind in ("residual", "anchor", "anchor_star")
    }
    assert len(ids) == 1


@pytest.mark.parametrize("rewrite", PASSES, ids=lambda p: p.__name__)
def test_passes_keep_the_numbers(rewrite):
    space = load_space("families")
    tokens = torch.randint(0, 256, (2, 41), generator=torch.Generator().manual_seed(0))
    for seed in range(12):
        before = lower_arch(space.sample(seed).arch)
        after = rewrite(before)
        outputs = [randomize(_build_raw(graph))(tokens) for graph in (before, after)]
        torch.testing.assert_close(outputs[0], outputs[1])


def _build_raw(graph):
    """`join.base` has no module; it is the first rewrite that removes it."""
    return build_model(drop_identities_pass(graph))


def test_merging_finds_equal_work_and_spares_dropout():
    twice = {
        "graph": {
            "h": None,
            "a": {"block": "core", "in": "x"},
            "b": {"block": "core", "in": "x"},
            "y": {"join": "sum", "in": ["a", "b"]},
            "logits": {"head": "lm", "in": "y"},
        }
    }
    assert sum(node.op == "block" for node in compile_arch(tiny_arch(twice)).nodes) == 1
    twice["blocks"] = {"core": {"dropout": 0.1}}
    assert sum(node.op == "block" for node in compile_arch(tiny_arch(twice)).nodes) == 2
    assert merge_duplicates_pass(lower_arch(tiny_arch())) is not None


def test_equal_losses_both_count():
    z = {"loss": "z", "in": "logits"}
    graph = compile_arch(tiny_arch({"graph": {"z1": z, "z2": z}}))
    assert set(graph.losses) == {"z1", "z2"}
    _, losses, _ = build_model(graph).with_losses(torch.zeros(1, 24, dtype=torch.long))
    assert losses["z1"] == losses["z2"]
    assert graph.arch_id != compile_arch(tiny_arch({"graph": {"z1": z}})).arch_id


def test_a_pass_that_breaks_the_graph_is_named():
    def bad_pass(graph):
        return graph.with_nodes(graph.nodes[1:])

    with pytest.raises(AssertionError, match="bad_pass broke the graph"):
        run_passes(lower_arch(tiny_arch()), (bad_pass,))


@pytest.mark.parametrize("hash_seed", ["1", "2", "3"])
def test_automatic_offsets_do_not_depend_on_pythons_hashes(hash_seed):
    """Two levels of one chunk, both automatic, beside one that is given."""
    code = (
        "from searchspace.files import arch_from_data\nfrom builder import compile_arch\n"
        "levels = {'a': {'chunk': 16, 'offset': 4}, 'b': {'chunk': 16}, 'c': {'chunk': 16}, 'token': {'chunk': 1}}\n"
        "pools = {'p': {'pool': 'a', 'in': 'x'}, 'q': {'pool': 'b', 'in': 'p'}, 'r': {'pool': 'c', 'in': 'q'}}\n"
        "graph = {'x': {'embed': 'tokens'}, **pools, 'u': {'upscale': 'token', 'in': 'r'},\n"
        "         'h': {'join': 'residual', 'in': ['x', 'u']}, 'logits': {'head': 'lm', 'in': 'h'}}\n"
        "data = {'vocab_size': 8, 'seq_len': 64, 'd_model': 8, 'levels': levels, 'blocks': {}, 'graph': graph}\n"
        "print(compile_arch(arch_from_data(data)).arch_id)\n"
    )
    command = [sys.executable, "-c", code]
    ids = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for seed in ("0", hash_seed)
    }  # fmt: skip
    assert len(ids) == 1
