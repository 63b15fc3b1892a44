"""Whether a loop settles, hears its input, and can be trained: the three axes of arXiv 2604.15259, measured.

Shape legend: B batch, L positions, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from builder.schedules import model_under
from searchspace.nodes import LoopNode
from spiralformer.recall import ConcatRecall, LinearRecall
from studies.probes.trace import LoopTrace, Runner, Trace

_BOUND = 10.0  # times the first state's norm: stable runs end within 1.5, others at 50 or far beyond (papers' sweep)
_SETTLED = 0.99  # cosine between a state and the one before
_NOISE_LEVELS, _NOISE_SEEDS = 10, 5
_ROWS = 2  # of the batch whose Jacobian is looked at
_WHOLE = 96  # a Jacobian of so many rows is computed whole
_RESTARTS = 8


def reachability(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """How the iteration comes to rest: cosine of the last two states, when it passes 0.99 first, growth of the norm.

    A loop that does not pass it settles at infinity. ``stable`` is 1 where the norm stays bounded in as many iterations
    as the model is tried in, else 0: its mean over seeds is the share of stable runs.
    """
    states, stable = loop.states, {"stable": float(_is_bounded(trace, loop))}
    if not all(bool(state.isfinite().all()) for state in states):
        return {"step_cosine": math.nan, "settles_at": math.nan, "norm_ratio": math.nan, **stable}
    cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1).mean().item() for a, b in pairwise(states)]
    settled = next((t for t, cosine in enumerate(cosines, start=1) if cosine > _SETTLED), math.inf)
    norms = [state.double().norm(dim=-1).mean().item() for state in states[1:]]
    ratio = norms[-1] / max(norms[0], 1e-300)
    return {"step_cosine": cosines[-1], "settles_at": float(settled), "norm_ratio": ratio, **stable}


def _is_bounded(trace: Trace, loop: LoopTrace) -> bool:
    """Whether the last state of the longest run that is asked for is no larger than ten times the first's."""
    node = trace.arch.graph[loop.name]
    assert isinstance(node, LoopNode)
    most = max((len(node.schedule), *(node.iterations.test if node.iterations else ())))
    first_BLD, last_BLD = loop.states[1], loop.states[-1]
    if most > len(node.schedule):
        arch, model = model_under(trace.model, trace.arch, {loop.name: most})
        runner = Runner(model, arch)
        labels = runner.states(loop.name)
        found = runner.lean(trace.values["tokens"], (labels[1], labels[-1]))
        first_BLD, last_BLD = found[labels[1]], found[labels[-1]]
    first, last = (state.double().norm(dim=-1).mean().item() for state in (first_BLD, last_BLD))
    return math.isfinite(last) and last <= _BOUND * max(first, 1e-300)


