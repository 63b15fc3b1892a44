import pytest
from helpers import SPACES, tiny_data

from builder import compile_arch
from searchspace import FixedChooser, RandomChooser, SpaceSpec, SpecError, load_space
from searchspace.files import load_arch, merge, parse_overrides, read_data
from searchspace.plain import dump_yaml

OPEN = {
    "d_model": {"choice": [16, 32]},
    "graph": {
        "h": {
            "loop": "core",
            "in": "x",
            "schedule": {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 3], "order": "coarse_to_fine"}},
            "topology": {"choice": ["anchor", {"mesh": {"slots": {"int": [3, 4]}}}]},
        }
    },
    "constraints": ["iterations('h') < 3 or d_model == 16"],
}


@pytest.mark.parametrize("file", SPACES, ids=lambda p: p.stem)
def test_shipped_spaces_sample_and_compile(file):
    space = load_space(file)
    space.check()
    for seed in range(30):
        compile_arch(space.sample(seed).arch)


def test_count_is_exact_where_it_can_be_enumerated():
    space = SpaceSpec(tiny_data(OPEN))
    size = space.count()
    candidates = list(space.enumerate())
    assert size.exact
    assert size.high == len(candidates) == 3 * (3 + 6 + 10) + 3 * (3 + 6)
    assert len({str(sorted(c.choices.items())) for c in candidates}) == len(candidates)


def test_count_gives_bounds_beyond():
    size = SpaceSpec(tiny_data({"seq_len": {"int": [16, 60000]}, "constraints": ["seq_len % 2 == 0"]})).count()
    assert (size.low, size.high, size.exact) == (0, 59985, False)
    assert "infinitely" in str(SpaceSpec(tiny_data({"norm_eps": {"float": [1e-6, 1e-5]}})).count())


def test_choices_replay_to_the_same_architecture():
    space = SpaceSpec(tiny_data(OPEN))
    for seed in range(20):
        candidate = space.sample(seed)
        assert space.resolve(FixedChooser(candidate.choices)) == candidate.arch


def test_contradictions_are_drawn_again_and_not_enumerated():
    space = SpaceSpec(tiny_data({"blocks": {"core": {"heads": {"choice": [2, 3, 4]}}}}))
    assert {c.arch.blocks["core"].heads for c in space.enumerate()} == {2, 4}
    assert {space.sample(seed).arch.blocks["core"].heads for seed in range(20)} == {2, 4}


def test_a_level_called_length_is_no_trouble():
    levels = {"length": {"chunk": 2}}
    schedule = {"sequence": {"of": ["length", "token"], "length": [2, 6], "order": "coarse_to_fine"}}
    space = SpaceSpec(tiny_data({"levels": levels, "graph": {"h": {"loop": "core", "in": "x", "schedule": schedule}}}))
    for seed in range(20):
        candidate = space.sample(seed)
        assert space.resolve(FixedChooser(candidate.choices)) == candidate.arch


def test_stepped_floats_stay_in_bounds():
    space = SpaceSpec(tiny_data({"blocks": {"core": {"dropout": {"float": [0.05, 0.95], "step": 0.1}}}}))
    space.check()
    assert space.decisions[0].high == 0.95
    assert {space.sample(seed).arch.blocks["core"].dropout for seed in range(99)} <= {
        round(0.05 + 0.1 * i, 2) for i in range(10)
    }


def test_surplus_choices_are_an_error():
    space = SpaceSpec(tiny_data({"d_model": {"choice": [16, 32]}}))
    with pytest.raises(SpecError, match="d_modle: is not a decision"):
        space.resolve(FixedChooser({"d_model": 16, "d_modle": 32}))


def test_sampling_is_by_seed_alone():
    space = SpaceSpec(tiny_data(OPEN))
    assert [space.sample(s).choices for s in range(9)] == [space.sample(s).choices for s in range(9)]
    assert space.resolve(RandomChooser(3)) is not None


def test_extends_merges_and_replaces(tmp_path):
    (tmp_path / "base.yaml").write_text(dump_yaml(tiny_data()))
    (tmp_path / "next.yaml").write_text(
        "extends: base.yaml\n"
        "levels: {word: {pool: mean}, phrase: null}\n"
        "graph: {h: {loop: core, in: x, schedule: [word]}}\n"
    )
    arch = load_arch(tmp_path / "next.yaml")
    assert (arch.levels["word"].chunk, arch.levels["word"].pool) == (4, "mean")
    assert "phrase" not in arch.levels
    assert arch.graph["h"].topology.kind == "residual"  # a node that names an operation is replaced whole


