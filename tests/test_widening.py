"""How many places a new member of each closed set touches: it is added to a copy, and must then work everywhere."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

POOL = (
    {
        "searchspace/nodes.py": [('PoolKind: TypeAlias = Annotated[Literal["mean"', 'PoolKind: TypeAlias = Annotated[Literal["max", "mean"')],
        "builder/graph/ops.py": [('    pool("mean", "pooling.MeanPool"),\n', '    pool("mean", "pooling.MeanPool"),\n    pool("max", "pooling.MaxPool"),\n')],
        "spiralformer/pooling.py": [("class LastPool(Pool):", '''class MaxPool(Pool):
    """A chunk's largest values; members that a first chunk lacks count for nothing."""

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        x_BMGD = chunks[0]
        lacking = _is_first(x_BMGD)[:, None] & (torch.arange(x_BMGD.shape[2], device=x_BMGD.device) < missing)
        return x_BMGD.masked_fill(lacking[..., None], -torch.inf).amax(dim=2)


class LastPool(Pool):''')],
    },
    """
over = {"levels": {"word": {"pool": "max", "offset": 3}}}
graph, model = whole(over)
assert "MaxPool" in modeling_code(graph) and "max" in draw_svg(tiny_arch(over))
assert "`max`" in key_reference() and '"max"' in json.dumps(json_schema("space"))
twice = {"h": None, "a": {"pool": "word", "in": "x"}, "b": {"pool": "word", "in": "x"}, "c": {"join": "sum", "in": ["a", "b"]},
         "d": {"upscale": "token", "in": "c"}, "y": {"join": "sum", "in": ["d", "x"]}, "logits": {"head": "lm", "in": "y"}}
merged = compile_arch(tiny_arch({**over, "graph": twice}))
assert sum(node.op == "pool.max" for node in merged.nodes) == 1  # it owns nothing: equal pools are one
""",
)  # fmt: skip
FEED_FORWARD = (
    {
        "searchspace/nodes.py": [('FfnKind: TypeAlias = Annotated[Literal["gelu"', 'FfnKind: TypeAlias = Annotated[Literal["silu", "gelu"')],
        "builder/graph/blocks.py": [('        feed_forward("relu2"', '        feed_forward("silu", "feedforward.SiluFeedForward"),\n        feed_forward("relu2"')],
        "spiralformer/feedforward.py": [("class SquaredReluFeedForward", '''class SiluFeedForward(GeluFeedForward):
    """out(silu(up(x)))."""

    def activate(self, hidden_BLF: Tensor) -> Tensor:
        return F.silu(hidden_BLF)


