"""Samplers by name: evolution's edits, the grid, priors, and learning from another study."""

import math
import random

import optuna
import pytest
from helpers import end_all, make_driver, tiny_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from searchspace import FixedChooser, SpecError
from searchspace.space import SpaceSpec
from studies.commands.search import prepare_data
from studies.config import load_study
from studies.data.corpus import Corpus
from studies.execution.run import run_serial
from studies.predict.importance import measured_importance
from studies.report.changes import changes_of, changes_table
from studies.show.summary import summarize
from studies.strategy.driver import StudyDriver
from studies.strategy.evolution import mutate

SCHEDULE = {"graph": {"h": {"schedule": {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 5]}}}}}
CHUNKS = {"phrase": 8, "word": 4, "token": 1}


@pytest.mark.parametrize("order", ["any", "coarse_to_fine"])
def test_every_edit_of_a_schedule_can_be_decided(order, tmp_path):
    """Whatever a mutation leaves decided is within the space, and each kind of edit comes up."""
    over = {
        "graph": {
            "h": {"schedule": {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 5], "order": order}}}
        }
    }
    space = load_study(tiny_study(tmp_path, {"space": over})).space
    draw = random.Random(0)
    choices = space.sample(0).choices
    seen = set()
    for _ in range(300):
        child = mutate(choices, space.schedules, CHUNKS, draw)
        if len(child) < len(choices) and not any(
            name.startswith("graph.h.schedule") for name in choices.keys() - child.keys()
        ):
            continue  # another decision was left to be drawn
        before, after = (space.draw(FixedChooser(c)).arch.graph["h"].schedule for c in (choices, child))
        before, after = [u.level for u in before], [u.level for u in after]
        assert before != after
        if len(after) != len(before):
            seen.add("insert" if len(after) > len(before) else "drop")
        elif sorted(before) == sorted(after):
            seen.add("swap")
        else:
            changed = sum(CHUNKS[level] for level in after) - sum(CHUNKS[level] for level in before)
            seen.add("coarsen" if changed > 0 else "refine")
        choices = child
    assert seen == {"insert", "drop", "coarsen", "refine"} | ({"swap"} if order == "any" else set())


def test_evolution_finds_the_smallest_sooner_than_chance(tmp_path):
    def best(sampler, seed):
        folder = tmp_path / f"{sampler}{seed}"
        folder.mkdir()
        over = {"space": SCHEDULE, "budget": {}}
        driver = make_driver(folder, over, f"search.sampler={sampler}", f"search.seed={seed}", "search.num_trials=40")
        end_all(driver, lambda record: record.cost.flops_per_token)
        ranked = sorted(r.cost.flops_per_token for r in driver.records if r.purpose == "search")
        return sum(ranked[:10])

    assert sum(best("evolution", seed) for seed in range(3)) < sum(best("random", seed) for seed in range(3))


def test_a_grid_launches_every_feasible_candidate_once_in_the_same_order_for_all_seeds(tmp_path):
    over = {
        "space": {**SCHEDULE, "graph": {"h": {"schedule": {"sequence": {"of": ["word", "token"], "length": [1, 2]}}}}}
    }
    orders = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        driver = make_driver(
            tmp_path / str(seed), over, "search.sampler=grid", f"search.seed={seed}", "search.num_trials=500"
        )
        end_all(driver)
        orders.append([record.arch_id for record in driver.records if record.purpose == "search"])
        assert "every candidate of the sampler grid" in driver.progress().note
    ids = {compile_id(arch.arch) for arch in driver.study.space.enumerate()}
    assert orders[0] == orders[1]
    assert set(orders[0]) == ids
    assert len(orders[0]) == len(ids)


def test_one_change_launches_the_first_options_and_then_one_other_at_a_time(tmp_path):
    """A decision that hangs on a change takes its first option; a change that a constraint forbids alone is left out."""
    space = {
        "graph": {"h": {"topology": {"choice": ["residual", "anchor", {"mesh": {"slots": {"int": [3, 4]}}}]}}},
        "blocks": {"core": {"layers": {"int": [1, 3]}, "ffn": {"choice": ["swiglu", "gelu"]}}},
        "constraints": ["blocks.core.layers != 3 or blocks.core.ffn == 'gelu'"],
    }
    over = {"space": space, "training": {"lr": {"choice": [2e-3, 4e-3]}}}
    driver = make_driver(tmp_path, over, "search.sampler=one_change", "search.num_trials=500")
    end_all(driver)
    first, *others = [record.choices for record in driver.records if record.purpose == "search"]
    assert (first["blocks.core.layers"], first["graph.h.topology"], first["training.lr"]) == (1, "residual", 2e-3)
    changes = [{k: v for k, v in each.items() if first.get(k) != v} for each in others]
    assert {"graph.h.topology": "mesh", "graph.h.topology.choice.2.mesh.slots": 3} in changes
    assert {"training.lr": 4e-3} in changes
    assert {"blocks.core.layers": 2} in changes
    assert {"blocks.core.layers": 3} not in changes
    assert [len(change) for change in changes] == [1] * 6 + [2] + [1]
    assert "every candidate of the sampler one_change" in driver.progress().note
    common, found = changes_of(driver.records)
    assert common.choices == first
    told = [(c.decision, c.record.choices[c.decision]) for c in found]
    assert set(told) == {next(iter(c.items())) for c in changes}
    table = changes_table(driver.records, Corpus(driver.corpus))
    assert table.row_count == len(found)
    assert [str(cell) for cell in table.columns[4].cells] == ["1"] * len(found)
    for each in found:
        assert each.effect == each.record.rungs[-1].score - common.rungs[-1].score
        assert each.error is None


