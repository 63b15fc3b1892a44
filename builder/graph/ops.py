"""The closed table of operations: what each takes and gives, looks ahead, owns and costs.

Conventions: FLOPs count matrix products and attention, a multiply-add as 2, attention dense, forward.
Lookahead is how many tokens past its own a value may depend on; a latent's own token is the one that
closes its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from searchspace.arch import BlockSpec, ffn_dim, head_dim

STREAM, MEMORY, LOGITS = "stream", "memory", "logits"


class Work(NamedTuple):
    """What one operation does at each position of ``level``."""

    level: Level
    per_position: int
    """FLOPs of matrix products at one position."""
    per_pair: int = 0
    """FLOPs of attention for one (query, key) pair."""
    cached: int = 0
    """Elements kept in the key-value cache for one position."""


LevelRule: TypeAlias = Callable[[Node, Sequence[Level]], str]
"""(node, input levels) -> what is wrong and what would be right, or ''."""
LookaheadRule: TypeAlias = Callable[[Graph, Node, Sequence[Level], Sequence[float]], float]
ParamsRule: TypeAlias = Callable[[Graph, Node, Sequence[Level]], int]
WorkRule: TypeAlias = Callable[[Graph, Node, Sequence[Level]], "Work | tuple[Work, ...]"]

_NORMS_PER_LAYER = {"pre": 2, "peri": 4, "post": 2, "sandwich": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One operation."""

    takes: tuple[str, ...]
    """Kind of each input; a trailing '...' repeats the one before it."""
    gives: str
    level: LevelRule
    lookahead: LookaheadRule
    params: ParamsRule
    work: WorkRule

    def works(self, graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[Work, ...]:
        """What it does, by the levels at which it does it."""
        work = self.work(graph, node, levels)
        return (work,) if isinstance(work, Work) else work


def _same_level(node: Node, levels: Sequence[Level]) -> str:
    for level in levels:
        if level != node.level:
            shown = " and ".join(str(level) for level in dict.fromkeys(levels))
            return f"joins values of different levels (chunk+offset {shown}); pool or upscale them to one level first"
    return ""


def _token_level(node: Node, levels: Sequence[Level]) -> str:
    if any(level != TOKEN_LEVEL for level in levels):
        return f"needs full resolution, its input is at level {levels[0]}; upscale it first"
    return ""


def _coarser(node: Node, levels: Sequence[Level]) -> str:
    finer = levels[0]
    if node.level.chunk < finer.chunk:
        return f"pools from {finer} to the finer {node.level}; use upscale for that"
    return _nesting(node.level, finer)


def _finer(node: Node, levels: Sequence[Level]) -> str:
    if levels[0].chunk < node.level.chunk:
        return f"upscales from {levels[0]} to the coarser {node.level}; use pool for that"
    return _nesting(levels[0], node.level)


def _nesting(coarse: Level, fine: Level) -> str:
    if coarse.nests_in(fine):
        return ""
    if coarse.chunk % fine.chunk:
        return f"chunk {fine.chunk} does not divide chunk {coarse.chunk}; choose a multiple"
    return (
        f"the borders of level {coarse} are not borders of level {fine}; choose offsets that are equal modulo "
        f"{fine.chunk}, or offset: auto"
    )


def _worst_input(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    return max(ahead, default=0)


def _block_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    return max(ahead) if graph.is_causal_block(graph.block_of(node)) else math.inf


def _read_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    delay = node.int_attr("delay") * node.level.chunk
    if node.attr("reads") == "closed":
        return ahead[0] - delay
    return ahead[0] + levels[0].chunk - node.level.chunk - delay


def _no_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return 0


def _no_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 0)


def _linear(
    outputs: Callable[[Graph, Node, Sequence[Level]], int], *, at_input: bool = False
) -> tuple[ParamsRule, WorkRule]:
    """Rules of one linear map with bias from d_model, run at the output's or the input's level."""

    def params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
        return (graph.d_model + 1) * outputs(graph, node, levels)

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
        return Work(levels[0] if at_input else node.level, 2 * graph.d_model * outputs(graph, node, levels))

    return params, work


def _block_level(node: Node, levels: Sequence[Level]) -> str:
    wanted = 2 if any(name == "recall" for name, _ in node.attrs) else 1
    if len(levels) != wanted:
        return f"has {len(levels)} inputs; give it the stream{' and what to recall' if wanted == 2 else ' alone'}"
    return _same_level(node, levels)


def block_params(block: BlockSpec, d_model: int) -> int:
    """Parameters of a whole block."""
    d, h, f = d_model, head_dim(block, d_model), ffn_dim(block, d_model)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    up = 2 * f if block.ffn == "swiglu" else f
    qkv = (heads + 2 * kv_heads) * h
    matrices = d * qkv + heads * h * d + d * up + f * d
    biases = qkv + d + up + d if block.bias else 0
    norms = _NORMS_PER_LAYER[block.norm_place] * norm_params(block.norm, d) + (2 * h if block.qk_norm else 0)
    gates = {"add": 0, "gate": 4 * d * d, "gru": 12 * d * (d + 1)}[block.residual]
    recall = 2 * d * d if block.recall in ("linear", "concat") else 0
    return block.layers * (matrices + biases + norms + gates + recall)


def _block_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return block_params(graph.block_of(node), graph.d_model)


def _block_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    block, d = graph.block_of(node), graph.d_model
    h, f = head_dim(block, d), ffn_dim(block, d)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    matrices = d * (heads + 2 * kv_heads) * h + heads * h * d + (3 if block.ffn == "swiglu" else 2) * d * f
    matrices += {"add": 0, "gate": 4 * d * d, "gru": 12 * d * d}[block.residual]
    matrices += 4 * d * d if block.recall in ("linear", "concat") else 0  # the one map serves both sub-layers
    return Work(node.level, 2 * matrices * block.layers, 4 * heads * h * block.layers, 2 * kv_heads * h * block.layers)


def _embed_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.vocab_size * graph.d_model


def norm_params(kind: str, dim: int) -> int:
    """Parameters of one normalization."""
    return {"rms": dim, "layer": 2 * dim, "none": 0}[kind]


def _head_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    logits = 0 if graph.tie_embeddings else graph.vocab_size * graph.d_model
    return logits + norm_params(str(node.attr("norm")), graph.d_model)


def _head_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 2 * graph.d_model * graph.vocab_size)


