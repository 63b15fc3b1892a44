"""The law of levels and causality: what is refused, and that the message names the way."""

import math
from dataclasses import replace

import pytest
from helpers import tiny_arch

from builder.graph.compiler import compile_arch
from builder.graph.ir import Level
from builder.graph.ops import OPS
from builder.graph.verify import verify
from searchspace import CausalityError, SpecError

BOTH_WAYS = {"blocks": {"core": {"bidirectional": True}}}


def wired(nodes, **top):
    return {**top, "graph": {"h": None, **nodes, "logits": {"head": "lm", "in": "y"}}}


LEAKS = [  # (what, laid over the tiny architecture, parts of the message)
    ("bidirectional block", wired({"y": {"block": "core", "in": "x"}}, **BOTH_WAYS), ["any number", "core is bidirectional"]),
    ("bidirectional core of a loop", {**BOTH_WAYS}, ["any number", "h.t2.block", "logits"]),
    ("own chunk", wired({"z": {"pool": "word", "in": "x"}, "u": {"upscale": "token", "in": "z", "reads": "own_chunk"},
     "y": {"join": "residual", "in": ["u", "x"]}}), ["3 tokens", "x -> z -> u (reads own_chunk)", "-> y"]),
    ("own chunk, delayed too little", wired({"z": {"pool": "word", "in": "x"},
     "u": {"upscale": "token", "in": "z", "reads": "own_chunk", "delay": 2},
     "y": {"join": "residual", "in": ["u", "x"]}}), ["1 tokens"]),
    ("leak through two levels", wired({"a": {"pool": "word", "in": "x"}, "b": {"pool": "phrase", "in": "a"},
     "c": {"upscale": "word", "in": "b", "reads": "own_chunk"}, "d": {"join": "sum", "in": ["c", "a"]},
     "e": {"upscale": "token", "in": "d"}, "y": {"join": "sum", "in": ["e", "x"]}}), ["4 tokens", "c (reads own_chunk)"]),
    ("a later read does not mend it", wired({"a": {"pool": "word", "in": "x"},
     "u": {"upscale": "token", "in": "a", "reads": "own_chunk"}, "v": {"join": "sum", "in": ["u", "x"]},
     "b": {"pool": "phrase", "in": "v"}, "w": {"upscale": "token", "in": "b"},
     "y": {"join": "sum", "in": ["w", "x"]}}), ["3 tokens"]),
    ("leak into a memory", wired({"z": {"pool": "word", "in": "x"}, "u": {"upscale": "token", "in": "z", "reads": "own_chunk"},
     "m": {"memory": 3, "in": "x"}, "n": {"write": "m", "in": ["u", "x"]}, "y": {"read": "n", "in": "x"}}), ["u (reads own_chunk) -> n"]),
    ("leaking router", wired({"z": {"pool": "word", "in": "x"}, "u": {"upscale": "token", "in": "z", "reads": "own_chunk"},
     "m": {"memory": 3, "in": "x"}, "y": {"read": "m", "in": "u"}}), ["own_chunk"]),
    ("leaking recall", wired({"z": {"pool": "word", "in": "x"}, "u": {"upscale": "token", "in": "z", "reads": "own_chunk"},
     "y": {"recall": "linear", "in": ["x", "u"]}}), ["own_chunk"]),
]  # fmt: skip


@pytest.mark.parametrize(("over", "parts"), [row[1:] for row in LEAKS], ids=[row[0] for row in LEAKS])
def test_leaks_are_refused(over, parts):
    with pytest.raises(CausalityError) as caught:
        compile_arch(tiny_arch(over))
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    over = {**over, "causal": False}
    compile_arch(tiny_arch(over))  # the same wiring is legal where the model sees everything


CAUSAL = [
    ("own chunk, delayed enough", wired({"z": {"pool": "word", "in": "x"},
     "u": {"upscale": "token", "in": "z", "reads": "own_chunk", "delay": 3}, "y": {"join": "residual", "in": ["u", "x"]}})),
    ("a delayed coarse read pays for a fine own chunk", wired({"a": {"pool": "phrase", "in": "x"},
     "b": {"upscale": "word", "in": "a", "delay": 1}, "c": {"upscale": "token", "in": "b", "reads": "own_chunk"},
     "y": {"join": "sum", "in": ["c", "x"]}})),
]  # fmt: skip


@pytest.mark.parametrize("over", [row[1] for row in CAUSAL], ids=[row[0] for row in CAUSAL])
def test_causal_wirings_compile(over):
    compile_arch(tiny_arch(over))


