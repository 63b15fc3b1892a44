import pytest
from helpers import ARCHITECTURES, tiny_arch

from builder.graph.blocks import ffn_dim
from searchspace import SpecError, load_arch
from searchspace.arch import head_dim, rotary_dim


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda p: p.stem)
def test_yaml_round_trip(file, tmp_path):
    arch = load_arch(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(arch.to_yaml())
    assert load_arch(copy) == arch


def test_round_trip_keeps_what_differs_from_defaults(tmp_path):
    arch = tiny_arch(
        {
            "levels": {"word": {"offset": 0, "pool": "last", "upscale": "uniform"}},
            "blocks": {"core": {"kv_heads": 1, "bias": True, "norm_place": "post"}},
            "graph": {
                "h": {
                    "loop": "core",
                    "in": "x",
                    "schedule": [{"level": "word", "offset": 0, "delay": 1}, "token"],
                    "topology": {"mesh": {"slots": 3}},
                    "recall": "linear",
                }
            },
        }
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(arch.to_yaml())
    assert load_arch(copy) == arch
    assert "{level: word, offset: 0, delay: 1}" in arch.to_yaml()


@pytest.mark.parametrize("name", ["1e3", "12", "1.5", "1e", "0x1f", "1_000", "true", "a"])
def test_texts_that_look_like_numbers_survive(name, tmp_path):
    copy = tmp_path / "copy.yaml"
    copy.write_text(tiny_arch({"name": name}).to_yaml())
    assert load_arch(copy).name == name


def test_resolved_sizes():
    block = tiny_arch({"blocks": {"core": {"ffn": "swiglu", "rotary_fraction": 0.5}}}).blocks["core"]
    assert ffn_dim(block, 16) == 48  # 8/3 * 16 = 42.7, rounded up to a multiple of 8
    assert (head_dim(block, 16), rotary_dim(block, 16)) == (8, 4)
    gelu = tiny_arch({"blocks": {"core": {"ffn": "gelu"}}}).blocks["core"]
    assert ffn_dim(gelu, 16) == 64


def test_specs_are_frozen():
    arch = tiny_arch()
    with pytest.raises(AttributeError):
        arch.d_model = 8


def test_deep_chain_of_nodes_is_no_recursion():
    graph = {"x": {"embed": "tokens"}}
    for i in range(3000):
        graph[f"n{i}"] = {"norm": "rms", "in": f"n{i - 1}" if i else "x"}
    tiny_arch({"graph": {**graph, "h": None, "logits": {"head": "lm", "in": "n2999"}}})


def test_a_file_with_choices_is_no_architecture(tmp_path):
    file = tmp_path / "open.yaml"
    file.write_text("extends: plain_4\nd_model: {choice: [64, 128]}\n")
    with pytest.raises(SpecError, match=r"open\.yaml:2: d_model: is an open choice"):
        load_arch(file)
