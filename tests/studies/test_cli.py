"""The command line as a user meets it: output, exit codes, one-line errors, nothing lost."""

import csv
import io
import json
import os
import re
import signal
import time
from dataclasses import replace
from importlib.metadata import version
from typing import get_args

import pytest
import typer
from helpers import ARCHITECTURES, ROOT, SPACES, STUDIES, tiny_study
from helpers import run_cli as run
from rich.console import Console
from typer.testing import CliRunner

from searchspace import SpecError, load_space
from searchspace.files import purpose_of
from studies import cli
from studies.cli import app
from studies.commands.export import FORMATS
from studies.commands.live import running_table
from studies.config import load_study
from studies.data.settings import TEXT_KEYS
from studies.predict.learners import LEARNERS
from studies.records.reading import read_study
from studies.records.trial import Report
from studies.show.schema import LANGUAGES


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    file = tiny_study(folder)
    output = run("search", file, "--dir", folder / "run", "--serial")
    return folder, file, output


@pytest.mark.parametrize("file", [*ARCHITECTURES, *SPACES, *STUDIES], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_yaml_checks(file):
    assert run("check", file).startswith("ok: ")


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda p: p.stem)
def test_describe(file):
    output = run("describe", file)
    assert "arch_id" in output
    assert "-> %logits" in output
    assert "forward FLOPs per token" in output


def test_describe_takes_overrides_and_shows_code():
    output = run("describe", "spiralformer_small", "levels.word.chunk=8", "levels.word.offset=4", "--code")
    assert "2 + 4R[16 8 1] + 2, mesh" in output
    assert "def forward(self, tokens, lengths=None):" in output
    assert "x = None" not in output
    assert "|-->|------>|" in output


def test_cost_as_json_is_the_cost():
    figures = json.loads(run("cost", "plain_4", "--json"))
    assert figures["params"] == 234048
    assert figures["flops"] == 565248 * 128


def test_choices_are_those_of_the_tables():
    assert list(FORMATS) == cli.EXPORT_FORMATS
    assert get_args(cli.Learner) == ("auto", *LEARNERS)
    assert get_args(cli.Language) == tuple(LANGUAGES)
    assert set(get_args(cli.TextSource)) == set(TEXT_KEYS) - {"python_source"}
    assert "unknown format 'nope'; choose one of: bundle" in run("export", "x", "--format", "nope", code=2)


def test_cost_over_lengths_and_of_training():
    output = run("cost", "plain_4", "--memory")
    assert f"{16 * 234048 / 2**20:.3g} MiB" in output
    rows = [
        line.split()
        for line in run("cost", "plain_4", "--lengths", "64,128").splitlines()
        if line.strip()[:1].isdigit()
    ]
    assert [row[0] for row in rows] == ["64", "128"]
    assert rows[1][1] == "565,248"
    assert json.loads(run("cost", "plain_4", "--memory", "--json"))["training_memory"]["states"] == 16 * 234048
    for wrong in ("64,,128", "many", "0"):
        assert "--lengths: can't read" in run("cost", "plain_4", "--lengths", wrong, code=2)


