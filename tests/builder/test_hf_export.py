"""What is exported loads elsewhere, computes the same, and is readable."""

import ast
import re
import subprocess
import sys

import pytest
import torch
from helpers import TOPOLOGIES, built, randomize, tiny_arch

from builder import build_model, compile_arch
from builder.exchange.bundle import load_bundle, save_bundle
from builder.exchange.hf_export import MODELING, export_hf, modeling_code
from builder.exchange.torch_export import export_torch
from searchspace import SpecError, load_space

transformers = pytest.importorskip("transformers")
find_labels = pytest.importorskip("transformers.utils").find_labels
pytestmark = pytest.mark.filterwarnings("default:::transformers", "default:::torch")

CASES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "loss of its own": {"graph": {"z": {"loss": "z", "in": "logits"}}},
    "names that code uses": {
        "graph": {
            "x": None, "h": None, "logits": None,
            "state": {"embed": "tokens"}, "self": {"block": "core", "in": "state"}, "keep": {"block": "core", "in": "self"}, "token": {"head": "lm", "in": "keep"},
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
    from builder.exchange import hf_export

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
    mask[0, -3:] = 0
    assert torch.equal(model(tokens, attention_mask=mask).logits, model(tokens).logits)
    beams = model.generate(tokens[:1, :5], max_new_tokens=12, num_beams=3, do_sample=False)
    whole = model.generate(tokens[:1, :5], max_new_tokens=12, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, whole)
    model = model.double()  # random weights make much of rounding
    state = model.new_state(2)
    first = model(tokens[:, :10], past_key_values=state, use_cache=True).logits
    rest = model(tokens[:, 10:], past_key_values=state, use_cache=True).logits
    assert torch.allclose(torch.cat((first, rest), dim=1), model(tokens).logits, atol=1e-9)


MESH = {"graph": {"h": {"topology": "mesh", "recall": "linear"}}, "blocks": {"core": {"kv_heads": 1, "recall": "add"}}}


@pytest.mark.parametrize("over", [{}, MESH, {"causal": False}], ids=["anchor", "mesh", "whole input"])
def test_prompts_padded_on_the_left_continue_as_alone(tmp_path, over):
    export_hf(tmp_path / "hf", tiny_arch(over), built(over))
    model = load(tmp_path / "hf").double()
    rows = [torch.randint(0, 17, (length,)) for length in (1, 4, 9, 14, 3)]
    tokens, mask = torch.zeros(5, 14, dtype=torch.long), torch.zeros(5, 14, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, 14 - len(row) :], mask[i, 14 - len(row) :] = row, 1
    logits = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, 14 - len(row) :], model(row[None]).logits[0])
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}) if over.get("causal", True) else ():
        settings = {"max_new_tokens": 12, "do_sample": False, **settings}
        together = model.generate(tokens, attention_mask=mask, **settings)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
            assert torch.equal(together[i, 14:], alone[0, len(row) :]), (settings, i)


def test_generate_takes_what_forward_takes(tmp_path):
    export_hf(tmp_path / "hf", tiny_arch(), built())
    model, tokens = load(tmp_path / "hf"), torch.randint(0, 17, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, logits_to_keep=0, **settings), model.generate(tokens, **settings))


def test_a_conversation_goes_on_with_its_cache(tmp_path):
    export_hf(tmp_path / "hf", tiny_arch(), built())
    model = load(tmp_path / "hf")
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(torch.randint(0, 17, (1, 6)), **settings)
    longer = torch.cat((first.sequences, torch.randint(0, 17, (1, 4))), dim=1)
    again = model.generate(longer, past_key_values=first.past_key_values, **settings).sequences
    assert torch.equal(again, model.generate(longer, **settings).sequences)


@pytest.mark.filterwarnings("default")
def test_a_mask_breaks_no_graph(tmp_path):
    export_hf(tmp_path / "hf", tiny_arch(), built())
    model = load(tmp_path / "hf")
    tokens, mask = torch.randint(0, 17, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    compiled = torch.compile(lambda x, m: model(x, attention_mask=m).logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(tokens, mask)[mask.bool()], model(tokens, attention_mask=mask).logits[mask.bool()]
    )
    torch.compiler.reset()


def test_only_the_parts_in_use_are_shipped():
    code = modeling_code(compile_arch(tiny_arch()))
    classes = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)}
    unused = {"GateResidual", "GruResidual", "GeluFeedForward", "ParallelLayer", "LinearRecall", "MeanPool", "TiedHead"}
    assert not classes & unused
    assert "parallel_residual" not in code
    assert "dropout" not in code.partition("class SpiralFormerModel")[2].partition("def forward")[0]  # at its default
    named = {name for name in classes if len(re.findall(rf"\b{name}\b", code)) > 1}
    assert classes - named <= {"SpiralFormerForCausalLM"}


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


