"""What is exported loads elsewhere, computes the same, and is readable."""

import ast
import re
import subprocess
import sys

import pytest
import torch
from helpers import TOPOLOGIES, built, tiny_arch

from builder import build_model, compile_arch
from builder.exchange.bundle import load_bundle, save_bundle
from builder.exchange.hf_export import MODELING, export_hf, exported_name, modeling_code
from builder.exchange.torch_export import export_torch
from builder.laws import randomize
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
    mine = model.generate(tokens[:, :5], 24, temperature=0.0)
    assert torch.equal(loaded.generate(tokens[:, :5], max_new_tokens=24, do_sample=False), mine)


def test_sampled_architectures(tmp_path):
    for seed in range(3):
        arch = load_space("families").sample(seed).arch
        export_hf(tmp_path / str(seed), arch, randomize(build_model(compile_arch(arch))))


def test_a_wrong_export_is_noticed(tmp_path, monkeypatch):
    from builder.exchange import hf_export

    code = hf_export.modeling_code
    monkeypatch.setattr(
        hf_export, "modeling_code", lambda *given: code(*given).replace("x_BLD + u_BLD", "x_BLD - u_BLD")
    )
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


GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module", params=[{}, MESH, {"tie_embeddings": True}], ids=["anchor", "mesh", "tied"])
def exported(request, tmp_path_factory):
    """Folders of an export, and of another's weights in the same architecture."""
    home, arch = tmp_path_factory.mktemp("exported"), tiny_arch(request.param)
    other = randomize(build_model(compile_arch(arch), seed=1), seed=5)
    return export_hf(home / "hf", arch, built(request.param)), export_hf(home / "other", arch, other)


def test_whoever_generates_gets_the_same(exported):
    """A prompt in chunks, embedded, tried ahead by lookup or by an assistant, or attended to otherwise."""
    model, other = (load(folder).double() for folder in exported)
    tokens = torch.randint(0, 5, (1, 11))
    expected = model.generate(tokens, **GREEDY)
    for settings in (
        {"logits_to_keep": 0},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"inputs_embeds": model.get_input_embeddings()(tokens).detach()},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": other},
        {"assistant_model": model},
    ):
        assert torch.equal(model.generate(tokens, **GREEDY, **settings), expected), settings
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    with pytest.raises(ValueError, match="keeps its own cache"):
        model.generate(tokens, cache_implementation="static", **GREEDY)


def test_a_conversation_goes_on_with_its_cache(exported):
    model = load(exported[0]).double()
    settings = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True}
    said = model.generate(torch.randint(0, 17, (1, 6)), **settings)
    for length in (4, 1):
        longer = torch.cat((said.sequences, torch.randint(0, 17, (1, length))), dim=1)
        said = model.generate(longer, past_key_values=said.past_key_values, **settings)
        assert torch.equal(said.sequences, model.generate(longer, **settings).sequences)


def test_tokens_are_taken_back(exported):
    model, tokens = load(exported[0]).double(), torch.randint(0, 17, (2, 30))
    expected = model(tokens).logits
    state = model.new_state()
    state.activate_past_recording()
    with torch.no_grad():
        model(tokens[:, :14], past_key_values=state, logits_to_keep=5)
        for removed, upto in ((4, 12), (0, 17), (3, 15), (1, 30)):
            state.crop(-removed)
            start = state.get_seq_length()
            wrong = model(17 - 1 - tokens[:, start:upto], past_key_values=state).logits
            assert wrong.shape[1] == upto - start
            state.crop(-(upto - start))
            right = model(tokens[:, start:upto], past_key_values=state).logits
            torch.testing.assert_close(right, expected[:, start:upto])
    plain = model.new_state()
    model(tokens[:, :14], past_key_values=plain)
    if plain.mark().is_lengths_alone:
        plain.crop(-3)
        torch.testing.assert_close(model(tokens[:, 11:], past_key_values=plain).logits, expected[:, 11:])
    else:
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            plain.crop(-3)


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_attentions_are_what_each_token_sees(exported, padded):
    """Of a batch at once, of each row alone, and token by token."""
    model, length = load(exported[0]).double(), 21
    rows = [torch.randint(0, 17, (size,)) for size in ((length, 13, 20) if padded else (length, length))]
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        whole, state = model(tokens, attention_mask=mask, use_cache=False, **asked), model.new_state()
        steps = [model(tokens[:, :14], attention_mask=mask[:, :14], past_key_values=state, **asked)]
        for i in range(14, length):
            steps.append(model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=state, **asked))
        alone = [model(row[None], **asked) for row in rows]
    layers = model.config.num_hidden_layers
    assert len(whole.hidden_states) == layers + 1
    assert len(whole.attentions) == layers
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    for number in range(layers + 1):
        one_by_one = torch.cat([step.hidden_states[number] for step in steps], dim=1)
        for i, row in enumerate(rows):
            mine = whole.hidden_states[number][i, length - len(row) :]
            torch.testing.assert_close(mine, alone[i].hidden_states[number][0])
            torch.testing.assert_close(mine, one_by_one[i, length - len(row) :])
    for number in range(layers):
        weights = whole.attentions[number]
        assert weights.shape == (len(rows), model.config.num_attention_heads, length, length)
        for i, row in enumerate(rows):
            first = length - len(row)
            mine = weights[i, :, first:, first:]
            torch.testing.assert_close(mine, alone[i].attentions[number][0])
            sums = mine.sum(dim=-1)
            assert ((sums - 1).abs().lt(1e-9) | sums.eq(0)).all()
            assert (sums[:, -1] > 0.5).all()
            for step, at in zip(steps[1:], range(14, length), strict=True):
                torch.testing.assert_close(step.attentions[number][i, :, 0, first:], weights[i, :, at, first : at + 1])


