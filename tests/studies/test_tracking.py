"""Trackers say what the journal says, and none of them can stop a search."""

import os
import struct
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import make_driver, run_cli, tiny_study

from searchspace import SpecError
from studies.commands import preflight
from studies.config import load_study
from studies.records.reading import open_for_reading
from studies.report import tracking
from studies.report.tracking import Tracking


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    trackers = "[tensorboard, mlflow]" if find_spec("mlflow") else "tensorboard"
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_cli("search", tiny_study(folder), "--dir", "run", "--serial", f"tracking={trackers}")
    finally:
        os.chdir(before)
    return folder / "run"


def scalars(folder):
    """(tag, step, value) of all event files, read as TensorBoard reads them: length, sum, data, sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in folder.rglob("events.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
    return found


def test_tensorboard_has_every_rung(study):
    records = open_for_reading(study)
    for record in records:
        found = scalars(study / "tracking/tensorboard" / f"{record.purpose}-{record.number:05d}")
        bits = sorted((step, value) for tag, step, value in found if tag == "held_out/bits_per_byte")
        expected = [(int(r.flops / 1e6), r.metrics["bits_per_byte"]) for r in record.rungs]
        assert [step for step, _ in bits] == [step for step, _ in expected]
        assert [value for _, value in bits] == pytest.approx([value for _, value in expected])


def test_tensorboard_has_what_was_decided_and_the_curve(study):
    """The HParams tab reads a session's start, with the hyperparameters, and its metrics by their tags."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for record in open_for_reading(study):
        folder = study / "tracking/tensorboard" / f"{record.purpose}-{record.number:05d}"
        (file,) = folder.glob("*.end")
        data, at, plugin, tags = file.read_bytes(), 0, {}, set()
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            for value in Event.FromString(data[at + 12 : at + 12 + size]).summary.value:
                tags.add(value.tag)
                if value.metadata.plugin_data.plugin_name == "hparams":
                    plugin[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            at += 12 + size + 4
        given = plugin["_hparams_/session_start_info"].session_start_info.hparams
        assert given["params"].number_value == record.cost.params
        assert given["arch_id"].string_value == record.arch_id
        metrics = [info.name.tag for info in plugin["_hparams_/experiment"].experiment.metric_infos]
        assert metrics == ["held_out/bits_per_byte", "held_out/loss"] * bool(record.rungs)
        assert ("train/loss" in tags) == bool(record.curve)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_trial(study):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{study / 'tracking/mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    records = open_for_reading(study)
    assert set(runs) == {f"{r.purpose}-{r.number:05d}" for r in records}
    for record in records:
        run = runs[f"{record.purpose}-{record.number:05d}"]
        assert run.data.metrics["held_out_loss"] == pytest.approx(record.rungs[-1].score)
        assert run.data.params["arch_id"] == record.arch_id
        assert run.data.tags["state"] == record.state
        history = client.get_metric_history(run.info.run_id, "held_out_loss")
        assert len(history) == len(record.rungs)


def test_a_tracker_that_fails_stops_nothing(tmp_path, monkeypatch):
    class Broken(tracking.TensorBoard):
        def rung(self, record, index):
            raise ConnectionError("the server is away")

    monkeypatch.setitem(tracking.TRACKERS._rows, "tensorboard", replace(tracking.TRACKERS["tensorboard"], make=Broken))
    output = run_cli("search", tiny_study(tmp_path), "--dir", tmp_path / "run", "--serial", "search.num_trials=2")
    assert "tensorboard is told nothing more: ConnectionError: the server is away" in " ".join(output.split())
    assert all(record.state != "running" for record in open_for_reading(tmp_path / "run"))


def test_a_missing_package_is_told_before_anything_runs(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    make_driver(tmp_path)
    monkeypatch.setattr(tracking, "import_module", missing)
    study = load_study(tmp_path / "tiny.yaml", ["tracking=wandb"])
    with pytest.raises(SpecError, match="wandb is not installed"):
        Tracking(study, tmp_path)
    with pytest.raises(SpecError, match="tracking"):
        load_study(tmp_path / "tiny.yaml", ["tracking=excel"])


def test_run_based_trackers_get_the_whole_trial(tmp_path, monkeypatch):
    told = []

    class Run:
        def log(self, values):
            told.append(values)

        def finish(self):
            told.append("finished")

    class Library:
        @staticmethod
        def init(**settings):
            told.append(settings)
            return Run()

    monkeypatch.setattr(tracking, "check_trackers", lambda study: None)
    monkeypatch.setattr(preflight, "check_trackers", lambda study: None)
    monkeypatch.setattr(tracking, "import_module", lambda module: Library)
    run_cli(
        "search", tiny_study(tmp_path), "--dir", tmp_path / "run", "--serial", "search.num_trials=1", "tracking=[wandb, trackio]"
    )  # fmt: skip
    records = open_for_reading(tmp_path / "run")
    assert told.count("finished") == 2 * len(records)
    logged = [values["held_out_loss"] for values in told if isinstance(values, dict) and "held_out_loss" in values]
    assert sorted(logged) == sorted([rung.score for record in records for rung in record.rungs] * 2)
    assert {settings["project"] for settings in told if isinstance(settings, dict) and "project" in settings} == {
        "tiny"
    }
