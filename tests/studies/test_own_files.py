"""The product touches only what is its own, and a trial's loss is its own, whatever happened to its files."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers import make_driver, run_cli, tiny_study

from studies.execution.run import run_serial
from studies.records.folder import JOURNAL
from studies.records.journal import mend
from studies.records.reading import open_for_reading

QUICK = ("search.num_trials=3", "training.flops=1e8")


def snapshot(folder, without=()):
    """Kind, content and permissions of everything below a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.join(place, name) not in without]
        for name in (*folders, *files):
            path = os.path.join(place, name)
            kind = os.readlink(path) if os.path.islink(path) else ""
            digest = "" if kind or not os.path.isfile(path) else hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[os.path.relpath(path, folder)] = (kind, digest, os.lstat(path).st_mode)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    file = tiny_study(folder)
    run_cli("search", file, "--serial", "--dir", folder / "run", *QUICK)
    return file, folder / "run"


NAMES = [
    "runs",
    "a::b",
    "memory:",
    "file:",
    "x[/lr]",
    "[bold]",
    "a b",
    "ü☃",
    "-x",
    "..x",
    "%s",
    "{a}",
    "~",
    "'q'",
    "x;y",
    "#",
]
PLACES = ["lock", "study.yaml", "journal.log", "journal.sums", "report.html", "id", "trials", "trials/00000", "trials/00001/attempt-001", "tracking",
          "tracking/tensorboard", "best", "export", "export/trial-0", "data", "data/corpus.json", "best/manifest.json", ".report.html.tmp"]  # fmt: skip
FOREIGN = ["notes.txt", "trials/notes.txt", "trials/00001/notes.txt", "trials/00001/attempt-001/notes.txt", "trials/00001/attempt-009/step-1.safetensors",
           "best/notes.txt", "data/notes.txt", "export/trial-0/notes.txt", ".thesis-1234.tmp", ".x-0123456789abcdeg.tmp"]  # fmt: skip


def commands(file, run, out):
    more = "search.num_trials=4"
    yield "search", file, "--serial", "--dir", run, *QUICK
    yield "search", file, "--serial", "--dir", run, QUICK[1], more, "search.stopper=none"
    yield "search", file, "--serial", "--dir", run, QUICK[1], more
    yield ("report", run)
    yield ("status", run)
    yield ("export", run)
    yield ("export", run, "-o", out)
    yield ("export", run, "--format", "torch", "-o", f"{out}.pt2")
    yield ("predict", run, "--learner", "cost", "--candidates", "8", "-o", f"{out}-p")


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 200))])
def test_nothing_outside_a_study_is_created_changed_or_removed(seed, finished, tmp_path, monkeypatch):
    """Random names and working folders, with links to others' files and foreign files in the study's folder."""
    from typer.testing import CliRunner

    from studies.cli import app

    draw = random.Random(seed)
    file, whole = finished
    world, place = tmp_path / "world", tmp_path / draw.choice(NAMES)
    for folder in (world, place, world / "documents", world / "a"):
        folder.mkdir(exist_ok=True, parents=True)
    for name in ("documents/thesis.txt", "a/thesis.txt", "manifest.json", "keys"):
        (world / name).write_text(f"mine: {name}")
    run = place / draw.choice(NAMES)
    shutil.copytree(whole, run)
    for name in draw.sample(PLACES, draw.randint(0, 3)):
        if (run / name).parent.is_dir():
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(
                world / draw.choice(["documents", "documents/thesis.txt", "manifest.json", "keys", "nowhere"])
            )
    kept = {}
    for name in draw.sample(FOREIGN, 3):
        if not (run / name).exists() and not any(part.is_symlink() for part in (run / name).parents):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("mine")
            kept[name] = "mine"
    monkeypatch.chdir(draw.choice([world / "a", world / "documents", place]))
    before = snapshot(tmp_path, without=(str(run),))
    for command in commands(file, run, place / "out"):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code in (0, 2, 3), (command, result.output, result.exception)
        for made in ("out", "out-p"):
            shutil.rmtree(place / made, ignore_errors=True)
        (place / "out.pt2").unlink(missing_ok=True)
        assert snapshot(tmp_path, without=(str(run),)) == before, command
    assert {name: (run / name).read_text() for name in kept} == kept


def test_the_property_can_fail(finished, tmp_path):
    """The snapshot sees a changed byte, a new file, a lost one and another link."""
    (tmp_path / "x").write_text("a")
    (tmp_path / "l").symlink_to("x")
    before = snapshot(tmp_path)
    for change in (
        lambda: (tmp_path / "x").write_text("b"),
        lambda: (tmp_path / "y").write_text(""),
        lambda: (tmp_path / "l").unlink(),
    ):
        change()
        assert snapshot(tmp_path) != before
        before = snapshot(tmp_path)


class Losses:
    """What each training gives, by architecture, seed and settings; trained once, in a folder of its own."""

    def __init__(self):
        self.known = {}

    def check(self, record, driver, scratch):
        key = (record.arch_id, record.seed, str(sorted(record.training.items())), record.purpose == "promotion")
        if key not in self.known:
            from dataclasses import replace

            from studies.training.run_trial import run_trial

            spec = replace(driver._spec(record), folder=str(scratch / str(len(self.known))), study="another")
            *_, last = run_trial(spec)
            self.known[key] = last.rungs
        assert record.rungs == self.known[key][: len(record.rungs)], record


LOSSES = Losses()


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 100))])
def test_no_trial_reports_a_loss_that_is_not_its_own(part, tmp_path):
    """The journal cut at five random offsets, old `trials/` kept; every other time the sums are lost too, or the settings change."""
    overrides = ("search.num_trials=4", "training.flops=1e8")
    same = {"data": {"path": str(tmp_path / "text.txt")}}
    driver = make_driver(tmp_path, same, *overrides)
    run_serial(driver)
    journal, sums = ((driver.folder / name).read_bytes() for name in (JOURNAL, "journal.sums"))
    draw = random.Random(part)
    for _ in range(5):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(driver.folder, tmp_path / "cut/run")
        cut = tmp_path / "cut/run" / JOURNAL
        cut.write_bytes(journal[: draw.randrange(len(journal))])
        (tmp_path / "cut/run/journal.sums").write_bytes(sums)
        how = draw.choice(["", "sums", "seed", "rate", "journal"])
        if how in ("sums", "journal"):
            (tmp_path / "cut/run/journal.sums").unlink()
        if how in ("seed", "rate", "journal"):
            cut.unlink()
        mend(tmp_path / "cut/run")
        changed = {"seed": ["search.seed=7"], "rate": ["training.lr=1e-3"]}.get(how, [])
        again = make_driver(tmp_path / "cut", same, *overrides, *changed)
        run_serial(again)
        records = open_for_reading(again.folder)
        assert len(records) == 5
        assert all(record.state in ("complete", "stopped") for record in records)
        for record in records:
            LOSSES.check(record, again, tmp_path / "scratch")
