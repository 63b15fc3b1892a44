"""`compile_arch`: spec to verified graph."""

from __future__ import annotations

from builder.frontend import lower_arch
from builder.ir import Graph
from builder.passes import run_passes
from searchspace.arch import ArchSpec


def compile_arch(arch: ArchSpec) -> Graph:
    """Compile an architecture to its verified, simplified graph.

    Raises:
        SpecError: where the wiring breaks a rule of levels or kinds.
        CausalityError: where a causal model would look ahead.
    """
    return run_passes(lower_arch(arch))