WRONG = [  # (what, laid over the tiny architecture, path, parts)
    ("base of an up-scaled update", {"graph": {"h": {"topology": "base"}}}, "graph.h.topology", ["join base", "at h.t0.join", "anchor"]),
    ("joining levels", wired({"z": {"pool": "word", "in": "x"}, "y": {"join": "sum", "in": ["x", "z"]}}), "graph.y", ["different levels"]),
    ("head on latents", wired({"y": {"pool": "word", "in": "x"}}), "graph.logits", ["full resolution", "upscale"]),
    ("pool to a finer level", wired({"z": {"pool": "word", "in": "x"}, "y": {"pool": "token", "in": "z"}}), "graph.y", ["use upscale"]),
    ("upscale to a coarser level", wired({"z": {"pool": "word", "in": "x"}, "y": {"upscale": "phrase", "in": "z"}}), "graph.y", ["use pool"]),
    ("offsets that don't nest", wired({"z": {"pool": {"level": "word", "offset": 1}, "in": "x"},
     "y": {"pool": {"level": "phrase", "offset": 2}, "in": "z"}}), "graph.y", ["equal modulo 4"]),
    ("chunks that don't divide", wired({"z": {"pool": "word", "in": "x"}, "y": {"pool": "odd", "in": "z"}},
     levels={"odd": {"chunk": 6, "offset": 0}}), "graph.y", ["4 does not divide chunk 6"]),
    ("memory as a stream", wired({"m": {"memory": 3, "in": "x"}, "y": {"block": "core", "in": "m"}}), "graph.y", ["read the memory first"]),
    ("stream as a memory", wired({"y": {"read": "x", "in": "x"}}), "graph.y.read", ["not a memory"]),
    ("memory of another level", {"levels": {"word": {"offset": 0}}, "graph": {"h": None, "z": {"pool": "word", "in": "x"},
     "g": {"loop": "core", "in": "z", "schedule": ["phrase"], "topology": "mesh"}, "u": {"upscale": "token", "in": "g"},
     "y": {"join": "sum", "in": ["u", "x"]}, "logits": {"head": "lm", "in": "y"}}}, "graph.g.topology", ["different levels", "at g.start.write"]),
    ("unused node", {"graph": {"y": {"block": "core", "in": "x"}}}, "graph.y", ["never used"]),
    ("shared weights of two kinds", wired({"a": {"norm": "rms", "in": "x", "weights": "n"},
     "y": {"norm": "layer", "in": "a", "weights": "n"}}), "graph.y", ["shares the weights"]),
]  # fmt: skip


@pytest.mark.parametrize(("over", "path", "parts"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_wirings_are_refused(over, path, parts):
    with pytest.raises(SpecError) as caught:
        compile_arch(tiny_arch(over))
    assert caught.value.path == path, str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_every_mutation_of_a_graph_is_rejected():
    graph = compile_arch(tiny_arch())
    by_name = graph.by_name()
    pool, block = by_name["h.t0.pool"], by_name["h.t0.block"]
    mutations = {
        "unknown operation": replace(pool, op="pool.median"),
        "dangling input": replace(block, inputs=("nobody",)),
        "later input": replace(pool, inputs=("h.t2.join",)),
        "missing input": replace(block, inputs=(), ports=()),
        "an input too many": replace(block, inputs=block.inputs * 2, ports=block.ports * 2),
        "an input that it has not": replace(block, ports=("steam",)),
        "a missing attribute": replace(block, attrs=()),
        "an attribute that it has not": replace(pool, attrs=(("slots", 3),)),
        "an attribute of another type": replace(block, attrs=(("block", 3),)),
        "wrong level": replace(block, level=Level(3, 0)),
        "duplicate name": replace(pool, name="x"),
    }
    for what, mutant in mutations.items():
        old = pool if mutant.op.startswith("pool") else block
        nodes = tuple(mutant if node is old else node for node in graph.nodes)
        mutated = graph.with_nodes(nodes)
        try:
            verify(mutated)
        except SpecError:
            continue
        pytest.fail(what)
    with pytest.raises(SpecError, match="no logits"):
        verify(replace(graph, output="x"))


def test_lookahead_of_a_chain():
    graph = compile_arch(tiny_arch())
    ahead = {}
    levels = {node.name: node.level for node in graph.nodes}
    for node in graph.nodes:
        inputs = [levels[i] for i in node.inputs]
        ahead[node.name] = OPS[node.op].lookahead(graph, node, inputs, [ahead[i] for i in node.inputs])
    assert ahead["logits"] == 0
    assert not any(math.isinf(value) for value in ahead.values())
