"""Positions in another order: against NumPy's transposition, on boards that are not full, and by the laws."""

import numpy as np
import pytest
import torch
from helpers import tiny_arch, tiny_data

from builder import build_model, compile_arch
from builder.laws import breaches, randomize
from searchspace import SpecError
from searchspace.files import arch_from_data, merge
from spiralformer.arranging import Arrange
from studies.probes.trace import Trace

BOXES = {"arrange": [2, 2, 2, 3], "axes": [0, 2, 1, 3]}
ARRANGED = {
    "causal": False,
    "levels": {"box": {"chunk": 6, "offset": 0, "pool": "mean"}},
    "graph": {
        "a": {"in": "x", **BOXES},
        "h": {"in": "a", "schedule": ["box", "token"], "topology": "anchor"},
        "z": {"in": "h", "back": True, **BOXES},
        "logits": {"in": "z"},
    },
}


@pytest.mark.parametrize(
    ("sides", "axes"), [((3, 4), (1, 0)), ((3, 3, 3, 3), (0, 2, 1, 3)), ((2, 3, 4), (2, 0, 1)), ((2, 5), (0, 1))]
)
def test_the_order_is_that_of_a_transposed_grid(sides, axes):
    count = int(np.prod(sides))
    order = np.arange(count).reshape(sides).transpose(axes).reshape(-1)
    x = torch.randn(2, count, 3)
    there = Arrange(sides, axes, back=False)(x)
    assert torch.equal(there, x[:, order])
    assert torch.equal(Arrange(sides, axes, back=True)(there), x)
    twice = torch.randn(2, 2 * count, 3)  # a second grid begins where the first is full
    assert torch.equal(Arrange(sides, axes, back=False)(twice), twice[:, [*order, *(order + count)]])


@pytest.mark.parametrize("length", range(1, 12))
def test_of_a_grid_that_is_not_full_the_rest_keeps_its_order(length):
    order = [place for place in np.arange(12).reshape(3, 4).transpose(1, 0).reshape(-1) if place < length]
    x = torch.randn(3, length, 2)
    there, back = (Arrange((3, 4), (1, 0), back=way) for way in (False, True))
    assert torch.equal(there(x), x[:, order])
    assert torch.equal(back(there(x)), x)
    padded = torch.cat((x, torch.full((3, 12 - length, 2), 9.0)), dim=1)
    seen = torch.arange(12).expand(3, -1) < length
    assert torch.equal(there(padded, visible=seen)[:, :length], there(x))
    assert torch.equal(back(there(padded, visible=seen), visible=seen), padded)


def test_laws():
    assert list(breaches(tiny_arch(ARRANGED))) == []


@torch.no_grad()
def test_a_chunk_is_a_box_of_the_board():
    """A board of 4 x 6 in boxes of 2 x 3, pooled by the mean."""
    arch = tiny_arch(ARRANGED)
    model = randomize(build_model(compile_arch(arch)))
    values = Trace(model, arch, torch.randint(0, 17, (2, 24))).values
    boards = values["x"].view(2, 4, 6, 16)
    for box in range(4):
        row, column = box // 2 * 2, box % 2 * 3
        cells = boards[:, row : row + 2, column : column + 3].mean(dim=(1, 2))
        torch.testing.assert_close(values["h_t0_pool"][:, box], cells)
    assert torch.equal(values["z"].view(2, 4, 6, 16)[:, 0, :3], values["h_t1_join"][:, :3])


def test_a_head_of_a_sequence_says_one_thing_of_all_of_it():
    arch = tiny_arch({"causal": False, "graph": {"logits": {"head": "sequence", "in": "h", "hidden": True}}})
    assert list(breaches(arch)) == []
    model, tokens = randomize(build_model(compile_arch(arch))), torch.randint(0, 17, (2, 24))
    trace = Trace(model, arch, tokens)
    with torch.no_grad():
        said = model.get_submodule("head")(trace.loop().states[-1].mean(dim=1))
    torch.testing.assert_close(trace.logits, said[:, None].expand(-1, 24, -1))
    with pytest.raises(SpecError, match="mean reads what stands behind"):
        compile_arch(tiny_arch({"graph": {"logits": {"head": "sequence", "in": "h"}}}))


def test_an_order_that_changes_nothing_is_nothing():
    same = {"a": {"arrange": [4, 6], "axes": [0, 1], "in": "x"}, "h": {"in": "a"}}
    assert compile_arch(tiny_arch({"graph": same})).arch_id == compile_arch(tiny_arch()).arch_id


@pytest.mark.parametrize(
    ("over", "told"),
    [
        (
            {"causal": True},
            "the logits look any number of tokens ahead, along x -> a (arrange reads what stands behind)",
        ),
        ({"graph": {"a": {"axes": [0, 1, 1, 3]}}}, "graph.a.axes: [0, 1, 1, 3] is no order of the 4 axes"),
        ({"graph": {"a": {"axes": [0, 1]}}}, "give each of 0 .. 3 once"),
        ({"graph": {"a": {"arrange": [24], "axes": [0], "in": "x"}}}, "graph.a.arrange: [24] are no sides of a grid"),
        ({"graph": {"a": {"arrange": [0, 24], "axes": [1, 0], "in": "x"}}}, "are no sides of a grid"),
        ({"seq_len": 30}, "graph.a.arrange: [2, 2, 2, 3] has 24 places, and seq_len 30 is no multiple of that"),
        ({"blocks": {"core": {"axes": [5, 5]}}}, "blocks.core.axes: [5, 5] has 25 places, and seq_len 24 is no"),
        ({"blocks": {"core": {"axes": [0, 4]}}}, "blocks.core.axes: [0, 4] are no sides of a grid; give e.g. [9, 9]"),
        ({"graph": {"p": {"pool": "box", "in": "x"}, "a": {"in": "p"}}}, "needs full resolution"),
    ],
)
def test_what_can_not_be_is_refused(over, told):
    with pytest.raises(SpecError) as caught:
        compile_arch(arch_from_data(tiny_data(merge(ARRANGED, over))))
    assert told in str(caught.value)
