import math
import os
import re

import pytest
import torch
from helpers import tiny_arch

from builder import compile_arch, estimate
from builder.iterations import drawn
from searchspace import SpecError
from studies.data.corpus import prepare_corpus
from studies.data.settings import TextData
from studies.sections import TrainingConfig
from studies.training.checkpoint import (
    LocalStore,
    attempts_in,
    claim_attempt,
    load_checkpoint,
    open_store,
    pack,
    remove_attempts,
    save_checkpoint,
    unpack,
)
from studies.training.recipe import Recipe
from studies.training.trainer import DivergedError, Trainer, make_plan, rate_at

DROPOUT = {"vocab_size": 256, "blocks": {"core": {"dropout": 0.1}}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return prepare_corpus(TextData(kind="text", path=str(folder / "text.txt")), folder / "data")


def make_trainer(corpus, over=None, **settings):
    config = TrainingConfig(**{"flops": 3e9, "batch_tokens": 96, "lr": 1e-2, "eval_tokens": 240, **settings})
    return Trainer(tiny_arch({**DROPOUT, **(over or {})}), config, corpus, seed=0)


def test_it_learns_and_spends_the_budget(corpus):
    trainer = make_trainer(corpus)
    before, _ = trainer.evaluate()
    trainer.train(trainer.plan.num_steps)
    assert trainer.evaluate()[0] < before - 1.0
    assert trainer.flops == pytest.approx(3e9, rel=0.02)
    assert trainer.tokens == trainer.step * 96


def test_a_loss_of_its_own_is_trained_and_not_scored(corpus):
    def trained(weight, parts=1):
        over = {"blocks": {"core": {"dropout": 0.0}}, "graph": {"z": {"loss": "z", "in": "logits", "weight": weight}}}
        trainer = make_trainer(corpus, over, micro_batches=parts)
        first = trainer.evaluate()[0]
        trainer.train(20)
        inputs, _ = corpus.batch(0, 0, 4, 24)
        return first, trainer.model(inputs).logsumexp(dim=-1).square().mean().item(), trainer.model.state_dict()

    (first, free, _), (also_first, held, weights) = trained(0.0), trained(0.5)
    assert first == also_first
    assert held < 0.9 * free
    in_parts = trained(0.5, parts=2)[2]
    assert all(torch.allclose(value, in_parts[name], atol=1e-4) for name, value in weights.items())


def test_a_cheaper_schedule_sees_more_tokens(corpus):
    dear = make_trainer(corpus, {"graph": {"h": {"schedule": ["token"] * 4, "topology": "residual"}}})
    cheap = make_trainer(corpus, {"graph": {"h": {"schedule": ["phrase"] * 4, "topology": "residual"}}})
    ratio = dear.cost.flops / cheap.cost.flops
    assert ratio > 2
    assert cheap.plan.num_steps / dear.plan.num_steps == pytest.approx(ratio, rel=0.02)
    assert make_trainer(corpus, flops=None, tokens=960.0).plan.num_steps == 10


@pytest.mark.parametrize("stop", [1, 7, 15])
def test_resume_is_bit_exact(corpus, stop, tmp_path):
    unbroken = make_trainer(corpus)
    losses = [unbroken.train(step + 1) for step in range(20)]
    first = make_trainer(corpus)
    first.train(stop)
    save_checkpoint(LocalStore(tmp_path), first.state(), stop, "me")
    second = make_trainer(corpus)
    torch.rand(5)  # whatever happened in between
    second.restore(load_checkpoint([LocalStore(tmp_path)], "me"))
    assert [second.train(step + 1) for step in range(stop, 20)] == losses[stop:]
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert unbroken.curve
    assert second.curve == unbroken.curve


def test_a_curve_has_some_thirty_points_and_loses_no_step(corpus):
    trainer = make_trainer(corpus, flops=None, tokens=64.0 * 100)
    losses = [trainer.train(step + 1) for step in range(trainer.plan.num_steps)]
    every = trainer.plan.num_steps // 32
    assert len(trainer.curve) == trainer.plan.num_steps // every
    for i, (tokens, loss) in enumerate(trainer.curve):
        assert tokens == (i + 1) * every * trainer.plan.tokens_per_step
        assert loss == pytest.approx(sum(losses[i * every : (i + 1) * every]) / every, abs=1e-4)


def test_divergence_is_told(corpus):
    trainer = make_trainer(corpus)
    with torch.no_grad():
        trainer.model.head.logits.weight.fill_(math.nan)
    with pytest.raises(DivergedError, match="nan at step"):
        trainer.train(20)
    with pytest.raises(DivergedError, match="held-out"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "muon"}, {"micro_batches": 2}, {"recompute": "loop"}, {"lr_schedule": "wsd"}, {"micro_batches": 99}],
    ids=str,
)
def test_other_ways_to_train(corpus, settings):
    trainer = make_trainer(corpus, **settings)
    before, _ = trainer.evaluate()
    trainer.train(60)
    assert trainer.evaluate()[0] < before - 0.3


