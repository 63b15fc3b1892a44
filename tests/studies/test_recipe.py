"""What a study's file leaves open is decided by size, recorded, and told."""

from dataclasses import asdict

import pytest
from helpers import end_all, make_driver, run_cli, tiny_arch, tiny_study

from builder import compile_arch, estimate
from searchspace import load_arch
from studies.sections import TrainingConfig
from studies.training.recipe import (
    BYTES_PER_PARAMETER,
    Recipe,
    batch_tokens,
    final_lr,
    horizon_of,
    peak_rate,
    recipe_of,
    size_of,
)


def priced(arch):
    return arch, estimate(compile_arch(arch))


def test_size_counts_blocks_and_head():
    for tied in (False, True):
        arch, cost = priced(tiny_arch({"tie_embeddings": tied}))
        assert size_of(arch, cost) == cost.params_non_embedding + arch.vocab_size * arch.d_model


def test_longer_means_larger_batches_and_larger_means_lower_rates():
    batches = [batch_tokens(tokens, 128) for tokens in (1e2, 1e6, 1e7, 1e9, 1e11)]
    assert batches[0] == 128
    assert batches == sorted(set(batches))
    assert all(batch & (batch - 1) == 0 for batch in batches)
    rates = [peak_rate(size, 60 * size) for size in (3e4, 3e5, 3e6, 1e8, 1e9)]
    assert rates == sorted(set(rates), reverse=True)
    assert peak_rate(1e4, 1e12) <= 0.05


def test_the_rate_of_short_trainings_ends_higher():
    ends = [final_lr(1000, 1000 * each) for each in (1, 15, 30, 60, 1000)]
    assert ends == [0.1, 0.1, 0.05, 0.0, 0.0]


def test_what_is_given_stays_given():
    arch, cost = priced(load_arch("plain_4"))
    given = Recipe(batch_tokens=256, lr=1e-3, beta2=0.9, final_lr=0.3)
    assert recipe_of(TrainingConfig(flops=4e11, **asdict(given)), arch, cost) == given
    by_size = recipe_of(TrainingConfig(flops=4e11), arch, cost)
    as_tokens = recipe_of(TrainingConfig(tokens=4e11 / cost.training_flops_per_token), arch, cost)
    assert by_size == as_tokens
    assert by_size.batch_tokens % arch.seq_len == 0
    huge = recipe_of(TrainingConfig(flops=1e24), arch, cost)
    assert by_size.beta2 > huge.beta2


def test_a_horizon_is_a_size_that_the_budget_suits():
    arch, cost = priced(load_arch("plain_4"))
    size = size_of(arch, cost)
    enough = TrainingConfig(tokens=BYTES_PER_PARAMETER * size / 4)
    found = horizon_of(enough, arch, cost, train_tokens=size, bytes_per_token=4.0)
    assert (found.bytes_per_parameter, found.size, found.width) == pytest.approx((60, size, arch.d_model))
    assert found.epochs == pytest.approx(15)
    segmented = tiny_arch({"graph": {"h": {"iterations": {"segments": 3}}}})
    plain, *once = (horizon_of(enough, each, priced(each)[1], size, 4.0) for each in (tiny_arch(), segmented))
    assert once[0].epochs == pytest.approx(plain.epochs / 3), "a batch in three segments is seen once"
    starved = horizon_of(TrainingConfig(tokens=enough.tokens / 16), arch, cost, size, 4.0)
    assert (starved.size, starved.width) == pytest.approx((size / 4, arch.d_model / 2))


