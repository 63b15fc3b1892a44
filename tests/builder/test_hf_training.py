"""Others train what is exported: transformers' Trainer and PEFT. Needs `pip install accelerate peft`."""

import pytest
import torch
from helpers import built, tiny_arch

from builder.exchange.hf_export import export_hf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_hf(folder, tiny_arch(), built())
    return folder


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_accumulation_changes_nothing(folder, tmp_path):
    """The same 16 sequences as one batch, as 4 of 4 and as 8 of 2: equal first loss and gradient norm."""
    pytest.importorskip("accelerate")
    tokens = torch.randint(0, 17, (16, 24), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    found = []
    for accumulation in (1, 4, 8):
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            learning_rate=1e-3,
            max_grad_norm=1e9,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=load(folder), args=settings, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        first = trainer.state.log_history[0]
        found.append((first["loss"], first["grad_norm"]))
        assert trainer.evaluate()["eval_loss"] > 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


def test_low_rank_adapters_train_save_load_and_merge(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    model = peft.get_peft_model(load(folder), config)
    tokens = torch.randint(0, 17, (4, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=tokens).logits
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=tokens).logits, expected)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-4)