def test_accumulation_and_recomputation_change_nothing_but_memory(corpus):
    plain = {"blocks": {"core": {"dropout": 0.0}}}
    losses = []
    for settings in ({}, {"micro_batches": 4}, {"recompute": "loop"}):
        trainer = make_trainer(corpus, plain, **settings)
        losses.append([trainer.train(step + 1) for step in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == losses[0]
    assert trainer.model.blocks.core.gradient_checkpointing


def test_recomputing_saves_the_loops_activations(corpus):
    def saved(recompute):
        trainer = make_trainer(
            corpus, {"graph": {"h": {"schedule": ["token"] * 4, "topology": "residual"}}}, recompute=recompute
        )
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.train(1)
        return total

    assert saved("loop") < 0.5 * saved("none")


def test_muon_takes_the_blocks_matrices_alone(corpus):
    trainer = make_trainer(corpus, optimizer="muon")
    adamw, muon = trainer.optimizers
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in taken) == (name.startswith("blocks.") and parameter.dim() == 2), name
    assert sum(len(g["params"]) for g in adamw.param_groups) + len(taken) == len(list(trainer.model.parameters()))


def test_resume_with_muon_is_bit_exact(corpus, tmp_path):
    unbroken = make_trainer(corpus, optimizer="muon")
    losses = [unbroken.train(step + 1) for step in range(8)]
    broken = make_trainer(corpus, optimizer="muon")
    broken.train(4)
    save_checkpoint(LocalStore(tmp_path), broken.state(), 4, "me")
    again = make_trainer(corpus, optimizer="muon")
    again.restore(load_checkpoint([LocalStore(tmp_path)], "me"))
    assert [again.train(step + 1) for step in range(4, 8)] == losses[4:]


def test_bf16_trains_too(corpus):
    trainer = make_trainer(corpus, precision="bf16")
    before, _ = trainer.evaluate()
    trainer.train(60)
    assert trainer.evaluate()[0] < before - 0.3


def test_learning_rate_schedules():
    to_a_tenth, to_zero = (Recipe(1, 1.0, 0.9, final_lr=end) for end in (0.1, 0.0))
    rates = [rate_at(TrainingConfig(flops=1.0, warmup=0.1), to_a_tenth, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    wsd = TrainingConfig(flops=1.0, warmup=0.1, lr_schedule="wsd", decay=0.2)
    rates = [rate_at(wsd, to_zero, step, 100) for step in range(100)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)


def test_a_budget_below_one_step_is_an_error(corpus):
    with pytest.raises(SpecError, match="do not last for one step"):
        make_plan(TrainingConfig(flops=10.0), tiny_arch(), estimate(compile_arch(tiny_arch())))
    with pytest.raises(SpecError, match="too small for data"):
        make_trainer(corpus, {"vocab_size": 17})


def test_damaged_checkpoints_fall_back(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(LocalStore(tmp_path), {"step": step}, step, "me")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-000000002.safetensors",
        "step-000000003.safetensors",
    ]
    newest = tmp_path / "step-000000003.safetensors"
    data = newest.read_bytes()
    for damaged in (data[: len(data) // 2], bytes([data[0] ^ 1]) + data[1:], b"", b"\0" * len(data)):
        newest.write_bytes(damaged)
        assert load_checkpoint([LocalStore(tmp_path)], "me") == {"step": 2}
    newest.unlink()
    assert load_checkpoint([LocalStore(tmp_path)], "me") == {"step": 2}
    (tmp_path / "pointer.json").write_text("[{")
    assert load_checkpoint([LocalStore(tmp_path)], "me") is None


def test_newest_of_several_attempts(tmp_path):
    for attempt, step in (("a", 5), ("b", 9), ("c", 2)):
        save_checkpoint(LocalStore(tmp_path / attempt), {"step": step}, step, "me")
    save_checkpoint(LocalStore(tmp_path / "c"), {"step": 11}, 11, "another")
    folders = [LocalStore(path) for path in sorted(tmp_path.iterdir())]
    assert load_checkpoint(folders, "me") == {"step": 9}
    assert load_checkpoint(folders, "me", step=5) == {"step": 5}
    assert load_checkpoint(folders, "me", step=6) is None
    (tmp_path / "b" / "step-000000009.safetensors").unlink()
    assert load_checkpoint(folders, "me") == {"step": 5}
    assert load_checkpoint([], "me") is None


def test_a_pickle_is_not_run(tmp_path):
    import hashlib
    import json
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    payload = pickle.dumps(Evil(), protocol=2)
    (tmp_path / "step-000000001.safetensors").write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    entry = {"file": "step-000000001.safetensors", "sha256": digest, "step": 1, "identity": "me"}
    (tmp_path / "pointer.json").write_text(json.dumps([entry]))
    assert load_checkpoint([LocalStore(tmp_path)], "me") is None


def test_states_come_back_as_they_were():
    state = {"a": torch.ones(2, 3).T, "b": [1, 2.5, None, True, "x", (3, 4)], "c": {0: {"d": torch.tensor(7)}}}
    again = unpack(pack(state))
    assert torch.equal(again["a"], state["a"])
    assert again["b"] == state["b"]
    assert again["c"][0]["d"] == 7


def test_checkpoints_on_any_fsspec_path():
    store = open_store("memory://bucket/study/00003")
    first, second = claim_attempt(store, "mine"), claim_attempt(store, "mine")
    assert [first.location[-3:], second.location[-3:]] == ["001", "002"]
    for step in (1, 2, 3):
        save_checkpoint(first, {"step": step}, step, "me")
    assert [name for name in first.names() if name.startswith("step")] == [
        f"step-00000000{i}.safetensors" for i in (2, 3)
    ]
    assert load_checkpoint(attempts_in(store), "me") == {"step": 3}
    remove_attempts(attempts_in(store), "somebody else's")
    assert load_checkpoint(attempts_in(store), "me") == {"step": 3}
    remove_attempts(attempts_in(store), "mine")
    assert all(attempt.names() == [] for attempt in attempts_in(store))


def test_every_write_is_synced_before_it_is_renamed_and_the_pointer_moves_last(tmp_path, monkeypatch):
    """R8: file fsync, rename, folder fsync, pointer, in this order."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("fsync", re.sub("-[0-9a-f]{16}", "", name)))
        fsync(descriptor)

    def note_replace(source, target):
        calls.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_checkpoint(LocalStore(tmp_path), {"step": 1}, 1, "me")
    data, pointer, folder = "step-000000001.safetensors", "pointer.json", tmp_path.name
    assert calls == [
        ("fsync", f".{data}.tmp"), ("rename", data), ("fsync", folder),
        ("fsync", f".{pointer}.tmp"), ("rename", pointer), ("fsync", folder),
    ]  # fmt: skip


SAMPLED = {
    "vocab_size": 256,
    "blocks": {"core": {"recall": "linear"}},
    "graph": {"h": {"schedule": ["word", "token"], "per": "loop", "noise": 0.1}},
}


def sampled(corpus, sample="progressive", **settings):
    iterations = {"sample": sample, "train": 6, "gradient_through": 3}
    over = {**SAMPLED, "graph": {"h": {**SAMPLED["graph"]["h"], "iterations": iterations}}}
    return make_trainer(corpus, over, **settings)


def segmented(corpus, iterations=None, **settings):
    loop = {**SAMPLED["graph"]["h"], "noise": 0.0, "iterations": {"segments": 3, **(iterations or {})}}
    return make_trainer(corpus, {**SAMPLED, "graph": {"h": loop}}, **settings)


def test_segments_are_steps_on_one_batch_that_go_on(corpus):
    """Against a literal loop: what each step's core is given first, by the batch and the state before."""
    trainer = segmented(corpus, micro_batches=2)
    given, ended, batches = [], [], []
    core = trainer.model.get_submodule("blocks.core")
    core.register_forward_hook(lambda _, inputs, output: given.append(inputs[0].detach()))
    make, carry = trainer.corpus.batch, trainer.model.with_losses

    def noted(tokens, carried=None):
        batches.append(tokens)
        found = carry(tokens, carried)
        ended.append((carried, found.carried))
        return found

    trainer.model.with_losses = noted
    trainer.train(7)
    assert trainer.corpus.batch == make
    for i in range(0, 12, 6):  # two parts a step, three steps a batch
        for part in range(2):
            same = batches[i + part :: 2][:3]
            assert all(torch.equal(same[0], tokens) for tokens in same)
            begun = [ended[i + part + 2 * segment][0] for segment in range(3)]
            assert begun[0] is None
            assert all(torch.equal(begun[s + 1]["h"], ended[i + part + 2 * s][1]["h"]) for s in range(2))
    assert not torch.equal(batches[4], batches[6])
    assert ended[12][0] is None


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_segments_resume_bit_exact(corpus, stop):
    drawn_too = {"sample": "uniform", "train": 6, "gradient_through": 2}
    whole, first, second = (segmented(corpus, drawn_too) for _ in range(3))
    whole.train(8)
    first.train(stop)
    second.restore(unpack(pack(first.state())))
    second.train(8)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


@pytest.mark.parametrize("sample", ["fixed", "uniform", "poisson_lognormal", "progressive"])
def test_drawn_iterations_resume_bit_exact(corpus, sample):
    whole = sampled(corpus, sample)
    whole.train(12)
    first, second = sampled(corpus, sample), sampled(corpus, sample)
    first.train(5)
    second.restore(unpack(pack(first.state())))
    second.train(12)
    assert whole.curve == second.curve
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_what_a_step_draws_it_runs(corpus):
    """Calls of the block, and how many of them pass a gradient."""
    trainer = sampled(corpus)
    calls = []
    trainer.model.get_submodule("blocks.core").register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for step in range(20):
        run = drawn(trainer.arch, 0, step)["h"]
        calls.clear()
        trainer.train(step + 1)
        assert calls == [False] * run.held + [True] * (run.total - run.held)


def test_drawn_iterations_recomputed_are_the_same(corpus):
    losses = [sampled(corpus, **settings).train(4) for settings in ({}, {"recompute": "loop"})]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_budget_is_spent_by_the_mean_of_what_is_drawn(corpus):
    trainer = sampled(corpus, flops=3e9)
    assert trainer.flops == 0
    assert trainer.plan.num_steps * trainer.plan.flops_per_step == pytest.approx(3e9, rel=0.02)
    assert trainer.plan.flops_per_step == 96 * trainer.cost.training_flops / 24
