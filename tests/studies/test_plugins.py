"""Plugins: what they add works everywhere, what is broken is refused for its own reason, and records tell of them."""

import ast
import io
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, end_all, make_driver, run_cli, tiny_arch, tiny_data, tiny_study
from rich.console import Console

from builder import build_model, compile_arch, estimate, load_bundle, save_bundle
from builder.exchange.hf_export import modeling_code
from builder.laws import LAWS
from searchspace import SpecError, load_plugin, plugins
from searchspace.plugin_loading import loaded_plugins, places_of
from searchspace.plugins import forget_plugins, records
from searchspace.tables import OPEN
from studies.commands import verify
from studies.config import load_study
from studies.records.trial import MissingPluginError, Report, Rung, TrialSpec
from studies.report.ranking import front, ranking_table
from studies.show.keys import key_reference
from studies.show.schema import json_schema
from studies.strategy.driver import StudyDriver
from studies.tasks.table import open_data, prepare_data

BLEND = ROOT / "examples/plugins/blend.py"
DIGITS = ROOT / "examples/plugins/digits.yaml"
BROKEN = ROOT / "tests/plugins/broken.py"
USES = {
    "levels": {"word": {"pool": "blend"}},
    "blocks": {"core": {"ffn": "reglu"}},
    "graph": {"h": {"topology": "dense"}},
}

POOL = """
from builder import pool
from searchspace import Plugin
from spiralformer.pooling import MeanPool
{more}
PLUGIN = Plugin(name="{name}", version="{version}", api={api}, rows=({rows}))
"""


def write(file, rows='pool("other", MeanPool),', *, name="mine", version="1", api=1, more=""):
    file.write_text(POOL.format(name=name, version=version, api=api, rows=rows, more=more))
    return file


# -- the example ---------------------------------------------------------------------------------


def test_what_the_example_adds_is_as_ours(tmp_path):
    assert load_plugin(BLEND) is load_plugin(str(BLEND))
    arch = tiny_arch(USES)
    graph = compile_arch(arch)
    model = build_model(graph)
    assert estimate(graph).params == sum(p.numel() for p in model.parameters())
    assert graph.arch_id == compile_arch(tiny_arch(USES)).arch_id != compile_arch(tiny_arch()).arch_id
    code = modeling_code(graph)
    named = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert "class BlendPool(Pool):" in code
    assert "class ReluGated(GatedFeedForward):" in code
    assert not [name for name in named if name.split(".")[0] in (*("builder", "searchspace", "studies"), "numpy")]
    assert f"Carries code of plugin blend 1.0 (SHA-256 {records()[0].sha256[:12]})" in code
    assert "`blend` (of plugin blend)" in key_reference()
    assert "`length`" in key_reference()
    assert '{"const": "reglu", "description": "Of plugin blend."}' in json.dumps(json_schema("space"))
    assert '{"const": "digits"}' in json.dumps(json_schema("study"))


def test_nothing_of_a_plugin_stays():
    before = {kind.__name__: list(rows) for kind, rows in OPEN.items()}
    load_plugin(BLEND)
    assert {kind.__name__: list(rows) for kind, rows in OPEN.items()} != before
    forget_plugins()
    assert {kind.__name__: list(rows) for kind, rows in OPEN.items()} == before
    with pytest.raises(SpecError, match=r"unknown value 'blend'.*or load the plugin that adds it \(--plugin\)"):
        tiny_arch(USES)


def test_a_metric_is_measured_shown_and_kept(tmp_path):
    study = tiny_study(tmp_path, {"search": {"num_trials": 2, "stopper": "none"}, "training": {"flops": 5e7}})
    said = run_cli("search", study, "--dir", tmp_path / "run", "--serial", "--plugin", BLEND)
    assert "complete" in said
    assert 0 < json.loads(run_cli("status", tmp_path / "run", "--json", "--plugin", BLEND))["best"]["top5"] < 1
    assert '"top5"' in (tmp_path / "run/journal.log").read_text()
    assert "needs plugin blend 1.0" in (forget_plugins() or run_cli("status", tmp_path / "run", code=2))


