import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_cli

from searchspace import SpecError
from studies.data.codec import Bytes, Tokenizer, byte_tokenizer
from studies.data.corpus import Corpus, prepare_corpus
from studies.data.settings import TextData


@pytest.fixture
def corpus(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 20)
    return prepare_corpus(TextData(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2), tmp_path / "data")


def test_files_are_held_out_whole(corpus):
    train, val = ((corpus.folder / f"{part}.bin").read_bytes() for part in ("train", "val"))
    assert 0 < len(val) < len(train)
    names = [f"file {i} " for i in range(40)]
    assert all((name.encode() in train) != (name.encode() in val) for name in names)


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    inputs, targets = corpus.batch(seed=1, step=7, batch_size=3, seq_len=16)
    again = Corpus(corpus.folder).batch(seed=1, step=7, batch_size=3, seq_len=16)
    assert torch.equal(inputs, again[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, corpus.batch(seed=1, step=8, batch_size=3, seq_len=16)[0])
    assert inputs.shape == (3, 16)
    assert inputs.dtype == torch.int64


def test_evaluation_windows_never_change_and_have_one_shape(corpus):
    first, second = (list(corpus.eval_batches(400, 4, 16)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert {batch[0].shape for batch in first} == {(4, 16)}


def test_prepared_once(corpus, tmp_path):
    before = (corpus.folder / "train.bin").stat().st_mtime_ns
    config = TextData(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2)
    assert prepare_corpus(config, corpus.folder).facts == corpus.facts
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == before


def test_what_is_prepared_stays_whatever_the_sources_do(corpus, tmp_path):
    (tmp_path / "99.txt").write_text("new " * 1000)
    config = TextData(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2)
    assert prepare_corpus(config, corpus.folder).facts == corpus.facts
    with pytest.raises(SpecError, match="differs from the data prepared here"):
        prepare_corpus(TextData(kind="text", path=str(tmp_path / "*.txt"), held_out=0.3), corpus.folder)


def test_files_of_one_name_fall_on_both_sides(tmp_path):
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "c.txt").write_text(f"file {i} " * 9)
    corpus = prepare_corpus(TextData(kind="text", path=str(tmp_path / "**/c.txt"), held_out=0.5), tmp_path / "data")
    assert min(corpus.facts.train_tokens, corpus.facts.val_tokens) > 0


def test_one_file_is_split_at_its_end(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a" * 90 + b"b" * 10)
    corpus = prepare_corpus(TextData(kind="text", path=str(tmp_path / "one.txt"), held_out=0.1), tmp_path / "data")
    assert (corpus.folder / "val.bin").read_bytes() == b"b" * 10


def test_token_files(tmp_path):
    for part, count in (("train", 500), ("val", 100)):
        (np.arange(count) % 300).astype(np.uint16).tofile(tmp_path / f"{part}.bin")
    config = TextData(kind="tokens", path=str(tmp_path), vocab_size=300, bytes_per_token=4.0)
    corpus = prepare_corpus(config, tmp_path / "data")
    inputs, _ = corpus.batch(0, 0, 2, 8)
    assert torch.equal(inputs[:, 1:] - inputs[:, :-1] % 300, torch.ones(2, 7, dtype=torch.int64)) or inputs.max() < 300
    assert corpus.headline.value(4 * math.log(2)) == pytest.approx(1.0)


def test_nothing_to_read(tmp_path):
    with pytest.raises(SpecError, match=r"data\.path: no file matches"):
        prepare_corpus(TextData(kind="text", path=str(tmp_path / "*.md")), tmp_path / "data")
    with pytest.raises(SpecError, match="needs a path"):
        prepare_corpus(TextData(kind="text"), tmp_path / "data")
    with pytest.raises(SpecError, match=r"no train\.bin"):
        prepare_corpus(TextData(kind="tokens", path=str(tmp_path)), tmp_path / "data")
    (tmp_path / "short.txt").write_text("short")
    corpus = prepare_corpus(TextData(kind="text", path=str(tmp_path / "short.txt")), tmp_path / "data")
    with pytest.raises(SpecError, match="fewer than one sequence"):
        corpus.batch(0, 0, 1, 64)


def test_python_source_is_the_real_standard_library(tmp_path):
    corpus = prepare_corpus(TextData(), tmp_path / "data")
    assert corpus.facts.train_tokens > 5e6
    text = (corpus.folder / "train.bin").read_bytes() + (corpus.folder / "val.bin").read_bytes()
    assert Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes() in text


def test_bytes_round_trip():
    assert Bytes().decode(Bytes().encode("naïve → text".encode())) == "naïve → text"


def prepare(folder, **settings):
    return prepare_corpus(TextData(**settings), folder / "data")


def texts_of(corpus):
    """All documents of both sides."""
    found = []
    for part in ("train", "val"):
        tokens = np.fromfile(corpus.folder / f"{part}.bin", corpus.facts.dtype).tolist()
        found += corpus.codec.decode(tokens).split("\n\0\n")
    return sorted(found)


def write_rows(folder, kind, rows):
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return folder / "rows.parquet"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(kind, tmp_path):
    rows = [{"id": i, "body": f"row {i} é"} for i in range(60)]
    file = write_rows(tmp_path, kind, [*rows, {"id": 60, "body": None}])
    corpus = prepare(tmp_path, kind=kind, path=str(file), text_field="body", held_out=0.2)
    assert texts_of(corpus) == sorted(row["body"] for row in rows)
    assert 0 < corpus.facts.val_tokens < corpus.facts.train_tokens
    with pytest.raises(SpecError, match=r"data\.text_field.*there (are|is no).*(id|text)"):
        prepare(tmp_path / "other", kind=kind, path=str(file))


def test_hugging_face_datasets_are_streamed(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for split, count in (("train", 30), ("validation", 5)):
        rows = "".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(count))
        (tmp_path / "set" / f"{split}.jsonl").write_text(rows)
    settings = {"kind": "hf", "path": str(tmp_path / "set")}
    corpus = prepare(tmp_path, **settings, held_out_split="validation")
    assert Bytes().decode((corpus.folder / "val.bin").read_bytes()).split("\n\0\n") == [
        f"validation {i}" for i in range(5)
    ]
    assert len(texts_of(corpus)) == 35
    with pytest.raises(SpecError, match="split nope"):
        prepare(tmp_path / "other", **settings, split="nope")


def test_at_most_so_many_bytes(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    corpus = prepare(tmp_path, kind="text", path=str(tmp_path / "*.txt"), max_bytes=350, held_out=0.5)
    texts = texts_of(corpus)
    assert sum(map(len, texts)) == 350


def make_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["some text about lines and squares"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_file(tmp_path):
    file = make_tokenizer(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"some text about line {i} é")
    corpus = prepare(tmp_path, kind="text", path=str(tmp_path / "*.txt"), tokenizer=str(file), held_out=0.3)
    facts = corpus.facts
    assert (facts.dtype, facts.vocab_size) == ("uint16", Tokenizer(file).vocab_size)
    train = np.fromfile(corpus.folder / "train.bin", np.uint16).tolist()
    texts = corpus.codec.decode(train).split("<|endoftext|>")
    assert all(text.startswith("some text about line") and text.endswith("é") for text in texts)
    assert facts.bytes_per_token > 1.5
    with pytest.raises(SpecError, match="is no tokenizer"):
        prepare(tmp_path / "other", kind="text", path=str(tmp_path / "*.txt"), tokenizer=str(tmp_path / "0.txt"))


def test_tokenized_once_used_by_all(tmp_path):
    file = make_tokenizer(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"some text about line {i}")
    run_cli("tokenize", tmp_path / "*.txt", "--tokenizer", file, "--held-out", "0.3", "-o", tmp_path / "tokens")
    corpus = prepare(tmp_path, kind="tokens", path=str(tmp_path / "tokens"))
    assert corpus.facts.vocab_size == Tokenizer(file).vocab_size
    assert corpus.facts.bytes_per_token > 1.5
    assert (corpus.folder / "train.bin").is_symlink()
    assert corpus.codec.encode(b"line") == Tokenizer(file).encode(b"line")
    assert "differs from the data" in run_cli("tokenize", tmp_path / "0.txt", "-o", tmp_path / "tokens", code=2)


def test_bytes_as_a_tokenizer_file(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    codec = Tokenizer(tmp_path / "tokenizer.json")
    text = "naïve → Āā\twith \x01 and \x7f\n" + "".join(map(chr, range(1, 400)))
    assert codec.encode(text.encode()) == list(text.encode())
    assert codec.decode(codec.encode(text.encode())) == text
    assert codec.encode(b"a\0b") == [97, 0, 98]
    assert codec.decode([*b"def ", 0xFF, *b" x"]) == "def \ufffd x"  # what is no text spoils nothing else
    assert codec.vocab_size == 256
    assert codec.separator == [0]