class SquaredReluFeedForward''')],
    },
    """
graph, model = whole({"blocks": {"core": {"ffn": "silu"}}})
assert type(model.blocks.core.layers[0].ffn.branch).__name__ == "SiluFeedForward"
assert "SiluFeedForward" in modeling_code(graph) and "`silu`" in key_reference()
""",
)  # fmt: skip
TOPOLOGY = (
    {
        "searchspace/topologies.py": [
            ('        "base",\n        "residual"', '        "twice",\n        "base",\n        "residual"'),
            ('        _plain("anchor"),\n', '        _plain("anchor"),\n        _plain("twice"),\n'),
        ],
        "builder/graph/topologies.py": [('        Unrolling("anchor",', '        Unrolling("twice", _added_to(lambda loop, state: (state, loop.start))),\n        Unrolling("anchor",')],
    },
    """
over = {"graph": {"h": {"topology": "twice"}}}
graph, model = whole(over)
assert "twice" in draw_svg(tiny_arch(over)) and "`twice`" in key_reference()
""",
)  # fmt: skip
BLOCK_ATTRIBUTE = (
    {
        "searchspace/arch.py": [('    bias: bool = key("Biases', '    v_norm: bool = key("Normalise values per head (RMS).", default=False)\n    bias: bool = key("Biases')],
        "builder/graph/ops.py": [
            ('"qk_norm", "bias", "dropout")', '"qk_norm", "v_norm", "bias", "dropout")'),
            ("(2 * h if block.qk_norm else 0)", "(2 * h if block.qk_norm else 0) + (h if block.v_norm else 0)"),
        ],
        "spiralformer/block.py": [
            ("    qk_norm: bool = False\n", "    qk_norm: bool = False\n    v_norm: bool = False\n"),
            ("def _attention(c: BlockConfig) -> Attention:\n    return Attention(", "def _attention(c: BlockConfig) -> Attention:\n    made = Attention("),
            ("bias=c.bias, eps=c.norm_eps\n    )\n", "bias=c.bias, eps=c.norm_eps\n    )\n    made.v_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.v_norm else nn.Identity()\n    return made\n"),
        ],
    },
    """
graph, model = whole({"blocks": {"core": {"v_norm": True}}})
assert compile_arch(tiny_arch()).arch_id != graph.arch_id and "`v_norm`" in key_reference()
""",
)  # fmt: skip
COST_METRIC = (
    {
        "builder/pricing/cost.py": [
            ('        CostMetric("params_non_embedding"', '        CostMetric("cache_bytes", "Whole key-value cache.", "cache", objective=True),\n        CostMetric("params_non_embedding"'),
            ("    @property\n    def flops_per_token", "    @property\n    def cache_bytes(self) -> int:\n        return self.kv_cache_bytes\n\n    @property\n    def flops_per_token"),
        ],
    },
    """
assert decode(BudgetSpec, {"cache_bytes": "1MiB"}, "budget").resolve(None).allows(estimate(compile_arch(tiny_arch())))
assert "cache_bytes" in COST_OBJECTIVES and "`cache_bytes`" in key_reference()
assert "cache_bytes" in json.dumps(json_schema("study"))
""",
)  # fmt: skip
SAMPLER = (
    {
        "studies/sections.py": [('SamplerName: TypeAlias = Annotated[\n    Literal["tpe"', 'SamplerName: TypeAlias = Annotated[\n    Literal["qmc", "tpe"')],
        "studies/strategy/samplers.py": [('        Sampler("random",', '        Sampler("qmc", "a quasi-random sequence", lambda asked: optuna.samplers.QMCSampler(seed=asked.seed, warn_independent_sampling=False, warn_asynchronous_seeding=False)),\n        Sampler("random",')],
    },
    """
driver = end_all(make_driver(folder, {"search": {"sampler": "qmc", "num_trials": 9}}))
assert len(driver.records) == 10 and "`qmc`" in key_reference()
""",
)  # fmt: skip
FORMAT = (
    {
        "studies/commands/export.py": [
            ('        Format("torch",', '        Format("state", "a state dict, .pt", ".pt", _to_state),\n        Format("torch",'),
            ("FORMATS = table(", '''def _to_state(bundle: Path, out: Path) -> Path:
    import torch

    torch.save(load_bundle(bundle).model.state_dict(), out)
    return out