def test_it_is_recorded_with_every_trial_and_decided_anew_for_longer(tmp_path):
    over = {"training": {"batch_tokens": None, "lr": None}}
    driver = end_all(make_driver(tmp_path, over, "search.num_trials=3", "search.stopper=none",
                                 "search.promote={trials: 1, seeds: 1, factor: 64}"))  # fmt: skip
    records = list(driver.records)
    assert {record.purpose for record in records} == {"baseline", "search", "promotion"}
    for record in records:
        arch = record.arch_spec()
        config = TrainingConfig(flops=record.training["flops"], eval_tokens=480)
        recipe, told = recipe_of(config, arch, record.cost), record.training
        assert (told["lr"], told["beta2"], told["final_lr"]) == (recipe.lr, recipe.beta2, recipe.final_lr)
        assert told["batch_tokens"] == recipe_of(config, *priced(driver.study.baselines[0])).batch_tokens
    batches = {
        purpose: {r.training["batch_tokens"] for r in records if r.purpose == purpose}
        for purpose in ("search", "promotion")
    }
    assert [len(found) for found in batches.values()] == [1, 1]
    assert max(batches["promotion"]) > max(batches["search"])


def test_check_tells_it_and_what_the_budget_suits(tmp_path):
    told = run_cli("check", tiny_study(tmp_path, {"training": {"lr": None}}))
    assert "(lr, beta2, final_lr by size)" in told
    assert "bytes of text per parameter" in told


def test_a_candidate_of_longer_sequences_sees_one_at_least(tmp_path):
    driver = make_driver(tmp_path, {"training": {"batch_tokens": None}})
    arch, cost = priced(tiny_arch({"vocab_size": 256, "seq_len": 600}))
    assert driver._proposer.candidates.plan(arch, cost, {"flops": 1e10, "lr": 1e-3}).tokens_per_step == 600


def test_a_promotion_repeats_what_its_trial_was_given(tmp_path):
    training = {"flops": None, "tokens": 1e5, "batch_tokens": None, "lr": {"choice": [None, 0.001]}}
    driver = end_all(make_driver(tmp_path, {"training": training}, "search.num_trials=6", "search.stopper=none",
                                 "search.sampler=random", "search.promote={trials: 6, seeds: 1, factor: 4}"))  # fmt: skip
    given = [r for r in driver.records if r.purpose == "promotion" and r.choices.get("training.lr") == 0.001]
    assert given
    assert all(record.training["lr"] == 0.001 for record in given)
    assert {r.training["tokens"] for r in driver.records if r.purpose == "promotion"} == {4e5}


NO_BASELINE = {"baseline": [], "budget": {"flops_per_token": None}}


def test_few_architectures_are_tried_with_several_settings(tmp_path):
    fixed = {"graph": {"h": {"schedule": ["word", "token"], "topology": "anchor"}}}
    training = {"tokens": 1e5, "flops": None, "batch_tokens": {"choice": [96, 10, 9, 8, 7, 6]}}
    told = run_cli("check", tiny_study(tmp_path, {**NO_BASELINE, "space": fixed, "training": training}))
    assert "1 candidate" in told
    assert "100.0% of 1 looked at" in told


def test_the_first_sample_need_not_suit_the_training(tmp_path):
    fixed = {"seq_len": {"choice": [4096, 24]}, "graph": {"h": {"schedule": ["word"], "topology": "anchor"}}}
    told = run_cli("check", tiny_study(tmp_path, {**NO_BASELINE, "space": fixed}))
    assert "50.0% of 2 looked at" in told
    assert "training: batch 96 tokens" in told


@pytest.mark.parametrize(
    ("width", "used"), [(16, "its losses teach the sampler"), (64, "training.batch_tokens differs")]
)
def test_studies_of_other_batches_do_not_compare(width, used, tmp_path):
    over = {"training": {"batch_tokens": None, "flops": 4e9}, "budget": {"flops_per_token": None}}
    file = tiny_study(tmp_path, over)
    small = (
        "--serial",
        "search.num_trials=1",
        "search.stopper=none",
        "training.flops=6e8",
        "training.eval_tokens=96",
    )
    run_cli("search", file, "--dir", tmp_path / "run", *small)
    head, _, baseline = file.read_text().partition("baseline:")
    file.write_text(head + "baseline:" + baseline.replace("d_model: 16", f"d_model: {width}"))
    told = run_cli("search", file, "--dir", tmp_path / "again", f"search.from={tmp_path / 'run'}", *small)
    assert used in " ".join(told.split())
