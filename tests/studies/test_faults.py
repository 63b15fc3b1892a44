"""What goes wrong, and what must not be lost by it (in one process; `test_ray.py` and `test_chaos.py` kill real ones)."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from helpers import end_all, make_driver, tiny_study

from searchspace import SpecError
from studies.config import load_study
from studies.data.corpus import Corpus
from studies.execution.run import run_serial
from studies.records.folder import JOURNAL, SUMS
from studies.records.journal import Journal, mend
from studies.records.reading import FORMAT_KEY, open_for_reading
from studies.records.resume import check_settings, keep_settings
from studies.records.trial import Report, Rung
from studies.report.finalists import promotions
from studies.report.ranking import best_of, front, notes, promotion_table
from studies.training.run_trial import _memory_asked, reason_of, run_trial

OK = (Rung(flops=0.5, tokens=1, score=2.0), Rung(flops=1.0, tokens=1, score=1.0))


def failed(reason="error", error="ValueError: no"):
    return Report(kind="failed", attempt=1, reason=reason, error=error)


def test_many_failures_in_a_row_halt_the_study_and_it_can_go_on(tmp_path):
    driver = make_driver(tmp_path, None, "search.num_trials=9", "search.max_failures=3")
    for _ in range(3):
        driver.report(driver.next_trial().number, failed())
    assert driver.halted == "3 trials in a row failed, the last with: ValueError: no"
    assert driver.next_trial() is None
    assert driver.finished
    again = end_all(make_driver(tmp_path, None, "search.num_trials=9", "search.max_failures=3"))
    assert not again.halted
    assert [r.state for r in again.records] == ["failed"] * 3 + ["complete"] * 7


def test_failures_between_successes_halt_nothing(tmp_path):
    driver = make_driver(tmp_path, None, "search.num_trials=8", "search.max_failures=2")
    while (spec := driver.next_trial()) is not None:
        driver.report(spec.number, failed() if spec.number % 2 else Report(kind="done", attempt=1, rungs=OK))
    assert not driver.halted
    assert len(driver.records) == 9


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rung", [0, 1])
def test_a_loss_that_is_no_number_is_a_failure_and_moves_no_cut_off(loss, rung, tmp_path):
    driver = make_driver(tmp_path)
    spec = driver.next_trial()
    bad = Rung(flops=1.0, tokens=1, score=loss)
    rungs = (bad,) if rung == 0 else (OK[0], bad)
    assert not driver.report(spec.number, Report(kind="rung" if rung == 0 else "done", attempt=1, rungs=rungs))
    record = driver.record(spec.number)
    assert (record.state, record.reason, record.score) == ("failed", "diverged", None)
    assert len(record.rungs) == 0
    assert driver.progress().best is None
    assert open_for_reading(driver.folder)[0] == record


def test_memory_that_was_asked_for_is_told():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.float32)
    assert reason_of(caught.value) == "out_of_memory"
    assert _memory_asked(caught.value) == 2.0**22
    fake = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79.1 GiB")
    assert _memory_asked(fake) == 2.5
    assert reason_of(MemoryError()) == "out_of_memory"
    assert _memory_asked(MemoryError()) == 0.0


def test_the_sampler_is_told_how_much_was_asked(tmp_path):
    driver = make_driver(tmp_path)
    driver.report(driver.next_trial().number, Report(kind="failed", attempt=1, reason="out_of_memory", memory_gib=2.5))
    (trial,) = driver.journal.studies["baseline"].get_trials()
    assert trial.constraints["memory"] == 2.5


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, monkeypatch):
    """Every write of journal and checkpoints fails once, as a full disk does; going on ends as if it never had."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "full").mkdir()
    overrides = ("search.num_trials=2", "training.flops=1e8")
    whole = make_driver(tmp_path / "whole", None, *overrides)
    run_serial(whole)

    make_driver(tmp_path / "full", None, *overrides)  # the data
    fsync, calls, fail_at = os.fsync, 0, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    halts = 0
    folder = tmp_path / "full" / "run"
    for _ in range(200):
        calls, fail_at = 0, 4 + 3 * halts
        if folder.is_dir():
            mend(folder)
        driver = make_driver(tmp_path / "full", None, *overrides)
        run_serial(driver)
        if not driver.halted:
            break
        assert "full" in driver.halted
        halts += 1
    assert halts >= 3
    strip = [(r.number, r.state, r.arch_id, r.rungs, r.reason) for r in whole.records]
    assert [(r.number, r.state, r.arch_id, r.rungs, r.reason) for r in driver.records] == strip


def test_a_flipped_bit_in_the_journal_is_found_and_placed(tmp_path):
    driver = end_all(make_driver(tmp_path))
    path = driver.folder / JOURNAL
    data, sums = path.read_bytes(), (driver.folder / SUMS).read_bytes()
    assert mend(driver.folder) == ""
    for place in range(10, len(data), max(1, len(data) // 97)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        damage = look(driver.folder)
        last_line = data.rstrip(b"\n").rfind(b"\n") < place
        if last_line and damage.startswith("cut "):  # it is no JSON any more, as if it were torn
            path.write_bytes(data)
            (driver.folder / SUMS).write_bytes(sums)
            continue
        low, high = (int(word) for word in damage.partition(":")[0].removeprefix("bytes ").split(" to "))
        assert low <= place < high
        assert path.stat().st_size == len(data)  # untouched


def look(folder):
    """What `mend` says, whether it mends or refuses."""
    try:
        return mend(folder)
    except SpecError as error:
        return f"{error.path}: {error.remedy}"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.99])