def test_from_search_to_export(tmp_path):
    run, own = tmp_path / "run", tmp_path / "blend.py"
    shutil.copy(BLEND, own)
    small = ["training.flops=1e8", "search.num_trials=2"]
    assert "best found" in run_cli("search", DIGITS, *small, "--dir", run, "--serial", "--plugin", own)
    record = records()[0].to_plain()
    assert load_study(run / "study.yaml").plain["plugins"] == [record]
    assert run_cli("export", run, "-o", tmp_path / "bundle", "--plugin", own)
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["plugins"] == [record]
    assert f'"plugins":[{json.dumps(record, separators=(",", ":"))}]' in (run / "journal.log").read_text()
    forget_plugins()
    for command in (
        ["status", run],
        ["report", run],
        ["export", run],
        ["search", DIGITS, *small, "--dir", run, "--serial"],
    ):
        said = " ".join(run_cli(*command, code=2).split())
        assert "needs plugin blend 1.0" in said or "unknown value 'digits'" in said, said
    with pytest.raises(SpecError, match=r"needs plugin blend 1\.0 .* not loaded; give it with --plugin"):
        load_bundle(tmp_path / "bundle")
    own.write_text(own.read_text() + "\n# changed\n")
    for command in (
        ["search", DIGITS, *small, "--dir", run, "--serial"],
        ["export", tmp_path / "bundle", "--format", "hf"],
        ["export", run, "-o", tmp_path / "again"],
    ):
        said = " ".join(run_cli(*command, "--plugin", own, code=2).split())
        assert "was made with plugin blend 1.0 (SHA-256 " in said, said
    said = " ".join(run_cli("report", run, "--plugin", own).split())
    assert "note: it was made with plugin blend 1.0 (SHA-256" in said
    assert "--plugin FILE_OR_MODULE  # blend 1.0" in (run / "report.html").read_text()


@pytest.mark.slow
def test_an_export_loads_where_there_is_no_plugin(tmp_path):
    load_plugin(BLEND)
    arch = tiny_arch(USES)
    bundle = save_bundle(tmp_path / "bundle", arch, build_model(compile_arch(arch)))
    run_cli("export", bundle, "--format", "hf", "-o", tmp_path / "hf", "--plugin", BLEND)
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)
print(model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=9, do_sample=False).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours = load_bundle(bundle).model.generate(torch.ones(1, 3, dtype=torch.long), 9, temperature=0.0)
    assert json.loads(done.stdout) == ours.tolist()


# -- verify ----------------------------------------------------------------------------------------

FIRST = {
    "pool:ahead": "lookahead", "pool:priced": "cost", "pool:from_the_end": "prefix", "pool:mixing": "batch",
    "pool:forgetful": "decode", "pool:homebound": "export", "pool:never": "runs", "pool:empty": "init",
    "ffn:summing": "decode", "ffn:oversized": "cost", "norm:position": "lookahead", "topology:same_name": "runs",
    "pool:training_leak": "training", "pool:running": "state", "pool:buffered": "runs", "pool:leaving": "runs",
    "pool:one_width": "cost", "pool:unsaid": "init", "loss:never": "runs", "metric:counts_all": "left out",
    "metric:changes": "runs", "sampler:same_seed": "seed", "format:nothing": "write",
    "metric:wrong_way": "direction", "metric:not_a_mean": "mean", "sampler:dice": "seed", "format:elsewhere": "write",
}  # fmt: skip
ALONE = ("pool:priced", "pool:forgetful", "pool:homebound", "ffn:summing")


@pytest.mark.parametrize("place", FIRST)
def test_each_broken_row_is_refused_for_its_own_reason(place, monkeypatch):
    plugin = load_plugin(BROKEN)
    monkeypatch.setattr(verify, "_EXPORTED", int(place == "pool:homebound"))
    row = next(row for row in plugin.rows if places_of(row) == (place,))
    found = verify._check_row(row, place, everything=False).breaches
    laws = dict.fromkeys(law for law, _, _ in sorted(found, key=verify._order))
    if place == "pool:from_the_end":  # at other lengths than the first its borders let the future in, too
        laws.pop("lookahead")
    assert next(iter(laws)) == FIRST[place], found
    assert place not in ALONE or len(laws) == 1, found


def test_verify_tells_everything_and_exits_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_EXPORTED", 0)
    lines = run_cli("verify", "--plugin", write(tmp_path / "good.py"))
    assert "✓ pool:other: 13 laws over 4 architectures" in lines
    assert "1 row holds" in lines
    more = "class Odd(MeanPool):\n    def forward(self, x):\n        return super().forward(x.roll(-1, 1))\n"
    bad = write(tmp_path / "bad.py", 'pool("odd", Odd), pool("fine", MeanPool),', name="bad", more=more)
    forget_plugins()
    said = " ".join(run_cli("verify", "--plugin", bad, code=2).split())
    assert "✗ pool:odd" in said
    assert "✓ pool:fine" in said
    assert "1 of 2 rows fail" in said
    assert "there is no plugin to verify" in (forget_plugins() or run_cli("verify", code=2))
    assert len(LAWS) == 13


