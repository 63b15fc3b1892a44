"""`eval` measures what it says: against a literal computation, on every kind of data."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import built, run_cli, tiny_arch

from builder import load_bundle, save_bundle
from searchspace import SpecError
from studies.data.settings import TextData
from studies.training.evaluate import evaluate, position_bins

TEXTS = [f"document {i}: {'ab ' * (i % 7)}end" for i in range(40)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    over = {"vocab_size": 256}
    return save_bundle(folder / "bundle", tiny_arch(over), built(over))


def text_file(folder):
    (folder / "one.txt").write_text("\n".join(TEXTS))
    return folder / "one.txt"


def test_it_is_the_mean_loss_of_every_next_token(bundle, tmp_path):
    file = text_file(tmp_path)
    found = evaluate(bundle, TextData(kind="text", path=str(file)))
    tokens, length = torch.tensor(list(file.read_bytes())), 24
    windows = (len(tokens) - 1) // length
    model = load_bundle(bundle).model
    losses = []
    for i in range(windows):
        window = tokens[i * length : i * length + length + 1]
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    each = torch.stack(losses)
    assert found.tokens == each.numel()
    assert found.loss == pytest.approx(float(each.mean()), abs=1e-5)
    assert found.bits_per_byte == pytest.approx(float(each.mean()) / math.log(2), abs=1e-5)
    assert found.by_position == pytest.approx(each.mean(0).tolist(), abs=1e-5)


def test_bins_double_and_cover_everything():
    rows = position_bins(tuple(float(i) for i in range(1, 25)))
    assert [name for name, _ in rows] == ["1", "2-3", "4-7", "8-15", "16-24"]
    assert rows[1][1] == 2.5


def test_rows_files_and_tokens_agree(bundle, tmp_path):
    separated = "\n\0\n".join(TEXTS).encode()
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    np.frombuffer(separated, np.uint8).astype(np.uint16).tofile(tmp_path / "val.bin")
    np.zeros(9, np.uint16).tofile(tmp_path / "train.bin")
    losses = [
        evaluate(bundle, TextData(kind="text", path=str(tmp_path / "texts"))).loss,
        evaluate(bundle, TextData(kind="jsonl", path=str(tmp_path / "rows.jsonl"))).loss,
        evaluate(bundle, TextData(kind="tokens", path=str(tmp_path), vocab_size=256)).loss,
    ]
    assert losses == pytest.approx([losses[0]] * 3)


def test_it_looks_at_as_much_as_asked(bundle, tmp_path):
    found = evaluate(bundle, TextData(kind="text", path=str(text_file(tmp_path))), most_tokens=100)
    assert found.tokens == 96


def test_what_can_not_be_scored_is_refused(bundle, tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(SpecError, match="has 2 tokens"):
        evaluate(bundle, TextData(kind="text", path=str(tmp_path / "short.txt")))
    for part in ("train", "val"):
        np.full(99, 300, np.uint16).tofile(tmp_path / f"{part}.bin")
    with pytest.raises(SpecError, match="holds id 300 at token 0, the vocabulary has 256"):
        evaluate(bundle, TextData(kind="tokens", path=str(tmp_path), vocab_size=400))
    with pytest.raises(SpecError, match="is not a bundle"):
        evaluate(tmp_path, TextData(kind="text", path=str(tmp_path / "short.txt")))


def test_the_command_prints_it_for_people_and_for_programs(bundle, tmp_path):
    file = text_file(tmp_path)
    facts = json.loads(run_cli("eval", bundle, "--data", file, "--json"))
    assert f"{facts['bits_per_byte']:.4f} bits/byte" in run_cli("eval", bundle, "--data", file)
    assert len(facts["by_position"]) == 24
