"""Drivers and workers killed at random times. A short version by default; `make chaos` runs it in full.

CHAOS_RUNS sets how many random runs there are of each kind, of three kills each; by default one, of one kill.
"""

import os
import random
import re
import signal
import time
from functools import cache

import pytest
from helpers import tiny_study
from processes import finish, kill_all, launch, processes, read_until, search

from studies.records.journal import mend
from studies.records.reading import open_for_reading

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
KILLS = 3 if RUNS > 1 else 1
SETTINGS = {"search": {"num_trials": 5}, "training": {"flops": 3e9}}
long = pytest.mark.skipif(RUNS < 2, reason="make chaos")


def fake(folder, name, *overrides, **environment):
    arguments = [str(folder / "tiny.yaml"), "run", name, *overrides]
    return launch(folder, "-c", f"import fakes; fakes.main(*{arguments!r})", **environment)


def content(folder):
    """What must not depend on kills: everything but times."""
    return [
        (r.number, r.purpose, r.state, r.arch_id, r.training, r.seed, r.rungs, r.reason)
        for r in open_for_reading(folder / "run")
    ]


def kill_and_restart(folder, arguments, draw):
    """Kill the driver with all its children again and again at random moments, then let it finish.

    Returns the number of trials that were running at a kill: what may have been done twice.
    """
    at_risk, finished = 0, []
    for _ in range(KILLS):
        process = search(folder, *arguments)
        read_until(process, r"starting workers|baseline +0 |going on|candidates")
        time.sleep(draw.uniform(0.0, 8.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if (folder / "run/journal.log").is_file():
            mend(folder / "run")
            records = open_for_reading(folder / "run")
            finished += [record for record in records if record.state != "running"]
            at_risk += sum(record.state == "running" for record in records)
    process = search(folder, *arguments)
    output = finish(process)
    assert process.returncode == 0, output
    after = {record.number: record for record in open_for_reading(folder / "run")}
    for record in finished:
        assert after[record.number] == record  # nothing finished is lost or changed
    return at_risk


def redone(folder):
    """Attempts beyond the first, of trials whose weights are kept."""
    return sum(int(path.name.rpartition("-")[2]) - 1 for path in folder.glob("run/trials/*/attempt-*"))


@pytest.fixture
def study(tmp_path, text):
    tiny_study(tmp_path, {**SETTINGS, "data": {"path": text}})
    yield tmp_path
    kill_all(processes(tmp_path))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """One text for all studies here, as its path is part of what they are."""
    folder = tmp_path_factory.mktemp("text")
    tiny_study(folder)
    return str(folder / "text.txt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, text):
    """What the same settings give when nothing is killed."""

    @cache
    def run(*arguments):
        folder = tmp_path_factory.mktemp("unbroken")
        tiny_study(folder, {**SETTINGS, "data": {"path": text}})
        finish(search(folder, "--serial", *arguments))
        return content(folder)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_serial_study_that_is_killed_is_the_unbroken_one(seed, study, unbroken):
    """One worker and one seed: the same trials in the same order, TPE, ASHA and all."""
    at_risk = kill_and_restart(study, ["--serial"], random.Random(seed))
    assert content(study) == unbroken()
    assert redone(study) <= min(at_risk, KILLS)


@long
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_study_on_ray_that_is_killed_loses_nothing(seed, study, unbroken):
    """Two workers: the same set of trials, each trained once but for what ran at a kill."""
    arguments = ["search.sampler=random", "search.stopper=none"]
    at_risk = kill_and_restart(study, arguments, random.Random(1000 + seed))
    records = open_for_reading(study / "run")
    assert [record.state for record in records] == ["complete"] * 6
    assert len({record.arch_id for record in records}) == 6
    assert redone(study) <= min(at_risk, 2 * KILLS)
    assert content(study) == unbroken(*arguments)


@pytest.mark.slow
def test_a_hung_trial_is_ended_and_its_worker_replaced(study):
    begin = time.monotonic()
    process = fake(study, "hang", "resources.trial_timeout_s=4", "search.stopper=none", "search.sampler=random")
    output = finish(process)
    assert process.returncode == 0, output
    records = open_for_reading(study / "run")
    assert [r.state for r in records] == ["complete", "failed", *["complete"] * 4]
    assert records[1].reason == "hung"
    assert "fakes.py" in records[1].error  # where it hung
    assert time.monotonic() - begin < 120


@long
def test_errors_are_not_tried_again(study):
    process = fake(study, "raise_often", "search.num_trials=12", "search.sampler=random", "search.stopper=none")
    output = finish(process)
    assert process.returncode == 0, output
    records = open_for_reading(study / "run")
    failed = [r.number for r in records if r.state == "failed"]
    assert failed == [n for n in range(1, 13) if random.Random(n).random() < 0.2]
    assert failed
    assert {r.error for r in records if r.number in failed} == {"ValueError: as it had to come"}
    tries = (study / "run/tries").read_text().split()
    assert sorted(map(int, tries)) == list(range(13))


@long
def test_every_worker_killed_once(study):
    """All trials finish, and none begins again from scratch."""
    settings = ["training.flops=2e10", "training.checkpoint_every_s=1", "search.num_trials=2", "search.stopper=none"]
    process = search(study, *settings, "resources.max_concurrent=1")
    read_until(process, "starting workers")
    for number in range(3):
        deadline = time.monotonic() + 150
        attempt = study / f"run/trials/{number:05d}/attempt-001"
        while not list(attempt.glob("step-*.safetensors")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        at_kill = max(int(path.stem.rpartition("-")[2]) for path in attempt.glob("step-*.safetensors"))
        workers = [pid for pid, command in processes(study).items() if re.search(r"ray::\w+\.train", command)]
        assert workers
        kill_all(workers)
        second = attempt.with_name("attempt-002")
        while not (found := sorted(second.glob("step-*.safetensors"))):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert int(found[0].stem.rpartition("-")[2]) >= at_kill
    output = finish(process)
    assert process.returncode == 0, output
    assert [record.state for record in open_for_reading(study / "run")] == ["complete"] * 3


@long
def test_sigterm_leaves_no_process_behind(study):
    process = search(study)
    read_until(process, r"baseline +0 ")
    os.kill(process.pid, signal.SIGTERM)
    finish(process)
    assert process.returncode == 143
    time.sleep(10)
    assert processes(study) == {}


@long
def test_two_nodes_of_which_one_is_lost(study):
    """A cluster of two Ray nodes on this machine; the second dies in mid-run."""
    cluster = launch(
        study,
        "-c",
        "import time, studies.execution.on_ray\n"
        "from ray.cluster_utils import Cluster\n"
        "c = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "second = c.add_node(num_cpus=1)\n"
        "print('cluster at', c.address, flush=True)\n"
        "time.sleep(600)\n",
    )
    try:
        found = re.search(r"(?m)^cluster at (\S+)$", read_until(cluster, r"^cluster at \S+$"))
        process = fake(
            study, "slow", "training.flops=6e9", "search.num_trials=5", "search.stopper=none", CLUSTER=found[1]
        )
        read_until(process, r"ended 0 ")
        raylets = sorted(pid for pid, command in processes(study).items() if "raylet/raylet" in command)
        assert len(raylets) == 2
        deadline = time.monotonic() + 60
        while sum(record.state == "running" for record in open_for_reading(study / "run")) < 2:  # each has one CPU
            assert time.monotonic() < deadline
            time.sleep(0.1)
        kill_all(raylets[1:])
        output = finish(process)
    finally:
        cluster.kill()
        cluster.communicate()
    assert process.returncode == 0, output
    assert [record.state for record in open_for_reading(study / "run")] == ["complete"] * 6
