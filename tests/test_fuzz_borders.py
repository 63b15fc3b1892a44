"""What comes from outside at each border, mutated: decoded, or refused by the product's own error, soon, with nothing written.

`make fuzz` looks at 1,700 examples of each, the default tests at 60.
"""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from bounded import bounded
from helpers import built, end_all, make_driver, tiny_arch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from builder import import_hf, load_bundle, save_bundle
from builder.exchange.bundle import bundle_contents
from searchspace import SpecError
from studies.config import StudyKeys
from studies.data.codec import Tokenizer, codec_of_bundle
from studies.data.corpus import Corpus, look_at_tokens, prepare_corpus
from studies.data.documents import source_files
from studies.data.settings import TextData
from studies.records.folder import check_place
from studies.records.reading import open_for_reading
from studies.training.checkpoint import LocalStore, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning", "ignore::DeprecationWarning")

# fmt: off
ODD = st.sampled_from([None, True, False, 0, -1, 1, 2, 3, 61, 300, 10**9, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "2", "1e3", "O", "object", "uint16",
                       "float32", "../x", "/etc/passwd", "a" * 999, "\0", "\x1b[2J", "é", [], {}, [1], {"a": 1}, [[[[]]]], {"rope_type": "yarn"}, "llama", "gpt_neox"])
# fmt: on
VALUES = ODD | st.recursive(
    ODD, lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=5), item, max_size=3), max_leaves=5
)


def places(value, at=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*at, name)
        yield from places(inner, (*at, name))


@st.composite
def mutated(draw, original):
    """JSON data with a few values replaced, removed, renamed or added."""
    root = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(root))
        if not paths:
            return copy.deepcopy(draw(VALUES))
        *parents, last = draw(st.sampled_from(paths))
        holder = root
        for name in parents:
            holder = holder[name]
        how = draw(st.sampled_from(["value", "value", "delete", "add", "root"]))
        if how == "root":
            return copy.deepcopy(draw(VALUES))
        if how == "delete":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=9))] = copy.deepcopy(draw(VALUES))
        else:
            holder[last] = copy.deepcopy(draw(VALUES))
    return root


