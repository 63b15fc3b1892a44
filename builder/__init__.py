"""Graph compiler, cost model and lowering.

Names are imported on first use: compiling and pricing never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.exchange.bundle import Bundle, load_bundle, save_bundle
    from builder.exchange.hf_import import import_hf
    from builder.graph.blocks import FeedForwardRow, NormRow, RecallRow, ResidualRow, feed_forward
    from builder.graph.compiler import compile_arch
    from builder.graph.emit import Value
    from builder.graph.ir import Graph, Level, Node
    from builder.graph.ops import operation, pool, upscale
    from builder.graph.topologies import Loop, topology
    from builder.halting import Halt
    from builder.lowering import build_model
    from builder.pricing.budget import Budget, BudgetSpec
    from builder.pricing.cost import Cost, breakdown, estimate

_HOME = {
    "exchange.bundle": ("Bundle", "load_bundle", "save_bundle"),
    "exchange.hf_import": ("import_hf",),
    "graph.blocks": ("FeedForwardRow", "NormRow", "RecallRow", "ResidualRow", "feed_forward"),
    "graph.compiler": ("compile_arch",),
    "graph.emit": ("Value",),
    "graph.ir": ("Graph", "Level", "Node"),
    "graph.ops": ("operation", "pool", "upscale"),
    "graph.topologies": ("Loop", "topology"),
    "halting": ("Halt",),
    "lowering": ("build_model",),
    "pricing.budget": ("Budget", "BudgetSpec"),
    "pricing.cost": ("Cost", "breakdown", "estimate"),
}

__all__ = [
    "Budget",
    "BudgetSpec",
    "Bundle",
    "Cost",
    "FeedForwardRow",
    "Graph",
    "Halt",
    "Level",
    "Loop",
    "Node",
    "NormRow",
    "RecallRow",
    "ResidualRow",
    "Value",
    "breakdown",
    "build_model",
    "compile_arch",
    "estimate",
    "feed_forward",
    "import_hf",
    "load_bundle",
    "operation",
    "pool",
    "save_bundle",
    "topology",
    "upscale",
]


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"builder.{module}"), name)
    raise AttributeError(f"module 'builder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
