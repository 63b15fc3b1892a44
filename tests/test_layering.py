"""Imports go one way (searchspace, spiralformer <- builder <- studies), and pricing leaves torch out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

STDLIB = set(sys.stdlib_module_names)
MAY_IMPORT = {
    "searchspace": {"searchspace", "omegaconf", "yaml"},
    "spiralformer": {"spiralformer", "torch"},
    "builder": {"builder", "searchspace", "spiralformer", "torch", "torch_geometric", "safetensors", "transformers"},
    "studies": {
        "studies", "builder", "searchspace", "spiralformer", "torch", "numpy", "optuna", "ray", "rich", "typer", "plotly", "jinja2",
        "fsspec", "safetensors", "scipy", "sklearn", "torch_geometric",
    },
}  # fmt: skip
ONLY_IN = {  # package -> the only files that may import it
    "omegaconf": {"searchspace/loading.py"},
    "ray": {"studies/ray_execution.py"},
    "transformers": {"builder/hf_export.py"},
    "optuna": {
        "studies/importance.py",
        "studies/journal.py",
        "studies/proposer.py",
        "studies/samplers.py",
        "studies/surrogate.py",
        "studies/searcher.py",
        "studies/warm_start.py",
    },
}
TORCH_FREE = ("searchspace", "builder.compiler", "builder.cost", "builder.budget", "builder.narrowing", "builder")


def imports_of(file: Path) -> set[str]:
    """Top-level names of every import, inside functions and type-checking blocks too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def violations(root: Path) -> list[str]:
    found = []
    for package, allowed in MAY_IMPORT.items():
        for file in sorted((root / package).rglob("*.py")):
            name = str(file.relative_to(root))
            for imported in sorted(imports_of(file) - STDLIB - {"__future__"}):
                if imported not in allowed or name not in ONLY_IN.get(imported, {name}):
                    found.append(f"{name} imports {imported}")
    return found


def test_imports_go_one_way():
    assert violations(ROOT) == []
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("searchspace/a.py", "import torch"),
        ("searchspace/a.py", "from builder import compile_arch"),
        ("searchspace/a.py", "def f():\n    import omegaconf"),
        ("spiralformer/a.py", "from searchspace import ArchSpec"),
        ("builder/a.py", "if True:\n    from studies.data import Corpus"),
        ("builder/a.py", "import optuna"),
        ("studies/report.py", "import ray"),
    ],
)
def test_the_check_can_fail(file, line, tmp_path):
    for package in MAY_IMPORT:
        (tmp_path / package).mkdir()
    (tmp_path / file).write_text(line)
    assert len(violations(tmp_path)) == 1


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in done.stdout.split()}


PRICE = """
from searchspace import load_space
from builder import compile_arch, estimate
estimate(compile_arch(load_space('quickstart').sample(0).arch))
"""


def test_pricing_leaves_torch_out():
    heavy = {"torch", "numpy", "ray", "optuna", "torch_geometric"}
    for code in (*[f"import {module}" for module in TORCH_FREE], PRICE):
        assert not loaded_after(code) & heavy, code


@pytest.mark.parametrize("module", ["studies.watch", "studies.resume", "studies.records"])
def test_reading_a_study_leaves_torch_and_optuna_out(module):
    assert not loaded_after(f"import {module}") & {"torch", "ray", "optuna", "torch_geometric"}


def test_the_torch_check_can_fail():
    assert "torch" in loaded_after("import builder.lowering")


def test_models_run_without_yaml_or_search():
    assert not loaded_after("import spiralformer") & {"yaml", "omegaconf", "ray", "optuna", "searchspace", "builder"}


def test_loading_a_bundle_leaves_the_search_stack_out():
    assert not loaded_after("from builder import load_bundle") & {"ray", "optuna", "studies"}
