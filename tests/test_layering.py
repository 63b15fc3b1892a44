"""Imports go one way, between packages, rooms and modules, and what only reads or prices leaves torch out."""

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
        "fsspec", "safetensors", "scipy", "sklearn", "pysat", "chess", "torch_geometric", "pandas",
    },
}  # fmt: skip
ONLY_IN = {  # package -> the only files that may import it
    "omegaconf": {"searchspace/files.py"},
    "ray": {"studies/execution/on_ray.py"},
    "pandas": {"studies/api/study.py"},
    "transformers": {"builder/exchange/hf_export.py"},
    "optuna": {
        "studies/candidates/distributions.py",
        "studies/commands/contracts.py",
        "studies/predict/importance.py",
        "studies/records/journal.py",
        "studies/strategy/driver.py",
        "studies/strategy/evolution.py",
        "studies/strategy/history.py",
        "studies/strategy/predictor_sampler.py",
        "studies/strategy/proposer.py",
        "studies/strategy/samplers.py",
        "studies/strategy/surrogate.py",
        "studies/strategy/warm_start.py",
    },
}
TORCH_FREE = (
    "searchspace",
    "builder.graph.compiler",
    "builder.pricing.cost",
    "builder.pricing.budget",
    "builder.pricing.narrowing",
    "builder",
)


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


def modules_of(root: Path) -> dict[str, set[str]]:
    """Every module of the packages, and which of them it imports, inside functions and type-checking blocks too."""
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for package in MAY_IMPORT
        for file in (root / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (full & set(files)) or {node.module or ""}
        found[name] = {other for other in named if other in files and other != name}
    return found


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Names that can't be put on floors, each above all that it imports."""
    left = {name: set(others) for name, others in imports.items()}
    while ground := [name for name, others in left.items() if not others & set(left)]:
        for name in ground:
            del left[name]
    return sorted(left)


def rooms_of(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders; a file that stands in no room is one of its own."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2]) if name.count(".") > 1 else name

    found: dict[str, set[str]] = {}
    for name, others in imports.items():
        found.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return found


def test_imports_go_one_way():
    assert violations(ROOT) == []
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)


def test_no_two_modules_and_no_two_rooms_import_each_other():
    imports = modules_of(ROOT)
    assert len(imports) > 90
    assert circles(imports) == []
    assert circles(rooms_of(imports)) == []


def test_the_check_for_circles_can_fail(tmp_path):
    """A circle over three modules, one import inside a function; a circle of rooms without one of modules."""
    for package in MAY_IMPORT:
        (tmp_path / package).mkdir()
    for name, line in (
        ("a", "from builder import b"),
        ("b", "def f():\n    import builder.c"),
        ("c", "from builder.a import x"),
        ("d", ""),
    ):
        (tmp_path / f"builder/{name}.py").write_text(line)
    assert circles(modules_of(tmp_path)) == ["builder.a", "builder.b", "builder.c"]
    rooms = {"s.x.one": {"s.y.two"}, "s.y.two": set(), "s.y.three": {"s.x.four"}, "s.x.four": set()}
    assert circles(rooms) == []
    assert circles(rooms_of(rooms)) == ["s.x", "s.y"]


def test_studies_is_rooms():
    assert sorted(p.name for p in (ROOT / "studies").glob("*.py")) == [
        "__init__.py",
        "cli.py",
        "config.py",
        "sections.py",
    ]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("searchspace/a.py", "import torch"),
        ("searchspace/a.py", "from builder import compile_arch"),
        ("searchspace/a.py", "def f():\n    import omegaconf"),
        ("spiralformer/a.py", "from searchspace import ArchSpec"),
        ("builder/a.py", "if True:\n    from studies.data.corpus import Corpus"),
        ("builder/a.py", "import optuna"),
        ("studies/a.py", "import ray"),
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


@pytest.mark.parametrize("module", ["studies.commands.status", "studies.records.resume", "studies.records.reading"])
def test_reading_a_study_leaves_torch_and_optuna_out(module):
    assert not loaded_after(f"import {module}") & {"torch", "ray", "optuna", "torch_geometric"}


def test_the_torch_check_can_fail():
    assert "torch" in loaded_after("import builder.lowering")


def test_models_run_without_yaml_or_search():
    assert not loaded_after("import spiralformer") & {"yaml", "omegaconf", "ray", "optuna", "searchspace", "builder"}


def test_loading_a_bundle_leaves_the_search_stack_out():
    assert not loaded_after("from builder import load_bundle") & {"ray", "optuna", "studies"}
