"""Looking inside whole models: sums over slices, the command, its page and the report's."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, built, run_cli, tiny_arch, tiny_study

from builder import build_model, compile_arch, save_bundle
from builder.laws import randomize
from searchspace.files import arch_from_data
from spiralformer.model import SpiralFormer
from studies.probes import inside
from studies.probes.look import Inside, look, rows_at_once
from studies.probes.trace import Trace
from studies.records.folder import PROBED
from studies.report.inside import inside_figures

MESH = {"graph": {"h": {"topology": {"mesh": {"slots": 4}}, "schedule": ["word", "token", "token"]}}}
PLAIN = arch_from_data(
    {
        **{name: TINY[name] for name in ("name", "seq_len", "d_model", "blocks")},
        "vocab_size": 256,
        "graph": {"x": {"embed": "tokens"}, "y": {"block": "core", "in": "x"}, "logits": {"head": "lm", "in": "y"}},
    }
)


def loss(logits_BLV, targets_BL):
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


def shown(rows=12, length=24):
    tokens_BL = torch.randint(0, 17, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens_BL[:, :-1], tokens_BL[:, 1:]


def test_slices_add_up_to_what_all_of_it_shows():
    arch, model = tiny_arch(MESH), built(MESH).double().eval()
    inputs_BL, targets_BL = shown()
    whole = look(model, arch, [(inputs_BL, targets_BL)], loss)
    parts = look(model, arch, list(zip(inputs_BL.split((6, 4, 2)), targets_BL.split((6, 4, 2)), strict=True)), loss)
    trace = Trace(model, arch, inputs_BL, lambda logits_BLV: loss(logits_BLV, targets_BL).item())
    loop = trace.loop()
    for found in (whole, parts):
        assert found.rows == 12
        assert found.loss == pytest.approx(trace.judge(trace.logits))
        assert found.loops[0].core == pytest.approx([each.core for each in inside.moved(trace, loop)])
        for row, call in zip(found.layers, inside.attended(trace), strict=True):
            assert row.entropy == pytest.approx(call.entropy[0].tolist(), rel=1e-5)
            assert row.distance == pytest.approx(call.distance[0].tolist(), rel=1e-5)
        for row, router in zip(found.routers, inside.routed(trace), strict=True):
            assert row["weights"] == pytest.approx(list(router.weights), rel=1e-5)
    own = whole.loops[0]
    assert own.chunks == [4, 1, 1]
    assert own.states == [0, 1, 2, 3]
    assert own.ranks == pytest.approx(inside.spectra(inside.sampled(loop))[1].tolist())
    assert own.worth == pytest.approx(dict(enumerate(inside.ablated(trace, loop), start=1)))
    assert [len(heads) for heads in own.heads["entropy"]] == [2, 2, 2]
    assert sum(own.changed) == 1
    assert {row["iteration"] for row in whole.routers} == {None, 1, 2, 3}


def test_it_goes_through_json_and_what_is_no_number_is_null():
    arch, model = tiny_arch(MESH), built(MESH).eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("ffn.branch.out.weight")).fill_(math.inf)
    found = look(model, arch, [shown()], loss)
    again = Inside.from_plain(json.loads(json.dumps(found.to_plain(), allow_nan=False)))
    assert again.loss is None
    assert again.to_plain() == found.to_plain()
    figures, told = inside_figures([again])
    assert len(figures) == sum(len(section["figures"]) for section in told["sections"])


def test_of_a_long_loop_states_are_looked_at_here_and_there():
    over = {"graph": {"h": {"schedule": ["token"] * 80, "topology": "residual"}}}
    found = look(built(over).eval(), tiny_arch(over), [shown(2)], loss).loops[0]
    assert (len(found.core), len(found.states), found.states[0], found.states[-1]) == (80, 33, 0, 80)
    assert list(found.worth) == found.states[1:]
    assert len(found.similarity) == len(found.ranks) == 33


def test_slices_are_bounded():
    small, large = tiny_arch(), tiny_arch({"d_model": 1024, "seq_len": 4096})
    assert rows_at_once(small, 24) > 100
    assert 1 <= rows_at_once(large, 4096) < 100


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A loop with a memory, a loop with coarse levels, and a model without a loop."""
    folder = tmp_path_factory.mktemp("bundles")
    archs = {
        "mesh": tiny_arch({**MESH, "vocab_size": 256}),
        "spiral": tiny_arch({"vocab_size": 256}),
        "plain": PLAIN,
    }
    for name, arch in archs.items():
        save_bundle(folder / name, arch, randomize(build_model(compile_arch(arch))))
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} is {i} squared\n" for i in range(200)))
    return folder


def test_the_command_writes_numbers_and_a_page(bundles, tmp_path):
    paths = [bundles / name for name in ("mesh", "spiral", "plain")]
    output = run_cli("probe", *paths, "--data", bundles / "text.txt", "-o", tmp_path / "out", "--tokens", 960)
    assert "h, by iteration" in output
    assert "it has no loop" in output
    found = json.loads((tmp_path / "out" / PROBED).read_text())["models"]
    assert [(each["name"], each["rows"], len(each["loops"])) for each in found] == [
        ("mesh", 40, 1),
        ("spiral", 40, 1),
        ("plain", 40, 0),
    ]
    page = (tmp_path / "out/probe.html").read_text()
    drawn = json.loads(re.search(r"const FIGURES = (.*);\n", page)[1])
    assert {name for name in drawn if f'id="{name}"' in page} == set(drawn)
    assert {"inside-entropy", "inside-layers", "inside-worth", "inside-spectra-1", "inside-routers-0"} <= set(drawn)
    assert "spiralformer probe" in page
    assert "jacobian" not in page  # its label stands there
    assert "spectral radius of the last iteration" in page
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:|#)[^"']*""", re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nowhere"], "nowhere: is not there"),
        (["mesh"], "--data"),  # a bundle that no study made says nothing of its data
        (["mesh", "--data", "missing.txt"], "--data: no file matches"),
        (["mesh", "--data", "text.txt", "--schedule", "g=3"], "there is no loop 'g'"),
        (["mesh", "--data", "text.txt", "--schedule", "h"], "write e.g. h=8"),
        (["mesh"] * 7, "at most 6"),
    ],
    ids=str,
)
def test_what_can_not_be_looked_at_is_told(bundles, given, told, monkeypatch):
    monkeypatch.chdir(bundles)
    assert told in run_cli("probe", *given, code=2)
    assert not [path for path in bundles.iterdir() if path.name.endswith("-probe")]


def test_a_study_looks_inside_its_best_and_baseline(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_cli("search", tiny_study(tmp_path), "--dir", run, "--serial", "search.num_trials=2")
    found = json.loads((run / PROBED).read_text())["models"]
    assert [each["name"] for each in found] == ["the best", "the baseline"]
    page = (run / "report.html").read_text()
    assert "Inside the models" in page
    assert 'id="inside-entropy"' in page
    monkeypatch.setattr(SpiralFormer, "generate", None)
    run_cli("probe", run / "best", "--tokens", 480)  # on the study's own data
    assert json.loads((run / "best-probe" / PROBED).read_text())["models"][0]["rows"] == 20
    of_another = json.loads((run / PROBED).read_text())
    of_another["models"][0]["arch_id"] = "0" * 16
    for text in (json.dumps(of_another), '{"models": [{"name": 3}]}', "{"):
        (run / PROBED).write_text(text)
        run_cli("report", run)
        assert "Inside the models" not in (run / "report.html").read_text()
