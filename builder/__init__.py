"""Graph compiler, cost model and lowering.

Names are imported on first use: compiling and pricing never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.exchange.bundle import Bundle, load_bundle, save_bundle
    from builder.exchange.hf_import import import_hf
    from builder.graph.compiler import compile_arch
    from builder.graph.ir import Graph, Level, Node
    from builder.lowering import build_model
    from builder.pricing.budget import Budget, BudgetSpec
    from builder.pricing.cost import Cost, breakdown, estimate

_HOME = {
    "exchange.bundle": ("Bundle", "load_bundle", "save_bundle"),
    "exchange.hf_import": ("import_hf",),
    "graph.compiler": ("compile_arch",),
    "graph.ir": ("Graph", "Level", "Node"),
    "lowering": ("build_model",),
    "pricing.budget": ("Budget", "BudgetSpec"),
    "pricing.cost": ("Cost", "breakdown", "estimate"),
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
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"builder.{module}"), name)
    raise AttributeError(f"module 'builder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
