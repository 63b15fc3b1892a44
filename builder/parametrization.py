"""How initial weights and rates go with size, parameter by parameter, so that a small model's settings carry over.

mup (Yang et al., arXiv 2203.03466) over width, completep (Dey et al., arXiv 2505.01618, table 1, alpha = 1) over width
and unrolled depth, each use of a shared layer counted. Both as ratios to a base, at which nothing changes. What
completep does to residual branches is `builder.graph.ir.Graph.branch_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from builder.graph.ir import Graph

READOUTS = ("logits", "router", "scorer", "allocation")
"""Linear maps, by their last name, from the width to a number of outputs that does not grow with it."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What a parameter's settings are multiplied by."""

    init: float = 1.0
    """Its initial standard deviation, beside what goes by 1/sqrt(width) already."""
    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


_NONE = Factors()


def factors_of(model: nn.Module, graph: Graph) -> dict[str, Factors]:
    """Factors of every parameter, by name; all 1 in the standard parametrization, and at the base.

    Args:
        model: built from the graph; may lie on the meta device.
        graph: of the model.

    A matrix that reads the width m times the base's has 1/m of the rate and m times the decay, so that rate times decay
    stays. A readout's logits are divided by m too, which is folded into its initial weights (1/sqrt(m) beside the
    1/sqrt(m) of every matrix) and its rate. AdamW's eps follows the gradient: 1/m, and in blocks over the depth's
    ratio.
    """
    wide, deep = graph.width_ratio, graph.depth_ratio
    found = dict.fromkeys((name for name, _ in model.named_parameters()), _NONE)
    if graph.base is None:
        return found
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        readout = path.rpartition(".")[2] in READOUTS
        in_block = path.startswith("blocks.")
        found[f"{path}.weight"] = Factors(
            init=wide**-0.5 if readout else 1.0,
            lr=1 / wide,
            decay=wide,
            eps=1.0 if readout else 1 / (wide * (deep if in_block else 1.0)),
        )
    return found