def test_trials_that_are_no_ablation_have_no_table_of_changes(tmp_path):
    driver = make_driver(tmp_path, {"space": SCHEDULE}, "search.sampler=random", "search.num_trials=12")
    end_all(driver)
    assert changes_of(driver.records) is None


def test_a_grid_goes_over_the_choices_of_training_too(tmp_path):
    over = {"space": {"graph": {"h": {"schedule": ["word", "token"]}}}, "training": {"lr": {"choice": [2e-3, 4e-3]}}}
    driver = make_driver(tmp_path, over, "search.sampler=grid", "search.num_trials=9")
    end_all(driver)
    ran = [r for r in driver.records if r.purpose == "search"]
    assert {(r.choices["graph.h.topology"], r.training["lr"]) for r in ran} == {
        (topology, lr) for topology in ("residual", "mesh") for lr in (2e-3, 4e-3)
    }


def compile_id(arch):
    from builder import compile_arch

    return compile_arch(arch).arch_id


def test_a_grid_over_a_range_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"training\.lr: is continuous"):
        make_driver(tmp_path, {"training": {"lr": {"float": [1e-3, 1e-2]}}}, "search.sampler=grid")


def test_a_gp_follows_what_it_is_told(tmp_path):
    over = {"space": {"d_model": {"int": [8, 128], "step": 4}}, "budget": {}}
    driver = make_driver(tmp_path, over, "search.sampler=gp", "search.num_trials=14", "search.stopper=none")
    end_all(driver)
    assert len(driver.records) == 15
    smallest = min(r.cost.params for r in driver.records if r.purpose == "search")
    assert smallest <= 1.5 * min(r.cost.params for r in driver.records)


@pytest.mark.parametrize("open_value", [{"choice": [8, 16, 32], "prior": 16}, {"int": [8, 32], "step": 8, "prior": 16}])
def test_priors_pull_random_draws(open_value):
    from helpers import tiny_data

    def share(confidence):
        space = SpaceSpec(tiny_data({"d_model": {**open_value, "confidence": confidence}}))
        return sum(space.sample(seed).arch.d_model == 16 for seed in range(400)) / 400

    low, medium, high = share("low"), share("medium"), share("high")
    assert 1 / len(open_value.get("choice", [1, 2, 3, 4])) < low < medium < high


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"choice": [8, 16], "prior": 9}, "9 is not an option"),
        ({"int": [8, 16], "prior": 17}, "17 is out of range"),
        ({"float": [0.1, 0.2], "prior": "x"}, "'x' is out of range"),
        ({"choice": [8, 16], "confidence": "high"}, "stands without a prior"),
        ({"choice": [8, 16], "prior": 8, "confidence": "sure"}, "unknown confidence 'sure'"),
    ],
)
def test_a_prior_that_makes_no_sense_is_named(value, text):
    from helpers import tiny_data

    with pytest.raises(SpecError, match=text):
        SpaceSpec(tiny_data({"d_model": value}))


@pytest.fixture
def earlier(tmp_path):
    (tmp_path / "earlier").mkdir()
    driver = make_driver(tmp_path / "earlier", {"space": SCHEDULE}, "search.num_trials=4", "search.stopper=none")
    run_serial(driver)
    (driver.folder / "study.yaml").write_text(driver.study.to_yaml())
    return driver


def warm(tmp_path, earlier, over, *overrides):
    (tmp_path / "later").mkdir()
    text = f"data.path={tmp_path / 'earlier' / 'text.txt'}"
    return make_driver(tmp_path / "later", over, f"search.from={earlier.folder}", text, *overrides)


