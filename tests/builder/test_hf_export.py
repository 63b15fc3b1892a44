"""What is exported loads elsewhere, computes the same, and is readable."""

import ast
import subprocess
import sys

import pytest
import torch
from helpers import TOPOLOGIES, built, randomize, tiny_arch

from builder import build_model, compile_arch
from builder.hf_export import MODELING, export_hf, modeling_code
from builder.torch_export import export_torch
from searchspace import SpecError, load_space

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default:::transformers", "default:::torch")

CASES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "names that code uses": {
        "graph": {
            "x": None, "h": None, "logits": None,
            "state": {"embed": "tokens"}, "self": {"block": "core", "in": "state"}, "token": {"head": "lm", "in": "self"},
        }
    },
    "recall in a parallel block": {"blocks": {"core": {"recall": "linear", "norm_place": "sandwich"}}, "graph": {"h": {"recall": "concat"}}},
    **{f"topology {i}": {"graph": {"h": {"topology": t, "schedule": ["phrase", "word", "word", "token"]}}} for i, t in enumerate(TOPOLOGIES)},
}  # fmt: skip


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("over", CASES.values(), ids=CASES)
def test_logits_and_continuations_are_equal(over, tmp_path):
    model = built(over)
    export_hf(tmp_path / "hf", tiny_arch(over), model)  # compares, and raises if they differ
    loaded = load(tmp_path / "hf")
    tokens = torch.randint(0, 17, (2, 24))
    assert torch.allclose(loaded(tokens).logits, model(tokens), atol=1e-5)
    mine = model.generate(tokens[:, :5], 64, temperature=0.0)
    assert torch.equal(loaded.generate(tokens[:, :5], max_new_tokens=64, do_sample=False), mine)


def test_sampled_architectures(tmp_path):
    for seed in range(3):
        arch = load_space("families").sample(seed).arch
        export_hf(tmp_path / str(seed), arch, randomize(build_model(compile_arch(arch))))


def test_a_wrong_export_is_noticed(tmp_path, monkeypatch):
    from builder import hf_export

    code = hf_export.modeling_code
    monkeypatch.setattr(hf_export, "modeling_code", lambda graph: code(graph).replace("x_BLD + u_BLD", "x_BLD - u_BLD"))
    with pytest.raises(SpecError, match="logits differ by"):
        export_hf(tmp_path / "hf", tiny_arch(), built())


def test_saved_again_it_loads_again(tmp_path):
    model = built()
    export_hf(tmp_path / "hf", tiny_arch(), model)
    load(tmp_path / "hf").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING).is_file()
    tokens = torch.randint(0, 17, (1, 24))
    assert torch.allclose(load(tmp_path / "again")(tokens).logits, model(tokens), atol=1e-5)


def test_loss_gradients_padding_and_beams(tmp_path):
    export_hf(tmp_path / "hf", tiny_arch(), built())
    model = load(tmp_path / "hf")
    tokens = torch.randint(0, 17, (2, 24))
    out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padding on the left moves the chunk grid"):
        model(tokens, attention_mask=mask)
    right = model(tokens, attention_mask=mask.flip(1)).logits
    assert torch.equal(right, model(tokens).logits)
    beams = model.generate(tokens[:1, :5], max_new_tokens=12, num_beams=3, do_sample=False)
    whole = model.generate(tokens[:1, :5], max_new_tokens=12, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, whole)
    state = model.new_state()
    first = model(tokens[:, :10], past_key_values=state, use_cache=True).logits
    rest = model(tokens[:, 10:], past_key_values=state, use_cache=True).logits
    assert torch.allclose(torch.cat((first, rest), dim=1), model(tokens).logits, atol=1e-4)


def test_what_sees_its_whole_input_has_no_cache(tmp_path):
    over = {"causal": False}
    model = built(over)
    export_hf(tmp_path / "hf", tiny_arch(over), model)
    tokens = torch.randint(0, 17, (1, 24))
    assert torch.allclose(load(tmp_path / "hf")(tokens).logits, model(tokens), atol=1e-5)
    assert "def decode" not in (tmp_path / "hf" / MODELING).read_text()


def test_it_needs_torch_and_transformers_alone(tmp_path):
    export_hf(tmp_path / "hf", tiny_arch(), built())
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        f"M.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True)\n"
        "print([m for m in ('builder', 'searchspace', 'spiralformer', 'studies') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    imported = {
        n.module or ""
        for n in ast.walk(ast.parse((tmp_path / "hf" / MODELING).read_text()))
        if isinstance(n, ast.ImportFrom)
    }
    assert not {name.split(".")[0] for name in imported} & {"builder", "searchspace", "spiralformer", "studies"}


def test_the_code_holds_what_it_uses_alone():
    code = modeling_code(compile_arch(tiny_arch()))
    assert "MeanPool" in code or "SelfAggregatePool" in code
    assert "class ReadMemory" not in code  # no mesh here
    assert max(map(len, code.splitlines())) <= 160


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="exists and is not an export"):
        export_hf(tmp_path, tiny_arch(), built())


def test_torch_export(tmp_path):
    model = built()
    file = export_torch(tmp_path / "model.pt2", tiny_arch(), model)
    program = torch.export.load(file).module()
    for batch in (1, 5):
        tokens = torch.randint(0, 17, (batch, 24))
        assert torch.allclose(program(tokens), model(tokens), atol=1e-5)
