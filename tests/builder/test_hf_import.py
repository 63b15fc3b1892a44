"""Imported checkpoints give `transformers`' own logits and greedy continuation."""

import json
import logging

import pytest
import torch

from builder import import_hf, load_bundle
from searchspace import SpecError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs
logging.getLogger("transformers").setLevel(logging.ERROR)

NEOX = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 97,
    "max_position_embeddings": 128, "layer_norm_eps": 1e-5,
}  # fmt: skip
LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 176, "vocab_size": 97, "max_position_embeddings": 128,
}  # fmt: skip

CASES = [
    ("GPTNeoX", {**NEOX}),
    ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0}),
    ("GPTNeoX", {**NEOX, "tie_word_embeddings": True, "num_attention_heads": 2, "rotary_emb_base": 500}),
    ("Llama", {**LLAMA}),
    ("Llama", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    ("Llama", {**LLAMA, "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 500000.0}),
    ("Llama", {**LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_logits_and_greedy_continuation(family, settings, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, so that nothing is trivially right
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_bundle(import_hf(tmp_path / "hf", tmp_path / "bundle")).model
    tokens = torch.randint(0, 97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    prompt = tokens[:1, :9]
    continued = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 64, temperature=0), continued)


def test_sharded_checkpoints(tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours = load_bundle(import_hf(tmp_path / "hf", tmp_path / "bundle")).model
    tokens = torch.randint(0, 97, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "path", "part"),
    [
        ({"model_type": "mamba"}, "model_type", "choose one of: gpt_neox, llama"),
        ({"hidden_act": "relu"}, "hidden_act", "choose one of: silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type", "choose one of: default"),
        ({"num_attention_heads": 7}, "blocks.stack.kv_heads", "divisor"),
        ({"hidden_size": 32}, "", "another shape"),
        ({"vocab_size": None}, None, ""),
        ({"num_hidden_layers": 4}, "", "no tensor model.layers.3"),
    ],
)
def test_what_can_not_be_imported_says_why(change, path, part, tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config = {k: v for k, v in {**config, **change}.items() if v is not None}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError) as caught:
        import_hf(tmp_path / "hf", tmp_path / "bundle")
    assert path is None or caught.value.path == path
    assert part in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_damaged_folders(tmp_path):
    with pytest.raises(SpecError, match=r"holds no config\.json"):
        import_hf(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama"}))
    with pytest.raises(SpecError, match="safetensors"):
        import_hf(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SpecError, match="can't be read"):
        import_hf(tmp_path, tmp_path / "out")
