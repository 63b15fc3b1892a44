"""What every model must hold, whatever it is made of: the laws that our own parts are tested by, and plugins too.

Each law is a function from an architecture's `Subject` to what is wrong, or nothing. Models are small, in double
precision, with every parameter random: zeros to begin with would hide mistakes.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import io
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builder.code import steps_of
from builder.exchange.hf_export import export_hf, modeling_code
from builder.exchange.torch_export import export_torch
from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.lowering import build_model
from builder.pricing.cost import estimate
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.plain import decode, encode
from spiralformer.model import SpiralFormer

TOLERANCE = 1e-9
LENGTHS = (1, 2, 3, 6, 7, 12, 17)
_KNOWN_STARTS = (nn.Embedding, nn.RMSNorm, nn.LayerNorm)
"""What `spiralformer.init` knows how to begin."""
_STEPS = 6
"""Decoded token by token after each prompt."""


@dataclass
class Subject:
    """An architecture, and what it compiles to."""

    arch: ArchSpec

    @cached_property
    def graph(self) -> Graph:
        return compile_arch(self.arch)

    @cached_property
    def model(self) -> SpiralFormer:
        """In double precision and evaluation mode."""
        return randomize(build_model(self.graph)).double()

    def tokens(self, *shape: int) -> Tensor:
        """The same ones for the same shape."""
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randint(0, self.arch.vocab_size, shape, generator=generator)

    @property
    def length(self) -> int:
        """At which every level closes a chunk with the last token, if there is one."""
        levels = {node.level for node in self.graph.nodes}
        closing = (n for n in range(17, 81) if all((n + level.offset) % level.chunk == 0 for level in levels))
        return next(closing, 24)


Check: TypeAlias = Callable[[Subject], str]


@dataclass(frozen=True, slots=True)
class Law:
    """A law by name."""

    name: str
    words: str
    check: Check
    is_slow: bool = False
    """Seconds rather than a fraction of one."""


def randomize(model: SpiralFormer, seed: int = 0) -> SpiralFormer:
    """Every parameter random, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() < 2 else 1.5 * parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.dim() < 2))
    return model.eval()


def truth(graph: Graph) -> tuple[int, int]:
    """Unique parameters, and forward FLOPs over one sequence, of the built module.

    Small models run, in a quarter of the time that shapes alone take; each kernel of attention counts its own FLOPs.
    """
    device = "cpu" if graph.d_model <= 128 else "meta"
    model = build_model(graph, device=device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, graph.seq_len, dtype=torch.long, device=device))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


@torch.no_grad()
def first_leak(model: nn.Module, length: int, vocab_size: int, *, at_once: bool = True) -> tuple[int, int] | None:
    """The first (changed token, earlier position whose logits changed); None if there is none.

    Args:
        model: from tokens (B, L) to logits (B, L, V).
        length: L.
        vocab_size: of its tokens.
        at_once: as one batch, of a model whose rows are known to be strangers.
    """
    generator = torch.Generator().manual_seed(length)
    base_L = torch.randint(0, vocab_size, (length,), generator=generator)
    changed_LL = base_L.repeat(length, 1)
    changed_LL[torch.arange(length), torch.arange(length)] = (base_L + 1) % vocab_size
    rows_BL = torch.cat((base_L[None], changed_LL))
    model = model.double()
    logits = model(rows_BL) if at_once else torch.cat([model(row_1L) for row_1L in rows_BL.split(1)])
    moved = (logits[1:] - logits[:1]).abs().amax(dim=-1) > TOLERANCE
    assert moved.diagonal().all(), "a token does not reach its own logits, so that nothing can be seen"
    for token, position in moved.nonzero().tolist():
        if position < token:
            return token, position
    return None


