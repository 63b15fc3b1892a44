"""Running the program in processes of its own, and finding and ending all that they start."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

MARK = "SPIRALFORMER_TEST"


def processes(tmp_path) -> dict[int, str]:
    """Command lines of what this test has started, Ray's processes too, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={tmp_path}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


def kill_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def launch(folder, *arguments, **environment):
    """Python in a process of its own, marked so that whatever it starts can be found."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", MARK: str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=folder, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs tests may have it ignored
    )  # fmt: skip


def search(folder, *overrides):
    """The search command on the tiny study in ``folder``."""
    return launch(folder, "-m", "studies.cli", "search", str(folder / "tiny.yaml"), "--dir", "run", *overrides)


def read_until(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    pytest.fail("".join(lines))


def finish(process):
    output, _ = process.communicate(timeout=200)
    return output


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
