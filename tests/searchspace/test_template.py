import itertools

import pytest

from searchspace.choices import FixedChooser, MissingChooser, RandomChooser
from searchspace.constraints import Constraint
from searchspace.errors import ConstraintError, SpecError
from searchspace.template import Template

LEVELS = {"token": {"chunk": 1}, "word": {"chunk": 4}, "phrase": {"chunk": 16}}


def test_one_decision_serves_many_places():
    template = Template({"vars": {"w": {"choice": [8, 16]}}, "a": "${vars.w}", "b": {"c": "w${vars.w}"}})
    for seed in range(5):
        decided = template.decide(RandomChooser(seed))
        assert decided.tree["b"]["c"] == f"w{decided.tree['a']}"
        assert list(decided.choices) == ["vars.w"]


def test_a_reference_may_stand_before_its_choice_and_point_into_an_alternative():
    template = Template({"a": "${t.mesh.slots}", "t": {"choice": [{"mesh": {"slots": {"int": [3, 6]}}}]}})
    decided = template.decide(FixedChooser({"t": "mesh", "t.choice.0.mesh.slots": 5}))
    assert decided.tree == {"a": 5, "t": {"mesh": {"slots": 5}}}


def test_a_choice_inside_an_alternative_exists_only_when_taken():
    template = Template({"t": {"choice": ["anchor", {"mesh": {"slots": {"int": [3, 6]}}}]}})
    assert template.decide(FixedChooser({"t": "anchor"})).choices == {"t": "anchor"}
    with pytest.raises(SpecError, match=r"t\.choice\.1\.mesh\.slots: this decision is not given"):
        template.decide(FixedChooser({"t": "mesh"}))


def test_ordered_sequences_are_decided_as_counts():
    entry = {"sequence": {"of": ["token", "phrase", "word"], "length": 6, "order": "coarse_to_fine"}}
    template = Template({"levels": LEVELS, "s": entry})
    assert template.size() == 28
    seen = {tuple(template.decide(RandomChooser(seed)).tree["s"]) for seed in range(600)}
    assert len(seen) == 28
    for sequence in seen:
        chunks = [LEVELS[name]["chunk"] for name in sequence]
        assert chunks == sorted(chunks, reverse=True)


def test_random_draws_of_an_ordered_sequence_are_uniform():
    entry = {"sequence": {"of": ["token", "word", "phrase"], "length": 2, "order": "fine_to_coarse"}}
    template = Template({"levels": LEVELS, "s": entry})
    draws = [tuple(template.decide(RandomChooser(seed)).tree["s"]) for seed in range(3000)]
    shares = [draws.count(s) / 3000 for s in set(draws)]
    assert len(shares) == 6
    assert max(abs(share - 1 / 6) for share in shares) < 0.03


def test_size_equals_enumeration():
    data = {
        "levels": LEVELS,
        "s": {"sequence": {"of": ["token", "word"], "length": [1, 3]}},
        "t": {"choice": [1, {"a": {"int": [1, 4]}}, [{"choice": [1, 2]}, {"choice": [3, 4]}]]},
        "f": {"float": [0.0, 1.0], "step": 0.25},
    }
    assert Template(data).size() == (2 + 4 + 8) * (1 + 4 + 4) * 5


def test_fixed_chooser_refuses_what_does_not_fit():
    template = Template({"a": {"int": [1, 9], "step": 2}, "b": {"choice": ["x", True]}})
    template.decide(FixedChooser({"a": 3, "b": True}))
    for bad in ({"a": 2, "b": "x"}, {"a": 11, "b": "x"}, {"a": True, "b": "x"}, {"a": 1, "b": 1}, {"a": 1}):
        with pytest.raises(SpecError):
            template.decide(FixedChooser(bad))


def test_missing_chooser_refuses_any_decision():
    with pytest.raises(SpecError, match="open choice"):
        Template({"a": {"choice": [1]}}).decide(MissingChooser())


def test_random_chooser_respects_log_and_bounds():
    template = Template({"a": {"float": [1e-4, 1.0], "log": True}, "b": {"int": [1, 1000], "log": True}})
    draws = [template.decide(RandomChooser(seed)).tree for seed in range(400)]
    assert all(1e-4 <= d["a"] <= 1.0 and 1 <= d["b"] <= 1000 for d in draws)
    assert 0.4 < sum(d["a"] < 1e-2 for d in draws) / 400 < 0.6
    assert 0.35 < sum(d["b"] < 32 for d in draws) / 400 < 0.65


@pytest.mark.parametrize(
    ("text", "tree", "holds"),
    [
        ("a % 64 == 0", {"a": 128}, True),
        ("a.b <= 3 and not a.c", {"a": {"b": 3, "c": False}}, True),
        ("1 < a < 3", {"a": 3}, False),
        ("iterations('h') * a <= 6", {"a": 2, "graph": {"h": {"loop": "core", "schedule": ["x", "y"]}}}, True),
        ("count('h', 'x') == 1", {"graph": {"h": {"loop": "core", "schedule": [{"level": "x"}, "y"]}}}, True),
        ("first('h') != last('h')", {"graph": {"h": {"loop": "core", "schedule": ["x", "x"]}}}, False),
        ("a in ['p', 'q']", {"a": "q"}, True),
        ("exists('a.b') or c == 1", {"c": 1}, True),
        ("max(a, 3) == 3 if a < 3 else True", {"a": 2}, True),
        ("-a + abs(b) // 2 == 0", {"a": 2, "b": -5}, True),
    ],
)
def test_constraints(text, tree, holds):
    assert Constraint(text, "constraints.0").holds(tree) is holds


def test_constraint_breach_is_told_apart():
    with pytest.raises(ConstraintError, match="does not hold: a > 1"):
        Template({"a": {"choice": [1]}, "constraints": ["a > 1"]}).decide(RandomChooser(0))


def test_functions_refuse_a_node_that_is_no_loop():
    with pytest.raises(SpecError, match="'x' is not a loop"):
        Constraint("iterations('x') > 1", "constraints.0").holds({"graph": {"x": {"embed": "tokens"}}})


@pytest.mark.parametrize(
    "text", ["first(graph.h) == 'word'", "count('h', word) > 1", "exists(vars.width)", "last(h) == 1"]
)
def test_functions_of_names_want_them_in_quotes(text):
    with pytest.raises(SpecError, match=r"wants names in quotes, got .*write e\.g\. "):
        Constraint(text, "constraints.0")


def test_division_by_zero_is_no_crash():
    with pytest.raises(SpecError, match="has no value"):
        Constraint("a % 0 == 1", "constraints.0").holds({"a": 1})


def test_in_text_references_join_texts():
    template = Template({"a": 1, "b": 2, "c": "${a}-${b}"})
    assert template.decide(MissingChooser()).tree["c"] == "1-2"


def test_decisions_are_listed_in_file_order():
    template = Template({"b": {"choice": [1, 2]}, "a": {"int": [0, 1]}})
    assert [d.name for d in template.decisions()] == ["b", "a"]
    assert len(set(itertools.chain(*[template.decide(RandomChooser(s)).choices for s in range(5)]))) == 2
