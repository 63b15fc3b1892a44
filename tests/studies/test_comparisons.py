"""A comparison says what it compares: the terminal's ranking, the report and what is said before a search."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import end_all, make_driver, run_cli, tiny_study

from studies.commands.preflight import look_at_data, preflight
from studies.config import load_study
from studies.data.corpus import Corpus, prepare_corpus
from studies.data.settings import TextData
from studies.records.trial import Report, Rung
from studies.report.page import write_html
from studies.report.ranking import best_of, notes, ranking_table, rest_of_front
from studies.show.summary import labels
from studies.show.terminal import TerminalConsole

POOLS = {
    "space": {
        "d_model": {"choice": [16, 32]},
        "levels": {"word": {"pool": {"choice": ["mean", "last"]}}},
        "graph": {"h": {"schedule": ["word", "token"], "topology": {"choice": ["residual", "anchor"]}}},
    },
    "budget": {"flops_per_token": None},
}


def shown(table):
    console = TerminalConsole(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def corpus_of(driver):
    return Corpus(driver.corpus)


def test_labels_that_read_alike_name_what_differs(tmp_path):
    space = load_study(tiny_study(tmp_path, POOLS)).space
    candidates = [(candidate.arch, candidate.choices) for candidate in space.enumerate()]
    found = labels(candidates)
    assert len(candidates) == 8
    assert len(set(found)) == 8
    assert all("word.pool" in label and "d_model" in label for label in found)
    assert labels(candidates[:1]) == [labels(candidates[:1])[0].partition(";")[0]]  # alone, nothing need be told
    narrow = [(arch, choices) for arch, choices in candidates if choices["d_model"] == 16]
    assert not any("d_model" in label for label in labels(narrow))


def test_objectives_have_columns_and_the_front_its_marks(tmp_path):
    names = ("loss", "decode_flops_per_token", "kv_cache_bytes_per_token")
    over = {**POOLS, "objectives": list(names)}
    driver = end_all(make_driver(tmp_path, over, "search.num_trials=8", "search.stopper=none", "search.sampler=random"))
    text = shown(ranking_table(driver.records, corpus_of(driver), objectives=driver.study.objectives))
    assert "decode" in text
    assert "KV" in text
    assert re.search(r"\d\*", text)
    page = write_html(driver.records, driver.study, corpus_of(driver), tmp_path / "report.html").read_text()
    assert "<th>decode FLOPs/tok</th><th>KV bytes/tok</th>" in page
    assert re.search(r"<td>\d\*</td>", page)
    assert "on the front of bits_per_byte, decode_flops_per_token, kv_cache_bytes_per_token" in page
    buttons = re.search(r'"buttons": \[(.*?)\]\}\]', page)[1]
    assert re.findall(r'"label": "([^"]*)"', buttons)[0] == "decode FLOPs"
    marked = {int(number) for number in re.findall(r"(\d+)\*", text)}
    exported = best_of(driver.records).number
    told = rest_of_front(driver.records, driver.study.objectives, exported, Corpus(driver.corpus))
    assert {int(number) for number in re.findall(r"(\d+) \(", told)} == marked - {exported}
    assert rest_of_front(driver.records, driver.study.objectives[:1], exported, Corpus(driver.corpus)) == ""


def test_tokens_and_steps_stand_beside_every_loss(tmp_path):
    driver = make_driver(tmp_path, POOLS, "search.num_trials=4", "search.stopper=none")
    tokens = 20_000
    while (spec := driver.next_trial()) is not None:
        tokens *= 3
        rung = Rung(flops=4e8, tokens=tokens, score=3.0 - tokens / 1e7)
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,), steps=tokens // 6000))
    text = shown(ranking_table(driver.records, corpus_of(driver)))
    assert "4.86M" in text
    said = " ".join(notes(driver.records, corpus_of(driver), driven=False))
    assert "saw 81.0 times the data that the baseline saw (4.86M against 60K tokens)" in said
    assert "took 10 to 810 steps" in said
    assert "the baseline 10" in said
    page = write_html(driver.records, driver.study, corpus_of(driver), tmp_path / "report.html").read_text()
    assert "<td>4.86M</td><td>810</td>" in page


@pytest.mark.parametrize(
    ("over", "note"),
    [
        ({"training": {"flops": 4e8}}, "steps, the first rung after"),
        ({"space": {"seq_len": 48}}, "contexts differ"),
    ],
)
def test_what_makes_a_comparison_weak_is_said_before_it_runs(over, note, tmp_path):
    study = load_study(tiny_study(tmp_path, over))
    assert note in " ".join(preflight(study, look_at_data(study)).notes)
    assert note in " ".join(run_cli("check", tmp_path / "tiny.yaml").split())


def test_enough_steps_are_no_note(tmp_path):
    study = load_study(tiny_study(tmp_path, {"training": {"flops": 1e11}}))
    found = preflight(study, look_at_data(study))
    assert found.steps[0] >= 50
    assert not any("steps" in note for note in found.notes)


def test_a_dry_run_evaluates_no_more_than_is_held_out(tmp_path):
    file = tiny_study(tmp_path)
    usual, greedy = (
        run_cli("search", file, "--dry-run", "--dir", tmp_path / "run", f"training.eval_tokens={n}")
        for n in (480, 10**9)
    )
    assert "are held out" in greedy
    assert "are held out" not in usual
    assert re.search(r"about [\d.]+ s, at most", greedy)  # not hours
    assert re.search(r"steps: \d+ to \d+ a trial", greedy)


def test_one_word_for_a_trial_that_nobody_drives(tmp_path):
    driver = make_driver(tmp_path, None, "search.num_trials=3")
    (driver.folder / "study.yaml").write_text(driver.study.to_yaml())
    driver.next_trial()
    for command in ("status", "report"):
        output = run_cli(command, driver.folder)
        assert "1 interrupted" in output
        assert "running" not in output.replace("nobody", "")
    page = (driver.folder / "report.html").read_text()
    assert "1 interrupted" in page
    assert "1 running" in " ".join(notes(driver.records, corpus_of(driver), driven=True))


def test_a_table_without_results_says_so(tmp_path):
    driver = make_driver(tmp_path)
    driver.next_trial()
    assert "No results yet." in shown(ranking_table(driver.records, corpus_of(driver)))


def test_table_and_sentence_round_alike(tmp_path):
    """Gaps are differences of what is shown, in every place."""
    driver = end_all(make_driver(tmp_path, POOLS, "search.num_trials=2", "search.stopper=none"))
    base, best = (next(r for r in driver.records if r.purpose == purpose) for purpose in ("baseline", "search"))
    again = [
        replace(record, number=90 + i, purpose="promotion", rungs=(replace(record.rungs[-1], score=loss),))
        for i, (record, loss) in enumerate(((base, 3.0004 * 0.6931), (best, 2.5006 * 0.6931)))
    ]
    from studies.report.ranking import promotion_table

    text = shown(promotion_table([*driver.records, *again], corpus_of(driver)))
    gap = re.search(r"-(0\.\d{3})", text)[1]
    assert f"is {gap} bits/byte better" in " ".join(notes([*driver.records, *again], corpus_of(driver), driven=False))


def test_an_export_names_one_place(tmp_path):
    run_cli("search", tiny_study(tmp_path), "--dir", tmp_path / "run", "--serial", "search.num_trials=1")
    output = " ".join(run_cli("export", tmp_path / "run", "--format", "torch", "-o", tmp_path / "m.pt2").split())
    assert output.count("exported") == 1
    assert not (tmp_path / "run" / "export").exists()
    assert Path(tmp_path / "m.pt2").is_file()


def test_a_limit_on_the_data_says_what_it_leaves_out(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("some text, again and again\n" * 400)
    config = TextData(kind="text", path=str(tmp_path / "*.txt"), max_bytes=25_000)
    facts = prepare_corpus(config, tmp_path / "part").facts
    assert facts.notes == ("data.max_bytes takes the first 3 of 6 files, by name",)
    assert not prepare_corpus(replace(config, max_bytes=10**9), tmp_path / "whole").facts.notes