def test_losses_of_an_equal_study_teach_the_sampler(tmp_path, earlier):
    driver = warm(tmp_path, earlier, {"space": SCHEDULE}, "search.stopper=none")
    told = [t for t in driver.journal.studies["search"].get_trials() if "from" in t.user_attrs]
    complete = [r for r in earlier.records if r.purpose == "search" and r.state == "complete"]
    assert sorted(t.value for t in told) == sorted(r.score for r in complete)
    assert "its losses teach the sampler" in driver.warm_start_note
    assert driver.records == []  # they are not this study's
    again = StudyDriver(driver.study, driver.folder, prepare_data(driver.study, driver.folder))
    assert len([t for t in again.journal.studies["search"].get_trials() if "from" in t.user_attrs]) == len(told)


def test_where_losses_do_not_compare_the_best_are_tried_first(tmp_path, earlier):
    driver = warm(tmp_path, earlier, {"space": SCHEDULE}, "training.flops=3e9")
    assert "training.flops differs" in driver.warm_start_note
    end_all(driver)
    searched = [r for r in earlier.records if r.purpose == "search" and r.state == "complete"]
    best = [r.arch_id for r in sorted(searched, key=lambda r: r.score)]
    assert [r.arch_id for r in driver.records if r.purpose == "search"][: len(best)] == best


def test_trials_that_do_not_fit_are_named(tmp_path, earlier):
    over = {
        "space": {"graph": {"h": {"schedule": {"sequence": {"of": ["phrase", "word", "token"], "length": [1, 2]}}}}}
    }
    driver = warm(tmp_path, earlier, over)
    longer = [r for r in earlier.records if r.choices.get("graph.h.schedule.length", 0) > 2]
    assert longer
    assert f"trial {longer[0].number} (graph.h.schedule.length: " in driver.warm_start_note
    assert f"{4 - len(longer)} of 4 finished trials fit" in driver.warm_start_note


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(SpecError, match="is not a study folder"):
        make_driver(tmp_path, None, f"search.from={tmp_path}")


def test_optuna_shows_what_ran(tmp_path):
    """Under a tight budget decisions are steered; whoever opens the journal with Optuna sees what was decided."""
    space = {"d_model": {"int": [8, 64], "step": 4}, "blocks": {"core": {"layers": {"int": [1, 6]}}}}
    over = {"space": space, "budget": {"params": {"min": 40000, "max": 48000}, "flops_per_token": None}, "baseline": []}
    over["training"] = {"lr": {"float": [1e-3, 1e-2]}}
    driver = make_driver(tmp_path, over, "search.num_trials=40", "search.stopper=none")
    end_all(driver, lambda record: 3 + record.cost.params / 1e5 + record.training["lr"])
    storage = JournalStorage(JournalFileBackend(str(driver.folder / "journal.log")))
    study = optuna.load_study(study_name="search", storage=storage)
    records = {record.number: record for record in driver.records}
    trials = {t.user_attrs["trial"]: t for t in study.trials if "launch" in t.user_attrs}
    assert trials.keys() == records.keys()
    for number, trial in trials.items():
        record = records[number]
        assert trial.params == record.choices
        assert driver.study.space.draw(FixedChooser(arch_choices(record))).arch == record.arch_spec()
        assert trial.user_attrs["params"] == record.cost.params
        assert trial.user_attrs["architecture"] == summarize(record.arch_spec())
        assert trial.user_attrs["bits_per_byte"] == pytest.approx(record.score / math.log(2))
    best = min(driver.records, key=lambda record: record.score)
    assert study.best_params == best.choices
    assert study.metric_names == ["loss"]
    assert len({str(trial.distributions["d_model"]) for trial in trials.values()}) == 1
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    theirs = optuna.importance.get_param_importances(study, evaluator=evaluator)
    ours = measured_importance(driver.records, driver.study)
    assert ours
    assert {name: theirs[name] for name in ours} == pytest.approx(ours)
    plots = optuna.visualization.plot_slice(study, params=["d_model", "training.lr"]).data
    for name, plot in zip(("d_model", "training.lr"), plots, strict=True):
        decided = [records[number].choices[name] for number in trials]
        assert list(map(float, plot.x)) == pytest.approx(decided)


def test_a_rejected_proposal_teaches_what_was_priced(tmp_path):
    """The constraint values of a rejection belong to the decisions that were priced, not to those first asked for."""
    space = {"d_model": {"int": [8, 64], "step": 4}, "blocks": {"core": {"layers": {"int": [1, 6]}}}}
    over = {"space": space, "budget": {"params": {"min": 40000, "max": 48000}, "flops_per_token": None}, "baseline": []}
    driver = end_all(make_driver(tmp_path, over, "search.num_trials=40", "search.stopper=none"))
    rejected = [
        t for t in driver.journal.studies["search"].trials if t.user_attrs.get("rejected", "").startswith("over")
    ]
    assert rejected
    for trial in rejected:
        cost = estimate(compile_arch(driver.study.space.draw(FixedChooser(trial.params)).arch))
        assert dict(driver.budget.excesses(cost)) == trial.constraints


def arch_choices(record):
    return {name: value for name, value in record.choices.items() if not name.startswith("training.")}
