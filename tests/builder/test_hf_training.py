"""Others train and use what is exported: Trainer, PEFT, TRL, lm-eval. Needs the extra `finetune`, and lm-eval."""

import json

import pytest
import torch
from helpers import built, tiny_arch

from builder.exchange.hf_export import export_hf
from studies.data.codec import byte_tokenizer

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


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_train_save_load_and_generate(folder, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(folder), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tokens = torch.randint(0, 17, (4, 20))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(**inputs, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    text = again.generate(**inputs, max_new_tokens=6, do_sample=False)
    for length in range(20, 26):
        logits = again(input_ids=text[:, :length], attention_mask=torch.ones_like(text[:, :length])).logits
        assert torch.equal(logits[:, -1].argmax(dim=-1), text[:, length])


WORDS = [f"the number {i} is followed by {i + 1}" for i in range(16)]


@pytest.fixture(scope="module")
def speaks(tmp_path_factory):
    """An export of a model of bytes, with its tokenizer."""
    over = {"vocab_size": 256, "seq_len": 128}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<0x00>", "eos_token": "<0x00>"}
    files = {"tokenizer.json": byte_tokenizer(), "tokenizer_config.json": json.dumps(names)}
    return export_hf(tmp_path_factory.mktemp("speaks") / "hf", tiny_arch(over), built(over), files=files)


def fit(speaks, trainer, settings, rows, model=None, **more):
    """Ten steps of one of TRL's trainers; the losses that it logged."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    common = {"max_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    common |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    config = getattr(trl, f"{trainer}Config")(output_dir=str(speaks.parent / "out"), **common, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(speaks)
    made = getattr(trl, f"{trainer}Trainer")(
        model=load(speaks) if model is None else model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        **more,
    )
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert len(losses) == 10
    assert all(abs(loss) < 1e3 for loss in losses)
    return losses


def test_supervised_finetuning_packed_or_not(speaks):
    rows = {"text": WORDS}
    alone = fit(speaks, "SFT", {"max_length": 64}, rows)
    assert alone[-1] < alone[0]
    assert fit(speaks, "SFT", {"max_length": 64, "gradient_checkpointing": False}, rows) == pytest.approx(alone)
    free = fit(speaks, "SFT", {"max_length": None, "padding_free": True}, rows)
    assert free == pytest.approx(alone, rel=1e-3)
    fit(speaks, "SFT", {"max_length": 64, "packing": True}, rows)
    fit(speaks, "SFT", {"max_length": 64}, {"prompt": WORDS, "completion": [" yes"] * len(WORDS)})


def test_preferences_rewards_and_reinforcement(speaks):
    pairs = {"chosen": [" yes sir"] * len(WORDS), "rejected": [" no"] * len(WORDS)}
    losses = fit(speaks, "DPO", {"max_length": 64}, {"prompt": WORDS, **pairs}, ref_model=load(speaks))
    assert losses[-1] < losses[0]
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
        speaks, trust_remote_code=True, num_labels=1
    )
    fit(speaks, "Reward", {"max_length": 64}, pairs, scorer)
    settings = {"num_generations": 4, "max_completion_length": 8}

    def letters(completions, **_):
        return [float(text.count("e")) for text in completions]

    fit(speaks, "GRPO", settings, {"prompt": WORDS}, reward_funcs=letters)


def test_batches_of_prompts_continue_as_alone(speaks):
    tokenizer = transformers.AutoTokenizer.from_pretrained(speaks)
    prompts, settings = [*WORDS[:6], "a", "abc def"], {"max_new_tokens": 8, "do_sample": False}
    generator = transformers.pipeline("text-generation", model=load(speaks), tokenizer=tokenizer)
    together = [rows[0]["generated_text"] for rows in generator(prompts, batch_size=4, **settings)]
    assert together == [generator(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    asked = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [instance("generate_until", {}, (prompt, asked), i) for i, prompt in enumerate(prompts)]
    answers = []
    for size in (1, 4):
        judge = huggingface.HFLM(pretrained=load(speaks), tokenizer=tokenizer, batch_size=size, device="cpu")
        answers.append(judge.generate_until(requests, disable_tqdm=True))
    assert answers[0] == answers[1]