@pytest.fixture(scope="module")
def spiral(tmp_path_factory):
    """An export with pools, learned factors and a recall."""
    over = {"graph": {"h": {"topology": TOPOLOGIES[5], "recall": "concat"}}}
    folder = tmp_path_factory.mktemp("spiral") / "hf"
    model = build_model(compile_arch(tiny_arch(over)), seed=0)
    export_hf(folder, tiny_arch(over), model)
    return folder, model


def test_trained_anew_it_begins_as_the_product_does(spiral):
    folder, model = spiral
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    ours, theirs = dict(model.named_parameters()), dict(fresh.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.dim() < 2 or value.std() == 0:
            assert torch.equal(value, theirs[name]), name
        else:
            assert theirs[name].std().item() == pytest.approx(value.std().item(), rel=0.25), name


def test_weights_that_are_missing_are_drawn(spiral, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, model = spiral
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if "qkv" in name or "norm" in name or "factors" in name]
    assert len(gone) > 3
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {name: value + 1 for name, value in weights.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = dict(load(tmp_path).named_parameters())
    for name, value in model.named_parameters():
        found = loaded[f"model.{name}"]
        if f"model.{name}" not in gone:
            assert torch.equal(found, kept[f"model.{name}"])
        elif value.dim() < 2:
            assert torch.equal(found, value)
        else:
            assert found.std().item() == pytest.approx(value.std().item(), rel=0.25)


def test_the_loss_is_shared_by_all_that_accumulate(spiral):
    """transformers' Trainer hands over how many labels the whole batch has; each part then gives its share."""
    model = load(spiral[0])
    tokens = torch.randint(0, 17, (4, 24))
    whole = model(tokens, labels=tokens).loss
    parts = [model(t[None], labels=t[None], num_items_in_batch=torch.tensor(4 * 23)).loss for t in tokens]
    assert torch.allclose(sum(parts), whole)
    shifted = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:].contiguous()
    assert torch.allclose(model(tokens, shift_labels=shifted, labels=tokens).loss, whole)
    assert find_labels(type(model)) == ["labels"]  # or evaluation would look for others in vain


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"atention_mask": 1}, TypeError),
        ({"inputs_embeds": torch.zeros(1, 12, 16)}, TypeError),
        ({"position_ids": torch.arange(12).remainder(6)[None]}, ValueError),
        ({"cache_position": torch.arange(12) + 1}, ValueError),
        ({"token_type_ids": torch.arange(12)[None] // 6}, TypeError),
        ({"attention_mask": torch.ones(1, 1, 12, 12).tril()}, ValueError),
        ({"attention_mask": torch.arange(12)[None] // 6 + 1}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_have_no_effect_is_refused(spiral, inputs, error):
    with pytest.raises(error, match=r"does not know|counted from a row's first|begins at 1|shape|other numbers"):
        load(spiral[0])(torch.randint(0, 17, (1, 12)), **inputs)


def test_what_means_nothing_new_is_accepted(spiral):
    model = load(spiral[0])
    tokens = torch.randint(0, 17, (2, 12))
    expected = model(tokens).logits
    for same in (
        {"position_ids": torch.arange(12)[None]},
        {"attention_mask": torch.ones(2, 12)},
        {"cache_position": torch.arange(12)},
        {"token_type_ids": torch.zeros(2, 12, dtype=torch.long)},
        {"output_attentions": False, "inputs_embeds": None, "return_dict": None},
    ):
        assert torch.equal(model(tokens, **same).logits, expected)
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([3, 4])).logits, expected[:, 3:5])
    assert torch.equal(model(tokens, logits_to_keep=2, labels=tokens).logits, expected[:, -2:])
    assert isinstance(model(tokens, return_dict=False), tuple)
    named = transformers.AutoModelForCausalLM.from_pretrained(
        spiral[0], trust_remote_code=True, attn_implementation="sdpa"
    )
    assert torch.equal(named.eval()(tokens).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_is_added_trained_and_kept(tied, tmp_path):
    over = {"tie_embeddings": tied}
    export_hf(tmp_path / "hf", tiny_arch(over), built(over))
    model = load(tmp_path / "hf")
    with torch.no_grad():
        before = model(torch.arange(12)[None]).logits
    model.resize_token_embeddings(20)
    tokens = torch.tensor([[1, 18, 2, 19, 3, 18]])
    assert model(tokens).logits.shape == (1, 6, 20)
    assert torch.allclose(model(torch.arange(12)[None]).logits[..., :17], before, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "more")
    assert torch.equal(load(tmp_path / "more")(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    """A model cast to half precision is kept so, in a bundle and in an export; positions keep their precision."""
    over = {"blocks": {"core": {"recall": "linear"}}}
    arch, model = tiny_arch(over), built(over).to(dtype)
    assert {buffer.dtype for name, buffer in model.named_buffers() if "_LR" in name} == {torch.float32}
    save_bundle(tmp_path / "b", arch, model)
    loaded = load_bundle(tmp_path / "b").model
    tokens = torch.randint(0, 17, (2, 24))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(tokens), model(tokens))
    export_hf(tmp_path / "hf", arch, model)
    assert load(tmp_path / "hf")(tokens).logits.dtype == dtype