@pytest.mark.slow
def test_the_example_holds_in_every_combination():
    assert "5 rows hold" in run_cli("verify", "--all", "--plugin", BLEND)


# -- loading ---------------------------------------------------------------------------------------

BAD = {
    "pool('x', MeanPool),": ({"api": 2}, "was written for version 2 of the interface; this is version 1"),
    "pool('mean', MeanPool),": ({}, "an operation 'pool.mean' is built in"),
    "pool('a', MeanPool), pool('a', MeanPool),": ({}, "adds pool:a twice"),
    "pool('a b', MeanPool),": ({}, "'pool:a b' can't be written in a file"),
    "": ({}, "its rows are none"),
    "pool('b', MeanPool)": ({}, "its rows are one row, no tuple; write rows=(row,), with a comma"),
    "3,": ({}, "has a row of int, which belongs to no table that plugins may add to"),
    "operation('join.x', {}, None, LANE),": ({"more": "from builder.graph.ops import LANE, operation"}, "operation 'join.x' is none of pool.NAME"),
    "TopologyRow('x', None, True, len, len),": ({"more": "from searchspace.topologies import TopologyRow"}, "topology 'x' does not say: unroll"),
    "pool('x', MeanPool), 1 / 0,": ({}, "can't be loaded: ZeroDivisionError"),
    "pool('x' MeanPool),": ({}, "can't be loaded: SyntaxError"),
    "pool('y', MeanPool),": ({"name": "a name"}, "'a name' can't be a plugin's name"),
    "pool('z', MeanPool),": ({"version": " "}, "its version is ''"),
}  # fmt: skip


@pytest.mark.parametrize("rows", BAD)
def test_what_is_no_plugin_is_refused_and_leaves_nothing(rows, tmp_path):
    settings, told = BAD[rows]
    before = {kind: list(table) for kind, table in OPEN.items()}
    file = write(tmp_path / "mine.py", rows, **settings)
    with pytest.raises(SpecError) as found:
        load_plugin(file)
    assert told in str(found.value)
    assert "mine.py" in str(found.value)
    assert {kind: list(table) for kind, table in OPEN.items()} == before
    assert not loaded_plugins()
    write(file)
    assert load_plugin(file).name == "mine"  # once it is mended