def test_a_study_for_other_programs(study, tmp_path):
    folder, _, _ = study
    records = read_study(folder / "run")[0]
    assert all(record.curve[-1][0] <= record.tokens for record in records if record.state == "complete")
    assert "Training loss within trials" in (folder / "run/report.html").read_text()
    found = json.loads(run("status", folder / "run", "--json"))
    assert found["trials"]["total"] == sum(found["trials"].values()) - found["trials"]["total"]
    assert found["best"]["bits_per_byte"] > 0
    assert found["baseline"]["purpose"] == "baseline"
    run("report", folder / "run", "--csv", tmp_path / "all.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [int(row["number"]) for row in rows] == list(range(found["trials"]["total"]))
    assert float(rows[found["best"]["number"]]["bits_per_byte"]) == found["best"]["bits_per_byte"]
    output = " ".join(run("compare", folder / "run", folder / "run").split())
    assert "is 0.000 bits/byte better" in output
    assert "architectures are complete in both" in output


def test_a_time_budget_ends_a_search_and_loses_nothing(tmp_path):
    file = tiny_study(tmp_path)
    settings = ("--dir", tmp_path / "run", "--serial", "training.flops=2e9")
    output = run("search", file, *settings, "search.time_budget_s=1")
    assert "search.time_budget_s, 1 seconds, is over" in output
    begun = json.loads(run("status", tmp_path / "run", "--json"))["trials"]
    assert begun.get("complete", 0) + begun.get("stopped", 0) < begun["total"]
    output = run("search", file, *settings)
    assert "is over" not in output
    assert "interrupted" not in json.loads(run("status", tmp_path / "run", "--json"))["trials"]


def test_a_time_budget_shorter_than_a_checkpoint_gets_on(tmp_path):
    """A trial that is longer than the budget saves where it stands, and ends after some calls."""
    file = tiny_study(tmp_path)
    settings = (
        "--dir",
        tmp_path / "run",
        "--serial",
        "search.num_trials=1",
        "training.flops=3e9",
        "search.stopper=none",
    )
    steps = []
    for _ in range(40):  # a busy machine takes more of them
        run("search", file, *settings, "search.time_budget_s=1")
        found = json.loads(run("status", tmp_path / "run", "--json"))["trials"]
        steps.append(found)
        if "interrupted" not in found and found.get("complete", 0) == found["total"]:
            break
    assert steps[-1].get("complete") == steps[-1]["total"], steps


def test_what_runs_is_shown_while_it_runs(study):
    record, report = read_study(study[0] / "run")[0][0], Report(kind="progress", attempt=1, steps=12, tokens=640)
    report = replace(report, flops=record.training["flops"] / 4, seconds=2.0, train_loss=2.5)
    console = Console(width=90, file=io.StringIO())
    console.print(running_table([(record, report)] * 14))
    shown = console.file.getvalue()
    assert re.search(r"25%\s+12\s+2.500\s+320", shown)
    assert "and 2 more" in shown


def test_count_and_sample(tmp_path):
    assert run("count", "quickstart").strip() == "2,340 candidates"
    text = run("sample", "quickstart", "-n", "2", "--seed", "3")
    first, second = text.split("---\n")
    for i, document in enumerate((first, second)):
        (tmp_path / f"{i}.yaml").write_text(document)
        assert run("check", tmp_path / f"{i}.yaml").strip() == "ok: architecture"


def test_draw(tmp_path):
    assert "core × 3" in run("draw", "spiralformer_small")
    out = tmp_path / "new" / "ladder.svg"
    assert f"drew {out}" in run("draw", "spiralformer_small", "-o", str(out)).replace("\n", "")
    assert out.read_text().startswith("<svg")
    assert "end the name in .svg" in run("draw", "spiralformer_small", "-o", "x.pdf", code=2)


def test_halted_studies_say_so_and_exit_with_3(tmp_path, monkeypatch):
    from studies.training.trainer import DivergedError, Trainer

    def diverge(self, *args, **kwargs):
        raise DivergedError("the training loss is nan at step 1")

    monkeypatch.setattr(Trainer, "train", diverge)
    file = tiny_study(tmp_path, {"search": {"max_failures": 2}})
    output = run("search", str(file), "--dir", str(tmp_path / "run"), "--serial", code=3)
    assert "halted: 2 trials in a row failed, the last with: the training loss is nan" in " ".join(output.split())
    assert "the same command goes on" in " ".join(output.split())


def test_count_within_a_budget():
    exact = run("count", "quickstart", "d_model=64", "--budget", "params=90% of baseline", "--baseline", "plain_4")
    assert re.fullmatch(r"2,340 candidates, \d+ within the budget \(\d+\.\d+%\)\n", exact), exact
    bounded = run("count", "families", "--budget", "params=60K", "--budget", "flops_per_token=200K")
    assert "95 % interval" in bounded
    assert "no baseline" in run("count", "quickstart", "--budget", "params=90% of baseline", code=2)
    assert "did you mean 'params'" in run("count", "quickstart", "--budget", "parms=1M", code=2)


def test_search_ends_with_ranking_bundle_and_sample(study):
    folder, _, output = study
    assert "within the budget" in output
    assert "At equal training FLOPs" in output
    assert re.search(r"plain: 1 .*baseline", output)
    assert "exported the best trial to" in output
    assert "a sample at temperature" in output
    for file in (
        "study.yaml",
        "journal.log",
        "best/manifest.json",
        "report.html",
    ):
        assert (folder / "run" / file).stat().st_size > 0
    assert (folder / "run").stat().st_mode & 0o777 == 0o700
    assert not [p for p in (folder / "run").rglob("*") if p.suffix in (".pkl", ".pickle")]


def test_the_same_command_again_changes_nothing(study):
    folder, file, _ = study
    before = (folder / "run/journal.log").read_bytes()
    assert "going on: 6 trials ended before" in run("search", file, "--dir", folder / "run", "--serial")
    assert (folder / "run/journal.log").read_bytes() == before


def test_more_trials_go_on_from_there(study, tmp_path):
    import shutil

    folder, file, _ = study
    shutil.copytree(folder / "run", tmp_path / "run")
    run("search", file, "search.num_trials=7", "--dir", tmp_path / "run", "--serial")
    assert "8 of 8 trials ended" in run("status", tmp_path / "run")


def test_another_study_in_the_same_folder_is_refused(study, tmp_path):
    folder, file, _ = study
    output = run("search", file, "training.lr=0.02", "--dir", folder / "run", code=2)
    assert "training.lr: is 0.02, but 0.01 in this folder's study" in output
    (tmp_path / "thesis.txt").write_text("precious")
    assert "holds no study" in run("search", file, "--dir", tmp_path, code=2)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_status_report_export_generate(study, tmp_path):
    folder, _, _ = study
    assert "6 of 6 trials ended" in run("status", folder / "run")
    assert "At equal training FLOPs" in run("report", folder / "run")
    output = run("export", folder / "run", "-o", tmp_path / "bundle", "--trial", "0")
    assert "exported" in output
    first = run("generate", tmp_path / "bundle", "--prompt", "line 7", "-n", "20", "--seed", "1")
    assert first == run("generate", tmp_path / "bundle", "--prompt", "line 7", "-n", "20", "--seed", "1")
    assert "line 7" in first
    assert "is empty" in run("generate", tmp_path / "bundle", "--prompt", "", code=2)
    assert "is not in this study" in run("export", folder / "run", "--trial", "99", code=2)
    stopped = re.search(r"(\d+) stopped", run("report", folder / "run"))
    if stopped:
        from studies.records.reading import open_for_reading

        number = next(r.number for r in open_for_reading(folder / "run") if r.state == "stopped")
        assert "only complete trials" in run("export", folder / "run", "--trial", number, code=2)


def test_exported_bundle_scores_what_the_search_measured(study):
    """The loss in the manifest, measured again from the bundle alone."""
    import torch
    import torch.nn.functional as F

    from builder import load_bundle
    from studies.data.corpus import Corpus

    folder, _, _ = study
    bundle = load_bundle(folder / "run/best")
    corpus = Corpus(folder / "run/data")
    with torch.no_grad():
        losses = [
            F.cross_entropy(bundle.model(inputs).flatten(0, 1), targets.flatten())
            for inputs, targets in corpus.eval_batches(480, 96 // bundle.arch.seq_len, bundle.arch.seq_len)
        ]
    assert torch.stack(losses).mean().item() == pytest.approx(bundle.manifest["metrics"]["loss"], abs=1e-5)


def test_train_one_architecture(study, tmp_path):
    _, file, _ = study
    out = tmp_path / "one"
    output = run("train", "plain_4", "training.flops=2e9", "seed=1", "--study", file, "-o", out, code=2)
    assert "unknown key" in output
    run("train", "plain_4", "training.flops=2e9", "training.batch_tokens=512", "--study", file, "-o", out)
    assert json.loads((out / "manifest.json").read_text())["metrics"]["training_flops"] > 1e9
    assert not list(tmp_path.glob(".one-run"))


def test_dry_run_starts_nothing(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, file, _ = study
    output = run("search", file, "--dry-run")
    for part in (
        "candidates",
        "trials: 5, and 1 baseline in full",
        "training FLOPs: about",
        "time: about",
    ):
        assert part in output
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_how_often_the_data_is_seen(study, tmp_path):
    output = run("search", study[1], "--dir", tmp_path / "nothing", "--dry-run", "training.flops=1e12")
    assert re.search(r"a trial sees the data about \d\d+\.\d times", " ".join(output.split()))


def test_errors_are_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("extends: plain_4\nd_model: [1]\n")
    result = CliRunner().invoke(app, ["describe", str(tmp_path / "bad.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}/bad.yaml:2: d_model: expected a whole number")
    assert "Traceback" not in result.output
    for command in ("status", "report", "export"):
        assert "is not a study folder" in run(command, tmp_path, code=2)
    assert "is not a bundle" in run("generate", tmp_path, code=2)
    assert "no such file" in run("check", "nowhere", code=2)


def test_key_reference_is_up_to_date():
    """After a deliberate change: ``spiralformer keys > docs/keys.md``."""
    assert run("keys") == (ROOT / "docs/keys.md").read_text()


def test_key_reference_has_every_key():
    text = (ROOT / "docs/keys.md").read_text()
    assert text.count("| required |") > 20
    for key in (
        "kv_heads",
        "rotary_fraction",
        "delay",
        "reads",
        "muon_lr",
        "gpus_per_trial",
        "slots",
        "tableau",
        "reduction",
    ):
        assert f"| `{key}` |" in text


def test_list_names_what_is_shipped():
    output = run("list")
    for file in (*ARCHITECTURES, *SPACES, *STUDIES):
        assert file.stem in output.replace("\n", " ")


def test_help_lists_the_commands():
    output = run("--help")
    for command in (
        "describe",
        "cost",
        "check",
        "count",
        "sample",
        "train",
        "search",
        "status",
        "report",
        "export",
        "generate",
    ):
        assert command in output


def test_an_interrupt_that_becomes_another_exception(monkeypatch, capsys):
    """In the midst of an import a library may turn it into an exception of its own."""
    monkeypatch.setattr(cli, "app", typer.Typer())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests may have it ignored

    def imports() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module") from None

    try:
        with pytest.raises(typer.Exit) as ended:
            cli._command(imports)()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_study_is_counted_within_its_own_budget(study):
    _, file, _ = study
    assert re.search(r"candidates, [\d,]+ within the budget", run("count", file))
    assert "which has its own" in run("count", file, "--budget", "params=1M", code=2)


def test_list_says_how_large_and_what_for():
    output = " ".join(run("list").split())
    assert re.search(r"pythia_160m 162\.\dM Pythia 160M|pythia_160m 162\.\dM", output)
    assert "Small schedules over bytes" in output


def test_version_and_short_help():
    assert run("--version") == f"spiralformer {version('spiralformer')}\n"
    assert run("-h") == run("--help")


def test_generation_has_the_models_knobs(study):
    folder, _, _ = study
    best = folder / "run" / "best"
    likeliest = run("generate", best, "-n", 12, "--temperature", 0)
    assert run("generate", best, "--num", 12, "--top-k", 1).partition(":")[2] == likeliest.partition(":")[2]
    assert "unknown device" in run("generate", best, "--device", "gpu", code=2)


@pytest.mark.parametrize("file", SPACES, ids=lambda p: p.stem)
def test_a_space_has_a_view_of_its_own(file):
    space = load_space(file)
    output = run("describe", file)
    text = re.sub(r"\s", "", output)
    for decision in space.decisions:
        assert decision.name[:20] in text  # long ones are folded
    assert "candidates" in output
    assert re.search(r"parameters +[\d.]+[KM]? to [\d.]+[KM]", output)


def test_a_study_that_does_not_exist(tmp_path):
    (tmp_path / "my_study.yaml").write_text("space: quickstart\n")
    assert "did you mean 'my_study.yaml'" in " ".join(run("search", tmp_path / "my_studdy.yaml", code=2).split())
    assert "did you mean 'quickstart'" in " ".join(run("search", "quickstrat", code=2).split())
    assert "names the shipped studies" in " ".join(run("search", tmp_path / "x.yaml", code=2).split())


NAMES = {
    "check": ["architectures", "spaces", "studies"], "describe": ["architectures", "spaces", "studies"],
    "count": ["spaces", "studies"], "sample": ["spaces", "studies"], "cost": ["architectures"], "draw": ["architectures"],
}  # fmt: skip
SHIPPED = {
    "architectures": ["plain_4", "hourglass_small"],
    "spaces": [p.stem for p in SPACES],
    "studies": [p.stem for p in STUDIES],
}


@pytest.mark.parametrize("command", NAMES)
def test_names_that_list_shows_work_in_every_command_that_can_take_them(command):
    for kind, names in SHIPPED.items():
        for name in names:
            if kind in NAMES[command]:
                run(command, name)
            elif name not in [other for taken in NAMES[command] for other in SHIPPED[taken]]:
                assert run(command, name, code=2).startswith("error: ")


def test_a_name_of_another_kind_is_told():
    assert "'looped_grid' is shipped among the spaces, not the architectures" in " ".join(
        run("cost", "looped_grid", code=2).split()
    )


@pytest.mark.parametrize(("given", "other"), [("tokens=20000", "flops"), ("flops=1e9", "tokens")])
def test_an_override_of_what_training_spends_takes_the_others_place(tmp_path, given, other):
    name, _, value = given.partition("=")
    file = tiny_study(tmp_path, {"training": {"flops": None, "tokens": None, other: 4e8}})
    training = load_study(file, [f"training.{given}"]).plain["training"]
    assert (training[name], training.get(other)) == (float(value), None)
    with pytest.raises(SpecError, match="exactly one of flops and tokens"):
        load_study(file, ["training.flops=1e9", "training.tokens=20000"])


def test_a_misspelt_probe_is_named_before_its_objective_is_refused(tmp_path):
    for asked, told in (
        (["attention", "update"], r"training\.probes\.1: unknown value 'update'.*updates"),
        (["attention"], r"probes: \[attention, updates\]"),
    ):
        file = tiny_study(tmp_path, {"training": {"probes": asked}, "objectives": ["loss", "update_ratio"]})
        with pytest.raises(SpecError, match=told):
            load_study(file)


def test_what_is_shipped_is_told_in_whole_sentences():
    for file in ARCHITECTURES + SPACES + STUDIES:
        assert purpose_of(file)[-1] in ".?", file