@st.composite
def broken(draw, data):
    """Bytes cut, flipped, inserted or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        new = draw(st.binary(max_size=6) | st.sampled_from([b"[" * 5000, b"\0" * 99, b"\n", b"{", b'"', b"9" * 5000]))
        cut = draw(st.sampled_from([0, 1, 7, 10**9]))
        data = data[:at] + new + data[at + cut :]
    return data


def tree(folder):
    return sorted(os.path.join(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("borders")


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 61,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "head_dim": 8, "num_key_value_heads": 2, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def hf_folder(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    layer = {f"self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"} | {"mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16),
             "mlp.down_proj.weight": (16, 24), "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,)}  # fmt: skip
    names = {f"model.layers.0.{name}": shape for name, shape in layer.items()} | {
        "model.embed_tokens.weight": (61, 16),
        "model.norm.weight": (16,),
    }
    save_file({name: torch.ones(shape) for name, shape in names.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def unwritten(folder, call):
    """`call`, which must leave a folder as it was where it refuses."""
    before = tree(folder)
    try:
        call()
    except SpecError as error:
        refused = error
    else:
        return
    assert refused.problem
    assert tree(folder) == before


@given(mutated(CONFIG))
def test_config_json(scratch, data):
    folder = hf_folder(scratch / "hf")
    (folder / "config.json").write_text(json.dumps(data))
    unwritten(scratch, lambda: import_hf(folder, scratch / "imported"))
    shutil.rmtree(scratch / "imported", ignore_errors=True)


INDEX = {"weight_map": {"model.norm.weight": "model.safetensors"}, "metadata": {"total_size": 1}}


@given(mutated(INDEX), st.binary(max_size=9))
def test_the_index_and_the_tensors(scratch, data, tail):
    folder = hf_folder(scratch / "hf")
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    unwritten(scratch, lambda: import_hf(folder, scratch / "imported"))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(tail + (folder / "model.safetensors").read_bytes())
    unwritten(scratch, lambda: import_hf(folder, scratch / "imported"))
    shutil.rmtree(scratch / "imported", ignore_errors=True)


TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 3, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": True}], "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
}  # fmt: skip


@given(mutated(TOKENIZER))
def test_tokenizer_json(scratch, data):
    file = scratch / "tokenizer.json"
    file.write_text(json.dumps(TOKENIZER))
    Tokenizer(file)  # imports the library
    file.write_text(json.dumps(data))
    codec = bounded(Tokenizer, file)
    if codec is not None:
        ids = codec.encode(b"a b \xff c")
        assert all(0 <= token < codec.vocab_size for token in ids)
        codec.decode(ids)


@given(
    st.binary(max_size=600),
    st.sampled_from(["uint8", "uint16", "uint32"]),
    st.none() | st.integers(2, 70_000),
    st.none() | st.sampled_from([0.5, 4.0]),
)
def test_token_files(scratch, data, dtype, vocab_size, size):
    folder = scratch / "tokens"
    folder.mkdir(exist_ok=True)
    for part in ("train", "val"):
        (folder / f"{part}.bin").write_bytes(data)
    config = TextData(kind="tokens", path=str(folder), dtype=dtype, vocab_size=vocab_size, bytes_per_token=size)
    facts = bounded(look_at_tokens, folder, config)
    if facts is not None:
        assert int(np.frombuffer(data, dtype).max()) < facts.vocab_size
        assert facts.train_tokens * np.dtype(dtype).itemsize == len(data)


@pytest.fixture(scope="module")
def corpus(scratch):
    (scratch / "text.txt").write_text("line\n" * 500)
    folder = prepare_corpus(TextData(kind="text", path=str(scratch / "text.txt")), scratch / "data").folder
    os.rename(folder / "val.bin", folder / "x.bin")
    with pytest.raises(SpecError):  # imports what is imported for errors alone
        Corpus(folder)
    os.rename(folder / "x.bin", folder / "val.bin")
    return folder


@given(st.data())
def test_corpus_json(corpus, data):
    file = corpus / "corpus.json"
    whole = file.read_text()
    try:
        if data.draw(st.booleans()):
            file.write_text(json.dumps(data.draw(mutated(json.loads(whole)))))
        else:
            file.write_bytes(data.draw(broken(whole.encode())))
        found = bounded(Corpus, corpus)
        if found is not None:
            assert len(found.train) * found.train.itemsize == (corpus / "train.bin").stat().st_size
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def bundle(scratch):
    facts = {"data": {"kind": "text", "text": "bytes", "source": "x"}, "metrics": {"loss": 1.0}}
    over = {"vocab_size": 256}
    return save_bundle(scratch / "bundle", tiny_arch(over), built(over), facts=facts)


@given(st.data())
def test_manifests(bundle, data):
    file = bundle / "manifest.json"
    whole = file.read_text()
    try:
        file.write_text(json.dumps(data.draw(mutated(json.loads(whole)))))
        bounded(bundle_contents, bundle)
        try:  # unwatched: building a module executes its generated code
            loaded = load_bundle(bundle)
        except SpecError:
            return
        bounded(codec_of_bundle, bundle, loaded)
    finally:
        file.write_text(whole)


@given(
    st.text(max_size=40)
    | st.sampled_from(["..", ".", "a/../b", "a::b", "x" * 400, "con", "NUL", "[/a]", "~root", "$HOME", "%00"])
)
def test_names_and_paths(scratch, name):
    from searchspace.plain import decode
    from studies.config import study_from_data

    study = {"name": name, "space": json.loads(json.dumps(TINY_SPACE)), "training": {"flops": 1e9}}
    found = bounded(study_from_data, study)
    if found is not None:
        assert os.path.basename(found.name) == found.name
        assert found.name.isprintable()
    bounded(decode, StudyKeys, {"name": name, "data": {"path": name}})
    bounded(source_files, TextData(kind="text", path=f"{scratch}/none/{name}"))
    if "\0" not in name and len(name) < 100:
        bounded(check_place, scratch / "places" / name)
    assert not (scratch / "places").exists()


TINY_SPACE = {
    "vocab_size": 17, "seq_len": 24, "d_model": 16, "blocks": {"core": {"layers": 1, "heads": 2}},
    "graph": {"x": {"embed": "tokens"}, "y": {"block": "core", "in": "x"}, "logits": {"head": "lm", "in": "y"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    driver = end_all(make_driver(tmp_path_factory.mktemp("journal")))
    return driver.folder


@given(st.data())
def test_journal_lines(study, data):
    file = study / "journal.log"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    try:
        if data.draw(st.booleans()):
            i = data.draw(st.integers(0, len(lines) - 1))
            lines[i] = json.dumps(data.draw(mutated(json.loads(lines[i])))).encode() + b"\n"
            file.write_bytes(b"".join(lines))
        else:
            file.write_bytes(data.draw(broken(whole)))
        records = bounded(open_for_reading, study)
        for record in records or ():
            assert record.cost.params > 0
            assert all(rung.score >= 0 for rung in record.rungs)
    finally:
        file.write_bytes(whole)


@given(st.data())
def test_checkpoints(scratch, data):
    shutil.rmtree(scratch / "attempt", ignore_errors=True)
    store = LocalStore(scratch / "attempt")
    save_checkpoint(store, {"step": 3, "x": torch.ones(3), "rungs": [{"loss": 1.0}]}, 3, "me")
    name = data.draw(st.sampled_from(["pointer.json", "step-000000003.safetensors"]))
    file = scratch / "attempt" / name
    if name == "pointer.json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(mutated(json.loads(file.read_text())))))
    else:
        file.write_bytes(data.draw(broken(file.read_bytes())))
    state = bounded(load_checkpoint, [store], "me")
    assert state is None or state["step"] == 3
