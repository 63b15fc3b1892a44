"""Tasks with levels of difficulty: held to a brute-force answer, tried on harder examples, searched by them, exported."""

import json
import re

import pytest
import torch
from helpers import run_cli

from builder import load_bundle
from searchspace import SpecError
from studies.config import load_study
from studies.records.reading import read_study
from studies.tasks.nested_logic import _SIGNS, NestedLogicData, make_expressions, prepare_nested_logic
from studies.tasks.prefix_sums import PrefixSums, PrefixSumsData, facts_of, make_rows, prepare_prefix_sums

SMALL = {"bits": 6, "rows": 200, "held_out": 40, "test_bits": [12, 24]}


class Exact(torch.nn.Module):
    """A model that knows the answer up to a length."""

    def __init__(self, most):
        super().__init__()
        self.most, self.weight = most, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        parity_BL = (tokens_BL % 2).cumsum(1) % 2
        parity_BL[:, self.most :] = 0
        return 5.0 * torch.nn.functional.one_hot(parity_BL, 4).float()


@pytest.mark.parametrize("bits", [2, 7, 33])
def test_answers_are_sums_bit_by_bit(bits):
    rows = make_rows(50, bits, seed=1)
    assert rows.shape == (50, 2 * bits)
    for row in rows.tolist():
        assert row[0] in (2, 3)
        assert set(row[1:]) <= {0, 1}
        assert row[bits:] == [sum(row[: i + 1]) % 2 for i in range(bits)]
    assert (rows == make_rows(50, bits, seed=1)).all()
    assert (rows != make_rows(50, bits, seed=2)).any()


def test_harder_levels_are_measured(tmp_path):
    data = prepare_prefix_sums(PrefixSumsData(**SMALL), tmp_path / "data")
    assert data.measure_model(Exact(24), 4000, {}) == {"hard_accuracy": 1.0, "extrapolation": 1.0}
    assert data.measure_model(Exact(12), 4000, {})["hard_accuracy"] < 0.01
    both = data.measure_model(Exact(6), 4000, {3: Exact(12), 9: Exact(24)})
    assert both["hard_accuracy"] == 1.0
    assert 0.74 < both["extrapolation"] < 0.77, "of two levels and two numbers of iterations all but one are solved"
    assert dict(data.examine(Exact(12), 4000, {}).rows)["12"] == 1.0
    found = PrefixSums.of(facts_of(PrefixSumsData(**SMALL))).examine(Exact(6), 4000, {})
    assert [level for level, _ in found.rows] == ["6", "12", "24"]
    assert found.metrics["accuracy"] == 1.0 > found.metrics["hard_accuracy"]


def test_a_solved_and_a_failed_case_are_shown(tmp_path):
    data = prepare_prefix_sums(PrefixSumsData(**SMALL), tmp_path / "data")
    _, text = data.show(Exact(12))
    solved, failed = text.split("\n\n")
    assert solved.startswith("level 12, solved:")
    assert failed.startswith("level 24, failed:")
    bits, sums, said = (line.split()[1] for line in failed.splitlines()[1:])
    assert "x" in said
    assert [a == b for a, b in zip(sums, said, strict=True)] == [c != "x" for c in said]
    assert sums[-1] == str(bits.count("1") % 2)
    assert "failed" not in data.show(Exact(24))[1]


def in_python(text, algebra):
    """The value of an expression by Python's own reading of it."""
    return eval(text) if algebra == "boolean" else eval(text) % 5


def spelt(tokens):
    return "".join(_SIGNS[token] for token in tokens)


@pytest.mark.parametrize("algebra", ["boolean", "modular"])
def test_expressions_have_their_depth_leaves_and_value(algebra):
    for depth, leaves in ((1, 2), (3, 4), (3, 8), (5, 8), (7, 8), (6, 32)):
        rows = make_expressions(40, algebra, (depth, depth), (leaves, leaves), seed=1)
        length = 4 * leaves - 2
        assert rows.shape == (40, 2 * length)
        assert len({row.tobytes() for row in rows}) > 5
        for row in rows.tolist():
            text = spelt(row[:length])
            assert text.endswith("=")
            assert sum(sign.isdigit() for sign in text) == leaves
            open_now = [text[: i + 1].count("(") - text[: i + 1].count(")") for i in range(length)]
            assert max(open_now) == depth
            assert _SIGNS[row[-1]] == str(in_python(text[:-1], algebra))
            assert set(row[length:-1]) == {0}