FORMATS = table('''),
        ],
    },
    """
graph, model = whole({})
bundle = save_bundle(folder / "bundle", tiny_arch(), model)
run_cli("export", bundle, "--format", "state", "-o", folder / "x.pt")
assert set(torch.load(folder / "x.pt")) == set(model.state_dict())
assert "choose one of: bundle, hf, state, torch" in " ".join(run_cli("export", bundle, "--format", "?", code=2).split())
""",
)  # fmt: skip
TASK = (
    {
        "studies/tasks/reversal.py": [("", '''"""Writing a row of digits backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import DataFacts, Headline, Metric
from studies.data.settings import DataConfig
from studies.tasks.pairs import Pairs, prepare_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversalData(DataConfig):
    """Rows of digits."""

    kind: Literal["reversal"] = key("Source: digits.", default="reversal")
    length: int = key("Digits in a row.", default=24, low=2, high=999)


class Rows(Pairs):
    metrics = table("a metric", (Metric("right", "right", "share of held-out digits", better="higher"), Metric("loss", "nats", "loss", better="lower")))

    @property
    def headline(self):
        return Headline(self.metrics["right"], -1.0)

    def measure(self, logits_BLV, targets_BL):
        return {"right": (logits_BLV.argmax(-1) == targets_BL).float().mean(), "loss": self.loss(logits_BLV, targets_BL)}


def facts_of(config):
    return DataFacts(kind="reversal", task="reversal", vocab_size=10, dtype="uint8", positions=config.length,
                     train_tokens=2000 * config.length, val_tokens=200 * config.length, source="digits")


def prepare_rows(config, folder, base):
    def make(part):
        draw = np.random.default_rng(part == "train")
        rows = draw.integers(0, 10, (1000 if part == "train" else 100, config.length))
        return np.concatenate((rows, rows[:, ::-1]), axis=1)

    return prepare_pairs(Rows, config, facts_of(config), folder, make)
''')],
        "studies/tasks/table.py": [
            ("from studies.tasks.reach import", "from studies.tasks import reversal\nfrom studies.tasks.reach import"),
            ('        Task(\n            "reach",', '''        Task("reversal", "writes digits backwards", causal=False, kinds=("reversal",), config=reversal.ReversalData,
             dataset=reversal.Rows, prepare=reversal.prepare_rows, examine=None,
             look=lambda config, base, prepare: reversal.facts_of(config)),
        Task(\n            "reach",'''),
        ],
    },
    """
assert "`length`" in key_reference() and "reversal" in json.dumps(json_schema("study"))
study = folder / "study.yaml"
over = {"causal": False, "vocab_size": 17, "graph": {"h": {"topology": {"choice": ["residual", "mesh"]}}}}
study.write_text(dump_yaml({"space": tiny_data(over), "data": {"kind": "reversal"}, "baseline": [tiny_data({"causal": False})],
    "training": {"flops": 2e7, "batch_tokens": 48, "eval_tokens": 480}, "search": {"num_trials": 2, "stopper": "none"}}))
said = run_cli("search", study, "--dir", folder / "run", "--serial")
assert "right better" in said or "right worse" in said
assert "share of held-out digits" in (folder / "run/report.html").read_text()
run_cli("export", folder / "run", "--format", "hf", "-o", folder / "hf")
""",
)  # fmt: skip
CASES = {
    "pool": POOL, "feed-forward": FEED_FORWARD, "topology": TOPOLOGY, "block attribute": BLOCK_ATTRIBUTE, "cost metric": COST_METRIC,
    "sampler": SAMPLER, "export format": FORMAT, "task": TASK,
}  # fmt: skip

PRELUDE = """
import json, sys, tempfile
from pathlib import Path
import torch
from helpers import end_all, make_driver, run_cli, tiny_arch, tiny_data
from builder.laws import first_leak, randomize, truth
from builder import BudgetSpec, build_model, compile_arch, estimate, save_bundle
from builder.exchange.hf_export import modeling_code
from searchspace.plain import decode, dump_yaml
from studies.sections import COST_OBJECTIVES
from studies.show.keys import key_reference
from studies.show.schema import json_schema
from studies.show.svg import draw_svg

folder = Path(tempfile.mkdtemp())

def whole(over):
    '''Priced as built, causal, decoded as run, in rows of different lengths, and exported.'''
    graph = compile_arch(tiny_arch(over))
    cost = estimate(graph)
    assert (cost.params, cost.flops) == truth(graph)
    model = randomize(build_model(graph))
    assert first_leak(model, 21, 17) is None
    tokens, mask = torch.randint(0, 17, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    state = model.decode_state(2)
    logits = [model.prefill(tokens[:, :12], state, mask[:, :12]), *[model.decode(tokens[:, i], state) for i in range(12, 20)]]
    alone = torch.cat((model(tokens[:1, 7:])[:, -9:], model(tokens[1:])[:, -9:]))
    assert torch.allclose(torch.stack(logits, dim=1), alone, atol=1e-9)
    compile(modeling_code(graph), "code", "exec")
    return graph, model.float()
"""


DEFAULT = ("pool", "topology", "task")


@pytest.mark.parametrize(
    ("edits", "check"),
    [pytest.param(*case, id=name, marks=() if name in DEFAULT else pytest.mark.slow) for name, case in CASES.items()],
)
def test_a_new_member_touches_three_places_and_works(tmp_path, edits, check):
    assert len(edits) <= 3
    for package in ("searchspace", "builder", "spiralformer", "studies"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, changes in edits.items():
        text = (tmp_path / file).read_text() if (tmp_path / file).exists() else ""
        for old, new in changes:
            assert text.count(old) == 1 or not old, (file, old)
            text = text.replace(old, new) if old else new
        (tmp_path / file).write_text(text)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + check],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