def input_dependence(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """How much of the input is in the state: collapse of tokens, and state against input in the recall's maps."""
    last_BLD = loop.states[-1].double()
    unit_BLD = last_BLD / last_BLD.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    count = unit_BLD.shape[1]
    same_BLL = unit_BLD @ unit_BLD.mT
    pairs = max(1, count * (count - 1))
    alike = ((same_BLL.sum(dim=(1, 2)) - same_BLL.diagonal(dim1=1, dim2=2).sum(dim=1)) / pairs).mean().item()
    found = {"token_cosine": alike}
    if maps := recall_maps(trace.model):
        norms = [(_norm(state), _norm(given)) for state, given in maps]
        found["recall_ratio"] = sum(state / max(given, 1e-300) for state, given in norms) / len(norms)
    return found


def geometry(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """Spectral radii of the last iteration's Jacobian and of the recall's matrix, and how that one is conditioned."""
    found = {"jacobian_radius": jacobian_radius(trace, loop)}
    if maps := recall_maps(trace.model):
        weights = [state.detach().double().cpu() for state, _ in maps]
        found["recall_radius"] = max(torch.linalg.eigvals(weight).abs().max().item() for weight in weights)
        values = [torch.linalg.svdvals(weight) for weight in weights]
        at = min(10, len(values[0]) - 1)
        found["recall_condition"] = max((each[0] / each[at].clamp_min(1e-300)).item() for each in values)
    return found


def recall_maps(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """W_x and W_e of every recall that has them, each (D, D)."""
    found = []
    for module in model.modules():
        if isinstance(module, ConcatRecall):
            state, given = module.adapter.weight.chunk(2, dim=1)
            found.append((state, given))
        elif isinstance(module, LinearRecall):
            found.append((module.state.weight, module.input.weight))
    return found


def jacobian_radius(trace: Trace, loop: LoopTrace) -> float:
    """The largest eigenvalue modulus of d state / d state before, of the last iteration; mean of the first rows.

    By products of the Jacobian and a vector (Arnoldi iteration); a small Jacobian is computed whole. Memory slots and
    the loop's input stay as they are.
    """
    tokens_BL: Tensor = trace.values["tokens"]
    radii = []
    for tokens_L in tokens_BL[:_ROWS]:
        row = Trace(trace.model, trace.arch, tokens_L[None])
        own = row.loop()
        assert own is not None
        with sdpa_kernel(SDPBackend.MATH):  # the others have no derivative of this kind
            radii.append(_radius(row, own))
    return sum(radii) / len(radii)


def _radius(trace: Trace, loop: LoopTrace) -> float:
    at_1LD, last = loop.states[-2], len(loop.states) - 1
    if not bool(loop.states[-1].isfinite().all()):
        return math.nan
    size = at_1LD.numel()

    def step(state_1LD: Tensor) -> Tensor:
        return trace.again(loop, last, state_1LD)

    if size <= _WHOLE:
        jacobian = torch.autograd.functional.jacobian(step, at_1LD).reshape(size, size)
        return float(torch.linalg.eigvals(jacobian.double()).abs().max())

    def product(vector: np.ndarray) -> np.ndarray:
        tangent_1LD = torch.from_numpy(vector.reshape(at_1LD.shape)).to(at_1LD)
        found_1LD: Tensor = torch.func.jvp(step, (at_1LD,), (tangent_1LD,))[1]
        flat: np.ndarray = found_1LD.detach().double().reshape(-1).cpu().numpy()
        return flat

    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values = eigs(
            operator, k=1, which="LM", v0=start, tol=1e-3, ncv=24, maxiter=_RESTARTS, return_eigenvectors=False
        )
    except ArpackError as error:
        values = getattr(error, "eigenvalues", np.empty(0))  # as far as it came
    return float(np.abs(values).max()) if len(values) else _growth(product, start)


def _growth(product: Callable[[np.ndarray], np.ndarray], vector: np.ndarray) -> float:
    """The geometric mean of how much a vector grows, over the later half of sixty products."""
    logs = []
    for _ in range(60):
        vector = product(vector / np.linalg.norm(vector))
        if not (size := float(np.linalg.norm(vector))):
            return 0.0
        logs.append(math.log(size))
    return math.exp(sum(logs[30:]) / 30)


def robustness(trace: Trace, loop: LoopTrace) -> dict[str, float]:
    """How far outputs move when every parameter is moved at random: by 10 to 100 % of its layer's norm, five draws.

    ``noise_kept`` is the share of positions whose most likely token stays, the mean over levels and draws: 1 is best.
    """
    model, tokens_BL = trace.model, trace.values["tokens"]
    said_BL = trace.logits.argmax(dim=-1)
    kept = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        for seed in range(_NOISE_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            noise = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in before.items()}
            for level in range(1, _NOISE_LEVELS + 1):
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        size = level / _NOISE_LEVELS * before[name].norm() / noise[name].norm().clamp_min(1e-12)
                        p.copy_(before[name] + size * noise[name])
                    kept.append((model(tokens_BL).argmax(dim=-1) == said_BL).float().mean().item())
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
    return {"noise_kept": sum(kept) / len(kept)}


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().cpu(), 2))
