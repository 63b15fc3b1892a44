"""What a checkpoint holds besides what is asked for: used as `transformers` uses it, named, or refused; never ignored."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import import_hf, load_bundle
from searchspace import SpecError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs
logging.getLogger("transformers").setLevel(logging.ERROR)

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61,
    "max_position_embeddings": 64,
}  # fmt: skip


def make(folder, family, **settings):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SIZES, **settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def hf(tmp_path):
    make(tmp_path / "hf", "Llama")
    return tmp_path / "hf"


def config(folder, **change):
    """Change config.json; `...` removes a key."""
    file = folder / "config.json"
    data = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


def tensors(folder, change):
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def gap(folder, out):
    """Between the logits of the bundle and those of transformers."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_bundle(import_hf(folder, out)).model
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((ours(tokens) - theirs(tokens).logits).abs().max())


DEFAULTS = {
    "GPTNeoX": ("rope_parameters", "layer_norm_eps", "hidden_act", "use_parallel_residual", "attention_bias", "tie_word_embeddings"),
    "Llama": ("rope_parameters", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "head_dim", "num_key_value_heads",
              "tie_word_embeddings", "max_position_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in DEFAULTS.items() for key in keys])
def test_a_missing_key_has_the_familys_default(family, key, tmp_path):
    make(tmp_path / "hf", family)
    config(tmp_path / "hf", **{key: ...})
    assert gap(tmp_path / "hf", tmp_path / "b") < 1e-4


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
def test_defaults_are_those_of_transformers(family):
    from builder.exchange.hf_import import _FAMILIES

    theirs = getattr(transformers, f"{family}Config")()
    ours = _FAMILIES[theirs.model_type][0]()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                 "max_position_embeddings", "tie_word_embeddings", "attention_bias"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


REFUSED = {
    "quantized": ({"quantization_config": {"quant_method": "x"}}, "quantization_config: the weights are quantized"),
    "null": ({"rms_norm_eps": None}, "rms_norm_eps: expected a number, got None"),
    "null tie": ({"tie_word_embeddings": None}, "tie_word_embeddings: expected true or false"),
    "text": ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a whole number, got '2'"),
    "float": ({"vocab_size": 61.0}, r"vocab_size: expected a whole number, got 61\.0"),
    "list": ({"rope_parameters": [1]}, "rope_parameters: expected a mapping"),
    "number": ({"rope_parameters": 3}, "rope_parameters: expected a mapping"),
    "negative": ({"num_attention_heads": -4}, "num_attention_heads: -4 is too small"),
    "vast vocabulary": ({"vocab_size": 10**9}, "vocab_size: 1000000000 is too large"),
    "vast depth": ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is too large"),
    "more layers": ({"num_hidden_layers": 3}, "the checkpoint has no tensor"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds what config.json does not tell of"),
    "other heads": ({"num_attention_heads": 3}, "heads|another shape|divide|multiple"),
    "other width": ({"hidden_size": 64}, "another shape"),
    "scaled rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
    "odd rope": ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor: unknown key"),
    "a mapping for a name": ({"hidden_act": {"a": 1}}, "hidden_act: unknown value"),
    "another family": ({"model_type": "gpt2"}, "model_type: can't import 'gpt2'"),
    "no family": ({"model_type": ["llama"]}, "model_type: can't import"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_decoded_as_our_own_are(case, hf, tmp_path):
    change, message = REFUSED[case]
    config(hf, **change)
    with pytest.raises(SpecError, match=message) as caught:
        import_hf(hf, tmp_path / "b")
    assert str(caught.value).startswith(str(hf))
    assert sorted(os.listdir(tmp_path)) == ["hf"]  # nothing half written


def drop_head(held):
    del held["lm_head.weight"]


WEIGHTS = {
    "fp8": (lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if "_proj" in k}), "is stored as F8_E4M3"),
    "int8": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}), "is stored as I8"),
    "scales": (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}), "weight_scale"),
    "query norm": (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}), "q_norm"),
    "adapter": (lambda t: t.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(1, 32)}), "lora_A"),
    "NaN": (lambda t: t["model.norm.weight"].fill_(float("nan")), "not finite"),
    "infinite": (lambda t: t["model.norm.weight"].fill_(float("inf")), "not finite"),
    "no head": (drop_head, "has no tensor lm_head.weight"),
    "flat": (lambda t: t.update({"model.norm.weight": torch.ones(1, 32)}), "another shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_tensors_that_would_be_ignored_or_misread_are_refused(case, hf, tmp_path):
    change, message = WEIGHTS[case]
    tensors(hf, change)
    with pytest.raises(SpecError, match=message):
        import_hf(hf, tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_known_buffers_and_half_precision_pass(hf, tmp_path):
    tensors(hf, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    import_hf(hf, tmp_path / "a")
    tensors(hf, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    import_hf(hf, tmp_path / "b")


@pytest.mark.parametrize("name", ["optimizer", "pytorch_model_ema", "consolidated.00", "adapter_model", "zzz"])
def test_a_stray_file_of_the_same_names_is_not_read(name, hf, tmp_path):
    save_file(
        {k: torch.zeros_like(v) for k, v in load_file(hf / "model.safetensors").items()}, hf / f"{name}.safetensors"
    )
    assert gap(hf, tmp_path / "b") < 1e-4


def test_the_index_says_which_files_count(tmp_path):
    make(tmp_path / "one", "Llama").save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "hf" / "zzz.safetensors")
    assert gap(tmp_path / "hf", tmp_path / "b") < 1e-4
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "hf")
    with pytest.raises(SpecError, match=r"holds model\.safetensors and an index of other files"):
        import_hf(tmp_path / "hf", tmp_path / "c")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x.safetensors"}},
                                   {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "none.safetensors"}}])  # fmt: skip
def test_an_index_of_something_else_is_refused(index, hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "m-1.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError):
        import_hf(hf, tmp_path / "b")


def test_a_head_of_its_own_is_kept_whatever_config_says(hf, tmp_path):
    config(hf, tie_word_embeddings=True)
    said = []
    import_hf(hf, tmp_path / "b", note=said.append)
    assert any("tie_word_embeddings" in text and "lm_head.weight" in text for text in said)
    assert gap(hf, tmp_path / "b") < 1e-4


def test_what_is_not_used_is_named(hf, tmp_path):
    config(hf, attn_logit_softcapping=30.0, sliding_window=None, use_cache=False)
    said = []
    import_hf(hf, tmp_path / "b", note=said.append)
    assert "config.json: not used: attn_logit_softcapping" in said


def test_pipes_and_folders_do_not_hang(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    with pytest.raises(SpecError):
        import_hf(hf, tmp_path / "b")
    (hf / "config.json").unlink()
    os.mkfifo(hf / "config.json")
    with pytest.raises(SpecError):
        import_hf(hf, tmp_path / "b")


def test_a_folder_that_is_no_bundle_is_kept(hf, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension"}')
    with pytest.raises(SpecError, match="is not a bundle"):
        import_hf(hf, tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["manifest.json"]
