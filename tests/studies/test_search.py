"""The driver through the serial executor: budgets, duplicates, failures, stopping, and going on."""

import dataclasses
import json

import pytest
from helpers import make_driver, tiny_arch, tiny_study

from builder import compile_arch, estimate
from searchspace import SpecError
from searchspace.choices import FixedChooser
from searchspace.plain import decode
from studies.candidates.feasibility import survey
from studies.commands.export import export_trial
from studies.config import load_study
from studies.data.corpus import Corpus
from studies.execution.run import run_serial
from studies.records.folder import JOURNAL, SUMS, StudyLockedError, exclusive
from studies.records.journal import Journal, mend
from studies.records.reading import open_for_reading
from studies.records.trial import Report, Rung, TrialSpec
from studies.sections import MiddleChooser, StopperConfig, TrainingConfig, decide_training
from studies.strategy.driver import trial_store
from studies.strategy.stopper import expected_work, rung_shares, should_stop
from studies.training.run_trial import run_trial


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    driver = make_driver(tmp_path_factory.mktemp("study"), None, "search.num_trials=7")
    run_serial(driver)
    return driver


def test_every_trial_ends_and_is_journaled(finished):
    records = open_for_reading(finished.folder)
    assert len(records) == 8
    assert records == finished.records
    assert [record.number for record in records] == list(range(8))
    assert records[0].purpose == "baseline"
    assert {record.state for record in records} <= {"complete", "stopped"}
    assert finished.progress().best.score == min(
        r.score for r in records if r.score is not None and r.purpose == "search"
    )


def test_no_trial_is_over_budget_and_none_runs_twice(finished):
    budget = finished.study.absolute_budget()
    searched = [record for record in finished.records if record.purpose == "search"]
    for record in searched:
        cost = estimate(compile_arch(record.arch_spec()))
        assert cost == record.cost
        assert budget.allows(cost)
    assert len({record.arch_id for record in searched}) == len(searched)


def test_choices_rebuild_the_architecture(finished):
    for record in finished.records[1:]:
        assert finished.study.space.resolve(FixedChooser(record.choices)) == record.arch_spec()


def test_rungs_compare_equal_flops(finished):
    for index in range(2):
        spent = [r.rungs[index].flops for r in finished.records if len(r.rungs) > index]
        assert max(spent) / min(spent) < 1.1


def test_only_complete_trials_keep_weights(finished):
    for record in finished.records:
        assert bool(trial_store(finished.trials, record.number).names()) == (record.state == "complete")


@pytest.mark.parametrize("sampler", ["random", "nsga2", "tpe"])
def test_a_tight_budget_is_never_broken(sampler, tmp_path, monkeypatch):
    """Launch 60 proposals without training them: none over budget, none twice."""
    space = {"d_model": {"int": [8, 64], "step": 4}, "blocks": {"core": {"layers": {"int": [1, 6]}}}}
    over = {"space": space, "budget": {"params": {"min": 40000, "max": 48000}}}
    driver = make_driver(tmp_path, over, f"search.sampler={sampler}", "search.num_trials=60", "search.stopper=none")
    share = survey(driver.study.space, driver.budget).share
    assert share < 0.15
    while (spec := driver.next_trial()) is not None:
        record = driver.records[spec.number]
        if record.purpose == "search":
            assert 40000 <= record.cost.params <= 48000
        driver.report(
            spec.number,
            Report(kind="done", attempt=1, rungs=(Rung(flops=1.0, tokens=1, score=float(record.cost.params)),)),
        )
    ids = [record.arch_id for record in driver.records]
    assert len(ids) == len(set(ids)) == 61
    assert driver.progress().rejected > 0


def test_a_space_smaller_than_num_trials_ends_and_says_why(tmp_path):
    over = {"space": {"graph": {"h": {"schedule": ["word"], "topology": {"choice": ["residual", "mesh"]}}}}}
    driver = make_driver(tmp_path, over, "search.num_trials=9", "training.flops=1e8")
    run_serial(driver)
    assert len(driver.records) == 3
    assert "1000 rejections in a row: 1000 times duplicate" in driver.progress().note


