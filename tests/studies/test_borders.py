"""What people bring: tokenizers, token files, text, paths, names, devices. Each is used rightly, or refused in words."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, built, run_cli, tiny_arch, tiny_data, tiny_study

from builder import save_bundle
from searchspace import SpecError
from searchspace.plain import dump_yaml
from studies.commands.preflight import check_device, look_at_data, preflight
from studies.config import load_study
from studies.data.codec import Tokenizer
from studies.data.corpus import Corpus, prepare_corpus
from studies.data.documents import documents, source_files
from studies.data.settings import TextData
from studies.records.folder import SUMS, check_place, study_folder
from studies.records.journal import mend

WORDS = ["line", "is", "squared", "[UNK]", ":", *map(str, range(100))]


def tokenizer(file, change=lambda data: data, words=WORDS):
    """A small word-level tokenizer.json."""
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "decoder": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    change(data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def text(folder, name="a.txt", lines=400):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"line {i % 100} : is squared\n" for i in range(lines)))
    return folder / name


def prepared(folder, **settings):
    return prepare_corpus(TextData(**settings), folder / "data")


SILENT = {
    "truncation": {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
    "padding": {"padding": {"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                            "pad_token": "line"}},
    "a template": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "is", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                   "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"is": {"id": "is", "ids": [1], "tokens": ["is"]}}}},
}  # fmt: skip


@pytest.mark.parametrize("what", SILENT)
def test_what_a_tokenizer_does_to_batches_is_not_done_to_a_corpus(what, tmp_path):
    file = text(tmp_path)
    plain = prepared(
        tmp_path / "1", kind="text", path=str(file), tokenizer=str(tokenizer(tmp_path / "p/tokenizer.json"))
    ).facts
    odd = tokenizer(tmp_path / "o/tokenizer.json", lambda data: data.update(SILENT[what]))
    found = prepared(tmp_path / "2", kind="text", path=str(file), tokenizer=str(odd)).facts
    assert (found.train_tokens, found.val_tokens) == (plain.train_tokens, plain.val_tokens)


def test_a_tokenizer_that_draws_does_not_draw():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5)
    path = Path(os.environ.get("PYTEST_TMP", "/tmp")) / f"dropout-{os.getpid()}.json"
    tokenizers.Tokenizer(model).save(str(path))
    codec = Tokenizer(path)
    path.unlink()
    assert {tuple(codec.encode(b"ab" * 9)) for _ in range(20)} == {(2,) * 9}


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_a_tokenizer_is_a_file_or_its_folder(name, tmp_path):
    tokenizer(tmp_path / "t/tokenizer.json")
    over = {"data": {"kind": "text", "path": str(text(tmp_path)), "tokenizer": str(tmp_path / "t" / name)}}
    study = load_study(tiny_study(tmp_path, over))
    assert [look_at_data(study, prepare=prepare).vocab_size for prepare in (True, False)] == [len(WORDS)] * 2


def test_holes_in_the_vocabulary_count(tmp_path):
    file = tokenizer(tmp_path / "tokenizer.json", lambda data: data["model"]["vocab"].update({"99": 339}))
    assert Tokenizer(file).vocab_size == 340
    over = {"data": {"kind": "text", "path": str(text(tmp_path)), "tokenizer": str(file)}}
    study = load_study(tiny_study(tmp_path, over))
    with pytest.raises(SpecError, match="vocab_size: 256 is too small for data with 340 tokens"):
        preflight(study, look_at_data(study))


@pytest.mark.parametrize("content", [b"", b"{", b'{"version":"1.0"}', b"[" * 200_000, b"\0" * 99, b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":["a b"]}}',
                                     b'{"model":{"type":"WordLevel","vocab":{"a":4294967295},"unk_token":"a"}}'])  # fmt: skip
def test_what_is_no_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SpecError, match=r"data\.tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_loses_text_is_named(tmp_path):
    file = tokenizer(tmp_path / "t/tokenizer.json", lambda d: d.update(normalizer={"type": "Replace", "pattern": {"Regex": "[a-z]{2,}"}, "content": "x"}))  # fmt: skip
    assert any("leaves out about" in note for note in prepared(tmp_path, kind="text", path=str(text(tmp_path)), tokenizer=str(file)).facts.notes)  # fmt: skip


# -- token files -----------------------------------------------------------------------------------


def tokens(folder, array, val=None):
    folder.mkdir(exist_ok=True)
    np.asarray(array).tofile(folder / "train.bin")
    np.asarray(array[:900] if val is None else val).tofile(folder / "val.bin")
    return folder


IDS = np.arange(20_000) % 300


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.where(IDS == 299, 499, IDS).astype(np.uint16),
            r"data\.vocab_size: holds id 499 at token 299, the vocabulary has 300",
        ),
        (np.append(IDS, 65535).astype(np.uint16), "holds id 65535 at token 20,000"),
        (IDS.astype(">u2"), "holds id"),
        (IDS.astype(np.uint8)[:19_999], r"data\.dtype: has 19,999 bytes, no multiple of the 2 of uint16"),
        (IDS.astype(np.float32), "holds id"),
        (np.array([], np.uint16), "is empty"),
    ],
)
def test_token_files_are_looked_through_before_anything_trains(array, message, tmp_path):
    folder = tokens(tmp_path / "bin", array, IDS[:900].astype(np.uint16))
    over = {"data": {"kind": "tokens", "path": str(folder), "vocab_size": 300}, "space": {"vocab_size": 300}}
    file = tiny_study(tmp_path, over)
    study = load_study(file)
    with pytest.raises(SpecError, match=message):
        look_at_data(study)
    for command in (["check", file], ["search", file, "--serial", "--dir", tmp_path / "run"]):
        assert "train.bin" in run_cli(*command, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["npy", "npz", "llm.c", "gzip"])
def test_files_of_another_format_are_named(form, tmp_path):
    folder = tokens(tmp_path / "bin", IDS.astype(np.uint16))
    train = folder / "train.bin"
    if form == "npy":
        np.save(folder / "x.npy", IDS.astype(np.uint16))
        (folder / "x.npy").rename(train)
    elif form == "npz":
        np.savez(folder / "x.npz", IDS)
        (folder / "x.npz").rename(train)
    elif form == "llm.c":
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(IDS)
        train.write_bytes(header.tobytes() + IDS.astype(np.uint16).tobytes())
    else:
        train.write_bytes(gzip.compress(train.read_bytes()))
    with pytest.raises(SpecError, match=r"data\.path: is .*; write the bare token ids"):
        prepared(tmp_path, kind="tokens", path=str(folder), vocab_size=60_000)


@pytest.mark.parametrize("wide", [np.int32, np.int64, np.uint64])
def test_a_wider_dtype_is_noticed(wide, tmp_path):
    facts = prepared(
        tmp_path, kind="tokens", path=str(tokens(tmp_path / "bin", IDS.astype(wide))), vocab_size=300
    ).facts
    assert any("every second token of train.bin is 0" in note for note in facts.notes)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "O"}, {"dtype": "float16"}, {"vocab_size": "300"}, {"vocab_size": 0}, {"train_tokens": -1}, {"bytes_per_token": 0}, {"bytes_per_token": float("nan")},
     {"extra": 1}, {"text": "latin"}, {"notes": "x"}, {"val_tokens": 10**30}, {"kind": None}],
)  # fmt: skip
def test_corpus_json_is_decoded(change, tmp_path):
    corpus = prepared(tmp_path, kind="text", path=str(text(tmp_path)))
    file = corpus.folder / "corpus.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SpecError, match=r"corpus\.json: "):
        Corpus(corpus.folder)
    with pytest.raises(SpecError):
        prepare_corpus(TextData(kind="tokens", path=str(corpus.folder)), tmp_path / "again")


def test_arrays_that_changed_are_noticed(tmp_path):
    config = TextData(kind="text", path=str(text(tmp_path)))
    corpus = prepare_corpus(config, tmp_path / "data")
    train = corpus.folder / "train.bin"
    whole = train.read_bytes()
    train.write_bytes(b"\0" * len(whole))
    with pytest.raises(SpecError, match="its digest has changed"):
        prepare_corpus(config, tmp_path / "data")
    for cut in (whole[:3000], b"", whole + b"x"):
        train.write_bytes(cut)
        with pytest.raises(SpecError, match=r"train\.bin: has [\d,]+ bytes"):
            Corpus(corpus.folder)
    (corpus.folder / "corpus.json").unlink()
    with pytest.raises(SpecError, match="exists and is not prepared data"):
        prepare_corpus(config, tmp_path / "data")


# -- text and paths --------------------------------------------------------------------------------


def found(**settings):
    return [path.name for path in source_files(TextData(kind="text", **settings))]


def test_a_name_that_exists_comes_before_the_pattern_it_looks_like(tmp_path, monkeypatch):
    for name in ("one[en].txt", "one*.txt", "a?.txt", "one1.txt"):
        text(tmp_path, name)
        assert found(path=str(tmp_path / name)) == [name]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(path="~/one1.txt") == ["one1.txt"]


def test_paths_of_a_study_begin_beside_its_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    file = tiny_study(tmp_path / "sub", {"data": {"path": "text.txt"}, "resources": {"checkpoints": "kept"}})
    monkeypatch.chdir(tmp_path)
    study = load_study(file.relative_to(tmp_path))
    assert look_at_data(study).train_tokens > 1000
    assert study.resources.checkpoints == str(tmp_path / "sub/kept")
    assert "ok: study" in run_cli("check", "sub/tiny.yaml")


def test_folders_give_their_text_and_nothing_hidden(tmp_path):
    text(tmp_path / "d", "a.txt")
    text(tmp_path / "d/.git/objects", "ab")
    text(tmp_path / "d", ".cache")
    os.symlink(tmp_path / "nowhere", tmp_path / "d/broken")
    os.mkfifo(tmp_path / "d/pipe")
    assert found(path=str(tmp_path / "d")) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"\x89PNG\0\0", "x.png: data.path: is no text"),
        ("x", b"\x7fELF\0\0", "is no text"),
        ("x.txt", "wide".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("x.txt.gz", gzip.compress(b"x", mtime=0), "is compressed; decompress it"),
        ("x.ZIP", b"PK", "is compressed"),
    ],
)
def test_what_is_no_text_is_refused_by_name(name, content, message, tmp_path):
    text(tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        found(path=str(tmp_path / "d"))


def test_empty_is_not_missing(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SpecError, match=r"1 file matches .*, all empty"):
        found(path=str(tmp_path / "*.txt"))
    with pytest.raises(SpecError, match=f"looked for in {Path.cwd()}"):
        found(path="nothing-here.txt")


def test_text_that_is_no_utf8_is_noted(tmp_path):
    (tmp_path / "a.txt").write_bytes("é ü ß ".encode("latin-1") * 500)
    facts = prepared(tmp_path, kind="text", path=str(tmp_path / "a.txt")).facts
    assert facts.notes == ("1 of 1 files or documents are not UTF-8 text",)


def test_large_files_come_in_pieces_that_are_one_document(tmp_path, monkeypatch):
    from studies.data import documents as module

    file = text(tmp_path)
    whole = prepared(tmp_path / "1", kind="text", path=str(file))
    monkeypatch.setattr(module, "_PIECE", 100)
    pieces = list(documents(TextData(kind="text", path=str(file))))
    assert len(pieces) > 50
    assert [p.continues for p in pieces] == [False] + [True] * (len(pieces) - 1)
    again = prepared(tmp_path / "2", kind="text", path=str(file))
    assert (again.folder / "train.bin").read_bytes() == (whole.folder / "train.bin").read_bytes()
    assert again.facts.source.endswith("1 files")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', "one array over all lines"),
        ('[{"text": "a"}]', "is a list"),
        ('{"text": ' + "[" * 100_000, "nested too deeply|is not JSON"),
        ('{"text": "a"}\n{"text": 3}', "is a int, not text"),
    ],
)
def test_rows_that_are_none_say_which(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SpecError, match=message):
        list(documents(TextData(kind="jsonl", path=str(tmp_path / "a.jsonl"))))


def test_a_line_without_end_is_bounded(tmp_path, monkeypatch):
    from studies.data import documents as module

    monkeypatch.setattr(module, "_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 5000 + '"}\n')
    with pytest.raises(SpecError, match="line 1 has over"):
        list(documents(TextData(kind="jsonl", path=str(tmp_path / "a.jsonl"))))


# -- names, devices, resources ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../up",
        "/abs",
        "a::b",
        "exp [/a]",
        "[bold]x",
        "x" * 300,
        "a\0b",
        "\x1b]0;T\x07",
        "x; cmd",
        "",
        ".hidden",
        "-x",
        "a/b",
        "名",
    ],
)
def test_study_names_are_held_to_the_rule_of_architectures(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tiny_study(tmp_path)
    before = sorted(os.listdir(tmp_path))
    output = run_cli("search", file, f"name={json.dumps(name)}", "--serial", code=2)
    assert "can't be used as a name" in output or "YAML" in output
    assert "\x1b" not in output
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_whose_name_is_no_studys_says_so(tmp_path):
    file = tiny_study(tmp_path)
    data = file.read_text().replace("name: tiny\n", "", 1)
    (tmp_path / "exp [wide].yaml").write_text(data)
    assert "'exp [wide]' can't be used as a name" in " ".join(
        run_cli("check", tmp_path / "exp [wide].yaml", code=2).split()
    )


@pytest.mark.parametrize(
    "folder", ["x[/lr]", "a::b", "[red]", "file:", "memory:", "s3:", "~", "a b", "ü☃", "%s", "{x}"]
)
def test_folders_of_any_name_are_folders(folder, tmp_path, monkeypatch):
    """Among them names that a parser of URLs, of markup or of formats would take for something else."""
    file = tiny_study(tmp_path)
    neighbour = tmp_path / "a"
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("mine")
    monkeypatch.chdir(neighbour)
    run_cli("search", file, "--serial", "--dir", tmp_path / folder / "run", "search.num_trials=1", "training.flops=1e7")
    assert (tmp_path / folder / "run/best/manifest.json").is_file()
    assert (neighbour / "thesis.txt").read_text() == "mine"
    assert "2 of 2 trials ended" in run_cli("status", tmp_path / folder / "run")


@pytest.mark.parametrize(("asked", "message"), [("gpu", "unknown device 'gpu'"), ("tpu", "unknown"), ("cuda:x", "unknown"), ("cpu:1", "unknown"), ("", "unknown"),
                                                ("cuda", "this machine has 0 GPUs"), ("cuda:7", "this machine has 0 GPUs")])  # fmt: skip
def test_devices(asked, message, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SpecError, match=message):
        check_device(asked)
    over = {"vocab_size": 256}
    bundle = save_bundle(tmp_path / "b", tiny_arch(over), built(over))
    assert "--device" in run_cli("eval", bundle, "--data", text(tmp_path), "--device", asked, code=2)
    assert "--device" in run_cli("train", "plain_4", "--device", asked, "-o", tmp_path / "t", code=2)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resources.gpus_per_trial=2", "a trial trains on one"),
        ("resources.gpus_per_trial=1.5", "a trial trains on one"),
        ("resources.gpus_per_trial=1", "this machine has 0 GPUs"),
        ("resources.cpus_per_trial=999", "asks for 999, this machine has"),
        ("resources.checkpoints='s3://a::file:///b'", "chain of file systems"),
        ("resources.checkpoints=''", "is no place"),
        ("tracking=trackio", "trackio is not installed"),
        ("search.from=nowhere", "search.from"),
        ("space.causal=false", "causal"),
        ("space.vocab_size=100", "vocab_size: 100 is too small for data with 256 tokens"),
        ("space.seq_len=9000000", "one sequence"),
        ("training.flops=1", "do not last for one step"),
        ("budget.params=10", "none of all"),
    ],
)
def test_what_no_candidate_can_satisfy_is_said_by_check_and_search(override, message, tmp_path, monkeypatch):
    import torch

    from studies.report import tracking

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "trackio" else True)
    file = tiny_study(tmp_path)
    for command in (
        ["search", file, override, "--serial", "--dir", tmp_path / "run"],
        ["search", file, override, "--dry-run"],
        ["check", file, override],
    ):
        if command[0] == "check" and "this machine" in message:
            continue  # it may be meant for a cluster
        assert message in " ".join(run_cli(*command, code=2).split()), command
    assert not (tmp_path / "run").exists()


def test_too_little_text_is_said_by_check(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/a.txt").write_text("short")
    file = tiny_study(tmp_path, {"data": {"path": str(tmp_path / "tiny")}})
    for command in (["check", file], ["search", file, "--serial", "--dir", tmp_path / "run"]):
        assert "less than one sequence" in " ".join(run_cli(*command, code=2).split())
    assert not (tmp_path / "run").exists()


def test_notes_of_what_may_not_be_meant(tmp_path):
    file = tiny_study(tmp_path, {"space": {"levels": {"phrase": {"chunk": 48}}}})
    output = " ".join(run_cli("check", file).split())
    assert "chunk 48 is longer than seq_len 24: level 'phrase'" in output
    file = tiny_study(tmp_path, {"space": {"seq_len": 12}})
    assert "contexts differ (seq_len 12, 24)" in " ".join(run_cli("check", file).split())


def quick_search(folder):
    """Two trials of a second, in ``run``."""
    return run_cli("search", tiny_study(folder), "--serial", "--dir", folder / "run", "search.num_trials=2", "training.flops=1e8")  # fmt: skip


# -- results ---------------------------------------------------------------------------------------


def test_a_search_without_a_result_says_why_and_exits_with_3(tmp_path, monkeypatch):
    from studies.training.trainer import Trainer

    def fail(self, *args, **kwargs):
        raise IndexError("index out of range in self")

    file = tiny_study(tmp_path)
    run_cli("search", file, "--serial", "--dir", tmp_path / "a", "search.num_trials=1", "training.flops=1e8")
    monkeypatch.setattr(Trainer, "train", fail)
    output = " ".join(
        run_cli("search", file, "--serial", "--dir", tmp_path / "b", "search.num_trials=2", code=3).split()
    )
    assert output.count("failed: error: IndexError: index out of range in self") == 1
    assert "no trial completed: 2 failed, the first, trial 1, with error: IndexError" in output


def test_tokens_without_a_tokenizer_end_well_and_refuse_text(tmp_path):
    folder = tokens(tmp_path / "bin", IDS.astype(np.uint16))
    data = {"kind": "tokens", "path": str(folder), "vocab_size": 300}
    file = tiny_study(
        tmp_path, {"data": {**data, "path": str(folder)}, "space": {"vocab_size": 300}, "baseline": []} | {"budget": {}}
    )
    output = " ".join(
        run_cli(
            "search",
            file,
            "--serial",
            "--dir",
            tmp_path / "run",
            "search.num_trials=2",
            "training.flops=1e8",
            "budget.flops_per_token=10M",
        ).split()
    )
    assert "note: no sample: " in output
    assert "bits per byte is bits per token" in output
    best = tmp_path / "run/best"
    for command in (["eval", best, "--data", text(tmp_path)], ["generate", best]):
        assert "text can't be encoded" in run_cli(*command, code=2)
    scored = json.loads(run_cli("eval", best, "--kind", "tokens", "--data", folder, "--json"))
    assert scored["bits_per_byte"] is None
    assert scored["tokens"] > 100


def test_what_is_shown_last_decides_nothing(tmp_path, monkeypatch):
    from studies.report import page as html_report

    def fail(*args, **kwargs):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(html_report, "write_html", fail)
    output = quick_search(tmp_path)
    assert "note: no ranking: no picture today" in output
    assert (tmp_path / "run/best/manifest.json").is_file()


@pytest.mark.parametrize("spoil", ["shorter", "gone", "another"])
def test_export_takes_the_step_that_the_journal_names(spoil, tmp_path):
    file = tiny_study(tmp_path)
    run_cli("search", file, "--serial", "--dir", tmp_path / "run", "search.num_trials=2")
    attempt = next((tmp_path / "run/trials/00000").iterdir())
    *_, older, newest = sorted(attempt.glob("step-*"))
    if spoil == "shorter":
        os.truncate(newest, 1000)
    elif spoil == "gone":
        newest.unlink()
    else:
        newest.write_bytes(older.read_bytes())
    assert "is missing or damaged" in run_cli("export", tmp_path / "run", "--trial", "0", "-o", tmp_path / "b", code=2)
    assert not (tmp_path / "b").exists()


# -- folders of others -----------------------------------------------------------------------------


def test_a_project_folder_with_a_study_file_of_that_name_is_no_study(tmp_path):
    file = tiny_study(tmp_path).rename(tmp_path / "study.yaml")
    before = file.read_text()
    assert "exists and holds no study" in run_cli("search", file, "--serial", "--dir", tmp_path, code=2)
    assert file.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["study.yaml", "text.txt"]


@pytest.mark.parametrize(
    "name", ["lock", "journal.log", "report.html", "trials", "tracking/tensorboard", "id", "data/corpus.json"]
)
def test_links_out_of_a_study_are_refused(name, tmp_path):
    with study_folder(tmp_path / "run"):
        (tmp_path / "run/tracking").mkdir()
        (tmp_path / "run/data").mkdir()
    (tmp_path / "outside").write_text("0123456789abcdef")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(SpecError, match="is a link"):
        check_place(tmp_path / "run")
    assert (tmp_path / "outside").read_text() == "0123456789abcdef"


def test_a_damaged_sum_is_no_damage_of_the_journal(tmp_path):
    quick_search(tmp_path)
    sums = tmp_path / "run" / SUMS
    whole, journal = sums.read_bytes(), (tmp_path / "run/journal.log").read_bytes()
    for place in range(0, len(whole), 13):
        sums.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert mend(tmp_path / "run") == ""
        assert (tmp_path / "run/journal.log").read_bytes() == journal
    sums.unlink()
    assert mend(tmp_path / "run") == ""


def test_what_is_read_is_bounded_before_it_is_read(tmp_path):
    """Sparse files, references of any length and sequences of any number of entries cost no time and no memory."""
    sparse = tmp_path / "sparse.yaml"
    sparse.touch()
    os.truncate(sparse, 60 << 30)
    long = tmp_path / "long.yaml"
    long.write_text("a: ${b:" + "x " * 100_000 + "}\n")
    uses = [{"level": "word", "offset": i} for i in range(1000)]
    wide = tmp_path / "wide.yaml"
    schedule = {"sequence": {"of": uses, "length": [1, 8], "order": "coarse_to_fine"}}
    wide.write_text(dump_yaml(tiny_data({"levels": {"word": {"chunk": 1001}}, "graph": {"h": {"schedule": schedule}}})))
    for file in (sparse, long, wide):
        start = time.process_time()
        run_cli("check", file, code=2)
        assert time.process_time() - start < 2, file.name


def test_a_small_parquet_file_of_large_texts_takes_little_memory(tmp_path):
    """One text of 1 MB, 20,000 times, dictionary-coded in some kilobytes: 20 GB if read at once."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, type=pyarrow.int32()), pyarrow.array(["abcdefgh" * 131_072])
    )
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "big.parquet")
    assert (tmp_path / "big.parquet").stat().st_size < 2e6
    script = (
        "import resource, sys; from studies.data.settings import TextData; from studies.data.corpus import prepare_corpus\n"
        "data = TextData(kind='parquet', path=sys.argv[1], max_bytes=4_000_000)\n"
        "facts = prepare_corpus(data, sys.argv[2]).facts\n"
        "print(facts.train_tokens + facts.val_tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "big.parquet"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    tokens, peak = map(int, done.stdout.split())
    assert 3_900_000 < tokens <= 5_100_000
    assert peak < 1500
