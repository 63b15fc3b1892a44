"""Everything the README and the guides tell people to type is typed here, and the site builds."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT
from typer.testing import CliRunner

from studies.cli import app

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.S)
FASTER = ["search.num_trials=8", "search.promote={trials: 2, seeds: 1}", "search.stopper=none", "training.flops=3e9", "training.batch_tokens=512", "training.eval_tokens=2048", "--serial"]  # fmt: skip


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def run(command):
    result = CliRunner().invoke(app, command.split()[1:], env={"COLUMNS": "80"})
    assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for text in blocks("yaml"):
        name = re.match(r"# (\w+\.yaml)\n", text)
        assert name, text
        (folder / name[1]).write_text(text)
    return folder


def test_console_blocks_print_what_they_show(folder, monkeypatch):
    monkeypatch.chdir(folder)
    commands = 0
    for text in blocks("console"):
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            command, commands = command.strip(), commands + 1
            if "--dry-run" in command:  # it trains a few steps to measure the speed
                command += " training.batch_tokens=1024"
            assert shown.strip() in run(command.strip().replace('"', "")), command
    assert commands >= 6


def test_python_blocks_run(folder):
    """Each by itself, in one process: most of its time is importing torch."""
    assert blocks("python")
    guide = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.S)
    alone = "\n".join(f"exec({text!r}, {{}})" for text in [*blocks("python"), *guide])
    subprocess.run([sys.executable, "-W", "error", "-c", alone], check=True, cwd=folder)


def test_what_to_do_after_a_search(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "README.md").write_text(TEXT)
    (after,) = [text for text in blocks("") if "spiralformer status" in text]
    CliRunner().invoke(app, ["search", "quickstart", *FASTER])
    for command in after.strip().splitlines():
        run(command.replace('"', ""))
    assert (folder / "winner/model.safetensors").is_file()


def test_from_an_idea_to_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faster = " training.flops=1e9 training.batch_tokens=512 training.eval_tokens=2048 search.stopper=none --serial"
    text = (ROOT / "docs/own-search.md").read_text()
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S):
        if language == "yaml":
            (tmp_path / re.match(r"# (\w+\.yaml)\n", block)[1]).write_text(block)
        for part in re.split(r"^\$ ", block, flags=re.M)[1:] if language == "console" else ():
            command, _, shown = part.partition("\n")
            is_search = command.startswith("spiralformer search") and "--dry-run" not in command
            assert shown.strip() in run(command + (faster if is_search else "")), command
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", block], check=True, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.stdout.startswith("def ")
    further = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), flags=re.S))
    assert "winner-hf" in further
    subprocess.run([sys.executable, "-c", further], check=True, cwd=tmp_path)


def test_meshs_recipe_is_a_study(tmp_path, monkeypatch):
    """Four thousand tokens stand for the Pile."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/mesh.md").read_text(), flags=re.S)
    (tmp_path / re.match(r"# (\w+\.yaml)\n", block)[1]).write_text(block)
    (tmp_path / "pile").mkdir()
    for part in ("train.bin", "val.bin"):
        (tmp_path / "pile" / part).write_bytes(bytes(2 * 8192))
    told = run("spiralformer check mesh_410m.yaml")
    assert "3 candidates" in told
    assert "batch 2,097,152 tokens" in told


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/own-search/index.html").is_file()


def test_the_shown_quickstart_is_of_the_shipped_study():
    from studies.config import load_study

    (shown,) = [text for text in blocks("") if "training FLOPs spent" in text]
    study = load_study("quickstart")
    promote = study.search.promote
    again = promote.seeds * (promote.trials + 1)
    assert f"{study.search.num_trials + len(study.baselines) + again} trials: " in shown
    for arch in study.baselines:
        assert f"{arch.name}: " in shown


def test_the_shown_picture_is_of_the_shown_architecture(folder):
    picture = (ROOT / "docs/figures/spiral.svg").read_text()
    run(f"spiralformer draw {folder / 'spiral.yaml'} -o {folder / 'spiral.svg'}")
    assert (folder / "spiral.svg").read_text() == picture


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`", TEXT + (ROOT / "CONTRIBUTING.md").read_text())):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_every_listed_file_exists():
    for name in re.findall(r"^    ([\w/.]+) ", TEXT, flags=re.M):
        assert (ROOT / name).exists(), name