def test_a_journal_cut_short_says_so_and_goes_on(keep, tmp_path):
    driver = end_all(make_driver(tmp_path))
    path = driver.folder / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert ("lost what was written after" if keep < 0.9 else "torn bytes") in mend(driver.folder)
    assert mend(driver.folder) == ""
    again = end_all(make_driver(tmp_path))
    assert [r.arch_id for r in again.records] == [r.arch_id for r in driver.records]
    (driver.folder / SUMS).unlink()
    assert mend(driver.folder) == ""
    assert len(Journal(driver.folder).launched()) == len(driver.records)


def test_promotion_trains_the_best_again_with_other_seeds(tmp_path):
    promote = "search.promote={trials: 2, seeds: 3, factor: 2}"
    driver = make_driver(tmp_path, None, promote, "search.num_trials=5", "search.stopper=none")
    losses = {}

    def loss(record):
        losses[record.number] = record.cost.params * 1e-3 + 0.01 * record.seed
        return losses[record.number]

    end_all(driver, loss)
    promoted = [r for r in driver.records if r.purpose == "promotion"]
    assert len(promoted) == (2 + 1) * 3
    assert {r.seed for r in promoted} == {1, 2, 3}
    assert {r.training["flops"] for r in promoted} == {8e8}
    searched = sorted((r for r in driver.records if r.purpose == "search"), key=lambda r: r.score)
    assert {r.arch_id for r in promoted} == {r.arch_id for r in [*searched[:2], driver.record(0)]}
    first = promotions(driver.records)[0]
    assert first.spread == pytest.approx(0.01)
    best = best_of(driver.records)
    assert best.purpose == "promotion"
    assert best.seed == 1
    assert any(
        "Trained again with 3 other seeds" in line
        for line in notes(driver.records, Corpus(driver.corpus), driven=False)
    )
    assert promotion_table(driver.records, Corpus(driver.corpus)).row_count == 3
    again = make_driver(tmp_path, None, promote, "search.num_trials=5", "search.stopper=none")
    assert again.finished
    assert again.next_trial() is None


def test_nothing_is_promoted_while_the_search_still_runs(tmp_path):
    driver = make_driver(tmp_path, None, "search.promote=1", "search.num_trials=1", "search.stopper=none")
    specs = [driver.next_trial(), driver.next_trial()]
    assert driver.next_trial() is None
    assert not driver.finished
    for spec in specs:
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=OK[1:]))
    assert driver.next_trial().seed == 1


def test_the_front_holds_what_no_other_beats(tmp_path):
    driver = end_all(
        make_driver(tmp_path, {"budget": {}}, "search.num_trials=12", "objectives=[loss, flops_per_token]")
    )
    found = front(driver.records, driver.study.objectives)
    points = {r.number: (r.score, r.cost.flops_per_token) for r in driver.records if r.state == "complete"}
    for number, (loss, flops) in points.items():
        beaten = any((a <= loss and b < flops) or (a < loss and b <= flops) for a, b in points.values())
        assert (number in {r.number for r in found}) == (not beaten)
    assert found


def test_a_damaged_journal_is_no_traceback_for_readers(tmp_path):
    driver = end_all(make_driver(tmp_path))
    path = driver.folder / JOURNAL
    data = path.read_bytes()
    middle = data.rindex(b'"launch"')
    path.write_bytes(data[:middle] + b"\x00{" + data[middle + 2 :])
    with pytest.raises(SpecError, match="is damaged"):
        open_for_reading(driver.folder)


@pytest.mark.parametrize("found", [{"format": 99, "version": "spiralformer 9.9"}, {}, "2"])
def test_a_journal_of_another_version_says_so(tmp_path, found):
    driver = end_all(make_driver(tmp_path))
    path = driver.folder / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if f'"{FORMAT_KEY}"' in line)
    lines[at] = json.dumps({**json.loads(lines[at]), "user_attr": {FORMAT_KEY: found}}, separators=(",", ":")) + "\n"
    path.write_text("".join(lines))
    (driver.folder / SUMS).unlink()
    for read in (open_for_reading, Journal):
        with pytest.raises(SpecError, match=r"was written by .*; this version reads format"):
            read(driver.folder)


@pytest.mark.parametrize("result", [None, [], 0, {"tokens": 1}])
def test_a_result_that_is_none_is_said_so(tmp_path, result):
    driver = end_all(make_driver(tmp_path))
    path = driver.folder / JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"result"' in line)
    lines[at] = json.dumps({**json.loads(lines[at]), "user_attr": {"result": result}}, separators=(",", ":")) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(SpecError, match="result"):
        open_for_reading(driver.folder)


def test_a_study_that_never_launched_leaves_its_folder_free(tmp_path):
    """What was refused before anything ran must not stand in the way of what corrects it."""
    first = make_driver(tmp_path)
    keep_settings(first.study, first.folder)
    other = load_study(tiny_study(tmp_path), ["training.lr=0.02"])
    check_settings(other, first.folder)
    keep_settings(other, first.folder)
    assert not (first.folder / JOURNAL).exists()
    driver = make_driver(tmp_path, None, "training.lr=0.02")
    driver.next_trial()
    keep_settings(driver.study, driver.folder)
    assert (driver.folder / JOURNAL).exists()
    with pytest.raises(SpecError, match=r"training\.lr"):
        check_settings(first.study, first.folder)


def test_a_trial_that_is_stopped_at_every_report_gets_to_its_end(tmp_path):
    """As a time budget does that is shorter than the trial: the last steps before a rung count, too."""
    spec = replace(make_driver(tmp_path).next_trial(), until=0.0)
    seen = []
    for _ in range(10):
        for report in run_trial(spec):
            seen.append(report.kind)
            if report.kind == "progress":
                break
        if seen[-1] == "done":
            break
    assert seen[-1] == "done", seen
