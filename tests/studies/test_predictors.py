"""Predictors learn what is there to be learned, judge themselves, and are kept without pickle."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import end_all, run_cli, tiny_study

from builder import estimate
from builder.graph.compiler import compile_arch
from searchspace import SpecError, load_space
from studies.commands.preflight import look_at_data, preflight
from studies.config import load_study
from studies.data.corpus import DataFacts, prepare_corpus
from studies.predict import explain as ranking
from studies.predict import learners
from studies.predict.explain import Pool, explain, rank, transfer
from studies.predict.features import Observation, adjust, observe
from studies.predict.learners import LEARNERS
from studies.predict.predictor import Predictor, fit_best, rank_correlation
from studies.records.trial import Report, Rung
from studies.strategy import surrogate
from studies.strategy.driver import StudyDriver

TRAINING = {"flops": 1e12, "batch_tokens": 2048}
SHARES = (1 / 9, 1 / 3, 1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    from studies.predict.gnn import GraphNetwork  # seconds to import

    monkeypatch.setitem(learners.LEARNERS, "gnn", lambda: GraphNetwork(epochs=60))


def made_up_loss(arch):
    """Coarse first is good, and so are many calls."""
    calls = [node for node in compile_arch(arch).nodes if node.op == "block"]
    return (
        -0.3 * np.log2(calls[min(1, len(calls) - 1)].level.chunk)
        - 0.2 * len(calls)
        + 0.05 * sum(1 / c.level.chunk for c in calls)
    )


def make_trials(number, study="", noise=0.0):
    """Schedules of the quickstart space at three rungs."""
    trials, seen, space = [], set(), load_space("quickstart")
    for seed in range(3 * number):
        arch = space.sample(seed).arch
        graph = compile_arch(arch)
        if graph.arch_id in seen or len(trials) == number:
            continue
        seen.add(graph.arch_id)
        loss = made_up_loss(arch) + noise * np.random.default_rng(seed).normal()
        rungs = [(1e12 * share, 3 + loss - np.log(share)) for share in SHARES]
        trials.append(observe(arch, estimate(graph), TRAINING, rungs, len(trials), study))
    return trials


@pytest.fixture(scope="module")
def trials():
    return make_trials(140)


def of_last_rung(trials):
    return [trial[-1] for trial in trials]


@pytest.mark.parametrize(("name", "tau"), [("cost", 0.0), ("scaling_law", 0.1), ("tabular", 0.75), ("gnn", 0.7)])
def test_held_out_schedules_are_ranked(name, tau, trials):
    predictor = Predictor(name, members=3)
    predictor.fit(of_last_rung(trials[:80]))
    held_out = of_last_rung(trials[80:])
    mean, spread = predictor.predict([o.example for o in held_out])
    assert mean.shape == spread.shape == (len(held_out),)
    assert (spread > 0).all()
    true = rank_correlation(mean, [o.loss for o in held_out])
    assert true > tau
    assert abs(predictor.tau - true) < 0.25  # its own estimate


def test_trials_that_were_stopped_teach_too(trials):
    stopped = [o for trial in trials[:20] for o in trial] + [trial[0] for trial in trials[20:80]]
    few = [o for trial in trials[:20] for o in trial]
    held_out = of_last_rung(trials[80:])
    taus = []
    for seen in (stopped, few):
        predictor = Predictor("tabular")
        predictor.fit(seen)
        taus.append(rank_correlation(predictor.predict([o.example for o in held_out])[0], [o.loss for o in held_out]))
    assert taus[0] > taus[1]
    assert taus[0] > 0.7


def test_rungs_that_only_good_trials_reach_are_adjusted(trials):
    by_loss = sorted(trials, key=lambda trial: trial[0].loss)
    seen = [trial[0] for trial in by_loss] + [o for trial in by_loss[:20] for o in trial[1:]]
    y, scales = adjust(seen)
    true = np.array([made for o in seen for made in [by_loss[[t[0].trial for t in by_loss].index(o.trial)][-1].loss]])
    assert np.allclose(y * scales[""].spread + scales[""].middle, true)


def test_chance_is_told_from_skill(trials):
    draw = np.random.default_rng(0)
    noise = [Observation(o.example, float(draw.normal()), o.rung, o.trial) for o in of_last_rung(trials[:60])]
    assert all(abs(predictor.tau) < 0.25 for predictor in fit_best(noise, names=("cost", "tabular")))
    best = fit_best(of_last_rung(trials[:60]), names=("cost", "tabular"))[0]
    assert (best.learner, best.tau > 0.7) == ("tabular", True)


def test_few_trials_are_refused(trials):
    with pytest.raises(SpecError, match="7 trials are too few"):
        Predictor("cost").fit(of_last_rung(trials[:7]))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_kept_predictor_says_the_same(name, trials, tmp_path):
    seen, others = of_last_rung(trials[:24]), [o.example for o in of_last_rung(trials[30:40])]
    predictor, again = Predictor(name, members=2), Predictor(name, members=2)
    predictor.fit(seen, seed=3)
    again.fit(seen, seed=3)
    assert np.array_equal(predictor.predict(others)[0], again.predict(others)[0])
    predictor.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictor.json", "predictor.safetensors"]
    loaded = Predictor.load(tmp_path)
    assert (loaded.tau, loaded.scales) == (predictor.tau, predictor.scales)
    for mine, theirs in zip(predictor.predict(others), loaded.predict(others), strict=True):
        assert np.allclose(mine, theirs, atol=1e-6)


def spoil_json(folder, **facts):
    file = folder / "predictor.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), "can't be read"),
    "torn weights": (lambda f: (f / "predictor.safetensors").write_bytes(b"\x01" * 20), "is damaged"),
    "no weights": (lambda f: (f / "predictor.safetensors").unlink(), "can't be read"),
    "torn facts": (lambda f: (f / "predictor.json").write_text('{"format": "spi'), "is not valid JSON"),
    "another format": (lambda f: spoil_json(f, format="pickle"), "is no predictor"),
    "another version": (lambda f: spoil_json(f, version=99), "another version"),
    "other features": (lambda f: spoil_json(f, features={"all": ["x"]}), "another version"),
    "another learner": (lambda f: spoil_json(f, learner="gnn"), "is damaged"),
    "unknown learner": (lambda f: spoil_json(f, learner="oracle"), "is damaged"),
    "more members": (lambda f: spoil_json(f, members=9), "is damaged"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_damaged_files_are_refused(how, trials, tmp_path):
    predictor = Predictor("cost", members=2)
    predictor.fit(of_last_rung(trials[:10]))
    predictor.save(tmp_path / "kept")
    spoil, message = BROKEN[how]
    spoil(tmp_path / "kept")
    with pytest.raises(SpecError, match=message):
        Predictor.load(tmp_path / "kept")


def test_another_study_helps_before_there_are_trials(trials):
    source = make_trials(80, "other")
    source = [Observation(o.example, 2 * o.loss + 5, o.rung, o.trial, "other") for trial in source for o in trial]
    target = of_last_rung(trials[:60])
    found = {n: (tau, alone) for n, tau, alone in transfer(source, target, "tabular", after=(0, 16), seeds=1)}
    assert found[0][0] > 0.7
    assert found[0][1] is None
    assert found[16][0] > found[16][1]


@pytest.fixture(scope="module")
def pool(corpus_facts):
    return Pool(load_study("quickstart"), corpus_facts)


@pytest.fixture(scope="module")
def corpus_facts():
    return DataFacts(
        kind="python_source", vocab_size=256, bytes_per_token=1.0, dtype="uint8", train_tokens=1 << 20, val_tokens=1 << 16, text="bytes", source=""
    )  # fmt: skip


def test_ranking_and_reasons_follow_what_was_learned(trials, pool):
    predictor = Predictor("tabular")
    predictor.fit(of_last_rung(trials))
    drawn = pool.draw(40, listed=0).proposals
    assert len({p.graph.arch_id for p in drawn}) == len(drawn) == 40
    ranked = rank(drawn, predictor)
    losses = [made_up_loss(r.proposal.candidate.arch) + 3 for r in ranked]
    assert rank_correlation([r.loss for r in ranked], losses) > 0.7
    assert abs(np.mean(losses) - np.mean([r.loss for r in ranked])) < 0.1  # in nats again
    why = explain(pool, drawn, predictor, swaps=10)
    names = list(why.importance)
    assert max(why.importance.values()) > 0
    assert set(names) >= {name for p in drawn for name in p.choices}
    coarse, fine = (why.effect.get((0, level)) for level in ("phrase", "token"))
    if coarse is not None and fine is not None:
        assert coarse < fine


def small_pool(tmp_path, corpus_facts, **over):
    """A constrained space of 2 x 2 x (2^3 + 2^4) ways to decide."""
    schedule = {"sequence": {"of": ["word", "token"], "length": [3, 4]}}
    space = {
        "d_model": {"choice": [16, 32]},
        "levels": {"word": {"pool": {"choice": ["mean", "last"]}}},
        "graph": {"h": {"schedule": schedule}},
        "constraints": ["count('h', 'word') >= 1 and last('h') == 'token'"],
        **over,
    }
    settings = load_study(tiny_study(tmp_path, {"space": space, "budget": {}}))
    return Pool(settings, replace(corpus_facts, vocab_size=17)), settings


def test_a_small_space_is_ranked_whole(tmp_path, corpus_facts):
    pool, settings = small_pool(tmp_path, corpus_facts)
    for seed in (0, 1):
        drawn = pool.draw(8, seed)
        graphs = [compile_arch(candidate.arch) for candidate in settings.space.enumerate()]
        expected = {graph.arch_id for graph in graphs if settings.absolute_budget().allows(estimate(graph))}
        assert len(expected) > 30
        assert {proposal.graph.arch_id for proposal in drawn.proposals} == expected
        assert str(drawn) == f"{len(expected)} of {len(expected)} candidates within the budget"


def test_constraints_are_drawn_again_not_given_up_on(tmp_path, corpus_facts):
    """Hardly a draw in 200 holds; the space is taken for too large to list."""
    rare = ["count('h', 'word') == 3 and last('h') == 'token' and d_model == 16 and levels.word.pool == 'last'"]
    pool, _ = small_pool(tmp_path, corpus_facts, constraints=rare, seq_len={"int": [20, 24]})
    drawn = pool.draw(5, listed=0)
    assert len(drawn.proposals) == 5
    assert not drawn.whole
    assert f"out of {drawn.looked_at:,} of 960 ways to decide looked at" in str(drawn)


def test_a_listing_that_takes_too_long_leaves_time_to_draw(tmp_path, corpus_facts, monkeypatch):
    pool, _ = small_pool(tmp_path, corpus_facts)
    monkeypatch.setattr(ranking, "assignments", lambda template: iter(lambda: time.sleep(0.01), 1))  # without end
    drawn = pool.draw(5, seconds=4)
    assert len(drawn.proposals) == 5
    assert not drawn.whole


def test_the_time_is_limited(tmp_path, corpus_facts):
    impossible = ["count('h', 'word') == 4 and last('h') == 'token'"]
    pool, _ = small_pool(tmp_path, corpus_facts, constraints=impossible)
    start = time.monotonic()
    drawn = pool.draw(5, listed=0, seconds=0.5)
    assert time.monotonic() - start < 5
    assert not drawn.proposals
    assert drawn.looked_at > 10
    assert pool.draw(5).looked_at == 0  # none of the listed satisfies the constraints


def drive(folder, num_trials, loss, stop=None):
    """A study whose losses are made up, by the sampler `predictor`; it may be broken off after some trials."""
    over = [f"search.num_trials={num_trials}", "search.sampler=predictor", "search.stopper=none"]
    over += ["search.promote=0", "budget.flops_per_token=105% of baseline"]
    settings = load_study("quickstart", over)
    folder.mkdir(exist_ok=True)
    driver = StudyDriver(settings, folder, prepare_corpus(settings.data, folder / "data"))
    for _ in range(stop or 0):
        spec = driver.next_trial()
        rung = Rung(flops=4e11, tokens=1, score=loss(driver.record(spec.number)))
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,)))
    return driver if stop else end_all(driver, loss)


def test_the_sampler_follows_it_once_it_can_rank(tmp_path):
    driver = drive(tmp_path, 48, lambda record: 3 + made_up_loss(record.arch_spec()))
    assert "followed" in driver.progress().predictor
    losses = [record.rungs[-1].score for record in driver.records]
    assert np.mean(losses[-16:]) < np.mean(losses[1:17]) - 0.2
    assert len({record.arch_id for record in driver.records}) == len(driver.records)


def test_without_skill_it_is_set_aside(tmp_path):
    draw = np.random.default_rng(4)
    driver = drive(tmp_path, 24, lambda record: 3 + float(draw.normal()))
    assert "set aside" in driver.progress().predictor


def test_a_fit_that_fails_stops_no_search(tmp_path, monkeypatch):
    def fail(self, seen, seed=0):
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(Predictor, "fit", fail)
    driver = drive(tmp_path, 14, lambda record: 3 + made_up_loss(record.arch_spec()))
    assert driver.progress().predictor == "predictor tabular set aside for tpe: singular"
    assert driver.progress().complete == 15


def test_without_scikit_learn_it_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setattr(surrogate, "find_spec", lambda name: None)
    study = load_study("quickstart", ["search.sampler=predictor"])
    facts = look_at_data(study, prepare=False)
    with pytest.raises(SpecError, match=r"search\.sampler: predictor needs scikit-learn"):
        preflight(study, facts)


def test_a_broken_off_search_proposes_what_it_would_have(tmp_path):
    def loss(record):
        return 3 + made_up_loss(record.arch_spec())

    whole = drive(tmp_path / "whole", 20, loss)
    drive(tmp_path / "part", 20, loss, stop=13)
    again = drive(tmp_path / "part", 20, loss)
    assert [r.arch_id for r in again.records] == [r.arch_id for r in whole.records]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    schedule = {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 3]}}
    over = {"space": {"graph": {"h": {"schedule": schedule}}}}
    run_cli("search", tiny_study(folder, over), "--dir", folder / "run", "--serial", "search.num_trials=12")
    return folder / "run"


def test_predict_shows_ranking_reasons_and_files(study, tmp_path):
    settings = ("--candidates", 12, "--top", 5, "--learner", "tabular")
    output = run_cli("predict", study, *settings, "--why", "--save", tmp_path / "kept", "-o", tmp_path / "best")
    assert "tabular" in output
    assert "Decisions that matter" in output
    assert "Effect of a level" in output
    files = sorted((tmp_path / "best").glob("*.yaml"))
    assert len(files) == 5
    assert "ok: architecture" in run_cli("check", files[0])
    assert "when it was fitted" in run_cli("predict", study, *settings, "--load", tmp_path / "kept")
    assert "What the other study adds" in run_cli("predict", study, *settings, "--from", study)


def test_predict_refuses_what_it_can_not_do(study, tmp_path):
    assert "'oracle' is not one of 'auto'" in run_cli("predict", study, "--learner", "oracle", code=2)
    assert "is not a study folder" in run_cli("predict", tmp_path, code=2)
    assert "can't be read" in run_cli("predict", study, "--load", tmp_path, code=2)
