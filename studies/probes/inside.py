"""What a loop does, iteration by iteration: where it attends, how far it moves its state, how states relate.

Attention as in section 4 of SpiralFormer (arXiv 2602.11698); relative updates, similarity and spectra of states as in
MeSH (arXiv 2510.07739).

Shape legend: B batch, N heads, L queries, K keys, H head dim, D model, P positions sampled, T iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from builder.code import Step
from searchspace.arch import ArchSpec
from spiralformer.attention import Attention
from spiralformer.model import SpiralFormer
from studies.probes.trace import LoopTrace, Trace

MOST_CHANGED = 0.4  # of the heads: those that the paper's figures are of
SINGULAR_VALUES = 50
SAMPLED = 512  # positions whose states are compared
_HIDDEN = -1e30  # a score that has no weight, and a finite product with it
_AT_ONCE = 1 << 20  # attention weights: more are no faster


# -- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attended:
    """How one call of a block attended, by layer and head: float64 (layers, N), means over examples and queries."""

    step: Step
    entropy: Tensor
    """Of a query's weights, over the logarithm of how many keys it sees: 1 is uniform."""
    distance: Tensor
    """Between query and key, in tokens: of latents, times their chunk."""
    local: Tensor
    """Weight on keys nearer than a sixteenth of the length."""

    @property
    def iteration(self) -> tuple[str, int | None]:
        """Its loop, and which iteration of it, from 0."""
        return self.step.node.iteration


def attended(trace: Trace) -> list[Attended]:
    """Attention at every call of a block, in the order of calls; of blocks that attend in this library's way."""
    return watched(trace.model, trace.arch, trace.values["tokens"])[1]


