"""Searching from Python: own training, own data, own candidates; killed and resumed, here and through Ray."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from helpers import ROOT, make_driver, tiny_arch

import builder
import studies
from searchspace import SpecError, load_arch, load_space
from searchspace.plain import encode
from studies import open_study, search
from studies.execution.custom import CustomTraining

SPACE = {
    "vocab_size": 16,
    "seq_len": 16,
    "d_model": {"choice": [8, 16]},
    "levels": {"token": {"chunk": 1}, "word": {"chunk": 4}},
    "blocks": {"core": {"layers": {"int": [1, 2]}, "heads": 2}},
    "graph": {
        "x": {"embed": "tokens"},
        "h": {"loop": "core", "in": "x", "schedule": {"sequence": {"of": ["word", "token"], "length": [1, 3]}}},
        "logits": {"head": "lm", "in": "h"},
    },
}
SHORT = {"tokens": 2000, "batch_tokens": 64, "lr": 1e-2, "eval_tokens": 256}
QUIET = {"progress": False, "settings": {"tracking": []}}


def by_width(spec):
    """Wider is better, and more of the budget too."""
    for share in spec.rungs:
        yield 5.0 - share - spec.arch.d_model / 100


class Copies:
    """The token of four positions ago."""

    vocab_size = 16

    def batch(self, seed, step, batch_size, seq_len):
        tokens = torch.randint(16, (batch_size, seq_len), generator=torch.Generator().manual_seed(1000 * seed + step))
        targets = torch.full_like(tokens, -100)
        targets[:, 4:] = tokens[:, :-4]
        return tokens, targets

    def eval_batches(self, tokens, batch_size, seq_len):
        for i in range(max(1, tokens // (batch_size * seq_len))):
            yield self.batch(12345, i, batch_size, seq_len)


def losses(study):
    return {trial.number: trial.score for trial in study.trials}


def test_a_training_function_a_result_and_going_on(tmp_path):
    seen = []

    class Told:
        def rung(self, record, index):
            seen.append((record.number, index))

        def end(self, record):
            seen.append((record.number, record.state))

    settings = {
        **QUIET,
        "train": by_width,
        "baseline": tiny_arch({"vocab_size": 16, "seq_len": 16}),
        "listener": Told(),
    }
    first = search(SPACE, dir=tmp_path / "s", num_trials=4, objectives=["loss", "params"], **settings)
    assert [trial.purpose for trial in first.trials] == ["baseline", *["search"] * 4]
    assert first.best.score == min(t.score for t in first.trials if t.purpose == "search" and t.score is not None)
    assert first.best in first.front
    assert all(a.cost.params != b.cost.params for a in first.front for b in first.front if a is not b)
    frame = first.to_dataframe()
    assert list(frame.index) == [0, 1, 2, 3, 4]
    assert {"loss", "params", "params_d_model", "flops_per_token", "state", "architecture"} <= set(frame.columns)
    assert frame.loc[first.best.number, "loss"] == first.best.score
    assert {number for number, _ in seen} == {0, 1, 2, 3, 4}
    again = search(SPACE, dir=tmp_path / "s", num_trials=6, objectives=["loss", "params"], **settings)
    assert losses(again).items() >= losses(first).items()
    assert len(again.trials) == 7
    assert losses(open_study(tmp_path / "s")) == losses(again)
    assert "by_width" in again.settings.train
    assert first.report().is_file()
    with pytest.raises(SpecError, match="by_width, which alone has its weights"):
        again.export(tmp_path / "x")
    with pytest.raises(SpecError, match="train"):  # another way of training is another study
        search(SPACE, dir=tmp_path / "s", num_trials=8, objectives=["loss", "params"], **{**settings, "train": None})
    with pytest.raises(SpecError, match="handed over from Python"):
        search(again.settings, dir=tmp_path / "t", progress=False)


def test_what_a_training_function_yields(tmp_path):
    def run(name, train, **more):
        study = search(SPACE, dir=tmp_path / name, train=train, num_trials=1, **{**QUIET, **more})
        return study.trials[0]

    def metrics(spec):
        for share in spec.rungs:
            yield {"loss": torch.tensor(2 - share), "accuracy": share}

    trial = run("metrics", metrics)
    assert (trial.score, trial.rungs[0].metrics["accuracy"]) == (1.0, trial.rungs[0].tokens / trial.tokens)
    assert trial.tokens == pytest.approx(1e6, rel=0.01)
    for name, train, said in (
        ("few", lambda spec: iter([1.0]), "yields 1 of the 3 numbers"),
        ("many", lambda spec: iter([1.0] * 9), "yields more than the 3 results"),
        ("text", lambda spec: iter(["good"]), "yields 'good' as loss"),
        ("other", lambda spec: iter([{"accuracy": 1.0}]), "without loss"),
        ("raises", lambda spec: 1 / 0, "division by zero"),
        ("nan", lambda spec: iter([float("nan")] * 3), "not finite"),
    ):
        with pytest.raises(studies.StudyHaltedError):
            run(name, train)
        (trial,) = open_study(tmp_path / name).trials
        assert trial.state == "failed"
        assert said in trial.error


def test_data_of_ones_own(tmp_path):
    study = search(SPACE, dir=tmp_path / "s", data=Copies(), training=SHORT, num_trials=3, **QUIET)
    assert all(0 < trial.score < 4 for trial in study.trials if trial.state == "complete")
    best = study.export(tmp_path / "best")
    assert builder.load_bundle(best).arch == study.best.arch_spec()
    with pytest.raises(SpecError, match=r"tests.*Copies|Copies.*handed over"):
        search(study.settings, dir=tmp_path / "t", progress=False)


def wrong(name, value):
    made = Copies()
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (object(), "lacks vocab_size, batch, eval_batches"),
        (wrong("vocab_size", "16"), "no number of tokens"),
        (wrong("vocab_size", 99), "too small for data with 99"),
        (wrong("batch", lambda *_: 1), "gives int"),
        (wrong("batch", lambda *_: (torch.zeros(2, 3), torch.zeros(2, 3))), "float32"),
        (wrong("batch", lambda *_: (torch.full((2, 16), 16),) * 2), "from 16 to 16"),
        (wrong("batch", lambda *_: (torch.zeros(2, 99, dtype=torch.long),) * 2), r"give \(2, 16\)"),
        (wrong("batch", lambda *_: (torch.zeros(1, 16, dtype=torch.long),) * 2), r"give \(2, 16\)"),
        (wrong("batch", lambda *_: (torch.zeros(2, 16, dtype=torch.long), torch.full((2, 16), 16))), "target 16"),
        (wrong("batch", lambda *_: ([[0]], [[0]])), "tuple of list"),
        (wrong("digest", 7), "digest: is int"),
        (wrong("loss", lambda logits, targets: 1.0), "data.loss: gives float"),
        (wrong("loss", lambda logits, targets: logits), "data.loss: gives Tensor of shape"),
        (wrong("measure", lambda logits, targets: 3), "data.measure: gives int"),
        (Copies, "is the class Copies"),
        (wrong("eval_batches", lambda *_: iter([])), "gives nothing"),
    ],
)
def test_wrong_data_are_named(tmp_path, data, said):
    with pytest.raises((SpecError, studies.StudyHaltedError), match=said):
        search(SPACE, dir=tmp_path / "s", data=data, training=SHORT, num_trials=2, **QUIET)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "crosswords"}, "unknown task"),
        ({"task": "reach", "data": {"kind": "text", "path": "x"}}, "data of the task text_lm"),
        ({"settings": {"budget": {}}}, "no further section"),
        ({"settings": {"search": 3}}, "give a mapping"),
        ({"enqueue": [{"depth": 3}]}, "no decision"),
        ({"enqueue": [{"d_model": 12}]}, "not an option"),
        ({"enqueue": [{"d_model": 8}] * 3, "num_trials": 2}, "lists 3"),
        ({"enqueue": ["no_such_file"]}, "no such file"),
        ({"enqueue": {"d_model": 8}}, "give a list"),
        ({"enqueue": [tiny_arch()], "settings": {"search": {"sampler": "gp"}}}, "learns from decisions alone"),
        ({"settings": {"search": {"num_trials": 3}}}, "an argument of its own"),
        ({"train": 5}, "give a function"),
        ({"budget": {"params": 1}}, "budget"),
        ({"training": {"tokens": {1, 2}}}, "expected plain data, got set"),
        ({"baseline": {"d_model": 3}}, "baseline.0"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, said):
    with pytest.raises(SpecError, match=said):
        search(SPACE, dir=tmp_path / "s", **{"train": by_width, **QUIET, **settings})
    assert not (tmp_path / "s" / "journal.log").exists()


@pytest.mark.parametrize("sampler", ["tpe", "random", "evolution", "predictor"])
def test_candidates_of_ones_own_come_first(tmp_path, sampler):
    stranger = load_arch({**encode(tiny_arch({"vocab_size": 16, "seq_len": 16})), "name": "stranger", "d_model": 24})
    (tmp_path / "mine.yaml").write_text(stranger.to_yaml())
    asked = [{"d_model": 16, "blocks.core.layers": 2}, str(tmp_path / "mine.yaml"), {"graph.h.schedule.length": 3}]
    settings = {"settings": {"tracking": [], "search": {"sampler": sampler, "stopper": "none"}}, "progress": False}
    study = search(SPACE, dir=tmp_path / "s", train=by_width, num_trials=12, enqueue=asked, **settings)
    first, second, third = study.trials[:3]
    assert (first.choices["d_model"], first.choices["blocks.core.layers"]) == (16, 2)
    assert (second.name, second.arch_spec().d_model) == ("stranger", 24)
    assert len(third.arch_spec().graph["h"].schedule) == 3
    assert study.best.number == 1  # by_width: it is the widest
    more = search(SPACE, dir=tmp_path / "s", train=by_width, num_trials=14, enqueue=asked, **settings)
    assert [trial.arch_id for trial in more.trials[:12]] == [trial.arch_id for trial in study.trials]
    assert len({trial.arch_id for trial in more.trials}) == 14  # nothing twice


def test_a_mistake_of_ones_own_costs_no_candidate(tmp_path):
    """Whoever mends a function goes on with the same call: what had failed is tried again."""
    mended = []

    def train(spec):
        if not mended:
            raise NameError("oops")
        yield from by_width(spec)

    asked = {"train": train, "num_trials": 6, "enqueue": [{"d_model": 16, "blocks.core.layers": 1}, {"d_model": 16}]}
    with pytest.raises(studies.StudyHaltedError, match="oops"):
        search(SPACE, dir=tmp_path / "s", **asked, **QUIET)
    mended.append(True)
    study = search(SPACE, dir=tmp_path / "s", **asked, **QUIET)
    ended = [trial for trial in study.trials if trial.state != "failed"]
    assert len(ended) == 6 == len({trial.arch_id for trial in ended})
    assert [trial.choices["d_model"] for trial in ended[:2]] == [16, 16]
    assert all("NameError: oops" in trial.error for trial in study.trials if trial.state == "failed")


def test_what_is_enqueued_too_late_is_told(tmp_path, capsys):
    search(SPACE, dir=tmp_path / "s", train=by_width, num_trials=2, **QUIET)
    late = {"enqueue": [{"d_model": 16, "blocks.core.layers": 2}], "settings": {"tracking": []}}
    search(SPACE, dir=tmp_path / "s", train=by_width, num_trials=2, **late)
    assert "1 of search.enqueue wait" in capsys.readouterr().err
    study = search(SPACE, dir=tmp_path / "s", train=by_width, num_trials=3, **late)
    assert study.trials[2].choices["blocks.core.layers"] == 2
    assert "wait" not in capsys.readouterr().err


def test_what_is_handed_over_is_told_apart(tmp_path):
    settings = {"num_trials": 1, **QUIET}

    def shifted(by, spec):
        return iter([by - share for share in spec.rungs])

    search(SPACE, dir=tmp_path / "f", train=partial(shifted, 5.0), **settings)
    with pytest.raises(SpecError, match="train"):
        search(SPACE, dir=tmp_path / "f", train=partial(shifted, 6.0), **{**settings, "num_trials": 2})
    search(SPACE, dir=tmp_path / "d", data=Copies(), training=SHORT, **settings)
    other = wrong("batch", lambda *args: tuple(15 - part.clamp(min=0) for part in Copies().batch(*args)))
    with pytest.raises(SpecError, match=r"data\.version"):
        search(SPACE, dir=tmp_path / "d", data=other, training=SHORT, **{**settings, "num_trials": 2})
    whole = open_study(tmp_path / "d").settings
    again = search(whole, dir=tmp_path / "d2", data=Copies(), progress=False)
    assert losses(again) == losses(open_study(tmp_path / "d"))


def test_reports_between_numbers_and_names_of_metrics(tmp_path):
    def train(spec):
        for share in spec.rungs:
            yield studies.Report(kind="progress", attempt=1, steps=1)
            yield {"loss": 2 - share, "state": 1.0, "params": 5.0}

    study = search(SPACE, dir=tmp_path / "s", train=train, num_trials=2, **QUIET)
    frame = study.to_dataframe()
    assert set(frame["state"]) <= {"complete", "stopped"}
    assert set(frame["metric_state"]) == {1.0}
    assert set(frame["metric_params"]) == {5.0}
    assert all(len(trial.rungs) == 3 for trial in study.trials if trial.state == "complete")
    json.dumps(study.to_dict(), allow_nan=False)


def test_a_time_budget_of_ones_own_training(tmp_path):
    def slow(spec):
        for loss in by_width(spec):
            time.sleep(0.4)
            yield loss

    settings = {"progress": False, "settings": {"tracking": [], "search": {"time_budget_s": 1.0, "stopper": "none"}}}
    begun = time.monotonic()
    study = search(SPACE, dir=tmp_path / "s", train=slow, num_trials=40, **settings)
    assert time.monotonic() - begun < 20
    assert 1 <= len(study.trials) < 10

    def failing(spec):
        time.sleep(1.2)
        raise ValueError("no")

    with pytest.raises(studies.StudyHaltedError, match="1 failed"):
        search(SPACE, dir=tmp_path / "t", train=failing, num_trials=1, **settings)


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_python as t
def slow(spec):
    for loss in t.by_width(spec):
        time.sleep(0.15)
        yield loss
class Slow(t.Copies):
    def batch(self, *args):
        time.sleep(0.01)
        return super().batch(*args)
given = {{"train": slow}} if sys.argv[1] == "train" else {{"data": Slow(), "training": t.SHORT}}
t.search(t.SPACE, dir=sys.argv[2], num_trials=5, ray=sys.argv[3] == "ray", **given, **t.QUIET)
"""


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("train", "here"),
        pytest.param("train", "ray", marks=pytest.mark.slow),
        pytest.param("data", "here", marks=pytest.mark.slow),
        pytest.param("data", "ray", marks=pytest.mark.slow),
    ],
)
def test_killed_it_goes_on_and_nothing_is_lost(tmp_path, what, where):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests" / "studies")))
    command = [sys.executable, "-W", "ignore", str(script), what, str(tmp_path / "killed"), where]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    journal = tmp_path / "killed" / "journal.log"
    deadline = time.monotonic() + 120
    while not (journal.exists() and b'"result"' in journal.read_bytes()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = {n: score for n, score in losses(open_study(tmp_path / "killed")).items() if score is not None}
    subprocess.run(command, env=environment, check=True, timeout=240)
    after = open_study(tmp_path / "killed")
    assert losses(after).items() >= before.items()
    assert [trial.number for trial in after.trials] == list(range(5))
    assert not [trial for trial in after.trials if trial.state in ("running", "failed")]


def test_what_is_handed_over_reaches_a_worker_whole(tmp_path):
    """What Ray's worker does with it, without a cluster; `test_killed` has one."""
    from studies.execution import on_ray

    driver = make_driver(tmp_path)
    spec = driver.next_trial()

    def told(pickled):
        worker = on_ray.Worker.__new__(on_ray.Worker)
        worker.setup({"trial": spec.to_json()}, pickled, [])
        return worker.step()

    offset = 3.0
    run = CustomTraining(
        lambda spec: iter([offset - share for share in spec.rungs])
    )  # a closure of __main__, as it were
    report = told(on_ray._pickled(run))["report"]
    assert json.loads(report)["rungs"][0]["score"] == 3.0 - spec.rungs[0]
    broken = told(b"no pickle")
    assert broken["done"]
    assert "can't be loaded by a worker" in broken["report"]
    with pytest.raises(SpecError, match="can't be sent to Ray's workers"):
        on_ray._pickled(CustomTraining(partial(print, threading.Lock())))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_examples_run(tmp_path, example):
    command = [sys.executable, "-W", "error", str(example), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trial" in done.stdout.splitlines()[-1]


def test_specs_from_what_files_would_hold():
    arch = load_arch({"extends": "plain_4", "d_model": 64}, ["seq_len=32"])
    assert (arch.d_model, arch.seq_len) == (64, 32)
    assert load_arch(encode(arch)) == arch
    space = load_space(SPACE)
    assert load_space(space.data).count().low == space.count().low > 1
    with pytest.raises(SpecError, match="d_modle"):
        load_arch({"extends": "plain_4", "d_modle": 64})
    with pytest.raises(SpecError, match="expected plain data, got Tensor"):
        load_arch({"extends": "plain_4", "d_model": torch.tensor(3)})


def test_packages_show_their_names():
    for package in (studies, builder):
        assert dir(package) == sorted(package.__all__)
        assert all(getattr(package, name) is not None for name in package.__all__)
    code = "import studies, sys; studies.open_study; print([m for m in ('ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
