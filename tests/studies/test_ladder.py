"""Ladders: horizons off one trunk, the same candidates at other sizes, and runs where they tell most."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import ARCHITECTURES, make_driver, run_cli, tiny_arch, tiny_data, tiny_study

from builder import compile_arch, estimate
from searchspace import SpecError, load_arch
from searchspace.plain import dump_yaml, encode
from studies.config import load_study
from studies.execution.run import run_serial
from studies.records.reading import open_for_reading
from studies.records.resume import keep_settings
from studies.records.trial import Report, Rung
from studies.scale.ladder import runs_of
from studies.scale.sizes import scaled
from studies.sections import SizeConfig, TrainingConfig
from studies.tasks.table import open_data
from studies.training.plan import make_plan
from studies.training.recipe import size_of
from studies.training.run_trial import run_trial
from studies.training.trainer import Trainer

LADDER = ("scale.sizes=[8,12,16]", "scale.horizons=[0.01,0.02]", "training.eval_tokens=512")


# -- one trunk ----------------------------------------------------------------------------------------


def wsd(**over):
    return TrainingConfig(
        **{"tokens": 24 * 100, "batch_tokens": 24, "lr": 0.01, "beta2": 0.95, "lr_schedule": "wsd", "warmup": 0.0}
        | over
    )


@pytest.fixture
def ladder_spec(tmp_path):
    two = {"baseline": [tiny_data({"vocab_size": 256}), tiny_data({"vocab_size": 256, "d_model": 24})]}
    driver = make_driver(tmp_path, two, *LADDER, "search.num_trials=0", "scale.seeds=1", "scale.allot=false")
    spec = driver.next_trial()
    return replace(spec, training=wsd(eval_tokens=1024, checkpoint_every_s=1.0), rungs=(0.25, 0.5, 1.0))


def test_each_horizon_is_what_a_training_of_its_own_would_be(ladder_spec):
    *_, last = run_trial(ladder_spec)
    assert last.kind == "done"
    corpus = open_data(ladder_spec.corpus)
    for rung, tokens in zip(last.rungs, (24 * 25, 24 * 50, 24 * 100), strict=True):
        alone = Trainer(ladder_spec.arch, wsd(tokens=tokens, eval_tokens=1024), corpus, seed=ladder_spec.seed)
        alone.train(alone.plan.num_steps)
        assert rung.tokens == tokens
        assert rung.flops == alone.flops
        assert rung.score == alone.evaluate()[0]


@pytest.mark.parametrize("stop_at", [15, 21, 30, 42, 47, 60, 95])
def test_a_trunk_goes_on_where_it_was_killed(ladder_spec, stop_at, monkeypatch):
    *_, whole = run_trial(replace(ladder_spec, folder=f"{ladder_spec.folder}-whole"))
    monkeypatch.setattr("studies.training.run_trial._PROGRESS_S", 0.0)  # a word, and a checkpoint, each step
    spec = replace(ladder_spec, training=replace(ladder_spec.training, checkpoint_every_s=-1.0))
    for report in run_trial(spec):
        if report.steps == stop_at and report.kind == "progress":
            break
    *_, last = run_trial(spec)
    assert last.kind == "done"
    assert last.rungs == whole.rungs


# -- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda file: file.stem)
def test_at_its_own_size_an_architecture_is_itself(file):
    arch = load_arch(file)
    assert scaled(arch, SizeConfig(d_model=arch.d_model)) == arch


@pytest.mark.parametrize("width", [8, 24, 40, 56, 96, 250])
@pytest.mark.parametrize("depth", [1, 3])
def test_any_width_can_be_built(width, depth):
    blocks = {"core": {"layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 48, "qk_norm": True}}
    arch = tiny_arch({"blocks": blocks})
    grown = scaled(arch, SizeConfig(d_model=width, depth=depth))
    cost = estimate(compile_arch(grown))
    assert grown.blocks["core"].layers == 2 * depth
    assert grown.d_model // grown.blocks["core"].heads == pytest.approx(8, rel=0.6)
    assert grown.blocks["core"].ffn_dim == pytest.approx(3 * width, abs=8)
    assert cost.params > 0


def test_sizes_grow_as_they_are_asked_to():
    arch = load_arch("three_layers")
    sizes = [
        size_of(grown, estimate(compile_arch(grown)))
        for grown in (scaled(arch, SizeConfig(d_model=width)) for width in (16, 32, 48, 80))
    ]
    assert sizes == [14192, 46048, 95568, 253360]


# -- a study's ladder ---------------------------------------------------------------------------------


def pretend(true_worth, noise=0.0):
    """A stand-in for training: losses of a law, by size, tokens and how much a candidate is worth."""

    def run(spec):
        cost = estimate(compile_arch(spec.arch))
        size = size_of(spec.arch, cost) * true_worth(spec)
        plan = make_plan(spec.training, spec.arch, cost)
        draw = np.random.default_rng([spec.seed, size_of(spec.arch, cost), round(1e6 * true_worth(spec))])
        rungs = tuple(
            Rung(
                flops=plan.step_at(share) * plan.flops_per_step,
                tokens=plan.step_at(share) * plan.tokens_per_step,
                score=0.7 + 20 * size**-0.35 + 3 * (plan.step_at(share) * plan.tokens_per_step) ** -0.3
                + noise * draw.normal(),
            )
            for share in spec.rungs
        )  # fmt: skip
        yield Report(kind="done", attempt=1, flops=rungs[-1].flops, tokens=rungs[-1].tokens, steps=plan.num_steps,
                     rungs=rungs)  # fmt: skip

    return run


def by_loops(spec):
    """More iterations are worth more, and cost more."""
    loops = [node for node in spec.arch.graph.values() if hasattr(node, "schedule")]
    return 1.0 + 0.5 * sum(len(node.schedule) for node in loops)


def ladder_driver(folder, *over):
    return make_driver(folder, None, *LADDER, "search.num_trials=4", "search.stopper=none", *over)


def test_the_best_and_the_baselines_go_up(tmp_path):
    driver = ladder_driver(tmp_path, "scale.candidates=2", "scale.allot=false", "search.promote=3")
    assert driver.progress().total == 4 + 1 + 8 + 3 * 3 * 2
    run_serial(driver, run=pretend(by_loops))
    assert driver.progress().total == len(driver.records)
    rungs = [record for record in driver.records if record.purpose == "ladder"]
    found = sorted((r for r in driver.records if r.purpose == "search"), key=lambda r: r.score)
    base = next(r.arch_id for r in driver.records if r.purpose == "baseline")
    assert {record.origin for record in rungs} == {base, found[0].arch_id, found[1].arch_id}
    assert len(rungs) == 3 * 3 * 2
    assert {record.size for record in rungs} == {"8", "12", "16"}
    assert all(len(record.rungs) == 2 for record in rungs)
    for where in {(record.size, record.seed) for record in rungs}:
        same = [record.training for record in rungs if (record.size, record.seed) == where]
        assert len({(t["tokens"], t["batch_tokens"], t["lr_schedule"]) for t in same}) == 1
        assert {t["lr_schedule"] for t in same} == {"wsd"}
    assert open_for_reading(driver.folder) == driver.records


def test_a_killed_driver_goes_up_the_same_ladder(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = ladder_driver(tmp_path / "a")
    run_serial(whole, run=pretend(by_loops, 0.01))
    driver = ladder_driver(tmp_path / "b")
    for _ in range(60):
        spec = driver.next_trial()
        if spec is None:
            break
        if spec.number % 3 == 0:  # the driver is lost with a trial on its way
            driver = ladder_driver(tmp_path / "b")
            assert driver.next_trial() == spec
        for report in pretend(by_loops, 0.01)(spec):
            driver.report(spec.number, report)
    assert driver.finished
    assert [(r.origin, r.size, r.seed) for r in driver.records] == [(r.origin, r.size, r.seed) for r in whole.records]


def test_what_cannot_change_the_answer_is_left_out(tmp_path):
    (tmp_path / "all").mkdir(), (tmp_path / "some").mkdir()
    steep = pretend(lambda spec: by_loops(spec) ** 4, 0.003)
    spent = {}
    for name, allot in (("all", "false"), ("some", "true")):
        driver = ladder_driver(tmp_path / name, f"scale.allot={allot}", "scale.seeds=3", "scale.sizes=[8,16,24,40]")
        run_serial(driver, run=steep)
        rungs = [record for record in driver.records if record.purpose == "ladder"]
        spent[name] = sum(record.flops for record in rungs), len(rungs)
        runs = runs_of(driver.records, driver.study.task)
        top = {run.candidate for run in runs if run.rung.startswith("40")}
        assert len(top) >= 2
    assert spent["some"][0] < 0.6 * spent["all"][0]
    assert spent["some"][1] < spent["all"][1]


def test_runs_go_where_they_tell(tmp_path):
    """Candidates alike are trained with more seeds than one that lies far off."""
    worth = {1: 1.0, 2: 3.0, 3: 3.05}
    schedules = {"plain": ["token"], "close": ["word", "token"], "closer": ["phrase", "word", "token"]}
    listed = [
        tiny_data({"name": name, "vocab_size": 256, "graph": {"h": {"schedule": schedule}}})
        for name, schedule in schedules.items()
    ]
    driver = make_driver(tmp_path, {"baseline": listed}, *LADDER, "search.num_trials=0", "scale.seeds=4")
    run_serial(driver, run=pretend(lambda s: worth[len(s.arch.graph["h"].schedule)], 0.01))
    runs = {name: sum(r.name == name for r in driver.records) for name in ("plain", "close", "closer")}
    assert runs["close"] + runs["closer"] > 2 * 3
    assert runs["plain"] <= max(runs["close"], runs["closer"])


def test_a_candidate_that_diverges_is_named(tmp_path):
    def run(spec):
        if by_loops(spec) > 2 and spec.seed == 0 and spec.rungs == (0.5, 1.0):
            yield Report(kind="failed", attempt=1, reason="diverged", error="the training loss is nan")
        else:
            yield from pretend(by_loops)(spec)

    driver = ladder_driver(tmp_path, "scale.seeds=1", "search.max_failures=50")
    run_serial(driver, run=run)
    assert driver.finished
    keep_settings(driver.study, driver.folder)
    text = " ".join(run_cli("scale", str(driver.folder)).split())
    assert "no run of it ended beside the baseline" in text


# -- from the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("climbed")
    study = tiny_study(folder)
    text = run_cli(
        "search",
        str(study),
        *LADDER,
        "search.num_trials=3",
        "scale.candidates=2",
        "scale.seeds=1",
        "--serial",
        "--dir",
        str(folder / "run"),
    )
    return folder, study, text


def test_search_ends_with_the_answer(climbed):
    folder, _, text = climbed
    assert "  ladder " in text
    assert "against plain" in text
    assert "a difference varies by" in text
    page = (folder / "run/report.html").read_text()
    assert 'id="scale"' in page
    assert page.index('id="scale"') < page.index("<h2>The search</h2>")


def test_scale_tells_a_study(climbed):
    folder, study, _ = climbed
    text = run_cli("scale", str(folder / "run"), "--size", "1e6")
    assert "At 1M parameters" in text
    assert "(trial " in text
    assert "The ladder took" in text
    again = run_cli("search", str(study), *LADDER, "search.num_trials=3", "scale.candidates=2", "scale.seeds=1",
                    "--serial", "--dir", str(folder / "run"))  # fmt: skip
    assert "  ladder " not in again
    plain = run_cli("search", str(study), LADDER[2], "search.num_trials=3", "--serial", "--dir", str(folder / "no"))
    assert "against plain" not in plain
    assert "has no ladder" in run_cli("scale", str(folder / "no"), code=2)
    short = ("search.num_trials=3", "scale.candidates=1", "scale.seeds=1", "--serial", "--dir", str(folder / "no"))
    more = run_cli("search", str(study), *LADDER, *short)
    assert "  ladder " in more  # a ladder can be added to what was searched


def test_training_one_architecture_is_one_run(tmp_path, monkeypatch):
    """What a study does with its best is of its search."""
    study, seen = tiny_study(tmp_path, {"search": {"promote": {"trials": 2}}}), []
    monkeypatch.setattr("studies.strategy.driver.StudyDriver.forget", lambda self, record: seen.extend(self.records))
    run_cli(
        "train",
        "three_layers",
        "training.flops=1e8",
        "training.batch_tokens=128",
        "--study",
        str(study),
        "-o",
        str(tmp_path / "out"),
    )
    assert [record.purpose for record in seen] == ["baseline"]


def test_a_rung_can_be_exported(climbed):
    folder, _, _ = climbed
    record = next(r for r in open_for_reading(folder / "run") if r.purpose == "ladder")
    run_cli("export", str(folder / "run"), "--trial", str(record.number), "-o", str(folder / "rung"))


def test_a_task_that_counts_hits_climbs_by_its_loss(tmp_path):
    run = (
        "search.num_trials=0",
        "scale.sizes=[8,12,16]",
        "scale.horizons=[0.01,0.02]",
        "scale.seeds=1",
        "training.flops=1e9",
    )
    study = load_study("mazes")
    listed = [encode(replace(study.baselines[0], name=name, d_model=d)) for name, d in (("a", 48), ("b", 32))]
    file = tmp_path / "mazes.yaml"
    file.write_text(dump_yaml({**study.plain, "baseline": listed}))
    text = run_cli("search", str(file), *run, "training.eval_tokens=1000", "--serial", "--dir", str(tmp_path / "run"))
    assert "nats" in text
    records = open_for_reading(tmp_path / "run")
    assert all(0 < run.loss == rung.metrics["loss"] for run, rung in zip(
        runs_of(records, study.task), [rung for record in records for rung in record.rungs], strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("over", "says"),
    [
        (["scale.sizes=[8,16]"], "2 are too few for a law"),
        (["scale.sizes=[8,24,16]"], "not in order"),
        (["scale.sizes=[8,8,16]"], "not in order"),
        (["scale.sizes=[8,16,wide]"], "write a width"),
        (["scale.sizes=[8,16,-3]"], "scale.sizes.2"),
        ([LADDER[0], "scale.horizons=[1,0.5]"], "in order"),
        ([LADDER[0], "scale.horizons=[]"], "in order"),
        ([LADDER[0], "scale.horizons=[.nan]"], "scale.horizons"),
        ([LADDER[0], "scale.target=0"], "scale.target"),
        (["scale.sizes=[8,16,24]", "scale.sedes=2"], "did you mean 'seeds'"),
        (["search.num_trials=0"], "there is no ladder"),
        ([*LADDER, "search.num_trials=0"], "list two baselines"),
        ([LADDER[0], "scale.horizons=[1e-2]", "scale.sizes=[7,9,11]"], "at width 7"),
        (["sizes=[8,16,24]"], "did you mean scale.sizes"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_what_is_wrong_is_said(tmp_path, over, says):
    assert says in " ".join(run_cli("check", str(tiny_study(tmp_path)), *over, code=2).split())


def test_a_ladder_alone_needs_no_space():
    study = load_study("ladder")
    assert study.search.num_trials == 0
    assert len({compile_arch(arch).arch_id for arch in study.baselines}) == 9


def test_the_dry_run_counts_the_ladder(tmp_path):
    study = str(tiny_study(tmp_path))
    without, with_it = (run_cli("search", study, *over, "--dry-run") for over in ((), LADDER))
    assert "ladder:" not in without
    assert "ladder: 6 candidates at" in with_it
    text = run_cli("check", study, "scale.sizes=[8,16,200]", "scale.horizons=[20]")
    assert "times (" in text
    assert "repeated text" in text


def test_error_of_size_names_it():
    with pytest.raises(SpecError, match="at width 7"):
        scaled(tiny_arch(), SizeConfig(d_model=7))


@pytest.mark.slow
def test_a_ladder_may_change_and_goes_on(tmp_path):
    """Other sizes, horizons and seeds are trained; what was trained keeps its own horizons."""
    study, run = str(tiny_study(tmp_path)), ("--serial", "--dir", str(tmp_path / "run"))
    over = ("search.num_trials=2", "scale.candidates=1", "scale.seeds=1", "scale.allot=false", LADDER[2])
    steps = [
        (["scale.sizes=[8,12,16]", "scale.horizons=[0.01,0.02]"], 6),
        (["scale.sizes=[8,12,16]", "scale.horizons=[0.01,0.02]"], 6),
        (["scale.sizes=[8,12,20]", "scale.horizons=[0.01,0.02]"], 8),
        (["scale.sizes=[8,12,20]", "scale.horizons=[0.015,0.03]"], 14),
        (["scale.sizes=[8,12,20]", "scale.horizons=[0.03]"], 20),
    ]
    for scale, count in steps:
        run_cli("search", study, *over, *scale, *run)
        rungs = [record for record in open_for_reading(tmp_path / "run") if record.purpose == "ladder"]
        assert len(rungs) == count, scale
        assert all(len(record.rungs) == len(record.shares) for record in rungs)
        assert all(record.rungs[-1].tokens == record.tokens for record in rungs)
    first = rungs[0]
    run_cli("export", str(tmp_path / "run"), "--trial", str(first.number), "-o", str(tmp_path / "out"))
    status = run_cli("status", str(tmp_path / "run"))
    assert "its ladder" not in status  # allot is off


def test_status_counts_what_is_to_come(tmp_path):
    driver = ladder_driver(tmp_path, "scale.candidates=2")
    for _ in range(5):
        for report in pretend(by_loops)(spec := driver.next_trial()):
            driver.report(spec.number, report)
    keep_settings(driver.study, driver.folder)
    text = run_cli("status", str(driver.folder))
    assert "5 of 23 trials ended" in text
    assert "the same search command goes on" in text
    assert "may need fewer" in text


def test_what_always_fails_is_not_tried_everywhere(tmp_path):
    def run(spec):
        if spec.decayed and spec.arch.graph == worst:
            yield Report(kind="failed", attempt=1, reason="diverged", error="nan")
        else:
            yield from pretend(by_loops)(spec)

    driver = ladder_driver(tmp_path, "scale.candidates=2", "scale.seeds=3", "scale.sizes=[8,24,32]")
    worst = None
    while (spec := driver.next_trial()) is not None:
        if spec.decayed and worst is None:
            worst = driver._ladder.candidates[1].arch.graph
        for report in run(spec):
            driver.report(spec.number, report)
    failed = [record for record in driver.records if record.state == "failed"]
    assert len(failed) == 1
    assert not driver.halted


def test_without_an_answer_the_reason_is_said(tmp_path):
    def run(spec):
        if spec.decayed and by_loops(spec) == 1.0:  # the plain baseline
            yield Report(kind="failed", attempt=1, reason="diverged", error="nan")
        else:
            yield from pretend(by_loops)(spec)

    driver = ladder_driver(tmp_path, "scale.candidates=2", "search.max_failures=50")
    run_serial(driver, run=run)
    keep_settings(driver.study, driver.folder)
    assert "no run of plain has ended" in run_cli("scale", str(driver.folder), code=2)
    assert "no answer from the ladder" in " ".join(run_cli("report", str(driver.folder)).split())
    assert "is no candidate" in run_cli("scale", str(driver.folder), "--baseline", "plian", code=2)


def test_architectures_of_another_length_stay_below(tmp_path):
    long = tiny_data({"vocab_size": 256, "seq_len": 48, "name": "long"})
    study = tiny_study(tmp_path, {"baseline": [tiny_data({"vocab_size": 256}), long]})
    text = " ".join(run_cli("check", str(study), *LADDER, code=2).split())
    assert "can't see the same batches" in text


def test_a_horizon_within_the_warm_up_is_refused(tmp_path):
    study = str(tiny_study(tmp_path))
    text = run_cli("check", study, LADDER[0], "scale.horizons=[0.001,0.1]", "training.warmup=0.1", code=2)
    assert "scale.horizons" in text