def test_a_graph_without_blocks_and_blocks_of_different_heads(tmp_path):
    bare = {"graph": {"h": None, "logits": {"head": "lm", "in": "x"}}}
    export_hf(tmp_path / "bare", tiny_arch(bare), built(bare))
    assert len(load(tmp_path / "bare")(torch.arange(5)[None], output_hidden_states=True).hidden_states) == 1
    over = {
        "blocks": {"few": {"layers": 1, "heads": 1}},
        "graph": {"h0": {"block": "few", "in": "x"}, "h": {"in": "h0", "schedule": ["phrase", "token"]}},
    }
    export_hf(tmp_path / "heads", tiny_arch(over), built(over))
    model = load(tmp_path / "heads").double()
    tokens = torch.randint(0, 17, (1, 12))
    whole = model(tokens, output_attentions=True).attentions
    said = model.generate(
        tokens[:, :3], max_new_tokens=9, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape[1] for step in said.attentions] == [1] * 9
    again = model(said.sequences, output_attentions=True).attentions
    for number, weights in enumerate(said.attentions[-1]):
        torch.testing.assert_close(weights[0, :, 0], again[number][0, :, -2, :-1])
    assert len(whole) == 3


def test_masks_and_settings_that_do_not_fit_are_refused(exported):
    model, tokens = load(exported[0]), torch.randint(0, 17, (2, 9))
    with pytest.raises(ValueError, match=r"has 30 positions, cache and input 0 \+ 9"):
        model(tokens, attention_mask=torch.ones(2, 30))
    state = model(tokens, use_cache=True).past_key_values
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="earlier tokens"):
        model(tokens[:, :1], attention_mask=mask, past_key_values=state)
    with pytest.raises(ValueError, match="num_hidden_layers: is 2"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True, num_hidden_layers=2)
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="'eager'"):
        model(tokens, output_attentions=True)


def test_what_sees_its_whole_input_is_trained_and_classified_as_it_is_asked(tmp_path):
    over = {"causal": False}
    export_hf(tmp_path / "hf", tiny_arch(over), built(over))
    model, tokens = load(tmp_path / "hf").double(), torch.randint(1, 17, (2, 12))
    answers = tokens.flip(1)
    expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), answers.flatten())
    torch.testing.assert_close(model(tokens, labels=answers).loss, expected.float())
    auto = transformers.AutoModelForSequenceClassification
    scorer = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True, num_labels=3).double().eval()
    scorer.config.pad_token_id = 0
    padded = tokens.clone()
    padded[0, 8:] = 0
    torch.testing.assert_close(scorer(padded).logits[:1], scorer(padded[:1, :8]).logits)


def test_packed_texts_are_told_apart_by_their_positions(exported):
    model = load(exported[0]).double()
    texts = [torch.randint(0, 17, (length,)) for length in (5, 1, 9, 3)]
    packed, places = torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]
    extra = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 15, 18]), "max_length_q": 9}
    logits = model(packed, position_ids=places, **extra).logits[0]
    torch.testing.assert_close(logits, torch.cat([model(text[None]).logits[0] for text in texts]))
    for wrong in (places + 1, places.flip(1)):
        with pytest.raises(ValueError, match="position_ids"):
            model(packed, position_ids=wrong)
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model(packed, **extra)


