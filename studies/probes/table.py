"""The closed table of probes: what a trial may be asked about its inside, as numbers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from searchspace.tables import complete, options, table
from studies.data.dataset import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from searchspace.arch import ArchSpec
    from spiralformer.model import SpiralFormer

WORST = 1e30
"""Stands for what is no number."""
ProbeName: TypeAlias = Literal[
    "reachability", "input_dependence", "geometry", "robustness", "attention", "updates", "states", "ablation"
]


@complete
@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A probe of the loop of most iterations."""

    name: str
    words: str
    measure: str
    """A function of the trace and its loop (`studies.probes.trace`), ``module:name``; torch is imported with it."""
    metrics: tuple[Metric, ...]
    """What it always measures; some measure more where there is a recall."""


PROBES = table(
    "a probe",
    (
        ProbeRow(
            "reachability",
            "whether the iteration comes to rest",
            "studies.probes.stability:reachability",
            (
                Metric("step_cosine", "step cosine", "cosine of the last two states, mean over tokens", "higher"),
                Metric("settles_at", "settles at", "first iteration with a cosine of 0.99 to the one before", "lower"),
                Metric(
                    "norm_ratio", "norm ratio", "norm of the last state over that after the first iteration", "lower"
                ),
                Metric("stable", "stable", "1 where the state stays bounded, to the most iterations tried", "higher"),
            ),
        ),
        ProbeRow(
            "input_dependence",
            "whether states differ by their input",
            "studies.probes.stability:input_dependence",
            (Metric("token_cosine", "token cosine", "cosine of two tokens' last states, mean", "lower"),),
        ),
        ProbeRow(
            "geometry",
            "spectral radii",
            "studies.probes.stability:geometry",
            (Metric("jacobian_radius", "radius", "spectral radius of the last iteration's Jacobian", "lower"),),
        ),
        ProbeRow(
            "robustness",
            "what noise on the weights leaves as it was",
            "studies.probes.stability:robustness",
            (Metric("noise_kept", "kept", "share of answers kept under noise on the weights", "higher"),),
        ),
        ProbeRow(
            "attention",
            "where each iteration attends",
            "studies.probes.inside:attention_numbers",
            (
                Metric("attention_entropy", "attn entropy", "entropy of attention over its most, mean", "lower"),
                Metric("attention_distance", "attn distance", "tokens between query and key, mean", "higher"),
                Metric(
                    "local_attention", "local attn", "weight on keys nearer than a sixteenth of the length", "higher"
                ),
                Metric("focusing", "focusing", "entropy of the first iteration less that of the last", "higher"),
            ),
        ),
        ProbeRow(
            "updates",
            "how far each iteration moves the state",
            "studies.probes.inside:update_numbers",
            (
                Metric("last_update", "last update", "relative update of the last iteration", "higher"),
                Metric("update_ratio", "update ratio", "relative update, last iteration over first", "higher"),
            ),
        ),
        ProbeRow(
            "states",
            "how alike states are, and how wide",
            "studies.probes.inside:state_numbers",
            (
                Metric("state_cka", "state CKA", "kernel alignment of successive states, mean", "lower"),
                Metric("effective_rank", "eff. rank", "dimensions that the last state uses", "higher"),
            ),
        ),
        ProbeRow(
            "ablation",
            "what the loss loses without an iteration",
            "studies.probes.inside:ablation_numbers",
            (Metric("least_update_worth", "least worth", "nats lost without the least useful iteration", "higher"),),
        ),
    ),
    options(ProbeName),
)


def probed_metrics() -> dict[str, tuple[ProbeRow, Metric]]:
    """Every metric that a probe always measures, by name."""
    return {metric.name: (row, metric) for row in PROBES.values() for metric in row.metrics}


def probe(
    names: tuple[ProbeName, ...],
    model: SpiralFormer,
    arch: ArchSpec,
    tokens_BL: Tensor,
    judge: Callable[[Tensor], float] | None = None,
) -> Mapping[str, float]:
    """What the probes of these names measure, in their order; nothing of a model that has no loop.

    Of a state that has grown without bound, the worst: -1 where more is better, else `WORST`.

    Args:
        names: of `PROBES`.
        model: in evaluation mode.
        arch: of it.
        tokens_BL: on its device.
        judge: the loss of logits (B, L, V) on them, in nats; ``ablation`` asks for it.
    """
    from studies.probes.trace import Trace

    trace = Trace(model, arch, tokens_BL, judge)
    loop, found = trace.loop(), dict[str, float]()
    for name in names if loop is not None else ():
        module, _, function = PROBES[name].measure.partition(":")
        found.update(getattr(importlib.import_module(module), function)(trace, loop))
    raised = {name for name, (_, metric) in probed_metrics().items() if metric.better == "higher"}
    worst = {name: -1.0 if name in raised else WORST for name in found}
    return {name: value if math.isfinite(value) else worst[name] for name, value in found.items()}