def test_an_empty_feasible_set_is_found_before_anything_starts(tmp_path):
    study = load_study(tiny_study(tmp_path, {"budget": {"params": 100}}))
    with pytest.raises(SpecError) as caught:
        survey(study.space, study.absolute_budget())
    text = str(caught.value)
    assert "none of all" in text
    assert "params" in text
    assert "graph.h.topology" in text


def test_nan_is_a_failed_trial_with_its_reason(tmp_path):
    driver = make_driver(tmp_path, None, "training.lr=1e0", "training.clip=1e30", "search.num_trials=2")
    first = driver.next_trial()
    assert driver.report(0, Report(kind="failed", attempt=1, reason="diverged", error="loss is nan")) is False
    record = driver.records[first.number]
    assert (record.state, record.reason, record.score) == ("failed", "diverged", None)
    assert driver.progress().best is None
    assert open_for_reading(driver.folder)[0] == record


def test_a_diverging_run_is_failed_not_best(tmp_path, monkeypatch):
    """Through the real training loop: the optimizer is made to write NaN."""
    import torch

    step = torch.optim.AdamW.step

    def poisoned(self, closure=None):
        step(self, closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    driver = make_driver(tmp_path, None, "search.num_trials=2")
    run_serial(driver)
    assert [record.state for record in driver.records] == ["failed"] * 3
    assert {record.reason for record in driver.records} == {"diverged"}
    assert driver.progress().best is None


def test_out_of_memory_and_bugs_are_told_apart(tmp_path, monkeypatch):
    import torch

    errors = iter([torch.OutOfMemoryError("no room"), RuntimeError("a bug"), MemoryError()])

    def raise_next(self, *args, **kwargs):
        raise next(errors)

    monkeypatch.setattr("studies.training.trainer.Trainer.train", raise_next)
    driver = make_driver(tmp_path, None, "search.num_trials=2")
    run_serial(driver)
    assert [record.reason for record in driver.records] == ["out_of_memory", "error", "out_of_memory"]
    assert "a bug" in driver.records[1].error
    assert "Traceback" in driver.records[1].error


def test_going_on_keeps_what_is_finished(tmp_path):
    """Stop the driver after every report once; the end must be the unbroken run's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = make_driver(tmp_path / "a", None, "search.num_trials=4")
    run_serial(unbroken)

    class Crash(Exception):
        pass

    reports = 0
    for crash_after in range(1, 60):
        driver = make_driver(tmp_path / "b", None, "search.num_trials=4")
        before = [record for record in driver.records if record.state != "running"]
        count = 0

        def watch(crash_after=crash_after):
            nonlocal count
            count += 1
            if count > 4:
                raise Crash

        try:
            run_serial(driver, watch)
            break
        except Crash:
            reports += 1
        after = open_for_reading(driver.folder)
        assert [after[r.number] for r in before] == before
    assert reports >= 3
    strip = [dataclasses.replace(record, seconds=0.0) for record in unbroken.records]
    again = [dataclasses.replace(record, seconds=0.0) for record in open_for_reading(driver.folder)]
    assert again == strip


def test_finished_weights_survive_a_crash_before_the_last_report(tmp_path):
    """Everything was trained and saved, but nobody heard: going on must not lose the weights."""
    driver = make_driver(tmp_path)
    spec = driver.next_trial()
    *_, last = run_trial(spec)
    assert last.kind == "done"
    again = make_driver(tmp_path)
    run_serial(again)
    assert again.records[0].state == "complete"
    export_trial(again.records, again.folder, Corpus(again.corpus), again.study, number=0, out=tmp_path / "bundle")


def test_a_stop_that_was_due_is_made_up_for(tmp_path):
    driver = make_driver(tmp_path, None, "search.num_trials=2")
    rungs = [Rung(flops=1.0, tokens=1, score=loss) for loss in (1.0, 9.0)]
    for number, rung in ((0, rungs[0]), (1, rungs[0])):
        driver.next_trial()
        driver.report(number, Report(kind="done", attempt=1, rungs=(rung, rung)))
    driver.next_trial()
    running = driver._running[2]
    driver.journal.rung(running.trial, 0, rungs[1])  # and then the process died
    again = make_driver(tmp_path, None, "search.num_trials=2")
    assert again.next_trial().number == 2
    assert again.report(2, Report(kind="rung", attempt=2, rungs=(rungs[1],))) is False
    assert again.records[2].state == "stopped"


def test_candidates_that_can_not_run_are_passed_over(tmp_path):
    over = {
        "space": {"causal": {"choice": [True, False]}, "seq_len": {"choice": [24, 5000]}},
        "training": {"batch_tokens": {"choice": [96, 100000000]}},
    }
    driver = make_driver(tmp_path, over, "search.num_trials=6", "budget={}")
    for _ in range(7):
        spec = driver.next_trial()
        assert spec.arch.causal
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(Rung(flops=1.0, tokens=1, score=1.0),)))


def test_out_of_memory_teaches_the_sampler(tmp_path):
    driver = make_driver(tmp_path)
    spec = driver.next_trial()
    driver.report(spec.number, Report(kind="failed", attempt=1, reason="out_of_memory"))
    (trial,) = driver.journal.studies["baseline"].get_trials()
    assert trial.state.name == "PRUNED"
    assert trial.constraints["memory"] > 0
    assert open_for_reading(driver.folder)[0].state == "failed"


def test_at_most_two_rejections_are_journaled_per_launch(tmp_path):
    driver = make_driver(
        tmp_path, {"budget": {"params": {"min": 11700}}}, "search.num_trials=5", "search.sampler=random"
    )
    for _ in range(6):
        driver.next_trial()
    trials = driver.journal.studies["search"].get_trials()
    in_a_row = 0
    for trial in trials:
        in_a_row = in_a_row + 1 if "rejected" in trial.user_attrs else 0
        assert in_a_row <= 2


def test_a_report_of_an_older_attempt_is_ignored(tmp_path):
    driver = make_driver(tmp_path)
    spec = driver.next_trial()
    rung = Rung(flops=1.0, tokens=1, score=2.0)
    assert driver.report(spec.number, Report(kind="rung", attempt=2, rungs=(rung,)))
    assert not driver.report(spec.number, Report(kind="failed", attempt=1, reason="error"))
    assert driver.records[spec.number].state == "running"
    assert driver.report(spec.number, Report(kind="done", attempt=2, rungs=(rung, rung))) is False
    assert not driver.report(spec.number, Report(kind="failed", attempt=3, reason="error"))
    assert driver.records[spec.number].state == "complete"


def test_a_lost_worker_is_a_failed_trial(tmp_path):
    driver = make_driver(tmp_path)
    spec = driver.next_trial()
    driver.lost(spec.number, "gone")
    driver.lost(spec.number, "gone")
    assert (driver.records[0].state, driver.records[0].reason) == ("failed", "worker_died")


def test_proposals_depend_on_seed_and_number_alone(tmp_path):
    """A resumed study proposes what the unbroken one would have."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    drivers = [make_driver(tmp_path / name, None, "search.num_trials=6") for name in "ab"]
    for i in range(6):
        if i == 3:
            drivers[1] = make_driver(tmp_path / "b", None, "search.num_trials=6")
        specs = [driver.next_trial() for driver in drivers]
        assert specs[0].arch == specs[1].arch
        for driver, spec in zip(drivers, specs, strict=True):
            driver.report(
                spec.number, Report(kind="done", attempt=1, rungs=(Rung(flops=1.0, tokens=1, score=2.0 + i),))
            )


def test_open_choices_in_training_are_searched(tmp_path):
    over = {"training": {"lr": {"float": [1e-3, 1e-1], "log": True}}}
    driver = make_driver(tmp_path, over)
    middle = decide_training(driver.study.training, MiddleChooser()).tree["lr"]
    assert middle == pytest.approx(1e-2)
    rates = []
    for _ in range(4):
        spec = driver.next_trial()
        rates.append(spec.training.lr)
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(Rung(flops=1.0, tokens=1, score=1.0),)))
    assert rates[0] == middle  # the baseline
    assert len(set(rates)) == 4
    assert "training.lr" in driver.records[1].choices


