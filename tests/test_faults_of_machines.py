"""No command ends in a traceback, whatever the machine does to it: one message, a documented exit code."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, built, run_cli, tiny_arch, tiny_study

from builder import save_bundle

CODES = {0, 2, 3}
PLUGIN = """
from searchspace import Plugin
from studies import AddedMetric


def likeliest(logits, targets):
    asked = targets != -100
    return ((logits.argmax(-1) == targets) & asked).sum() / asked.sum()


PLUGIN = Plugin(name="words", version="1", api=1, rows=(AddedMetric("likeliest", "likeliest", "share", "higher", "text_lm", likeliest),))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study, a bundle, text, a checkpoint of others, and where to write."""
    folder = tmp_path_factory.mktemp("world")
    file = tiny_study(folder)
    run_cli(
        "search",
        file,
        "--serial",
        "--dir",
        folder / "run",
        "search.num_trials=8",
        "training.flops=1e8",
        "search.stopper=none",
    )
    rows = [
        f"{name},{n},{60 * n},{1.2 + 20 * n**-0.3 + gap}"
        for n in (1e4, 3e4, 1e5)
        for name, gap in (("a", 0), ("b", 0.01))
    ]
    (folder / "ladder.csv").write_text("\n".join(["candidate,size,tokens,loss", *rows]) + "\n")
    over = {"vocab_size": 256}
    save_bundle(folder / "bundle", tiny_arch(over), built(over))
    (folder / "words.py").write_text(PLUGIN)
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text('{"model_type": "llama"}')
    return folder


def commands(world, out):
    """Every command of the command line: what it reads, and what it writes."""
    run, bundle, text = world / "run", world / "bundle", world / "text.txt"
    return {
        "list": ["list"],
        "keys": ["keys"],
        "schema": ["schema", "space"],
        "describe": ["describe", "spiralformer_small"],
        "cost": ["cost", "plain_4"],
        "draw": ["draw", "spiralformer_small"],
        "draw -o": ["draw", "spiralformer_small", "-o", out / "x.svg"],
        "check": ["check", world / "tiny.yaml"],
        "count": ["count", "quickstart"],
        "sample": ["sample", "quickstart"],
        "train": ["train", "plain_4", "training.flops=2e9", "training.batch_tokens=512", "--study", world / "tiny.yaml", "-o", out / "t"],
        "search": ["search", world / "tiny.yaml", "--serial", "--dir", out / "run", "search.num_trials=1", "training.flops=1e8"],
        "search again": ["search", world / "tiny.yaml", "--serial", "--dir", run, "search.num_trials=8", "training.flops=1e8", "search.stopper=none"],
        "dry run": ["search", world / "tiny.yaml", "--dry-run"],
        "status": ["status", run],
        "status --json": ["status", run, "--json"],
        "report --csv": ["report", run, "--csv", out / "all.csv"],
        "compare": ["compare", run, run],
        "status --watch": ["status", run, "--watch"],
        "report": ["report", run],
        "report --watch": ["report", run, "--watch"],
        "export": ["export", run, "-o", out / "b"],
        "verify": ["verify", "--plugin", world / "words.py"],
        "export hf": ["export", bundle, "--format", "hf", "-o", out / "h"],
        "export torch": ["export", bundle, "--format", "torch", "-o", out / "p.pt2"],
        "predict": ["predict", run, "--learner", "cost", "--candidates", "8", "-o", out / "y"],
        "predict --save": ["predict", run, "--learner", "cost", "--candidates", "8", "--save", out / "s"],
        "eval": ["eval", bundle, "--data", text],
        "probe": ["probe", bundle, "--data", text, "--tokens", "480", "-o", out / "probe"],
        "coordinates": ["coordinates", "three_layers", "seq_len=16", "--widths", "8,16", "--seeds", "1"],
        "scale": ["scale", world / "ladder.csv"],
        "tokenize": ["tokenize", text, "-o", out / "k"],
        "import-hf": ["import-hf", world / "hf", "-o", out / "i"],
        "generate": ["generate", bundle, "-n", "5"],
    }  # fmt: skip


NAMES = list(commands(Path("w"), Path("o")))
WRITE = [
    "draw -o",
    "train",
    "search",
    "search again",
    "report",
    "report --csv",
    "export",
    "export hf",
    "export torch",
    "predict",
    "predict --save",
    "probe",
    "tokenize",
]


def test_every_command_is_here():
    from typer.main import get_command

    from studies.cli import app

    known = set(get_command(app).commands)
    assert known == {name.split()[0] for name in NAMES if name != "dry run"}


def invoke(command):
    from typer.testing import CliRunner

    from studies.cli import app

    result = CliRunner().invoke(app, [str(part) for part in command])
    told = result.exception is None or isinstance(result.exception, SystemExit)
    assert told, (command, result.exception, result.output)
    assert "Traceback" not in result.stdout
    return result


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.EIO, 2)]
)
def test_folders_that_can_not_be_written(name, number, code, world, tmp_path, monkeypatch):
    """The fault is injected where files are opened to be written, made, or synced."""
    shutil.copytree(world, tmp_path / "world")
    out = tmp_path / "out"
    out.mkdir()
    opened, writing, hit = os.open, os.O_WRONLY | os.O_RDWR | os.O_CREAT, []

    def refuse(path, flags, *args, **kwargs):
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if flags & writing and text.startswith(str(tmp_path)):
            hit.append(text)
            raise OSError(number, os.strerror(number), text)
        return opened(path, flags, *args, **kwargs)

    made = os.mkdir

    def no_folder(path, *args, **kwargs):
        if os.fspath(path).startswith(str(tmp_path)):
            hit.append(path)
            raise OSError(number, os.strerror(number), str(path))
        made(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", no_folder)
    result = invoke(commands(tmp_path / "world", out)[name])
    monkeypatch.undo()
    assert hit, "nothing was written: the test sees nothing"
    decorative = name == "search again"  # all is done: only the report and the export can fail
    assert result.exit_code in ({0, code} if decorative else {2, 3}), result.output
    assert os.strerror(number).lower() in result.output.lower() or "disk is full" in result.output
    assert os.listdir(out) == []  # nothing half written


@pytest.mark.parametrize("name", ["describe", "draw", "status", "generate"])  # boxes, arrows, and text of models
def test_a_terminal_that_knows_ascii_alone(name, world, tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [str(part) for part in commands(world, tmp_path)[name]]
    done = subprocess.run(
        [sys.executable, "-m", "studies.cli", *command],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["closed", "full"])
def test_output_that_goes_nowhere(name, how, world, tmp_path):
    """A reader that is gone, or a full device: no traceback; a search goes on, and its exit code is the study's."""
    shutil.copytree(world, tmp_path / "world")
    command = [str(part) for part in commands(tmp_path / "world", tmp_path)[name]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    target = writer if how == "closed" else os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([sys.executable, "-m", "studies.cli", *command], env=env, stdout=target, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)  # fmt: skip
    os.close(target)
    if how == "full":
        os.close(writer)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode in CODES, done.stderr
    if name in ("search", "search again"):
        assert done.returncode == 0, done.stderr
        assert (tmp_path / ("run" if name == "search" else "world/run") / "best/manifest.json").is_file()


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "torn": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "other": lambda file: file.write_bytes(b"\x00\xff[{" * 99),
    "brackets": lambda file: file.write_text("[" * 200_000),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}