def test_the_line_that_fails_is_told(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\n\ndef f():\n    return json.nothing\n\n\nf()\n")
    with pytest.raises(SpecError, match=r"mine\.py:5: --plugin: can't be loaded: AttributeError"):
        load_plugin(file)


def test_places_that_hold_no_plugin(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "my-pool.py").touch()
    (tmp_path / "empty.py").touch()
    (tmp_path / "study.yaml").touch()
    (tmp_path / "other.py").write_text("PLUGIN = 3\n")
    for source, told in {
        "folder": "is a folder without __init__.py", "no.py": "no such file", "my-pool.py": "is no name of a module",
        "study.yaml": "is no Python file", "empty.py": "defines no PLUGIN", "other.py": "its PLUGIN is int",
    }.items():  # fmt: skip
        with pytest.raises(SpecError, match=told):
            load_plugin(tmp_path / source)
    with pytest.raises(SpecError, match="there is no module 'no_such_module'"):
        load_plugin("no_such_module")
    assert "no such file" in run_cli("cost", "plain_small", "--plugin", tmp_path / "no.py", code=2)


def test_two_plugins_that_add_the_same_are_refused(tmp_path):
    load_plugin(write(tmp_path / "one.py", name="one"))
    with pytest.raises(SpecError, match="adds pool:other, which plugin one adds too"):
        load_plugin(write(tmp_path / "two.py", name="two"))
    (tmp_path / "again").mkdir()
    with pytest.raises(SpecError, match=r"has the name of .*one\.py, which is loaded already"):
        load_plugin(write(tmp_path / "again/one.py", "pool('more', MeanPool),", name="more"))
    with pytest.raises(SpecError, match="is called one, as another one from"):
        load_plugin(write(tmp_path / "three.py", "pool('more', MeanPool),", name="one"))


def test_a_folder_is_one_plugin_and_its_export_carries_each_file(tmp_path):
    folder = tmp_path / "twofold"
    folder.mkdir()
    (folder / "parts.py").write_text(
        "from spiralformer.pooling import MeanPool\n\n\nclass Twofold(MeanPool):\n    pass\n"
    )
    write(folder / "__init__.py", 'pool("twofold", Twofold),', more="from .parts import Twofold")
    load_plugin(folder)
    first = records()[0].sha256
    assert "class Twofold(MeanPool)" in modeling_code(
        compile_arch(tiny_arch({"levels": {"word": {"pool": "twofold"}}}))
    )
    forget_plugins()
    (folder / "parts.py").write_text((folder / "parts.py").read_text() + "# more\n")
    load_plugin(folder)
    assert records()[0].sha256 != first


# -- installed -------------------------------------------------------------------------------------


def install(folder, points, package="blends"):
    """A package's metadata, and a module in which one can see whether it was imported."""
    info = folder / f"{package}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
    lines = "".join(f"{place} = {module}\n" for place, module in points.items())
    (info / "entry_points.txt").write_text(f"[spiralformer.plugins]\n{lines}")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv(plugins.SWITCH, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._installed.cache_clear()
    yield tmp_path
    for name in ("installed_pool", "installed_other"):
        sys.modules.pop(name, None)


def test_an_installed_plugin_is_imported_when_a_file_names_it(site):
    write(site / "installed_pool.py")
    install(site, {"pool:other": "installed_pool"})
    assert "installed plugin installed_pool of blends 2.0: pool:other" in run_cli("--version")
    tiny_arch()
    with pytest.raises(SpecError, match=r"choose one of: .*attention, other, or load"):
        tiny_arch({"levels": {"word": {"pool": "nonsense"}}})
    assert "installed_pool" not in sys.modules
    assert tiny_arch({"levels": {"word": {"pool": "other"}}}).levels["word"].pool == "other"
    assert "installed_pool" in sys.modules
    assert "plugin mine 1 (SHA-256 " in run_cli("--version")


def test_a_space_that_may_choose_an_installed_plugin_records_it(site):
    write(site / "installed_pool.py")
    install(site, {"pool:other": "installed_pool"})
    space = tiny_data({"levels": {"word": {"pool": {"choice": ["mean", "other"]}}}})
    assert [record.name for record in load_study({"space": space, "training": {"flops": 1e7}}).plugins] == ["mine"]


def test_a_study_finds_its_installed_plugins_again(site):
    write(site / "installed_pool.py")
    install(site, {"pool:other": "installed_pool"})
    study = tiny_study(site, {"space": {"levels": {"word": {"pool": "other"}}}, "search": {"num_trials": 1}})
    run_cli("search", study, "training.flops=5e7", "--dir", site / "run", "--serial")
    forget_plugins()
    sys.modules.pop("installed_pool")
    assert "ended" in run_cli("status", site / "run")
    assert run_cli("export", site / "run", "-o", site / "bundle")
    forget_plugins()
    assert load_bundle(site / "bundle").arch.levels["word"].pool == "other"


def test_order_and_plugins_that_nothing_uses_do_not_matter(tmp_path):
    (tmp_path / "two").mkdir()
    own, more = write(tmp_path / "mine.py"), write(tmp_path / "two/more.py", 'pool("more", MeanPool),', name="more")
    study = tiny_study(tmp_path, {"space": {"levels": {"word": {"pool": "other"}}}, "search": {"num_trials": 1}})
    command = ["search", study, "training.flops=5e7", "--dir", tmp_path / "run", "--serial"]
    run_cli(*command, "--plugin", own)
    run_cli(*command, "--plugin", more, "--plugin", own)
    forget_plugins()
    folder = tmp_path / "package"
    folder.mkdir()
    shutil.copy(own, folder / "__init__.py")
    run_cli(*command, "--plugin", folder)  # the same text
    assert [row["name"] for row in load_study(tmp_path / "run/study.yaml").plain["plugins"]] == ["mine"]


def test_a_format_of_a_plugin_claims_nothing_and_finds_its_folder(tmp_path):
    more = "from studies import Format\n\n\ndef to_text(bundle, out):\n    out.write_text('weights')\n    return out\n"
    own = write(tmp_path / "mine.py", 'Format("words", "a text", ".txt", to_text),', more=more)
    study = tiny_study(tmp_path, {"search": {"num_trials": 1, "stopper": "none"}})
    run_cli("search", study, "training.flops=5e7", "--dir", tmp_path / "run", "--serial")
    said = " ".join(run_cli("export", tmp_path / "run", "--format", "words", "--plugin", own).split())
    assert "exported trial 1" in said
    assert "the same" not in said
    assert list((tmp_path / "run/export").glob("*.txt"))
    told = " ".join(run_cli("export", tmp_path / "run", "--format", "wrods", code=2).split())
    assert "bundle, hf, torch, words" in told
    assert told.count("words") == 2  # did you mean it, and in the list


def test_settings_of_a_topology_are_tried_at_their_bounds(tmp_path, monkeypatch):
    more = """
from dataclasses import dataclass
from builder import topology
from searchspace import key

@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    learned: bool = key("?", default=False)
    keep: float = key("?", default=0.5, low=0.25, high=1.0)

def unroll(loop):
    assert not (loop.settings.learned or loop.settings.keep > 0.9)
    state = loop.start
    for t in loop.iterations:
        state = loop.normalise(t, loop.to.sum(f"{loop.name}.t{t}.join", loop.iterate(t, state), [state], key=loop.key))
    return state
"""
    monkeypatch.setattr(verify, "_EXPORTED", 0)
    own = write(tmp_path / "mine.py", 'topology("odd", unroll, settings=Settings),', more=more)
    said = " ".join(run_cli("verify", "--plugin", own, code=2).split())
    assert "breaks 1 of 13 laws over 8 architectures" in said
    assert re.search(
        r"runs: AssertionError: nothing said \(line \d+ of mine.py\) \(learned: True, and in 1 more\)", said
    )
    assert tiny_arch({"graph": {"h": {"topology": {"odd": {"keep": 0.75}}}}}).graph["h"].topology.settings.keep == 0.75


def test_the_switch_leaves_installed_plugins_alone(site, monkeypatch):
    write(site / "installed_pool.py")
    install(site, {"pool:other": "installed_pool"})
    monkeypatch.setenv(plugins.SWITCH, "0")
    with pytest.raises(SpecError, match="unknown value 'other'"):
        tiny_arch({"levels": {"word": {"pool": "other"}}})
    assert "installed plugins are off (SPIRALFORMER_PLUGINS=0)" in run_cli("--version")
    load_plugin("installed_pool")  # but one that is asked for by name
    tiny_arch({"levels": {"word": {"pool": "other"}}})


def test_promises_of_entry_points_are_held_to(site):
    write(site / "installed_pool.py")
    install(site, {"pool:another": "installed_pool", "pool:twice": "installed_pool"})
    install(site, {"pool:twice": "installed_other"}, "others")
    for name, told in {
        "another": r"is said to add pool:another \(blends 2.0\), and does not",
        "twice": "pool:twice is given by installed_pool of blends 2.0 and installed_other of others 2.0",
    }.items():
        with pytest.raises(SpecError, match=told):
            tiny_arch({"levels": {"word": {"pool": name}}})


# -- workers ---------------------------------------------------------------------------------------


def driver_of(folder, plugin):
    load_plugin(plugin)
    study = load_study(tiny_study(folder, {"space": {"levels": {"word": {"pool": "other"}}}}))
    return StudyDriver(study, folder, prepare_data(study.data, folder / "data"))


def test_a_worker_loads_what_its_trial_says_or_refuses(tmp_path):
    file = write(tmp_path / "mine.py")
    (tmp_path / "study").mkdir()
    driver = driver_of(tmp_path / "study", file)
    text = driver.next_trial().to_json()
    forget_plugins()  # as another process has it
    assert TrialSpec.from_json(text).plugins == records() != ()
    forget_plugins()
    write(file, version="2")
    with pytest.raises(MissingPluginError, match=r"was made with plugin mine 1 .*, and mine 2 .* is loaded"):
        TrialSpec.from_json(text)
    forget_plugins()
    file.unlink()
    with pytest.raises(MissingPluginError, match=r"needs plugin mine 1 .* can't be loaded here: .*no such file"):
        TrialSpec.from_json(text)


def test_a_refusal_halts_the_study_and_costs_no_trial(tmp_path):
    file = write(tmp_path / "mine.py")
    (tmp_path / "study").mkdir()
    driver = driver_of(tmp_path / "study", file)
    spec = driver.next_trial()
    assert not driver.report(spec.number, Report(kind="failed", attempt=1 << 30, reason="no_plugin", error="lacks it"))
    assert driver.halted.startswith("a worker can not run its trial: lacks it")
    assert driver.finished
    again = driver_of(tmp_path / "study", file)
    assert again.next_trial().number == spec.number
    assert len(end_all(again).records) == 6


@pytest.mark.slow
def test_ray_workers_train_with_a_plugin(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(DIGITS.read_text())
    said = run_cli(
        "search", file, "training.flops=1e8", "search.num_trials=2", "--dir", tmp_path / "run", "--plugin", BLEND
    )
    assert "3 trials: 3 complete" in said


def test_a_plugin_of_python_goes_into_a_search(tmp_path):
    from studies import search

    load_plugin(write(tmp_path / "mine.py"))
    space = tiny_data({"levels": {"word": {"pool": {"choice": ["other", "mean"]}}}, "vocab_size": 256})
    (tmp_path / "text.txt").write_text("two three five seven " * 500)
    study = search(
        space, data={"kind": "text", "path": str(tmp_path / "text.txt")}, training={"flops": 1e7, "batch_tokens": 96},
        num_trials=2, dir=tmp_path / "run", ray=False,
    )  # fmt: skip
    assert {trial.arch["levels"]["word"].get("pool") for trial in study.trials} == {"other", "mean"}
    assert [trial.plugins != () for trial in study.trials] == [
        trial.arch["levels"]["word"]["pool"] == "other" for trial in study.trials
    ]
    assert "mine" in (tmp_path / "run/study.yaml").read_text()


@pytest.mark.parametrize("exported", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_guide(tmp_path, monkeypatch, exported):
    """Its files hold, and its commands run; exports take seconds each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "_EXPORTED", exported)
    text = (ROOT / "docs/plugins.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for name, rows in (("loudest.py", "1 row holds"), ("leaky.py", "2 rows hold")):
        (tmp_path / name).write_text(next(block for block in blocks if block.startswith(f"# {name}")))
        assert rows in run_cli("verify", "--plugin", name)
        forget_plugins()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in re.findall(r"^\$ spiralformer (.*)$", text, flags=re.M):
        small = ["training.flops=1e8", "search.num_trials=1", "--serial"] if command.startswith("search") else []
        assert run_cli(*command.split(), *small)
    assert [law.name for law in LAWS] == re.findall(r"^\| (\w+) \|", text.split("| law |")[1], flags=re.M)[: len(LAWS)]


def test_a_metric_is_an_objective_of_its_direction(tmp_path):
    """More of it is better: the front holds the trial that has most, which by loss is the worst."""
    load_plugin(BLEND)
    over = {
        "objectives": ["bits_per_byte", "top5", "params"],
        "search": {"num_trials": 3, "stopper": "none"},
        "baseline": [],
    }
    driver = make_driver(tmp_path, {**over, "budget": {"flops_per_token": 1e9}})
    numbers = {}
    while (spec := driver.next_trial()) is not None:
        numbers[spec.number] = (1.0 + spec.number, 0.1 * (1 + spec.number))
        loss, top5 = numbers[spec.number]
        rung = Rung(flops=1.0, tokens=1, score=loss, metrics={"loss": loss, "bits_per_byte": loss, "top5": top5})
        driver.report(spec.number, Report(kind="done", attempt=1, rungs=(rung,)))
    study = driver.journal.studies["search"]
    assert study.metric_names == ["loss", "-top5", "params"]
    assert [trial.values[1] for trial in study.trials] == [-top5 for _, top5 in numbers.values()]
    assert {record.number for record in front(driver.records, driver.study.objectives[:2])} == set(numbers)
    table = Console(width=200, file=io.StringIO())
    table.print(ranking_table(driver.records, open_data(tmp_path / "run/data"), objectives=driver.study.objectives))
    assert re.search(r"\b0\.3\b", table.file.getvalue())
    assert "front of bits_per_byte, top5, params" in " ".join(table.file.getvalue().split())


def test_a_trial_that_does_not_measure_an_objective_fails(tmp_path):
    load_plugin(BLEND)
    driver = make_driver(tmp_path, {"objectives": ["loss", "top5"], "search": {"max_failures": 9}})
    end_all(driver)  # with loss alone
    assert {record.state for record in driver.records} == {"failed"}
    assert "measured top5, an objective, as nothing or no number" in driver.records[0].error
    with pytest.raises(SpecError, match=r"objectives\.1: unknown objective 'top6'; did you mean 'top5'"):
        make_driver(tmp_path, {"objectives": ["loss", "top6"]})


CARRIED = {  # what a pool's module holds beside it -> what its reduce says, and what is wrong with that
    "A, B = 2.0, 3.0": ("return mean_of_members(chunks[0], missing) * A", "uses what an export can't carry: 'A, B = (2.0, 3.0)'"),
    "try:\n    from math import tau\nexcept ImportError:\n    tau = 6.0": ("return mean_of_members(chunks[0], missing) * tau", "uses what an export can't carry: 'try:'"),
    "TABLE = {}\nTABLE['k'] = 1.5": ("return mean_of_members(chunks[0], missing) * TABLE['k']", "uses what an export can't carry: 'TABLE['k'] = 1.5'"),
    "FACTOR = 2.0\nFACTOR *= 3": ("return mean_of_members(chunks[0], missing) * FACTOR", "uses what an export can't carry: 'FACTOR *= 3'"),
    "import math as F": ("return mean_of_members(chunks[0], missing) * F.sqrt(2)", "imports F otherwise than the export: 'import math as F'"),
    "class DecodeCache:\n    factor = 2.0": ("return mean_of_members(chunks[0], missing) * DecodeCache.factor", "defines DecodeCache, which the export defines too"),
    "def max(x):\n    return x": ("return max(mean_of_members(chunks[0], missing))", "defines max, which Python defines too"),
    "class Rows:\n    factor = 2.0": ("return mean_of_members(chunks[0], missing) * Rows.factor", "defines Rows, which spiralformer defines too"),
    "": ("from builder import pool\n        return mean_of_members(chunks[0], missing)", "uses what an export can't carry: 'from builder import pool'"),
    "import spiralformer.pooling as ours": ("return ours.mean_of_members(chunks[0], missing)", "'import spiralformer.pooling as ours'"),
    "from math import tau\nTWICE = 2 * tau\n\n\ndef scaled(x):\n    return x * TWICE / tau": ("return scaled(mean_of_members(chunks[0], missing))", ""),
    "from math import sqrt as root\nimport math": ("return mean_of_members(chunks[0], missing) * root(math.pi)", ""),
}  # fmt: skip


@pytest.mark.parametrize("beside", CARRIED)
def test_what_an_export_carries_of_a_module(beside, tmp_path):
    """Either it computes the same, or it is said what can't travel; never a name that is missing."""
    body, told = CARRIED[beside]
    own = f"\n\n{beside}\n\n\nclass Odd(Pool):\n    def starts(self, scales):\n        return {{}}\n    def reduce(self, *chunks, missing):\n        {body}\n"
    more = f"from spiralformer.pooling import Pool, mean_of_members{own}"
    load_plugin(write(tmp_path / "mine.py", 'pool("odd", Odd, init="own"),', more=more))
    arch = tiny_arch({"levels": {"word": {"pool": "odd"}}})
    if told:
        with pytest.raises(SpecError, match=re.escape(told)):
            modeling_code(compile_arch(arch))
        return
    code = modeling_code(compile_arch(arch))
    names = {}
    exec(compile(code.split("\nclass DecodeCache")[0], "code", "exec"), names)
    ours = build_model(compile_arch(arch)).get_submodule("ops.h.t1.pool")
    x_BLD = torch.randn(2, 10, 16)
    assert torch.equal(names["Odd"](ours.chunk, ours.offset)(x_BLD), ours(x_BLD))


def test_an_export_is_of_the_code_that_was_loaded(tmp_path):
    own = write(tmp_path / "mine.py", 'pool("odd", Odd),', more="class Odd(MeanPool):\n    pass")
    load_plugin(own)
    own.write_text(own.read_text().replace("    pass", "    factor = 2"))
    with pytest.raises(SpecError, match=r"mine 1 .* has changed since it was loaded"):
        modeling_code(compile_arch(tiny_arch({"levels": {"word": {"pool": "odd"}}})))


TAKEN = {
    'AddedMetric("bits_per_byte", "x", "x", "lower", "text_lm", len),': "a metric 'bits_per_byte' is built in",
    'AddedMetric("loss", "x", "x", "lower", "reach", len),': "a metric 'loss' is built in",
    'AddedMetric("params", "x", "x", "lower", "text_lm", len),': "a metric 'params' is built in",
    'replace(TASKS["text_lm"], name="mine"),': "data of the kind 'python_source' are the task text_lm's",
    'RecallRow("odd", MeanPool, None, None),': "has a row that fails: TypeError",
}


@pytest.mark.parametrize("rows", TAKEN)
def test_names_that_are_taken_elsewhere_and_rows_that_fail(rows, tmp_path):
    more = "from dataclasses import replace\nfrom builder import RecallRow\nfrom studies import AddedMetric\nfrom studies.tasks.table import TASKS\n"
    before = {kind: list(table) for kind, table in OPEN.items()}
    with pytest.raises(SpecError, match=re.escape(TAKEN[rows])):
        load_plugin(write(tmp_path / "mine.py", f'pool("other", MeanPool), {rows}', more=more))
    assert {kind: list(table) for kind, table in OPEN.items()} == before


def test_an_exit_in_a_plugin_is_its_fault(tmp_path):
    own = write(tmp_path / "mine.py", more="import sys\nsys.exit(0)")
    assert "can't be loaded: SystemExit: 0" in run_cli("verify", "--plugin", own, code=2)


def test_an_entry_point_is_no_path_of_the_current_folder(site, monkeypatch):
    write(site / "installed_pool.py")
    install(site, {"pool:other": "installed_pool", "nameless": "installed_pool"})
    (site / "here/installed_pool").mkdir(parents=True)
    (site / "here/installed_pool/__init__.py").write_text("raise RuntimeError('of the current folder')")
    monkeypatch.chdir(site / "here")
    monkeypatch.setattr(verify, "_EXPORTED", 0)
    assert tiny_arch({"levels": {"word": {"pool": "other"}}}).levels["word"].pool == "other"
    forget_plugins()
    assert "13 laws" in run_cli("verify")  # a name that says no kind is left out


def test_a_module_of_a_package_is_known_by_all_of_it(site):
    for name in ("one", "two"):
        folder = site / name / "installed_other"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "parts.py").write_text(f"GAIN = '{name}'\n")
        write(folder / "plugin.py", more="from .parts import GAIN")
    digests = []
    for name in ("one", "two"):
        sys.path.insert(0, str(site / name))
        load_plugin("installed_other.plugin")
        digests.append(records()[0].sha256)
        forget_plugins()
        sys.path.remove(str(site / name))
        for module in [module for module in sys.modules if module.startswith("installed_other")]:
            del sys.modules[module]
    assert len(set(digests)) == 2


def test_a_folders_modules_come_from_their_source(tmp_path):
    folder, stamp = tmp_path / "stale", (1_700_000_000, 1_700_000_000)
    folder.mkdir()
    write(folder / "__init__.py", more="from .parts import GAIN")
    for gain in (1, 2):
        (folder / "parts.py").write_text(f"GAIN = {gain}\n")
        os.utime(folder / "parts.py", stamp)
        if gain == 1:
            py_compile.compile(str(folder / "parts.py"))
        load_plugin(folder)
        assert gain == sys.modules["spiralformer_plugins.stale"].GAIN
        forget_plugins()


def test_what_is_drawn_as_a_box_is_drawn(tmp_path):
    load_plugin(BROKEN)
    from studies.show.svg import draw_svg

    assert "never" in draw_svg(tiny_arch({"graph": {"z": {"loss": "never", "in": "logits"}}}))


def test_one_file_through_two_paths_is_one_plugin(tmp_path):
    own = write(tmp_path / "mine.py")
    (tmp_path / "link.py").symlink_to(own)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.py").symlink_to(own)
    assert load_plugin(own) is load_plugin(tmp_path / "sub/mine.py") is load_plugin(tmp_path / "link.py")


def test_another_version_is_said_before_what_follows_from_it(tmp_path):
    own = write(tmp_path / "mine.py")
    load_plugin(own)
    arch = tiny_arch({"levels": {"word": {"pool": "other"}}})
    save_bundle(tmp_path / "bundle", arch, build_model(compile_arch(arch)))
    forget_plugins()
    load_plugin(write(own, 'pool("renamed", MeanPool),', version="2"))
    with pytest.raises(SpecError, match="was made with plugin mine 1"):
        load_bundle(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    (tmp_path / "bundle/manifest.json").write_text(json.dumps({**manifest, "plugins": None}))
    with pytest.raises(SpecError, match=r"manifest.json: plugins: expected a list"):
        load_bundle(tmp_path / "bundle")


def test_a_score_with_the_wrong_sign_is_found(tmp_path, monkeypatch):
    text = BLEND.read_text().replace('Headline(self.metrics["right"], -1.0)', 'Headline(self.metrics["right"], 1.0)')
    own = tmp_path / "blend.py"
    own.write_text(text.replace("0 if part == ", "1 if part != ").replace("else (200, 1)", "else (200, 0)"))
    row = load_plugin(own).rows[-1]
    found = verify._check_row(row, "task:digits", everything=False).breaches
    assert (
        "headline",
        "its score, of which less is better, is larger for right answers: see its scale",
        "score",
    ) in found
