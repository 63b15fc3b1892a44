"""`compile_arch`: spec to verified graph."""

from __future__ import annotations

from builder.graph.ir import Graph
from builder.graph.passes import run_passes
from builder.graph.unroll import lower_arch
from searchspace.arch import ArchSpec


def compile_arch(arch: ArchSpec) -> Graph:
    """Compile an architecture to its verified, simplified graph.

    Raises:
        SpecError: where the wiring breaks a rule of levels or kinds.
        CausalityError: where a causal model would look ahead.
    """
    return run_passes(lower_arch(arch))