FILES = [
    "run/journal.log", "run/journal.sums", "run/study.yaml", "run/data/corpus.json", "run/data/train.bin", "run/id",
    "bundle/manifest.json", "bundle/model.safetensors", "bundle/architecture.yaml", "hf/config.json", "tiny.yaml", "text.txt", "ladder.csv",
]  # fmt: skip
READ = [
    "check",
    "search again",
    "dry run",
    "status",
    "report",
    "export",
    "export hf",
    "predict",
    "eval",
    "probe",
    "import-hf",
    "generate",
    "tokenize",
]


@pytest.mark.parametrize(
    "how", ["torn", *(pytest.param(how, marks=pytest.mark.slow) for how in DAMAGE if how != "torn")]
)
@pytest.mark.parametrize("file", FILES)
def test_damaged_files(file, how, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    DAMAGE[how](tmp_path / "world" / file)
    out = tmp_path / "out"
    out.mkdir()
    own = {
        "run": READ[1:8],
        "bundle": ["export hf", "eval", "generate"],
        "hf": ["import-hf"],
        "tiny.yaml": ["check", "dry run"],
        "ladder.csv": ["scale"],
    }
    for name in own.get(file.split("/")[0], ["check", "eval", "tokenize"]):
        result = invoke(commands(tmp_path / "world", out)[name])
        assert result.exit_code in CODES, result.output


def test_checkpoints_that_are_none(world, tmp_path):
    for how, damage in DAMAGE.items():
        shutil.copytree(world, tmp_path / how)
        for file in (tmp_path / how / "run/trials").rglob("*"):
            if file.is_file() and not file.is_symlink():
                damage(file)
        result = invoke(commands(tmp_path / how, tmp_path / f"{how}-out")["search again"])
        assert result.exit_code == 0, result.output
        assert "missing or damaged" in result.output
        assert invoke(commands(tmp_path / how, tmp_path / f"{how}-out")["export"]).exit_code == 2


def can_mount(options):
    if os.getuid() != 0 or shutil.which("mount") is None:
        return None
    folder = Path(tempfile.mkdtemp())
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    return folder if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_real_file_systems(kind, world):
    """The same on a mount, where this may be made: nothing is injected, and root is told no as well."""
    folder = can_mount("size=16m")
    if folder is None:
        pytest.skip("no mounts here")
    try:
        shutil.copytree(world, folder / "world", ignore=shutil.ignore_patterns("report.html"))
        (folder / "out").mkdir()
        if kind == "full":
            with pytest.raises(OSError, match="No space"):
                (folder / "filler").write_bytes(b"\0" * 2**25)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for name in WRITE:
            result = invoke(commands(folder / "world", folder / "out")[name])
            assert result.exit_code in CODES, (name, result.output)
            if name != "search again":
                assert result.exit_code in (2, 3), (name, result.output)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("flag", ["status", "report"])
def test_watching_a_folder_that_nobody_drives_ends(flag, world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "world")
    opened = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).endswith("lock"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert invoke([flag, tmp_path / "world/run", "--watch"]).exit_code == 0