def watched(model: SpiralFormer, arch: ArchSpec, tokens_BL: Tensor) -> tuple[Trace, list[Attended]]:
    """A trace, and how blocks attended in it: one forward, in which attention's weights are there to be seen."""
    found: list[Attended] = []
    near = max(1, tokens_BL.shape[1] // 16)

    @contextmanager
    def around(step: Step) -> Iterator[None]:
        if step.node.op != "block" or step.target is None:
            yield
            return
        with _watched(model.get_submodule(step.target), step.node.level.chunk, near) as seen:
            yield
        if seen:
            found.append(Attended(step, *torch.stack(seen, dim=1)))

    return Trace(model, arch, tokens_BL, around=around), found


def most_changed(calls: Sequence[Attended]) -> Tensor:
    """Which heads' entropy varies most over calls of one block: a mask (layers, N) of 40 % of them, at least one.

    Of calls of different blocks, whose heads can't be told apart by place: all.
    """
    if len({(call.step.target, call.entropy.shape) for call in calls}) > 1:
        return torch.ones_like(calls[0].entropy, dtype=torch.bool)
    spread = torch.stack([call.entropy for call in calls]).std(dim=0, correction=0)
    count = max(1, math.ceil(MOST_CHANGED * spread.numel()))
    mask = torch.zeros(spread.numel(), dtype=torch.bool)
    mask[spread.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(spread)


def loop_calls(calls: Sequence[Attended], loop: str) -> list[list[Attended]]:
    """The calls within a loop, by iteration."""
    inside = [(call, t) for call in calls if (t := call.iteration[1]) is not None and call.iteration[0] == loop]
    return [[call for call, t in inside if t == i] for i in range(1 + max((t for _, t in inside), default=-1))]


@contextmanager
def _watched(block: nn.Module, chunk: int, near: int) -> Iterator[list[Tensor]]:
    """Every layer's entropy, distance and local mass, (3, N), while a block runs."""
    seen: list[Tensor] = []
    layers = [m for m in block.modules() if isinstance(m, Attention) and type(m).attend is Attention.attend]

    def attend(q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        groups = q_BNLH.shape[1] // k_BKLH.shape[1]
        k_BNKH, v_BNKH = (each.repeat_interleave(groups, dim=1) for each in (k_BKLH, v_BKLH))
        mixed_BNLH, measured_3N = _measure(q_BNLH, k_BNKH, v_BNKH, visible, causal, chunk, near)
        seen.append(measured_3N)
        return mixed_BNLH.transpose(1, 2)

    try:
        for layer in layers:
            layer.attend = attend  # type: ignore[method-assign]
        yield seen
    finally:
        for layer in layers:
            del layer.attend


def _measure(
    q_BNLH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, visible: Tensor | None, causal: bool, chunk: int, near: int
) -> tuple[Tensor, Tensor]:
    """Values mixed (B, N, L, H), and entropy, distance and local mass (3, N), float64."""
    batch, heads, length, width = q_BNLH.shape
    keys = k_BNKH.shape[2]
    place_LK = (torch.arange(length)[:, None] - torch.arange(keys)).abs().to(q_BNLH) * chunk
    if causal:
        visible = torch.ones(1, 1, length, keys, dtype=torch.bool, device=q_BNLH.device).tril()
    elif visible is None:
        visible = torch.ones(1, 1, length, keys, dtype=torch.bool, device=q_BNLH.device)
    visible = visible.expand(-1, -1, length, -1)
    hidden = ~visible
    seen_B1L = visible.sum(dim=-1)
    entropy_of = (1 / seen_B1L.double().log().clamp_min(1e-9)).where(seen_B1L > 1, 0.0)
    entropy_of = entropy_of / (seen_B1L > 1).sum(dim=-1, keepdim=True).clamp_min(1)
    total_3N = torch.zeros(3, heads, dtype=torch.float64, device=q_BNLH.device)
    mixed_BNLH = torch.empty_like(q_BNLH)
    rows = max(1, _AT_ONCE // (heads * length * keys))
    queries = max(1, min(length // 8 if causal else length, _AT_ONCE // (rows * heads * keys)))
    for first, start in product(range(0, batch, rows), range(0, length, queries)):
        part, of = slice(first, first + rows), slice(start, start + queries)
        own = part if len(visible) > 1 else slice(None)
        upto = slice(start + queries if causal else keys)  # what is hidden from all of them costs nothing
        scores = (q_BNLH[part, :, of] @ k_BNKH[part, :, upto].mT).mul_(1 / math.sqrt(width))
        scores.masked_fill_(hidden[own, :, of, upto], _HIDDEN)
        scores -= scores.amax(dim=-1, keepdim=True)
        weights = scores.exp()
        sums = weights.sum(dim=-1, keepdim=True)
        weights /= sums
        mixed_BNLH[part, :, of] = weights @ v_BNKH[part, :, upto]
        entropy_BNL = sums[..., 0].log() - scores.mul_(weights).sum(dim=-1)
        total_3N[0] += (entropy_BNL.double() * entropy_of[own, :, of]).sum(dim=(0, 2))
        weights_NLK, apart_LK = weights.sum(dim=0), place_LK[of, upto]
        total_3N[1] += (weights_NLK * apart_LK).sum(dim=(1, 2)).double() / length
        total_3N[2] += (weights_NLK * (apart_LK < near)).sum(dim=(1, 2)).double() / length
    return mixed_BNLH, total_3N.cpu() / batch


# -- states ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moved:
    """How far one iteration moves things: 2 |new - old| / (|new| + |old|), mean over examples; 0 to 2."""

    core: float
    """From what the core reads to what it gives, at its own level (MeSH's relative update size)."""
    state: float
    """From the loop's state to the next one."""


def moved(trace: Trace, loop: LoopTrace) -> list[Moved]:
    """By iteration."""
    found = []
    for t, (before, after) in enumerate(pairwise(loop.states)):
        blocks = [step for step in _of_iteration(trace, loop, t) if step.node.op == "block"]
        core = math.nan
        if blocks and trace.values[blocks[0].inputs[0]].shape == trace.values[blocks[-1].label].shape:
            core = _relative(trace.values[blocks[0].inputs[0]], trace.values[blocks[-1].label])
        found.append(Moved(core, _relative(before, after)))
    return found


def _relative(old_BLD: Tensor, new_BLD: Tensor) -> float:
    old, new = (each.double().flatten(1) for each in (old_BLD, new_BLD))
    sizes_B = (new.norm(dim=1) + old.norm(dim=1)).clamp_min(1e-300)
    return float((2 * (new - old).norm(dim=1) / sizes_B).mean())


def sampled(loop: LoopTrace, most: int = SAMPLED) -> list[Tensor]:
    """Each state at up to so many positions, evenly spaced over all examples: float64 (P, D)."""
    flat = [state.flatten(0, 1) for state in loop.states]
    count = len(flat[0])
    at_P = torch.linspace(0, count - 1, min(most, count), device=flat[0].device).round().long()
    return [state_ND[at_P].double() for state_ND in flat]


def similarity(states_PD: Sequence[Tensor]) -> Tensor:
    """Centred kernel alignment of every pair of states, (T + 1, T + 1): 1, the same up to rotation and scale.

    With Gaussian kernels as wide as the median distance between positions (Kornblith et al., arXiv 1905.00414).
    """
    unit = [kernel / kernel.norm().clamp_min(1e-300) for kernel in map(_kernel, states_PD)]
    return torch.stack([torch.stack([(a * b).sum() for b in unit]) for a in unit]).cpu()


def _kernel(state_PD: Tensor) -> Tensor:
    squares_PP = torch.cdist(state_PD, state_PD, compute_mode="donot_use_mm_for_euclid_dist").square()
    count = len(squares_PP)
    apart = squares_PP[~torch.eye(count, dtype=torch.bool, device=squares_PP.device)]
    kernel = (
        torch.exp(-squares_PP / (2 * apart.sqrt().median().square().clamp_min(1e-300))) if count > 1 else squares_PP
    )
    kernel = kernel - kernel.mean(dim=0, keepdim=True)
    return kernel - kernel.mean(dim=1, keepdim=True)


def spectra(states_PD: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Leading singular values of each state over its first, (T + 1, up to 50), and effective ranks, (T + 1).

    The effective rank is the exponential of the entropy of the singular values (Roy and Vetterli, 2007). Both are NaN
    of a state that is not finite.
    """
    values = torch.stack([_singular_values(state_PD) for state_PD in states_PD]).cpu()
    shares = values / values.sum(dim=1, keepdim=True).clamp_min(1e-300)
    ranks = torch.special.entr(shares).sum(dim=1).exp()
    return (values / values[:, :1].clamp_min(1e-300))[:, :SINGULAR_VALUES], ranks


def _singular_values(state_PD: Tensor) -> Tensor:
    if not bool(state_PD.isfinite().all()):
        return state_PD.new_full((min(state_PD.shape),), math.nan)
    found: Tensor = torch.linalg.svdvals(state_PD)
    return found


@dataclass(frozen=True, slots=True)
class Routed:
    """What a router gives, mean over examples and tokens."""

    name: str
    iteration: tuple[str, int | None]
    weights: tuple[float, ...]
    """Of a memory, by slot; of a mixture, the update's and each support's."""


def routed(trace: Trace) -> list[Routed]:
    """Every router of a memory or a mixture, in the order of calls."""
    found = []
    for step in trace.runner.steps:
        module = trace.model.get_submodule(step.target) if step.target is not None else None
        if callable(weigh := getattr(module, "weights", None)) and "state" in step.node.ports:
            state = trace.values[step.inputs[step.node.ports.index("state")]]
            with torch.no_grad():
                weights: Tensor = weigh(state)
            found.append(
                Routed(step.node.name, step.node.iteration, tuple(weights.double().flatten(0, -2).mean(0).tolist()))
            )
    return found


def ablated(trace: Trace, loop: LoopTrace, iterations: Sequence[int] | None = None) -> list[float]:
    """How much the loss rises without an iteration's update: zero in its place; in a base loop, the state before.

    Args:
        trace: with a judge.
        loop: of it.
        iterations: from 0; default: all.
    """
    assert trace.judge is not None
    whole = trace.judge(trace.logits)
    asked = range(len(loop.states) - 1) if iterations is None else iterations
    return [trace.judge(_without(trace, loop, t)) - whole for t in asked]


def _without(trace: Trace, loop: LoopTrace, t: int) -> Tensor:
    own = _of_iteration(trace, loop, t)
    made = [step for step in own if step.node.op == "block" or step.row.family == "upscale"]
    onward = {label for step in own if step in made or step.row.family == "pool" for label in step.inputs}
    updates = {step.label for step in made if step.label not in onward}
    values = dict(trace.values)
    for label in updates:
        is_state = label == loop.labels[t + 1]
        values[label] = values[loop.labels[t]] if is_state else torch.zeros_like(values[label])
    steps = trace.runner.steps
    first = min(i for i, step in enumerate(steps) if step.label in updates)
    with torch.no_grad():
        trace.runner.run([step for step in steps[first:] if step.label not in updates], values)
    logits: Tensor = values[trace.runner.output]
    return logits


def _of_iteration(trace: Trace, loop: LoopTrace, t: int) -> list[Step]:
    return [step for step in trace.runner.steps if step.node.iteration == (loop.name, t)]


# -- as numbers of a trial -------------------------------------------------------------------------


def attention_numbers(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """Means over the loop's calls and heads; ``focusing`` is how far entropy falls, of the heads that change most."""
    by_iteration = loop_calls(attended(trace), loop.name)
    calls = [call for iteration in by_iteration for call in iteration]
    names = ("attention_entropy", "attention_distance", "local_attention", "focusing")
    if not calls or not all(by_iteration):
        return dict.fromkeys(names, math.nan)
    found = [
        float(torch.stack([getattr(call, name) for call in calls]).mean()) for name in ("entropy", "distance", "local")
    ]
    firsts = [iteration[0] for iteration in by_iteration]
    mask = most_changed(firsts)
    found.append(float((firsts[0].entropy - firsts[-1].entropy)[mask].mean()))
    return dict(zip(names, found, strict=True))


def update_numbers(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """The core's relative update at the end, and over that of the first iteration: near 0, later ones are idle."""
    cores = [each.core for each in moved(trace, loop)]
    return {"last_update": cores[-1], "update_ratio": cores[-1] / max(cores[0], 1e-300)}


def state_numbers(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """How alike successive states are, and how many dimensions the last one uses."""
    states = sampled(loop)
    alike = similarity(states).diagonal(offset=1)
    return {"state_cka": float(alike.mean()), "effective_rank": float(spectra(states[-1:])[1])}


def ablation_numbers(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """What the least useful iteration is worth, in the loss."""
    return {"least_update_worth": min(ablated(trace, loop))}
