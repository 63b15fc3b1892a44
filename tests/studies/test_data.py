import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from searchspace import SpecError
from studies.config import DataConfig
from studies.data import Corpus, decode_bytes, encode_bytes, prepare_corpus


@pytest.fixture
def corpus(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 20)
    return prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2), tmp_path / "data")


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
    config = DataConfig(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2)
    assert prepare_corpus(config, corpus.folder).facts == corpus.facts
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == before


def test_what_is_prepared_stays_whatever_the_sources_do(corpus, tmp_path):
    (tmp_path / "99.txt").write_text("new " * 1000)
    config = DataConfig(kind="text", path=str(tmp_path / "*.txt"), held_out=0.2)
    assert prepare_corpus(config, corpus.folder).facts == corpus.facts
    with pytest.raises(SpecError, match="differs from the data prepared here"):
        prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "*.txt"), held_out=0.3), corpus.folder)


def test_files_of_one_name_fall_on_both_sides(tmp_path):
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "c.txt").write_text(f"file {i} " * 9)
    corpus = prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "**/c.txt"), held_out=0.5), tmp_path / "data")
    assert min(corpus.facts.train_tokens, corpus.facts.val_tokens) > 0


def test_one_file_is_split_at_its_end(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a" * 90 + b"b" * 10)
    corpus = prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "one.txt"), held_out=0.1), tmp_path / "data")
    assert (corpus.folder / "val.bin").read_bytes() == b"b" * 10


def test_token_files(tmp_path):
    for part, count in (("train", 500), ("val", 100)):
        (np.arange(count) % 300).astype(np.uint16).tofile(tmp_path / f"{part}.bin")
    config = DataConfig(kind="tokens", path=str(tmp_path), vocab_size=300, bytes_per_token=4.0)
    corpus = prepare_corpus(config, tmp_path / "data")
    inputs, _ = corpus.batch(0, 0, 2, 8)
    assert torch.equal(inputs[:, 1:] - inputs[:, :-1] % 300, torch.ones(2, 7, dtype=torch.int64)) or inputs.max() < 300
    assert corpus.bits_per_byte(4 * math.log(2)) == pytest.approx(1.0)


def test_nothing_to_read(tmp_path):
    with pytest.raises(SpecError, match=r"data\.path: no file matches"):
        prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "*.md")), tmp_path / "data")
    with pytest.raises(SpecError, match="needs a path"):
        prepare_corpus(DataConfig(kind="text"), tmp_path / "data")
    with pytest.raises(SpecError, match=r"no train\.bin"):
        prepare_corpus(DataConfig(kind="tokens", path=str(tmp_path)), tmp_path / "data")
    (tmp_path / "short.txt").write_text("short")
    corpus = prepare_corpus(DataConfig(kind="text", path=str(tmp_path / "short.txt")), tmp_path / "data")
    with pytest.raises(SpecError, match="fewer than one sequence"):
        corpus.batch(0, 0, 1, 64)


def test_python_source_is_the_real_standard_library(tmp_path):
    corpus = prepare_corpus(DataConfig(), tmp_path / "data")
    assert corpus.facts.train_tokens > 5e6
    text = (corpus.folder / "train.bin").read_bytes() + (corpus.folder / "val.bin").read_bytes()
    assert Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes() in text


def test_bytes_round_trip():
    assert decode_bytes(encode_bytes("naïve → text")) == "naïve → text"
