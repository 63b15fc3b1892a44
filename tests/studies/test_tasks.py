"""A second task, which sees its whole input: made, trained, searched, reported, exported and examined."""

import dataclasses
import json
from collections import deque

import numpy as np
import pytest
import torch
from helpers import ROOT, run_cli

from builder import load_bundle
from searchspace import SpecError, load_arch
from searchspace.nodes import HeadNode
from searchspace.plain import decode
from searchspace.tables import TableError
from studies.config import StudyKeys, load_study
from studies.data.dataset import Headline
from studies.data.settings import TEXT_KEYS, TextData
from studies.records.reading import read_study
from studies.sections import TrainingConfig
from studies.tasks.reach import CUT_OFF, REACHED, START, WALL, Mazes, ReachData, make_mazes, prepare_mazes
from studies.tasks.table import TASKS, check_fit, decode_data, open_data, prepare_data, sources
from studies.training.trainer import Trainer

FASTER = (
    "training.flops=4e9",
    "training.eval_tokens=2500",
    "data.grids=400",
    "data.held_out=100",
    "search.num_trials=3",
)


def reachable(grid):
    """By a queue, cell after cell; and how far the farthest is."""
    size = len(grid)
    start = tuple(np.argwhere(grid == START)[0])
    seen, waiting = {start: 0}, deque([start])
    while waiting:
        row, column = waiting.popleft()
        for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= r < size and 0 <= c < size and (r, c) not in seen and grid[r, c] != WALL:
                seen[r, c] = seen[row, column] + 1
                waiting.append((r, c))
    return seen


@pytest.mark.parametrize("size", [3, 5, 8])
def test_answers_are_what_a_search_cell_by_cell_finds(size):
    rows, steps = make_mazes(60, size, 0.4, seed=3)
    assert len({row.tobytes() for row in rows}) > 40
    for row, far in zip(rows, steps, strict=True):
        grid, answer = row.reshape(2, size, size)
        seen = reachable(grid)
        assert max(seen.values()) == far
        for (r, c), cell in np.ndenumerate(grid):
            assert answer[r, c] == (WALL if cell == WALL else REACHED if (r, c) in seen else CUT_OFF)