class Calculator(torch.nn.Module):
    """Answers as Python does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, len(_SIGNS))
        for row, tokens in zip(logits, tokens_BL.tolist(), strict=True):
            row[-1, _SIGNS.index(str(in_python(spelt(tokens)[:-1].strip(), "boolean")))] = 1.0
        return logits


def test_training_holds_every_depth_up_to_its_own(tmp_path):
    config = NestedLogicData(rows=400, held_out=40, depth=3, leaves=6, test_depths=(4, 5), test_leaves=(12,))
    data = prepare_nested_logic(config, tmp_path / "data")
    inputs, targets = data.batch(0, 0, 200, 22)
    texts = map(spelt, inputs.tolist())
    depths = {max(text[: i + 1].count("(") - text[: i + 1].count(")") for i in range(22)) for text in texts}
    assert depths == {1, 2, 3}
    assert ((targets != -100).sum(1) == 1).all()
    names = ["depth 3, 6 leaves", "depth 4, 12 leaves", "depth 4, 6 leaves", "depth 5, 6 leaves"]
    assert [data.name(level) for level in data.facts.levels] == names
    assert data.examine(Calculator(), 400, {}).metrics == {"accuracy": 1.0, "hard_accuracy": 1.0}
    assert "solved:\n(" in data.show(Calculator())[1]


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"leaves": 9, "depth": 3}, "data.depth: expressions of 9 leaves are from 4 to 8 deep"),
        ({"leaves": 4, "depth": 4}, "data.depth: expressions of 4 leaves are from 2 to 3 deep"),
        ({"test_depths": (3, 4)}, r"data.test_depths: \[3, 4\] are not from 4 to 7, in order"),
        ({"test_leaves": (32, 16)}, r"data.test_leaves: \[32, 16\] are not from 9 to 4096, in order"),
    ],
)
def test_expressions_that_can_not_be_are_refused(over, told):
    with pytest.raises(SpecError, match=told):
        NestedLogicData(**over)


def test_a_search_over_depth(tmp_path):
    over = [
        "data.rows=300",
        "data.held_out=40",
        "space.d_model=16",
        "training.flops=2e9",
        "training.batch_tokens=240",
    ]
    said = run_cli(
        "search",
        "depth",
        *over,
        "training.eval_tokens=480",
        "search.num_trials=2",
        "--dir",
        tmp_path / "run",
        "--serial",
    )
    assert "level depth" in said
    found = json.loads(run_cli("eval", tmp_path / "run/best", "--tokens", 600, "--json"))
    assert [level for level, _ in found["rows"]][-1] == "depth 7, 8 leaves"


@pytest.mark.parametrize("levels", [[6], [12, 12], [24, 12]])
def test_levels_are_beyond_training_in_order(levels):
    with pytest.raises(SpecError, match=r"data\.test_bits: .* are not lengths beyond 6, in order"):
        PrefixSumsData(**{**SMALL, "test_bits": tuple(levels)})


def test_from_search_to_export_by_what_is_hard(tmp_path):
    over = [
        "data.bits=6",
        "data.rows=300",
        "data.held_out=40",
        "data.test_bits=[12, 24]",
        "space.seq_len=6",
        "space.d_model=16",
        "space.graph.h.iterations={sample: progressive, test: [12, 24]}",
    ]
    faster = ["training.tokens=6000", "training.batch_tokens=120", "training.eval_tokens=480", "search.num_trials=3"]
    run = tmp_path / "run"
    said = run_cli("search", "recall_and_norm", *over, *faster, "--dir", run, "--serial")
    assert "front of solved, hard_accuracy" in " ".join(said.split()) or "hard" in said
    records, data, study = read_study(run)
    assert [o.name for o in study.objectives] == ["loss", "hard_accuracy"]
    assert study.objectives[1].is_raised
    assert all({"solved", "bits", "hard_accuracy", "loss"} <= set(r.rungs[-1].metrics) for r in records)
    assert data.facts.levels == (6, 12, 24)
    assert "share of the longest rows without a mistake" in (run / "report.html").read_text() or "hard" in said
    run_cli("export", run, "-o", tmp_path / "bundle")
    by_level = [
        json.loads(run_cli("eval", tmp_path / "bundle", "--tokens", 1000, "--json", *more))["rows"]
        for more in ((), ("--schedule", "24"))
    ]
    assert all([level for level, *_ in rows] == ["6", "12", "24"] for rows in by_level)
    assert [len(row) for row in by_level[0]] == [4, 4, 4], "as scheduled, and with 12 and 24 iterations"
    assert [len(row) for row in by_level[1]] == [2, 2, 2]
    longer = load_bundle(tmp_path / "bundle", schedules=["24"])
    assert len(longer.arch.graph["h"].schedule) == 24


def test_the_shipped_study_asks_what_the_paper_asks():
    study = load_study("recall_and_norm")
    assert study.space.count().high == 18
    ways = {
        (a.graph["h"].recall, a.blocks["core"].recall, a.blocks["core"].norm_place, a.blocks["core"].residual)
        for a in (study.space.sample(i).arch for i in range(150))
    }
    assert len(ways) == 18


class Rewriter(torch.nn.Module):
    """Works out every innermost operation, as Python does."""

    def __init__(self, wrong_beyond=99):
        super().__init__()
        self.weight, self.wrong_beyond, self.calls = torch.nn.Parameter(torch.zeros(1)), wrong_beyond, 0

    def forward(self, tokens_BL):
        self.calls += 1
        assert all("(" in spelt(tokens) for tokens in tokens_BL.tolist()), "a value is not rewritten"
        logits = torch.zeros(*tokens_BL.shape, len(_SIGNS))
        for row, tokens in zip(logits, tokens_BL.tolist(), strict=True):
            text = spelt(tokens)
            for found in re.finditer(r"\((\d)([&|^])(\d)\)", text):
                value = in_python(found[0], "boolean")
                text = text[: found.start()] + f"{value}    " + text[found.end() :]
            if text.count("(") > self.wrong_beyond:
                text = spelt(tokens)
            row[torch.arange(len(text)), torch.tensor([_SIGNS.index(sign) for sign in text])] = 1.0
        return logits


def test_rewriting_goes_on_until_a_value_is_left(tmp_path):
    config = NestedLogicData(rows=400, held_out=40, depth=3, leaves=6, test_depths=(5,), test_leaves=(12,), answer="rewrite")  # fmt: skip
    data = prepare_nested_logic(config, tmp_path / "data")
    inputs, targets = data.batch(0, 0, 50, 22)
    model = Rewriter()
    assert torch.equal(model(inputs).argmax(-1), targets), "what is asked is one step"
    assert data.measure(model(inputs), targets)["right"] == 1.0
    model.calls = 0
    assert data.measure_model(model, 400, {}) == {"hard_accuracy": 1.0, "extrapolation": 1.0}
    assert model.calls == 4 + 5, "as many steps as each is deep"
    assert data.measure_model(Rewriter(wrong_beyond=2), 400, {})["hard_accuracy"] < 1.0
    assert "solved" in data.show(Rewriter())[1]
