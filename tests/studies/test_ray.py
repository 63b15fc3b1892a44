"""The same studies through Ray: real workers, killed drivers, killed workers, interrupts."""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import make_driver, tiny_study
from processes import finish, kill, kill_all, launch, processes, read_until, search

from studies.records.reading import open_for_reading


@pytest.fixture
def study(tmp_path):
    tiny_study(tmp_path, {"search": {"num_trials": 6}, "training": {"flops": 1e9}})
    yield tmp_path
    kill_all(processes(tmp_path))


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listening(pids) -> set[str]:
    """Local addresses on which these processes listen, from /proc."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


def listens_on_loopback_only_and_asks_for_a_token(study):
    found = processes(study)
    addresses = listening(found)
    # Not the workers': their titles are written over the place where the environment stands.
    servers = [pid for pid, command in found.items() if "gcs_server" in command or "/raylet " in command]
    environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in servers]
    assert addresses
    assert addresses <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}, addresses
    assert environments
    assert all(b"RAY_AUTH_MODE=token\0" in text for text in environments)
    assert not list(study.glob(".ray/*"))  # the token stands in no file


def test_ray_starts_where_people_work_and_a_killed_worker_resumes_its_trial(study):
    """A scratch folder of a batch job, a cluster's address in the environment, files named as our packages."""
    scratch = study / "slurm_jobdir" / "1234567" / "tmp.node0016"
    scratch.mkdir(parents=True)
    assert len(str(scratch)) > 60
    for name in ("studies", "builder", "torch"):
        (study / f"{name}.py").write_text("raise SystemExit('this is not the package')\n")
    script = str(Path(sys.executable).with_name("spiralformer"))  # `python -m` would itself look in the folder first
    overrides = ("training.flops=1e10", "training.checkpoint_every_s=1", "search.num_trials=1", "search.stopper=none")
    elsewhere = {"TMPDIR": str(scratch), "RAY_ADDRESS": "127.0.0.1:6399", "HOME": str(study)}
    process = launch(study, script, "search", "tiny.yaml", "--dir", "run", *overrides, **elsewhere)
    read_until(process, "starting workers")
    wait_for(lambda: list(study.glob("run/trials/00000/attempt-001/step-*.safetensors")))
    listens_on_loopback_only_and_asks_for_a_token(study)

    workers = [pid for pid, command in processes(study).items() if re.search(r"ray::\w+\.train", command)]
    assert workers
    kill_all(workers)
    output = finish(process)
    assert process.returncode == 0, output
    assert [record.state for record in open_for_reading(study / "run")] == ["complete"] * 2
    assert (study / "run/trials/00000/attempt-002").is_dir()
    assert not list(scratch.glob("spiralformer-ray-*"))


def test_search_survives_sigkill_and_interrupt_of_the_driver(study):
    def ended():
        return [record for record in open_for_reading(study / "run") if record.state != "running"]

    process = search(study)
    read_until(process, r"baseline +0 ")
    read_until(process, r"trial +\d+ ")
    kill(process)
    before = ended()
    assert before

    process = search(study)
    read_until(process, r"trial +\d+ ")
    os.kill(process.pid, signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    interrupted = ended()
    assert interrupted[: len(before)] == before

    process = search(study)
    output = finish(process)
    assert process.returncode == 0, output
    assert "going on" in output
    assert "At equal training FLOPs" in output
    after = open_for_reading(study / "run")
    assert [after[record.number] for record in interrupted] == interrupted
    assert len(after) == 7
    assert not any(record.state == "running" for record in after)
    assert len({record.arch_id for record in after}) == 7
    assert (study / "run/best/model.safetensors").is_file()

    process = search(study)  # nothing is left to do: no workers, the same ranking
    again = finish(process)
    assert process.returncode == 0, again
    assert "starting workers" not in again
    assert open_for_reading(study / "run") == after


@pytest.mark.slow
def test_sigterm_leaves_with_its_code(study):
    process = search(study)
    read_until(process, r"baseline +0 ")
    os.kill(process.pid, signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 143, output
    assert any(record.state == "complete" for record in open_for_reading(study / "run"))


def test_resources_no_machine_has_are_refused(study):
    process = search(study, "resources.cpus_per_trial=999")
    output = finish(process)
    assert process.returncode == 2, output
    assert "asks for 999, this machine has" in output


def test_a_cluster_that_lost_its_workers_halts_the_study(tmp_path, monkeypatch):
    """A machine that slept: Ray gives up; what is journaled stays."""
    from studies.execution import on_ray
    from studies.training.run_trial import run_trial

    class Asleep:
        def __init__(self, *args, **kwargs):
            pass

        def fit(self):
            raise on_ray.ray.exceptions.ActorUnavailableError("keepalive watchdog timeout\nmore", b"\0" * 16)

    driver = make_driver(tmp_path)
    monkeypatch.setattr(on_ray, "_init", lambda *args: None)
    monkeypatch.setattr(on_ray, "_check_resources", lambda resources: None)
    monkeypatch.setattr(on_ray.tune, "Tuner", Asleep)
    on_ray.run_ray(driver, lambda: None, address=None, run=run_trial)
    assert "Ray has lost a worker and gave up" in driver.halted
    assert "more" not in driver.halted
    assert driver.finished