def test_data_are_made_once_and_the_same(tmp_path):
    config = ReachData(size=4, grids=32, held_out=16)
    data = prepare_mazes(config, tmp_path / "a")
    again = prepare_data(config, tmp_path / "b")
    assert type(open_data(tmp_path / "b")) is type(data) is type(again)
    for ours, theirs in zip(data.batch(1, 5, 8, 16), again.batch(1, 5, 8, 16), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == (8, 16)
    inputs, targets = data.batch(1, 6, 8, 16)
    assert torch.equal(targets == -100, inputs == WALL)
    assert sum(len(inputs) for inputs, _ in data.eval_batches(10**6, 4, 16)) == 16
    with pytest.raises(SpecError, match="differs from the data"):
        prepare_mazes(ReachData(size=4, grids=33, held_out=16), tmp_path / "a")


def test_metrics_are_those_of_a_perfect_and_of_a_blind_model(tmp_path):
    data = prepare_mazes(ReachData(size=4, grids=32, held_out=64), tmp_path / "a")
    (_inputs, targets), *_ = data.eval_batches(10**6, 64, 16)
    perfect = torch.nn.functional.one_hot(targets.clamp(min=0), 5).float() * 50
    metrics = data.result({k: float(v) for k, v in data.measure(perfect, targets).items()})
    assert (metrics["solved"], metrics["cells"], data.score(metrics)) == (1.0, 1.0, -1.0)
    blind = torch.zeros_like(perfect)
    blind[..., REACHED] = 1.0
    found = data.measure(blind, targets)
    assert 0 < found["solved"] < 0.5 < found["cells"] < 1
    assert data.headline.text(-0.25) == "0.250 solved"
    assert data.headline.verdict(-0.5, -0.25) == "0.250 solved better"
    assert data.headline.change(-0.25, -0.5) == "-0.250"


def test_headlines_of_both_directions_agree():
    for task in TASKS.values():
        scale = 2.0 if task.headline.better == "lower" else -2.0
        headline = Headline(task.headline, scale)
        assert headline.verdict(1.0, 2.0).endswith("better")
        assert headline.spread(0.5) == 1.0
        assert (headline.value(1.0) < headline.value(2.0)) == (task.headline.better == "lower")


@pytest.mark.parametrize(
    ("over", "what"),
    [
        ({"causal": True}, "must see its whole input"),
        ({"vocab_size": 4}, "too small for data with 5"),
        ({"seq_len": 36}, "not the length of an example, 25"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(over, what):
    study = load_study("mazes")
    facts = study.task.look(study.data, study.base, prepare=True)
    check_fit(study.baselines[0], facts)
    with pytest.raises(SpecError, match=what):
        check_fit(dataclasses.replace(study.baselines[0], **over), facts)
    graph = study.baselines[0].graph
    (head,) = [name for name, node in graph.items() if isinstance(node, HeadNode)]
    once = dataclasses.replace(graph[head], head="sequence")
    with pytest.raises(SpecError, match=rf"graph.{head}.head: answers once for all positions"):
        check_fit(dataclasses.replace(study.baselines[0], graph={**graph, head: once}), facts)
    with pytest.raises(SpecError, match="sees what it is to predict"):
        check_fit(study.baselines[0], load_study("quickstart").task.look(TextData(), study.base, prepare=False))


@pytest.mark.parametrize("kind", sources())
def test_a_source_takes_its_own_keys_alone(kind):
    values = {
        "path": "x", "text_field": "body", "subset": "s", "split": "test", "held_out_split": "v", "max_bytes": 5, "tokenizer": "t",
        "held_out": 0.1, "dtype": "uint8", "vocab_size": 9, "bytes_per_token": 2.0, "size": 9, "walls": 0.2, "grids": 99,
    }  # fmt: skip
    own = TEXT_KEYS.get(kind, tuple(field.name for field in dataclasses.fields(sources()[kind].config)))
    for name, value in values.items():
        if kind not in TEXT_KEYS and name == "held_out":
            continue  # a share of text, a number of made examples
        if kind in ("sudoku", "chess") and name == "path":
            continue  # which needs ratings too
        if name in own:
            assert getattr(decode_data({"kind": kind, name: value}, "data"), name) == value
        else:
            with pytest.raises(SpecError, match=r"data\.\w+.*(no use for it|unknown key)"):
                decode_data({"kind": kind, name: value}, "data")
    with pytest.raises(SpecError, match="unknown value 'crosswords'"):
        decode(StudyKeys, {"data": {"kind": "crosswords"}})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mazes")
    output = run_cli("search", "mazes", "--dir", folder / "run", "--serial", *FASTER)
    return folder / "run", output


def test_a_search_over_it_is_whole(searched):
    folder, output = searched
    assert "solved" in output
    assert "higher is better" in output
    assert "a held-out maze" in output
    assert "bits/byte" not in output
    records, data, settings = read_study(folder)
    assert settings.task.name == data.facts.task == "reach"
    for record in records:
        for rung in record.rungs:
            assert set(rung.metrics) == {"solved", "cells", "loss"}
            assert rung.score == -rung.metrics["solved"]
    assert "solved" in run_cli("status", folder)
    run_cli("report", folder)
    page = (folder / "report.html").read_text()
    assert "share of held-out mazes without a mistake" in page
    assert "bits/byte" not in page
    assert (folder / "tracking/tensorboard").is_dir()


def test_what_it_found_is_exported_and_examined(searched, tmp_path):
    folder, _ = searched
    model = load_bundle(folder / "best").model
    for form, out in (("hf", tmp_path / "hf"), ("torch", tmp_path / "model.pt2")):
        assert "computes the same" in run_cli("export", folder, "--format", form, "-o", out)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens, mask = torch.randint(0, 3, (2, 25)), torch.ones(2, 25, dtype=torch.long)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens))
    mask[0, :4] = 0
    torch.testing.assert_close(loaded(tokens, attention_mask=mask).logits[0, 4:], model(tokens[:1, 4:])[0])
    card = (folder / "best/README.md").read_text() + (tmp_path / "hf/README.md").read_text()
    assert card.lower().count("share of held-out mazes") == 2
    found = json.loads(run_cli("eval", folder / "best", "--tokens", 5000, "--json"))
    assert found["metrics"]["mazes"] == 200
    assert 0 <= found["metrics"]["solved"] <= 1
    assert found["rows"][0][0] == "0"
    assert "By steps to the farthest cell" in " ".join(run_cli("eval", folder / "best", "--tokens", 5000).split())
    assert "makes no examples" in run_cli("eval", _text_bundle(tmp_path), code=2)
    for command in (("generate", folder / "best"), ("eval", folder / "best", "--data", ROOT / "README.md")):
        assert "the task reach, which has no text" in " ".join(run_cli(*command, code=2).split())
    assert "AutoTokenizer" not in (tmp_path / "hf/README.md").read_text()
    for refuses in (model.generate, loaded.generate):
        with pytest.raises(ValueError, match="nothing to continue"):
            refuses(tokens, max_new_tokens=3)


def test_mistakes_of_who_writes_a_task_are_named(tmp_path):
    row = {field.name: getattr(TASKS["reach"], field.name) for field in dataclasses.fields(TASKS["reach"])}
    with pytest.raises(TableError, match="ReachData is of kind 'reach', none of"):
        type(TASKS["reach"])(**{**row, "kinds": ("maze",)})
    study = load_study("mazes")
    facts = study.task.look(study.data, study.base, prepare=True)
    with pytest.raises(SpecError, match="is of the task 'maze'"):
        check_fit(study.baselines[0], dataclasses.replace(facts, task="maze"))

    class Forgetful(Mazes):
        def result(self, means):
            return {"solved": means["solved"]}

    folder = prepare_mazes(ReachData(size=5, grids=32, held_out=16), tmp_path / "data").folder
    training = TrainingConfig(flops=1e8, batch_tokens=100, eval_tokens=100)
    with pytest.raises(TableError, match=r"Forgetful names metrics that it does not measure: \['cells', 'loss'\]"):
        Trainer(study.baselines[0], training, Forgetful(folder), seed=0).evaluate()


def _text_bundle(folder):
    from builder import build_model, compile_arch, save_bundle

    arch = load_arch(ROOT / "searchspace/architectures/spiralformer_small.yaml")
    return save_bundle(folder / "text", arch, build_model(compile_arch(arch)))