def _matrices(count: int) -> tuple[ParamsRule, WorkRule]:
    """Rules of ``count`` d x d maps without bias."""

    def params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
        return count * graph.d_model**2

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
        return Work(node.level, 2 * count * graph.d_model**2)

    return params, work


def _pool_mix_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return node.level.chunk // levels[0].chunk * graph.d_model**2


def _pool_mix_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 2 * _pool_mix_params(graph, node, levels))


def _pool_attention_work(graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[Work, ...]:
    """Keys and values of every member, query and output of every latent."""
    return Work(levels[0], 4 * graph.d_model**2), Work(node.level, 4 * graph.d_model**2)


def _weighted_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return str(node.attr("factors")).count(",") + 1 if node.attr("learned") else 0


def _vector_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.d_model


def _relative_chunk(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return levels[0].chunk // node.level.chunk


_scorer_params, _scorer_work = _linear(lambda graph, node, levels: 1, at_input=True)
_allocation_params, _allocation_work = _linear(_relative_chunk, at_input=True)
_router_params, _router_work = _linear(lambda graph, node, levels: node.int_attr("slots"))
_mixture_params, _mixture_work = _linear(lambda graph, node, levels: len(levels) - 1)
_two_matrices_params, _two_matrices_work = _matrices(2)
_four_matrices_params, _ = _matrices(4)


def _free(takes: tuple[str, ...], gives: str = STREAM, level: LevelRule = _same_level) -> OpRow:
    """A row without parameters or matrix products that keeps the worst lookahead."""
    return OpRow(takes=takes, gives=gives, level=level, lookahead=_worst_input, params=_no_params, work=_no_work)


def _row(
    takes: tuple[str, ...],
    params: ParamsRule,
    work: WorkRule,
    *,
    gives: str = STREAM,
    level: LevelRule = _same_level,
    lookahead: LookaheadRule = _worst_input,
) -> OpRow:
    return OpRow(takes=takes, gives=gives, level=level, lookahead=lookahead, params=params, work=work)


def _norm_row(kind: str) -> OpRow:
    return _row((STREAM,), lambda graph, node, levels: norm_params(kind, graph.d_model), _no_work)


OPS: dict[str, OpRow] = {
    "embed": _row((), _embed_params, _no_work, level=_token_level),
    "block": _row((STREAM, "..."), _block_params, _block_work, level=_block_level, lookahead=_block_lookahead),
    "pool.mean": _free((STREAM,), level=_coarser),
    "pool.last": _free((STREAM,), level=_coarser),
    "pool.self_aggregate": _row((STREAM,), _scorer_params, _scorer_work, level=_coarser),
    "pool.linear": _row((STREAM,), _pool_mix_params, _pool_mix_work, level=_coarser),
    "pool.attention": _row((STREAM,), _four_matrices_params, _pool_attention_work, level=_coarser),
    "upscale.uniform": _row((STREAM,), _no_params, _no_work, level=_finer, lookahead=_read_lookahead),
    "upscale.learned": _row((STREAM,), _allocation_params, _allocation_work, level=_finer, lookahead=_read_lookahead),
    "join.base": _free((STREAM,)),
    "join.sum": _free((STREAM, STREAM, "...")),
    "join.weighted": _row((STREAM, "..."), _weighted_params, _no_work),
    "join.mixture": _row((STREAM, STREAM, STREAM, "..."), _mixture_params, _mixture_work),
    "step.add": _row((STREAM,), _vector_params, _no_work),
    "step.scale": _row((STREAM,), _vector_params, _no_work),
    "memory": _free((STREAM,), gives=MEMORY),
    "write": _row((MEMORY, STREAM, STREAM), _router_params, _router_work, gives=MEMORY),
    "read": _row((MEMORY, STREAM), _router_params, _router_work),
    "norm.rms": _norm_row("rms"),
    "norm.layer": _norm_row("layer"),
    "recall.add": _free((STREAM, STREAM)),
    "recall.linear": _row((STREAM, STREAM), _two_matrices_params, _two_matrices_work),
    "recall.concat": _row((STREAM, STREAM), _two_matrices_params, _two_matrices_work),
    "head": _row((STREAM,), _head_params, _head_work, gives=LOGITS, level=_token_level),
}
