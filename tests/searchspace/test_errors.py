"""Broken files and values: each gives one `SpecError` that says where, what, and what would be right."""

import time

import pytest
from helpers import ROOT, tiny_data

from searchspace import SpecError, load_arch, load_space
from searchspace.errors import one_of
from searchspace.plain import dump_yaml
from studies.config import load_study

HEAD = "vocab_size: 16\nseq_len: 16\nd_model: 16\n"
GRAPH = "graph:\n  x: {embed: tokens}\n  logits: {head: lm, in: x}\n"

FILES = [  # (what, text, expected parts of the message)
    ("unclosed flow", HEAD + "levels: {token: {chunk: 1}\n", ["is not valid YAML", ":5"]),
    ("tab", HEAD + "levels:\n\ttoken: {chunk: 1}\n", ["is not valid YAML"]),
    ("two documents", HEAD + "---\n" + HEAD, ["is not valid YAML"]),
    ("scalar root", "hello\n", ["root is a str"]),
    ("list root", "- 1\n- 2\n", ["root is a list"]),
    ("empty file", "", ["'vocab_size' is missing"]),
    ("nul byte", "name: a\0b\n", ["is not valid YAML"]),
    ("not utf-8", b"name: \xff\xfe\n", ["UTF-8"]),
    ("duplicate key", "d_model: 8\nd_model: 16\n", ["duplicate"]),
    ("python tag", "name: !!python/object/apply:os.system ['echo hi']\n", ["is not valid YAML"]),
    ("alias bomb", "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ), ["exceeds the configured limit"]),
    ("deep nesting", "a: " + "[" * 500 + "]" * 500, ["nested deeper"]),
    ("deep but legal", "a: " + "[" * 90 + "]" * 90, ["nested deeper"]),
    ("nested without end", "a: " + "[" * 50_000, ["nested deeper"]),
    ("nested maps without end", "{a: " * 50_000, ["nested deeper"]),
    ("extends what is no YAML", "extends: ../../../etc/passwd\n", ["extends", "not named as YAML"]),
    ("extends outside", "extends: ../../../../../../etc/x.yaml\n", ["extends"]),
    ("leading zero", "vocab_size: 0100\n", ["0100", "begins with a zero"]),
    ("base 60", "vocab_size: 1:40\n", ["1:40", "base 60"]),
    ("steering a terminal", "\"\\e]0;owned\\a\": 1\n", ["unknown key"]),
    ("too large", "# " + "x" * 300_000, ["bytes", "under"]),
    ("integer key", HEAD + "levels: {1: {chunk: 1}}\n" + GRAPH, ["key 1 is not text"]),
    ("missing value", HEAD.replace("16\n", "???\n", 1) + GRAPH, ["vocab_size", "???"]),
    ("environment", HEAD + "name: ${oc.env:HOME}\n" + GRAPH, ["name", "resolvers", "off"]),
    ("dangling reference", HEAD + "name: ${vars.nope}\n" + GRAPH, ["name", "refers to nothing"]),
    ("malformed reference", HEAD + "name: ${a b}\n" + GRAPH, ["name"]),
    ("reference cycle", HEAD.replace("d_model: 16", "d_model: ${seq_len}").replace("seq_len: 16", "seq_len: ${d_model}")
     + GRAPH, ["circle"]),
    ("extends itself", "extends: broken.yaml\n", ["circle"]),
    ("extends nothing", "extends: nowhere.yaml\n", ["extends", "no such file"]),
    ("extends a list", "extends: [a, b]\n", ["extends", "expected a file name"]),
]  # fmt: skip

VALUES = [  # (what, laid over the tiny architecture, path, expected parts)
    ("unknown key", {"d_modle": 16}, "d_modle", ["unknown key", "did you mean 'd_model'"]),
    ("text for a number", {"d_model": "16"}, "d_model", ["expected a whole number", "'16'", "without quotes"]),
    ("bool for a number", {"d_model": True}, "d_model", ["expected a whole number", "True"]),
    ("float for a count", {"seq_len": 16.5}, "seq_len", ["expected a whole number", "16.5"]),
    ("nan", {"norm_eps": float("nan")}, "norm_eps", ["finite"]),
    ("zero width", {"d_model": 0}, "d_model", ["too small", "2 or more"]),
    ("huge vocabulary", {"vocab_size": 10**12}, "vocab_size", ["too large"]),
    ("5000 digits", {"vocab_size": 10**4000}, "vocab_size", ["too large"]),
    ("zero chunk", {"levels": {"word": {"chunk": 0}}}, "levels.word.chunk", ["too small"]),
    ("offset beyond chunk", {"levels": {"word": {"offset": 4}}}, "levels.word.offset", ["beyond the chunk", "0 .. 3"]),
    ("unknown pool", {"levels": {"word": {"pool": "mena"}}}, "levels.word.pool", ["'mena'", "did you mean 'mean'"]),
    ("pool as a mapping", {"levels": {"word": {"pool": {"a": 1}}}}, "levels.word.pool", ["unknown value"]),
    ("heads don't divide", {"blocks": {"core": {"heads": 3}}}, "blocks.core.heads", ["3", "16", "divisor"]),
    ("kv heads don't divide", {"blocks": {"core": {"heads": 4, "kv_heads": 3}}}, "blocks.core.kv_heads", ["divisor"]),
    ("odd rotation", {"blocks": {"core": {"heads": 16}}}, "blocks.core.rotary_fraction", ["odd"]),
    ("missing layers", {"blocks": {"other": {"heads": 2}}}, "blocks.other", ["'layers' is missing"]),
    ("dropout over 1", {"blocks": {"core": {"dropout": 1.5}}}, "blocks.core.dropout", ["too large"]),
    ("level as a list", {"levels": ["token"]}, "levels", ["expected a mapping"]),
    ("path in a name", {"name": "../../etc"}, "name", ["can't be used as a name"]),
    ("dot in a node", {"graph": {"a.b": {"norm": "rms", "in": "x"}}}, "graph.'a.b'", ["can't be used"]),
    ("10 kB name", {"name": "x" * 10_000}, "name", ["can't be used"]),
    ("no operation", {"graph": {"y": {"in": "x"}}}, "graph.y", ["names no operation", "embed"]),
    ("misspelt operation", {"graph": {"y": {"blok": "core", "in": "x"}}}, "graph.y", ["did you mean 'block'"]),
    ("two operations", {"graph": {"y": {"block": "core", "pool": "word", "in": "x"}}}, "graph.y", ["two operations"]),
    ("dangling input", {"graph": {"y": {"block": "core", "in": "z"}}}, "graph.y.in", ["no node is called 'z'"]),
    ("unknown block", {"graph": {"y": {"block": "corr", "in": "x"}}}, "graph.y.block", ["did you mean 'core'"]),
    ("unknown level", {"graph": {"y": {"pool": "wrd", "in": "x"}}}, "graph.y.pool", ["did you mean 'word'"]),
    ("unknown level in a schedule", {"graph": {"h": {"loop": "core", "in": "x", "schedule": ["token", "wrod"]}}},
     "graph.h.schedule.1", ["did you mean 'word'"]),
    ("empty schedule", {"graph": {"h": {"loop": "core", "in": "x", "schedule": []}}}, "graph.h.schedule", ["0 iter"]),
    ("unknown topology", {"graph": {"h": {"loop": "core", "in": "x", "schedule": ["token"], "topology": "mash"}}},
     "graph.h.topology", ["did you mean 'mesh'"]),
    ("one slot", {"graph": {"h": {"loop": "core", "in": "x", "schedule": ["token"], "topology": {"mesh": {"slots": 1}}}}},
     "graph.h.topology.mesh.slots", ["too small"]),
    ("join of one", {"graph": {"y": {"join": "residual", "in": ["x"]}}}, "graph.y.in", ["1 inputs", "2"]),
    ("cycle", {"graph": {"a": {"norm": "rms", "in": "b"}, "b": {"norm": "rms", "in": "a"}}}, "graph.b.in",
     ["cycle", "a <- b <- a"]),
    ("two heads", {"graph": {"l2": {"head": "lm", "in": "h"}}}, "graph", ["2 heads"]),
    ("no head", {"graph": {"logits": None}}, "graph", ["0 heads"]),
    ("no embed", {"graph": {"x": None}}, "graph", ["no embed"]),
    ("python path", {"graph": {"y": {"_target_": "os.system", "in": "x"}}}, "graph.y", ["names no operation"]),
]  # fmt: skip

SPACES = [  # (what, laid over the tiny architecture, path, expected parts)
    ("min over max", {"d_model": {"int": [32, 16]}}, "d_model.int", ["above", "swap"]),
    ("log from zero", {"norm_eps": {"float": [0.0, 1.0], "log": True}}, "norm_eps.float", ["log range", "above 0"]),
    ("empty choice", {"d_model": {"choice": []}}, "d_model.choice", ["0 options"]),
    ("choice of one text", {"d_model": {"choice": "abc"}}, "d_model.choice", ["expected a list"]),
    ("same option twice", {"d_model": {"choice": [16, 32, 16]}}, "d_model.choice.2", ["twice"]),
    ("infinite option", {"norm_eps": {"choice": [float("inf")]}}, "norm_eps.choice.0", ["finite"]),
    ("step 0", {"d_model": {"int": [16, 32], "step": 0}}, "d_model.step", ["0"]),
    ("step below twelve digits", {"norm_eps": {"float": [1.3795849098840138] * 2, "step": 1e-12}}, "norm_eps.step", ["lost", "at least"]),
    ("step of no size", {"norm_eps": {"float": [1.3795849098840138] * 2, "step": 1e-323}}, "norm_eps.step", ["lost"]),
    ("log and step", {"d_model": {"int": [16, 32], "step": 2, "log": True}}, "d_model.step", ["exclude"]),
    ("infinite bound", {"norm_eps": {"float": [0.1, float("inf")]}}, "norm_eps.float.1", ["finite"]),
    ("text bound", {"d_model": {"int": ["a", 32]}}, "d_model.int.0", ["'a'"]),
    ("stray key", {"d_model": {"int": [16, 32], "lgo": True}}, "d_model.lgo", ["does not belong", "did you mean 'log'"]),
    ("unused var", {"vars": {"width": {"choice": [1, 2]}}}, "vars.width", ["nothing refers to it"]),
    ("sequence length", {"graph": {"h": {"loop": "core", "in": "x", "schedule": {"sequence": {"of": ["token"], "length": [3, 2]}}}}},
     "graph.h.schedule.sequence.length", ["[3, 2]"]),
    ("misspelt choice", {"d_model": {"choise": [16, 32]}}, "d_model", ["did you mean 'choice'"]),
    ("misspelt level in a sequence", {"graph": {"h": {"loop": "core", "in": "x", "schedule": {"sequence":
     {"of": ["wrod", "token"], "length": 2, "order": "coarse_to_fine"}}}}}, "graph.h.schedule", ["did you mean 'word'"]),
    ("a misspelt key beside a constraint", {"graph": {"h": {"loop": "core", "in": "x", "shedule": ["word"]}},
     "constraints": ["iterations('h') > 1"]}, "graph.h.shedule", ["did you mean 'schedule'"]),
    ("sequence order", {"graph": {"h": {"loop": "core", "in": "x", "schedule": {"sequence":
     {"of": ["token"], "length": 2, "order": "fine"}}}}}, "graph.h.schedule.sequence.order", ["fine_to_coarse"]),
    ("bad option inside", {"levels": {"word": {"pool": {"choice": ["mean", "median"]}}}}, "levels.word.pool", ["'median'"]),
    ("impossible constraints", {"d_model": {"choice": [16, 32]}, "constraints": ["d_model == 24"]}, "constraints",
     ["no draw", "loosen"]),
    ("constraint syntax", {"constraints": ["d_model %% 2"]}, "constraints.0", ["can't read the expression"]),
    ("constraint call", {"constraints": ["__import__('os').system('echo hi')"]}, "constraints.0", ["unknown function"]),
    ("constraint dunder", {"constraints": ["d_model.__class__ == 1"]}, "constraints.0", ["not allowed"]),
    ("constraint comprehension", {"constraints": ["[x for x in levels]"]}, "constraints.0", ["not allowed"]),
    ("constraint lambda", {"constraints": ["(lambda: 1)()"]}, "constraints.0", ["unknown function"]),
    ("constraint power", {"constraints": ["9 ** 9 ** 9 > 1"]}, "constraints.0", ["out of range"]),
    ("constraint name", {"constraints": ["vars.nope > 1"]}, "constraints.0", ["no vars.nope"]),
    ("constraint types", {"constraints": ["name * 3 == 3"]}, "constraints.0", ["needs numbers"]),
    ("constraint not a list", {"constraints": "d_model > 1"}, "constraints", ["expected a list"]),
]  # fmt: skip

STUDY = {"space": "quickstart", "training": {"flops": 1e9}}
STUDIES = [  # (what, study, path, expected parts)
    ("no space", {"training": {"flops": 1e9}}, "", ["'space' is missing"]),
    ("space not there", {"space": "nowhere.yaml"}, "space", ["no such file"]),
    ("unknown key", {**STUDY, "serach": {}}, "serach", ["did you mean 'search'"]),
    ("unknown sampler", {**STUDY, "search": {"sampler": "tpee"}}, "search.sampler", ["did you mean 'tpe'"]),
    ("two sizes", {**STUDY, "scale": {"sizes": [8, 16]}}, "scale.sizes", ["3 or more"]),
    ("sizes out of order", {**STUDY, "scale": {"sizes": [8, 24, 16]}}, "scale.sizes", ["small to large"]),
    ("size of no width", {**STUDY, "scale": {"sizes": [8, 16, {"depth": 2}]}}, "scale.sizes.2", ["d_model"]),
    ("size in words", {**STUDY, "scale": {"sizes": [8, 16, "large"]}}, "scale.sizes.2", ["write a width"]),
    ("horizons out of order", {**STUDY, "scale": {"sizes": [8, 16, 32], "horizons": [1, 0.5]}}, "scale.horizons", ["[0.5, 1]"]),
    ("no trials", {**STUDY, "search": {"num_trials": 0}}, "search.num_trials", ["1 or more"]),
    ("unknown stopper", {**STUDY, "search": {"stopper": "asho"}}, "search.stopper", ["asha"]),
    ("both budgets", {**STUDY, "training": {"flops": 1e9, "tokens": 1e6}}, "training", ["exactly one"]),
    ("no budget", {**STUDY, "training": {}}, "training", ["exactly one"]),
    ("negative rate", {**STUDY, "training": {"flops": 1e9, "lr": -1.0}}, "training.lr", ["too small"]),
    ("unreadable limit", {**STUDY, "budget": {"params": "lots"}}, "budget.params", ["'lots'", "1.5M"]),
    ("unknown limit", {**STUDY, "budget": {"parms": 1000}}, "budget.parms", ["did you mean 'params'"]),
    ("zero limit", {**STUDY, "budget": {"params": 0}}, "budget.params", ["can't read the limit"]),
    ("unknown objective", {**STUDY, "objectives": ["loss", "speed"]}, "objectives.1", ["flops_per_token"]),
    ("objectives without loss", {**STUDY, "objectives": ["params"]}, "objectives", ["put loss first"]),
    ("baseline not there", {**STUDY, "baseline": "nowhere"}, "baseline.0", ["no such file"]),
    ("unknown data", {**STUDY, "data": {"kind": "web"}}, "data.kind", ["python_source"]),
    ("a key of a section", {**STUDY, "num_trials": 3}, "num_trials", ["did you mean search.num_trials"]),
    ("gpus below zero", {**STUDY, "resources": {"gpus_per_trial": -1}}, "resources.gpus_per_trial", ["0 or more"]),
]  # fmt: skip


def check(error: SpecError, path: str, parts: list[str]) -> None:
    text = str(error)
    assert error.path == path, text
    for part in parts:
        assert part in text, text
    assert error.remedy or "missing" in text, text
    assert len(text) < 2000, text


@pytest.mark.parametrize(("text", "parts"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_broken_file(text, parts, tmp_path, capfd):
    file = tmp_path / "broken.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        load_arch(file)
    assert time.perf_counter() - start < 1.0
    assert str(file) in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("over", "path", "parts"), [row[1:] for row in VALUES], ids=[row[0] for row in VALUES])
def test_broken_architecture(over, path, parts, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(dump_yaml(tiny_data(over)))
    with pytest.raises(SpecError) as caught:
        load_arch(file)
    assert str(file) in str(caught.value)
    check(caught.value, path, parts)


@pytest.mark.parametrize(("over", "path", "parts"), [row[1:] for row in SPACES], ids=[row[0] for row in SPACES])
def test_broken_space(over, path, parts, tmp_path, capfd):
    file = tmp_path / "broken.yaml"
    file.write_text(dump_yaml(tiny_data(over)))
    with pytest.raises(SpecError) as caught:
        load_space(file).check()
    check(caught.value, path, parts)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("study", "path", "parts"), [row[1:] for row in STUDIES], ids=[row[0] for row in STUDIES])
def test_broken_study(study, path, parts, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(dump_yaml(study))
    with pytest.raises(SpecError) as caught:
        load_study(file)
    assert str(file) in str(caught.value)
    check(caught.value, path, parts)


def test_a_study_is_told_from_an_architecture(tmp_path):
    (tmp_path / "study.yaml").write_text(dump_yaml(STUDY))
    for load in (load_arch, load_space):
        with pytest.raises(SpecError, match="is a study"):
            load(tmp_path / "study.yaml")


def test_errors_of_a_space_name_its_file(tmp_path):
    (tmp_path / "space.yaml").write_text(dump_yaml(tiny_data({"blocks": {"core": {"heads": {"choice": [3, 5]}}}})))
    with pytest.raises(SpecError, match=r"space\.yaml"):
        load_space(tmp_path / "space.yaml").check()


def test_there_are_enough_rows():
    assert len(FILES) + len(VALUES) + len(SPACES) + len(STUDIES) >= 40


def test_missing_file_names_what_is_shipped():
    with pytest.raises(SpecError, match="did you mean 'plain_4'"):
        load_arch("plain_5")
    with pytest.raises(SpecError, match="`spiralformer list`"):
        load_arch("nowhere")
    for folder, message in ((".", "is not a file name"), (str(ROOT), "is a folder")):
        with pytest.raises(SpecError, match=message):
            load_arch(folder)


def test_secrets_of_the_environment_stay_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    file = tmp_path / "env.yaml"
    file.write_text("extends: plain_4\nname: ${oc.env:SECRET_TOKEN}\n")
    with pytest.raises(SpecError) as caught:
        load_arch(file)
    assert "hunter2" not in str(caught.value)


def test_line_number_points_at_the_deepest_known_place(tmp_path):
    file = tmp_path / "arch.yaml"
    file.write_text(HEAD + "levels:\n  token: {chunk: 1}\n  word:\n    chunk: 4\n    pool: mena\n" + GRAPH)
    with pytest.raises(SpecError, match=r"arch\.yaml:8: levels\.word\.pool"):
        load_arch(file)


def test_one_of_names_the_nearest():
    assert one_of(["mean", "last"], "mena") == "did you mean 'mean'? choose one of: mean, last"


@pytest.mark.parametrize(
    ("override", "path"),
    [("d_model=-3", "d_model"), ("blocks.stack.heds=3", "blocks.stack.heds"), ("levels={a: 1}", "levels.a")],
)
def test_an_override_is_blamed_itself(override, path):
    """Not the line of the file that it was laid over."""
    with pytest.raises(SpecError) as caught:
        load_arch("plain_4", [override])
    assert str(caught.value).startswith(f"command line: {path}")


@pytest.mark.parametrize("name", ["é" * 200, f"a/{'é' * 200}/b.yaml", "x/" * 3000 + "y", "a\0b"])
@pytest.mark.parametrize("load", [load_arch, load_space, load_study])
def test_names_that_no_file_can_have(load, name):
    with pytest.raises(SpecError):
        load(name)