def test_override_reaches_into_a_node_that_it_does_not_name():
    data = merge(tiny_data(), {"graph": {"h": {"topology": "mesh"}}})
    assert data["graph"]["h"]["schedule"] == ["phrase", "word", "token"]
    assert merge({"a": {"choice": [1, 2]}}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    asha = {"search": {"stopper": {"asha": {"rungs": 3}}}}
    assert merge({"search": {"stopper": {"none": {"rungs": 4}}}}, asha) == asha
    assert merge(asha, {"search": {"stopper": {"asha": {"reduction": 2}}}}) == {
        "search": {"stopper": {"asha": {"rungs": 3, "reduction": 2}}}
    }


def test_command_line_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text(dump_yaml(tiny_data()))
    data = read_data(tmp_path / "a.yaml", ["d_model=32", "levels.word.pool=mean", "graph.h.schedule=[word, token]"])
    assert (data["d_model"], data["levels"]["word"]["pool"]) == (32, "mean")
    assert parse_overrides(["a.b=1e-3", "a.c=true", "a.d=text"]) == {"a": {"b": 1e-3, "c": True, "d": "text"}}
    for bad in ("novalue", "=1", "a..b=1", "a=[1"):
        with pytest.raises(SpecError):
            parse_overrides([bad])


FIGURE_8 = {
    "extends": "looped_410m_base",
    "blocks": {
        "prelude": {"layers": {"int": [1, 10]}},
        "core": {"layers": {"int": [2, 12]}},
        "coda": {"layers": {"int": [1, 10]}},
    },
    "graph": {
        "h": {
            "schedule": {"sequence": {"of": ["token"], "length": [2, 4]}},
            "topology": {"choice": ["base", "mesh"]},
        }
    },
    "constraints": [
        "blocks.prelude.layers == blocks.coda.layers",
        "blocks.prelude.layers + blocks.coda.layers + len(graph.h.schedule) * blocks.core.layers == 24",
    ],
}


def figure_8(folder, data):
    (folder / "figure_8.yaml").write_text(dump_yaml(data))
    return load_space(folder / "figure_8.yaml")


def test_a_space_of_which_hardly_a_way_is_valid(tmp_path):
    """MeSH's figure 8: 34 of 6,600 ways; all are counted, and samples reach them all."""
    space = figure_8(tmp_path, FIGURE_8)
    space.check()
    assert str(space.count()) == "34"
    found = [space.sample(seed) for seed in range(400)]
    assert len({str(candidate.choices) for candidate in found}) == 34
    for candidate in found[:20]:
        layers = {name: block.layers for name, block in candidate.arch.blocks.items()}
        iterations = len(candidate.arch.graph["h"].schedule)
        assert layers["prelude"] == layers["coda"]
        assert layers["prelude"] + layers["coda"] + iterations * layers["core"] == 24


def test_a_space_of_which_no_way_is_valid(tmp_path):
    space = figure_8(tmp_path, {**FIGURE_8, "constraints": ["blocks.prelude.layers > 10"]})
    with pytest.raises(SpecError, match="no draw of"):
        space.sample(0)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"levles": {"word": {"chunk": 3}}}, "levles: unknown key; did you mean 'levels'"),
        ({"constraint": []}, "constraint: unknown key; did you mean 'constraints'"),
        ({"levels": {"line": {"chunck": 3}}}, r"levels\.line: has no chunk"),
    ],
)
def test_a_misspelt_key_is_blamed_itself(over, message, tmp_path):
    """Not the first reference that it leaves without an end: ordered sequences look up chunks."""
    schedule = {"sequence": {"of": ["line", "word"], "length": [1, 3], "order": "coarse_to_fine"}}
    data = tiny_data({"levels": {"line": {"chunk": 12}}, "graph": {"h": {"schedule": schedule}}})
    figure_8(tmp_path, data).sample(0)
    if "levels" in over:
        del data["levels"]["line"]
    with pytest.raises(SpecError, match=message):
        figure_8(tmp_path, merge(data, over)).sample(0)
