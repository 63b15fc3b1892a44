"""Six synthetic tasks: answers held to a literal reading of the rows, harder rows, search to export."""

import json

import pytest
import torch
from helpers import run_cli

from searchspace import SpecError
from studies.config import load_study
from studies.records.reading import read_study
from studies.tasks.synthetic import (
    BLANK,
    FIRST,
    MARK,
    SYNTHETICS,
    Synthetic,
    SyntheticData,
    facts_of,
    make_rows,
    prepare_synthetic,
)

SMALL = {"rows": 60, "held_out": 20, "length": 32, "test_lengths": (64, 96)}


def halves(rows, length):
    return [(row[:length], row[length:]) for row in rows.tolist()]


@pytest.mark.parametrize("task", SYNTHETICS)
def test_rows_are_the_same_every_time_and_ask(task):
    config = SyntheticData(task=task, **SMALL)
    rows = make_rows(config, 40, 32, 1)
    assert (rows == make_rows(config, 40, 32, 1)).all()
    assert (rows != make_rows(config, 40, 32, 2)).any()
    assert rows[:, 32:].any(axis=1).all()
    assert rows.max() < facts_of(config).vocab_size
    assert set(rows[:, 32:].flat) <= {BLANK, *range(FIRST, FIRST + 16)}


@pytest.mark.parametrize("task", ["in_context_recall", "noisy_recall"])
def test_a_value_is_the_one_that_stood_behind_its_key(task):
    noise = set()
    for given, asked in halves(make_rows(SyntheticData(task=task, noise=0.5, **SMALL), 200, 96, 0), 96):
        behind = {}
        at = 0
        while at < 96:
            token = given[at]
            if token >= FIRST + 16:
                noise.add(token)
                assert asked[at] == BLANK
                at += 1
                continue
            assert FIRST <= token < FIRST + 8
            assert asked[at] == behind.get(token, BLANK)
            if at + 1 < 96:
                assert asked[at + 1] == BLANK
                assert behind.setdefault(token, given[at + 1]) == given[at + 1]
            at += 2
    assert noise == (set() if task == "in_context_recall" else {*range(FIRST + 16, FIRST + 20)})


def test_fuzzy_values_are_those_of_the_same_key_before():
    for given, asked in halves(make_rows(SyntheticData(task="fuzzy_recall", **SMALL), 200, 96, 0), 96):
        is_key = [FIRST <= token < FIRST + 8 for token in given]
        before = {}
        at = 0
        while at < 96:
            end = next((i for i in range(at, 96) if not is_key[i]), 96)
            stop = next((i for i in range(end, 96) if is_key[i]), 96)
            name, value = tuple(given[at:end]), given[end:stop]
            assert 1 <= len(name) <= 3
            if end < 96:
                expected = value if name in before else [BLANK] * len(value)
                assert asked[end - 1 : stop - 1] == expected
                if stop < 96:
                    assert before.setdefault(name, value) == value
            at = stop
        assert not any(a != b and a == b[: len(a)] for a in before for b in before)


def test_what_is_memorized_is_the_same_in_all_rows():
    known = {}
    for seed in (0, 1, 2):
        for given, asked in halves(make_rows(SyntheticData(task="memorization", **SMALL), 50, 32, seed), 32):
            for at in range(0, 32, 2):
                assert given[at + 1] == MARK
                assert known.setdefault(given[at], asked[at + 1]) == asked[at + 1]
    assert len(known) == 8


def test_what_is_copied():
    for given, asked in halves(make_rows(SyntheticData(task="selective_copying", **SMALL), 50, 64, 0), 64):
        assert [token for token in given if token >= FIRST] == [answer for answer in asked if answer]
        assert given[-8:] == [MARK] * 8
        assert all(asked[-8:])
    for given, asked in halves(make_rows(SyntheticData(task="compression", **SMALL), 50, 33, 0), 33):
        assert asked == [BLANK] * 16 + given[:16] + [BLANK]
        assert given[16:] == [MARK] * 17


class Recalls(torch.nn.Module):
    """Looks back at most so far."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.weight = reach, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 22)
        for row, tokens in zip(logits, tokens_BL.tolist(), strict=True):
            for at in range(0, len(tokens), 2):
                found = [i for i in range(max(0, at - self.reach), at, 2) if tokens[i] == tokens[at]]
                row[at, tokens[found[-1] + 1] if found else BLANK] = 1.0
        return logits


def test_who_can_look_back_far_is_right(tmp_path):
    data = prepare_synthetic(SyntheticData(**SMALL), tmp_path / "data")
    assert data.measure_model(Recalls(96), 2000, {}) == {"hard_accuracy": 1.0, "extrapolation": 1.0}
    assert data.measure_model(Recalls(8), 2000, {})["hard_accuracy"] < 0.2
    inputs, targets = data.batch(0, 0, 8, 32)
    assert data.measure(Recalls(32)(inputs), targets)["right"] == 1.0
    assert data.measure(Recalls(8)(inputs), targets)["right"] < 1.0
    fresh = Synthetic.of(facts_of(SyntheticData(**SMALL))).examine(Recalls(96), 2000, {})
    assert [row[0] for row in fresh.rows] == ["32", "64", "96"]
    _, text = data.show(Recalls(20))
    assert "failed:" in text
    assert ">x" in text


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"test_lengths": (64, 32)}, "data.test_lengths"),
        ({"task": "selective_copying", "copied": 40, "length": 64}, "data.copied: 40 tokens and as many marks"),
    ],
)
def test_settings_that_can_not_be_are_refused(over, told):
    with pytest.raises(SpecError, match=told):
        SyntheticData(**over)


def test_from_search_to_export(tmp_path):
    over = ["data.rows=100", "data.held_out=20", "data.length=16", "data.test_lengths=[32]", "space.seq_len=16"]
    faster = ["training.flops=1e8", "training.batch_tokens=64", "training.eval_tokens=160", "search.num_trials=1",
              "space.d_model=16", "baseline=[]", "data.task=noisy_recall"]  # fmt: skip
    run = tmp_path / "run"
    run_cli("search", "synthetic", *over, *faster, "--dir", run, "--serial")
    records, _, settings = read_study(run)
    assert [o.name for o in settings.objectives] == ["loss", "extrapolation"]
    assert "right" in records[0].rungs[-1].metrics
    found = json.loads(run_cli("eval", run / "best", "--tokens", 320, "--json"))
    assert [row[0] for row in found["rows"]] == ["16", "32"]


def test_the_shipped_study():
    assert load_study("synthetic").space.count().high == 8
