"""Graph compiler, cost model and lowering.

Names are imported on first use: compiling and pricing never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.budget import Budget, BudgetSpec
    from builder.bundle import Bundle, load_bundle, save_bundle
    from builder.compiler import compile_arch
    from builder.cost import Cost, breakdown, estimate
    from builder.hf_import import import_hf
    from builder.ir import Graph, Level, Node
    from builder.lowering import build_model

_HOME = {
    "Budget": "budget",
    "BudgetSpec": "budget",
    "Bundle": "bundle",
    "load_bundle": "bundle",
    "save_bundle": "bundle",
    "compile_arch": "compiler",
    "Cost": "cost",
    "breakdown": "cost",
    "estimate": "cost",
    "import_hf": "hf_import",
    "Graph": "ir",
    "Level": "ir",
    "Node": "ir",
    "build_model": "lowering",
}

__all__ = [
    "Budget",
    "BudgetSpec",
    "Bundle",
    "Cost",
    "Graph",
    "Level",
    "Node",
    "breakdown",
    "build_model",
    "compile_arch",
    "estimate",
    "import_hf",
    "load_bundle",
    "save_bundle",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'builder' has no attribute {name!r}")
    return getattr(import_module(f"builder.{_HOME[name]}"), name)
