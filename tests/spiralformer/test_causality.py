"""Changing token k changes no logit before k: every pool, upscale, topology, offset and ragged length.

Weights are random, so that zero-initialised scorers and allocations hide nothing.
"""

import pytest
from helpers import SPACES, TOPOLOGIES, built

import spiralformer.upscale
from builder import build_model, compile_arch
from builder.laws import first_leak, randomize
from searchspace import load_space
from searchspace.arch import LevelSpec
from searchspace.nodes import NormPlace, PoolKind, RecallKind, ResidualKind, UpscaleKind
from searchspace.tables import options

POOLS, UPSCALES = options(PoolKind), options(UpscaleKind)
CHUNKS = (2, 3, 4)


def ladder(pool, upscale, topology, chunk, offset, delay=0):
    """A loop at the level, then at one twice as coarse, then at full resolution."""
    front = "zero" if delay else "read"
    return {
        "levels": {
            "phrase": {"chunk": 2 * chunk, "offset": chunk + offset, "pool": pool, "upscale": upscale},
            "word": {"chunk": chunk, "offset": offset, "pool": pool, "upscale": upscale, "front": front},
        },
        "graph": {
            "h": {"schedule": [{"level": "word", "delay": delay}, "phrase", "token", "word"], "topology": topology},
        },
    }


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("upscale", UPSCALES)
@pytest.mark.parametrize("pool", POOLS)
def test_no_later_token_reaches_an_earlier_logit(pool, upscale, topology):
    """Every chunk and offset with the first topology, one chunk with the others: what they add has no chunks."""
    for chunk in CHUNKS if topology == TOPOLOGIES[0] else CHUNKS[1:2]:
        for offset in range(chunk):
            model = built(ladder(pool, upscale, topology, chunk, offset, delay=offset % 2))
            for length in (1, chunk, 4 * chunk - 1, 4 * chunk + 1):
                assert first_leak(model, length, 17) is None, (chunk, offset, length)


@pytest.mark.parametrize("moved", [1, 2])
def test_the_test_fails_when_the_read_rule_is_moved_by_one(moved, monkeypatch):
    """Reading ``moved`` positions earlier must be seen, for every chunk and offset."""
    original = spiralformer.upscale.Upscale.place

    def early(self, update_BMGD, tokens_BT):
        self.shift, self.first = self.shift - moved, self.first - moved
        try:
            return original(self, update_BMGD, tokens_BT)
        finally:
            self.shift, self.first = self.shift + moved, self.first + moved

    monkeypatch.setattr(spiralformer.upscale.Upscale, "place", early)
    for chunk in CHUNKS:
        for offset in range(chunk):
            model = built(ladder("mean", "learned", "residual", chunk, offset))
            assert first_leak(model, 4 * chunk + 1, 17) is not None, (chunk, offset)


@pytest.mark.parametrize("file", SPACES, ids=lambda p: p.stem)
def test_random_architectures_of_shipped_spaces(file):
    space = load_space(file)
    for seed in range(25):
        arch = space.sample(seed).arch
        if not arch.causal:
            continue
        model = randomize(build_model(compile_arch(arch)), seed)
        assert first_leak(model, 23, arch.vocab_size) is None, seed


@pytest.mark.parametrize("place", options(NormPlace))
@pytest.mark.parametrize("residual", options(ResidualKind))
@pytest.mark.parametrize("recall", [None, *options(RecallKind)])
def test_blocks_and_steps(place, residual, recall):
    core = {"norm_place": place, "residual": residual, "recall": recall}
    loop = {"recall": recall, "norm": "layer", "step": "scale" if recall else "add"}
    levels = {"word": {"positions": "last_token", "pool": "attention"}}
    model = built({"levels": levels, "blocks": {"core": core}, "graph": {"h": loop}})
    for length in (1, 6, 21):
        assert first_leak(model, length, 17) is None


WIRINGS = [
    {"a": {"pool": "word", "in": "x"}, "b": {"pool": "phrase", "in": "a"}, "c": {"upscale": "word", "in": "b"},
     "d": {"join": "sum", "in": ["c", "a"]}, "e": {"block": "core", "in": "d"}, "f": {"upscale": "token", "in": "e"},
     "y": {"join": "sum", "in": ["f", "x"]}},
    {"a": {"pool": "word", "in": "x"}, "u": {"upscale": "token", "in": "a", "reads": "own_chunk", "delay": 3},
     "v": {"join": "sum", "in": ["u", "x"]}, "y": {"block": "core", "in": "v"}},
    {"a": {"pool": "phrase", "in": "x"}, "b": {"upscale": "word", "in": "a", "delay": 1},
     "c": {"upscale": "token", "in": "b", "reads": "own_chunk"}, "y": {"join": "sum", "in": ["c", "x"]}},
    {"m": {"memory": 3, "in": "x"}, "a": {"pool": "phrase", "in": "x"}, "u": {"upscale": "token", "in": "a"},
     "n": {"write": "m", "in": ["u", "x"]}, "r": {"read": "n", "in": "x"}, "s": {"recall": "concat", "in": ["r", "x"]},
     "t": {"norm": "rms", "in": "s"}, "y": {"recall": "linear", "in": ["t", "x"]}},
]  # fmt: skip


@pytest.mark.parametrize("nodes", WIRINGS, ids=["pool of a pool", "delayed own chunk", "paid by a delay", "memory"])
def test_hand_wired_graphs(nodes):
    model = built({"graph": {"h": None, **nodes, "logits": {"head": "lm", "in": "y"}}})
    for length in (1, 9, 25):
        assert first_leak(model, length, 17) is None


def test_non_causal_models_do_see_ahead():
    model = built({"causal": False, "graph": {"h": {"topology": "residual"}}})
    assert first_leak(model, 21, 17) is not None


def test_every_kind_is_in_the_grid():
    assert set(LevelSpec.__dataclass_fields__) == {"chunk", "offset", "pool", "upscale", "positions", "front"}