def test_several_objectives(tmp_path):
    driver = make_driver(tmp_path, None, "objectives=[loss, flops_per_token]", "search.num_trials=3")
    run_serial(driver)
    values = [trial.values for trial in driver.journal.studies["search"].get_trials() if trial.values]
    assert values
    assert all(len(pair) == 2 for pair in values)


def test_the_journal_is_optunas_own(finished):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(finished.folder / JOURNAL)))
    study = optuna.load_study(study_name="search", storage=storage)
    assert study.best_value == finished.progress().best.score
    assert any(trial.intermediate_values for trial in study.trials)


def test_one_driver_at_a_time(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(StudyLockedError, match="in use by process"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("tail", [b'{"op_code": 5, "wor', b"\0" * 64, b"garbage\n", b'{"op_code": 4'])
def test_torn_journals_are_mended(finished, tail, tmp_path):
    whole = (finished.folder / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole + tail)
    assert mend(tmp_path) == f"cut {len(tail)} torn bytes off the journal's end"
    assert (tmp_path / JOURNAL).read_bytes() == whole
    assert mend(tmp_path) == ""
    assert len(Journal(tmp_path).launched()) == 8


def test_journal_cut_anywhere_opens_and_goes_on(finished, tmp_path):
    whole = (finished.folder / JOURNAL).read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        path = tmp_path / JOURNAL
        path.write_bytes(whole[:size])
        (tmp_path / SUMS).unlink(missing_ok=True)
        mend(tmp_path)
        journal = Journal(tmp_path)
        journal.studies["search"].ask()
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_asha_keeps_the_best_share():
    asha = decode(StopperConfig, {"asha": {"rungs": 3, "reduction": 3}})
    assert rung_shares(asha) == pytest.approx((1 / 9, 1 / 3, 1.0))
    assert rung_shares(decode(StopperConfig, "none")) == (1.0,)

    def stops(config, value, others):
        return should_stop(config, (value,), [(other,) for other in others])

    assert not stops(asha, 3.0, [])
    assert stops(asha, 3.0, [2.0])
    assert not stops(asha, 1.0, [2.0, 3.0, 4.0])
    assert not stops(asha, 2.5, [2.0, 3.0, 4.0, 5.0])  # second of five: ceil(5 / 3) = 2 go on
    assert stops(asha, 3.5, [2.0, 3.0, 4.0, 5.0])
    assert not stops(StopperConfig(rungs=1), 9.0, [1.0])
    assert expected_work(StopperConfig(rungs=1)) == (1.0, 1.0)
    assert expected_work(asha) == pytest.approx((1 / 9 + 2 / 9 / 3 + 2 / 3 / 9, 1 + 1 / 3 + 1 / 9))


def test_with_several_objectives_a_trial_ends_by_those_that_dominate_it():
    """A trial with a high loss that nobody undercuts in cost stands on the front, and goes on."""
    asha, median = StopperConfig(kind="asha"), StopperConfig(kind="median", startup=2)
    others = [(2.0, 50.0), (2.5, 40.0), (3.0, 30.0), (3.5, 20.0)]
    assert not should_stop(asha, (4.0, 10.0), others)
    assert should_stop(asha, (4.0,), [other[:1] for other in others])
    assert should_stop(asha, (4.0, 60.0), others)
    assert not should_stop(asha, (2.0, 50.0), others)  # as good as one of them, no worse than any
    assert not should_stop(median, (4.0, 10.0), others)
    assert should_stop(median, (4.0, 35.0), others) is False  # two of four dominate it: not more than half
    assert should_stop(median, (4.0, 60.0), others)


def test_specs_and_reports_travel_as_json():
    spec = TrialSpec(
        number=3,
        arch=tiny_arch(),
        arch_id="0123",
        training=TrainingConfig(flops=1e9, lr=0.1),
        seed=0,
        corpus="c",
        data="d",
        folder="f",
        study="s",
        rungs=(0.5, 1.0),
        device="cpu",
        threads=1,
    )
    assert TrialSpec.from_json(spec.to_json()) == spec
    report = Report(kind="rung", attempt=2, rungs=(Rung(flops=1.0, tokens=2, score=3.0),), train_loss=1.0)
    assert Report.from_json(report.to_json()) == report