def test_a_prefix_is_seen_by_every_layer_at_every_call(exported):
    """As prefix tuning gives it; a prefix's values are mixed in, its gradient comes back, decoding sees it too."""
    model, tokens = load(exported[0]).double(), torch.randint(0, 17, (2, 20))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    rows = torch.randn(2 * layers, 2, heads, 3, model.config.head_dim, dtype=torch.double, requires_grad=True)

    def prefix():
        return transformers.DynamicCache([(rows[2 * i], rows[2 * i + 1]) for i in range(layers)])

    mask = torch.ones(2, 23, dtype=torch.long)
    whole = model(tokens, attention_mask=mask, past_key_values=prefix())
    whole.logits.sum().backward()
    assert (rows.grad.flatten(1) != 0).any(dim=1).all()
    assert not torch.allclose(whole.logits, model(tokens).logits)
    with torch.no_grad():
        state = model(tokens[:, :9], past_key_values=prefix()).past_key_values
        assert state.get_seq_length() == 12
        rest = model(tokens[:, 9:], past_key_values=state).logits
    torch.testing.assert_close(rest, whole.logits[:, 9:])


def test_embeddings_checkpoints_and_attention_by_name(exported):
    tokens = torch.randint(0, 17, (2, 24))
    model = load(exported[0]).double()
    whole = model(tokens, labels=tokens)
    given = model(inputs_embeds=model.get_input_embeddings()(tokens))
    torch.testing.assert_close(given.logits, whole.logits)
    whole.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for reentrant in (False, True):
        again = load(exported[0]).double().train()
        again.activation_checkpointing_enable({"use_reentrant": reentrant})
        again(tokens, labels=tokens).loss.backward()
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name])
    asked = []

    def mine(module, query, key, value, attention_mask, **settings):
        asked.append(query.shape)
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **settings)

    transformers.AttentionInterface.register("mine", mine)
    model.set_attn_implementation("mine")
    torch.testing.assert_close(model(tokens).logits, whole.logits)
    assert len(asked) == model.config.num_hidden_layers


def test_the_base_and_a_classifier_load_by_their_names(exported, tmp_path):
    tokens, mask = torch.randint(0, 17, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, :5] = 0
    base = transformers.AutoModel.from_pretrained(exported[0], trust_remote_code=True).eval()
    model = load(exported[0])
    hidden = base(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(
        model.lm_head(hidden)[mask.bool()], model(tokens, attention_mask=mask).logits[mask.bool()]
    )
    auto = transformers.AutoModelForSequenceClassification
    scorer = auto.from_pretrained(exported[0], trust_remote_code=True, num_labels=4).eval()
    out = scorer(tokens, attention_mask=mask, labels=torch.tensor([0, 3, 1]))
    torch.testing.assert_close(out.logits, scorer.score(hidden[torch.arange(3), torch.tensor([8, 11, 11])]))
    out.loss.backward()
    scorer.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.testing.assert_close(again(tokens, attention_mask=mask).logits, out.logits)
    with pytest.raises(ValueError, match="pad_token_id"):
        scorer(tokens)


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
    assert classes - named <= {"SpiralFormerForCausalLM", "SpiralFormerForSequenceClassification"}


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
    ours = {exported_name(name): value for name, value in model.named_parameters()}
    theirs = dict(fresh.named_parameters())
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
        name = exported_name(name)
        found = loaded[name]
        if name not in gone:
            assert torch.equal(found, kept[name])
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
        ({"inputs_embeds": torch.zeros(1, 12, 16)}, ValueError),
        ({"position_ids": torch.arange(12)[None] + 1}, ValueError),
        ({"cache_position": torch.arange(12) + 1}, TypeError),
        ({"past_key_values": transformers.DynamicCache()}, ValueError),
        ({"token_type_ids": torch.arange(12)[None] // 6}, TypeError),
        ({"attention_mask": torch.ones(1, 1, 12, 12).tril()}, ValueError),
        ({"attention_mask": torch.arange(12)[None] // 6 + 1}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_have_no_effect_is_refused(spiral, inputs, error):
    with pytest.raises(
        error, match=r"does not know|counted from a row's first|one of them|its own cache|shape|other numbers"
    ):
        load(spiral[0])(torch.randint(0, 17, (1, 12)), **inputs)


def test_what_means_nothing_new_is_accepted(spiral):
    model = load(spiral[0])
    tokens = torch.randint(0, 17, (2, 12))
    expected = model(tokens).logits
    for same in (
        {"position_ids": torch.arange(12)[None]},
        {"attention_mask": torch.ones(2, 12)},
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