def padded(rows: list[Tensor], side: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one batch, padded with other tokens on the left or right, and its mask."""
    width = max(map(len, rows)) + 1
    tokens = torch.randint(0, vocab_size, (len(rows), width), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        first = width - len(row) if side == "left" else 0
        tokens[i, first : first + len(row)], mask[i, first : first + len(row)] = row, 1
    return tokens, mask


# -- laws ------------------------------------------------------------------------------------------


@torch.no_grad()
def _runs(of: Subject) -> str:
    for length in (1, 2, 24):
        logits = of.model(of.tokens(2, length))
        if logits.shape != (2, length, of.arch.vocab_size):
            return f"gives logits {tuple(logits.shape)} of 2 rows of {length} tokens"
        if not logits.isfinite().all():
            return f"gives logits that are no numbers, of {length} tokens"
    if of.graph.losses:
        wrong = [name for name, loss in of.model.with_losses(of.tokens(2, 9))[1].items() if not loss.isfinite()]
        return f"its loss {wrong[0]} is no number" if wrong else ""
    return ""


def _cost(of: Subject) -> str:
    cost = estimate(of.graph)
    params, flops = truth(of.graph)
    if cost.params != params:
        return f"has {params:,} parameters, its price says {cost.params:,}"
    return f"takes {flops:,} FLOPs, its price says {cost.flops:,}" if cost.flops != flops else ""


def _init(of: Subject) -> str:
    for step in steps_of(of.graph):
        if step.target is None:
            continue
        module, said = of.model.get_submodule(step.target), step.row.init
        if said == "nothing" and any(True for _ in module.parameters()):
            return f"{step.node.op} says that it has no parameters, and has some"
        if said == "small" and callable(getattr(module, "starts", None)):
            return f"{step.node.op} says that its parameters begin small, and its class says otherwise (starts)"
        if said == "own" and not any(
            callable(getattr(part, "starts", None)) or isinstance(part, _KNOWN_STARTS) for part in module.modules()
        ):
            return f"{step.node.op} says that its class tells how parameters begin, which has no method starts"
    model = build_model(of.graph)
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    return f"{wrong[0]} begins as no number" if wrong else ""


def _lookahead(of: Subject) -> str:
    leak = first_leak(of.model, of.length, of.arch.vocab_size, at_once=False) if of.graph.causal else None
    return f"token {leak[0]} changes the logits of token {leak[1]}, before it" if leak else ""


@torch.no_grad()
def _prefix(of: Subject) -> str:
    if not of.graph.causal:
        return ""
    tokens = of.tokens(1, 19)
    whole = of.model(tokens)
    for length in range(1, 19):
        gap = _gap(of.model(tokens[:, :length]), whole[:, :length])
        if gap > TOLERANCE:
            return f"the logits of the first {length} of 19 tokens differ from those of {length} alone by {gap:.2g}"
    return ""


@torch.no_grad()
def _batch(of: Subject) -> str:
    tokens = of.tokens(3, of.length)
    together = of.model(tokens)
    gap = max(_gap(together[i : i + 1], of.model(tokens[i : i + 1])) for i in range(3))
    return f"a row's logits differ by {gap:.2g} from those of the row alone" if gap > TOLERANCE else ""


@torch.no_grad()
def _padding(of: Subject) -> str:
    rows = [of.tokens(length) for length in LENGTHS]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side, of.arch.vocab_size)
        logits = of.model(tokens, mask)
        for i, row in enumerate(rows):
            gap = _gap(logits[i][mask[i].bool()], of.model(row[None])[0])
            if gap > TOLERANCE:
                return f"padding on the {side} changes the logits of a row of {len(row)} by {gap:.2g}"
    return ""


@torch.no_grad()
def _decode(of: Subject) -> str:
    if not of.graph.causal or of.model.undecodable:
        return ""
    rows = [of.tokens(length + _STEPS) for length in LENGTHS]
    alone = [of.model(row[None])[0] for row in rows]
    tokens, mask = padded([row[:-_STEPS] for row in rows], "left", of.arch.vocab_size)
    state = of.model.decode_state(len(rows), max_len=max(map(len, rows)))
    steps = [of.model.prefill(tokens, state, mask)]
    steps += [of.model.decode(torch.stack([row[i - _STEPS] for row in rows]), state) for i in range(_STEPS)]
    for step, logits in enumerate(steps):
        for i, row in enumerate(rows):
            gap = _gap(logits[i], alone[i][len(row) - _STEPS - 1 + step])
            if gap > TOLERANCE:
                what = "a prompt's last logits" if not step else f"the logits of token {step} after a prompt"
                return f"{what} of {len(row) - _STEPS} differ by {gap:.2g} from those of the forward"
    return ""


@torch.no_grad()
def _training(of: Subject) -> str:
    """With the same random numbers: what another row holds, and what comes later, changes nothing."""
    model, tokens = copy.deepcopy(of.model).train(), of.tokens(3, of.length)

    def run(rows: Tensor) -> Tensor:
        torch.manual_seed(0)
        logits: Tensor = model(rows)
        return logits

    plain = run(tokens)
    if _gap(run(tokens), plain) > TOLERANCE:
        return ""  # it keeps something between calls, which another law is about
    other = tokens.clone()
    other[0] = (other[0] + 1) % of.arch.vocab_size
    if _gap(run(other)[1:], plain[1:]) > TOLERANCE:
        return "in training, a row's logits depend on another row"
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % of.arch.vocab_size
    if of.graph.causal and _gap(run(later)[:, :-1], plain[:, :-1]) > TOLERANCE:
        return "in training, the last token changes earlier logits"
    return ""


def _state(of: Subject) -> str:
    """A few steps of training, then the same weights in a model of their own."""
    model, tokens = copy.deepcopy(of.model).train(), of.tokens(4, 23)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(1)).backward()
        optimizer.step()
    fresh = build_model(of.graph).double().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        gap = _gap(fresh(tokens), model.eval()(tokens))
    return f"its trained weights, loaded elsewhere, give other logits ({gap:.2g})" if gap > TOLERANCE else ""


def _gradients(of: Subject) -> str:
    model, tokens = copy.deepcopy(of.model), of.tokens(4, 23)
    logits, losses, _ = model.with_losses(tokens)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().roll(1))
    sum(losses.values(), total).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-14]
    return f"nothing depends on {still[0]}: its gradient is zero" if still else ""


def _identity(of: Subject) -> str:
    again = compile_arch(decode(ArchSpec, encode(of.arch)))
    if again.arch_id != of.graph.arch_id:
        return "has another id when it is read back from its own YAML"
    file = io.BytesIO()
    pickle.dump(of.model, file)
    file.seek(0)
    tokens = of.tokens(1, 9)
    with torch.no_grad():
        copied = pickle.load(file)(tokens)
        return "computes something else once it was pickled" if _gap(copied, of.model(tokens)) else ""


def _export(of: Subject) -> str:
    code = modeling_code(of.graph)
    for node in ast.walk(ast.parse(code)):
        named = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [named]
        for name in names:
            if name.split(".")[0] in ("spiralformer", "builder", "searchspace", "studies", "spiralformer_plugins"):
                return f"the exported code imports {name}, and does not stand alone"
    model = randomize(build_model(of.graph))
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("transformers") is not None:
            export_hf(Path(folder) / "hf", of.arch, model)
        export_torch(Path(folder) / "model.pt2", of.arch, model)
    return ""


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, of what is about as large as 1."""
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


LAWS = (
    Law("runs", "gives logits, of any length", _runs),
    Law("cost", "costs what its price says", _cost),
    Law("batch", "rows of a batch are strangers", _batch),
    Law("lookahead", "no later token reaches an earlier logit", _lookahead),
    Law("prefix", "a prefix's logits are the prefix of the logits", _prefix),
    Law("padding", "padding changes nothing", _padding),
    Law("decode", "token by token as in the forward", _decode),
    Law("training", "in training, too, rows are strangers and nothing looks ahead", _training),
    Law("state", "all that it learns is in its parameters and buffers", _state),
    Law("init", "begins as its row says", _init),
    Law("gradients", "every parameter can move", _gradients),
    Law("identity", "is itself when it is read or copied again", _identity),
    Law("export", "an export stands alone and computes the same", _export, is_slow=True),
)


def told(error: BaseException) -> str:
    """What a part's own code raised, and its line where that is known."""
    if isinstance(error, SpecError):
        return str(error)
    text = str(error).strip().splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    own = [f for f in frames if not f.filename.startswith((str(Path(__file__).parent.parent), "<"))]
    place = f" (line {own[-1].lineno} of {Path(own[-1].filename).name})" if own else ""
    return f"{type(error).__name__}: {text[0] if text else 'nothing said'}{place}"


def breaches(arch: ArchSpec, *, slow: bool = True) -> Iterator[tuple[Law, str]]:
    """Each law that an architecture breaks, and how; of one that does not run, that alone.

    Args:
        arch: small; its costs are counted by running it.
        slow: the laws that take seconds too.
    """
    of = Subject(arch)
    for law in LAWS:
        if law.is_slow and not slow:
            continue
        try:
            wrong = law.check(of)
        except (Exception, SystemExit) as error:  # whatever a part's own code raises is its breach
            wrong = told(error)
        if wrong:
            yield law, wrong
            if law.check is _runs:
                return
