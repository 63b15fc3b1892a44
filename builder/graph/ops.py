"""The closed table of operations: what each takes and gives, looks ahead, owns, costs, and how it is made and drawn.

Conventions: FLOPs count matrix products and attention, a multiply-add as 2, attention dense, forward.
Lookahead is how many tokens past its own a value may depend on; a latent's own token is the one that
closes its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from builder.graph.blocks import FEED_FORWARDS, NORM_PLACES, NORMS, RECALLS, RESIDUALS, ffn_dim, norm_params
from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from builder.graph.row import (
    CallRule,
    Decode,
    Drawing,
    IdentityRule,
    Init,
    Kind,
    LevelRule,
    LookaheadRule,
    Operation,
    ParamsRule,
    PartCall,
    PartName,
    PartRule,
    Sees,
    Work,
    WorkRule,
    part,
    ports,
)
from searchspace.arch import BlockSpec, head_dim, rotary_dim
from searchspace.nodes import LossKind, NormKind, PoolKind, RecallKind, StepKind, UpscaleKind
from searchspace.tables import table

STREAM, MEMORY, LOGITS = Kind.STREAM, Kind.MEMORY, Kind.LOGITS

BOX, LANE, BUS = Drawing("box"), Drawing("lane"), Drawing("bus")
_CIRCLE = "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0"
_DOT = "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0"
_PLUS, _CROSS = _CIRCLE + "M-5 0H5M0-5V5", _CIRCLE + "M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5"


def _join_sign(shape: str, words: str, hides: tuple[str, ...] = ()) -> Drawing:
    return Drawing("sign", shape, half=5, space=4, words=words, follows=True, hides=hides)


# -- levels ----------------------------------------------------------------------------------------


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


# -- lookahead -------------------------------------------------------------------------------------


def _worst_input(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    return max(ahead, default=0)


def _block_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    return max(ahead) if graph.is_causal_block(graph.block_of(node)) else math.inf


def _read_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    delay = node.attr("delay", int) * node.level.chunk
    if node.attr("reads", str) == "closed":
        return ahead[0] - delay
    return ahead[0] + levels[0].chunk - node.level.chunk - delay


# -- parameters and work ---------------------------------------------------------------------------


def _no_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return 0


def _no_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 0)


def _linear(
    outputs: Callable[[Graph, Node, Sequence[Level]], int], *, bias: bool = True, at_input: bool = False
) -> tuple[ParamsRule, WorkRule]:
    """Rules of one linear map from d_model, run at the output's or the input's level."""

    def params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
        return (graph.d_model + bias) * outputs(graph, node, levels)

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
        return Work(levels[0] if at_input else node.level, 2 * graph.d_model * outputs(graph, node, levels))

    return params, work


def block_params(block: BlockSpec, d_model: int) -> int:
    """Parameters of a whole block."""
    d, h, f = d_model, head_dim(block, d_model), ffn_dim(block, d_model)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    up = FEED_FORWARDS[block.ffn].maps_in * f
    qkv = (heads + 2 * kv_heads) * h
    matrices = d * qkv + heads * h * d + d * up + f * d
    biases = qkv + d + up + d if block.bias else 0
    norms = 2 * NORM_PLACES[block.norm_place].count * norm_params(block.norm, d) + (2 * h if block.qk_norm else 0)
    recall = RECALLS[block.recall].params(d) if block.recall else 0
    return block.layers * (matrices + biases + norms + 2 * RESIDUALS[block.residual].params(d) + recall)


def _block_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return block_params(graph.block_of(node), graph.d_model)


def _block_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    block, d = graph.block_of(node), graph.d_model
    h, f = head_dim(block, d), ffn_dim(block, d)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    matrices = d * (heads + 2 * kv_heads) * h + heads * h * d + (FEED_FORWARDS[block.ffn].maps_in + 1) * d * f
    matrices += 2 * RESIDUALS[block.residual].work(d)
    matrices += 2 * RECALLS[block.recall].work(d) if block.recall else 0  # the one map serves both sub-layers
    return Work(node.level, 2 * matrices * block.layers, 4 * heads * h * block.layers, 2 * kv_heads * h * block.layers)


def _embed_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.vocab_size * graph.d_model


def _head_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    logits = 0 if graph.tie_embeddings else graph.vocab_size * graph.d_model
    return logits + norm_params(node.attr("norm", str), graph.d_model)


def _head_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 2 * graph.d_model * graph.vocab_size)


def _pool_mix_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return node.level.chunk // levels[0].chunk * graph.d_model**2


def _pool_mix_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    return Work(node.level, 2 * _pool_mix_params(graph, node, levels))


def _pool_attention_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return 4 * graph.d_model**2


def _pool_attention_work(graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[Work, ...]:
    """Keys and values of every member, query and output of every latent."""
    return Work(levels[0], 4 * graph.d_model**2), Work(node.level, 4 * graph.d_model**2)


def _weighted_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return len(node.numbers("factors")) if node.attr("learned", bool) else 0


def _vector_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.d_model


_pool_mix = (_pool_mix_params, _pool_mix_work)
_pool_attention = (_pool_attention_params, _pool_attention_work)
_scorer = _linear(lambda graph, node, levels: 1, bias=False, at_input=True)
_allocation = _linear(lambda graph, node, levels: levels[0].chunk // node.level.chunk, at_input=True)
_router = _linear(lambda graph, node, levels: node.attr("slots", int))
_mixture = _linear(lambda graph, node, levels: len(levels) - 1)


# -- modules ---------------------------------------------------------------------------------------


def _made(path: str, *, width: bool = False) -> PartRule:
    """Made with nothing, or with d_model."""
    return lambda graph, node, levels: part(path, graph.d_model) if width else part(path)


def _routed(path: str) -> PartRule:
    return lambda graph, node, levels: part(path, graph.d_model, node.attr("slots", int))


def _norm_part(kind: str) -> PartRule:
    return lambda graph, node, levels: part(NORMS[kind].part, graph.d_model, eps=graph.norm_eps)


def _embed_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    scaled = node.get("scale", "") == "sqrt_d_model"
    return part("embedding.ScaledEmbedding" if scaled else "nn.Embedding", graph.vocab_size, graph.d_model)


def _block_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    """Settings of `spiralformer.block.BlockConfig`: the block's own by name, and those that follow from the graph."""
    block, d_model = graph.block_of(node), graph.d_model
    place = NORM_PLACES[block.norm_place]
    settings: dict[str, object] = {
        name: getattr(block, name) for name in ("layers", "heads", "rotary_base", "qk_norm", "bias", "dropout")
    }
    settings.update(
        d_model=d_model,
        kv_heads=block.kv_heads or block.heads,
        head_dim=head_dim(block, d_model),
        ffn=PartName(FEED_FORWARDS[block.ffn].part),
        ffn_dim=ffn_dim(block, d_model),
        layer=PartName("block.ParallelLayer" if block.parallel_residual else "block.Layer"),
        norm=PartName(NORMS[block.norm].part),
        norm_eps=graph.norm_eps,
        norm_places=(place.pre, place.peri, place.post),
        residual=PartName(RESIDUALS[block.residual].part),
        recall=PartName(RECALLS[block.recall].part) if block.recall else None,
        rotary_dim=rotary_dim(block, d_model),
        causal=graph.is_causal_block(block),
        branch_scale=graph.branch_scale,
        max_len=graph.seq_len,
    )
    return part("block.Block", part("block.BlockConfig", **settings))


def _block_call(graph: Graph, node: Node) -> dict[str, str]:
    """What the rotary embedding is told of latents whose position is their chunk's last token."""
    if not node.get("positions", ""):
        return {}
    return {"stride": str(node.level.chunk), "first": str(node.level.chunk - node.level.offset - 1)}


def _head_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    kind = node.attr("norm", str)
    norm = part("nn.Identity") if kind == "none" else _norm_part(kind)(graph, node, levels)
    if graph.tie_embeddings:
        return part("embedding.TiedHead", norm)
    return part("embedding.Head", graph.d_model, graph.vocab_size, norm)


def _pool_part(path: str, width: bool) -> PartRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = node.level.relative_to(levels[0])
        return part(path, chunk, offset, graph.d_model) if width else part(path, chunk, offset)

    return rule


def _upscale_part(path: str, width: bool) -> PartRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = levels[0].relative_to(node.level)
        settings: dict[str, object] = {"d_model": graph.d_model} if width else {}
        settings |= {"delay": node.attr("delay", int), "own_chunk": node.attr("reads", str) == "own_chunk"}
        settings |= {"zero_front": node.get("front", "") == "zero"}
        return part(path, chunk, offset, target=tuple(node.level), **settings)

    return rule


def _weighted_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    return part("joins.WeightedJoin", node.numbers("factors"), learned=node.attr("learned", bool))


# -- rows ------------------------------------------------------------------------------------------


def _row(
    name: str,
    takes: Mapping[str, Kind],
    part: PartRule | None,
    draw: Drawing,
    *,
    cost: tuple[ParamsRule, WorkRule] = (_no_params, _no_work),
    init: Init = "nothing",
    gives: Kind = STREAM,
    attrs: Mapping[str, type] | None = None,
    level: LevelRule = _same_level,
    lookahead: LookaheadRule = _worst_input,
    decode: Decode = "plain",
    call: CallRule = lambda graph, node: {},
    sees: Sees = "",
    identity: IdentityRule = lambda node, levels: False,
) -> Operation:
    """A row of what works on each position alone, unless it says otherwise."""
    return Operation(
        name,
        ports=ports(takes),
        gives=gives,
        attrs=attrs or {},
        level=level,
        lookahead=lookahead,
        params=cost[0],
        work=cost[1],
        part=part,
        decode=decode,
        draw=draw,
        init=init,
        identity=identity,
        call=call,
        sees=sees,
    )


def _pool(
    kind: str,
    path: str,
    *,
    width: bool = False,
    cost: tuple[ParamsRule, WorkRule] = (_no_params, _no_work),
    init: Init = "nothing",
) -> Operation:
    """``path`` is made with the relative chunk and offset, and with d_model where ``width``."""
    return _row(
        f"pool.{kind}",
        {"stream": STREAM},
        _pool_part(path, width),
        LANE,
        cost=cost,
        init=init,
        level=_coarser,
        decode="remembers",
        identity=lambda node, levels: levels[0] == node.level,
    )


def _upscale(
    kind: str,
    path: str,
    *,
    width: bool = False,
    cost: tuple[ParamsRule, WorkRule] = (_no_params, _no_work),
    init: Init = "nothing",
) -> Operation:
    return _row(
        f"upscale.{kind}",
        {"latents": STREAM},
        _upscale_part(path, width),
        LANE,
        cost=cost,
        init=init,
        attrs={"delay": int, "reads": str, "front?": str},
        level=_finer,
        lookahead=_read_lookahead,
        decode="remembers",
        call=lambda graph, node: {"tokens": "tokens"},
        sees="source",
        identity=lambda node, levels: levels[0] == node.level and node.attr("delay", int) == 0,
    )


def _by_width(params: Callable[[int], int], work: Callable[[int], int]) -> tuple[ParamsRule, WorkRule]:
    """Rules from parameters and multiply-adds at one position, of d_model."""
    return (
        lambda graph, node, levels: params(graph.d_model),
        lambda graph, node, levels: Work(node.level, 2 * work(graph.d_model)),
    )


def _norms() -> Iterator[Operation]:
    sign = Drawing("sign", "M-1.5-7h3v14h-3z", "solid", half=2, space=4, words="▮ norm")
    for kind, row in NORMS.items():
        cost = _by_width(row.params, lambda d: 0)
        yield _row(f"norm.{kind}", {"stream": STREAM}, _norm_part(kind), sign, cost=cost, init="own")


def _recalls() -> Iterator[Operation]:
    sign = Drawing("sign", "M-5 0 0-5 5 0 0 5z", half=5, space=6, dashes=("recall",))
    for kind, row in RECALLS.items():
        yield _row(
            f"recall.{kind}",
            {"state": STREAM, "recall": STREAM},
            _made(row.part, width=True),
            sign,
            cost=_by_width(row.params, row.work),
            init="own" if row.params(1) else "nothing",
        )


_STEP = Drawing("sign", "M-4-4h8v8h-8z", half=4, space=6, words="□ step vector")
_WRITE = Drawing("sign", _DOT, "solid", space=9, follows=True, hides=("memory", "state"))
_READ = Drawing("sign", _DOT, "solid", space=7, over_drop=True, hides=("memory", "state"))

_VECTOR = (_vector_params, _no_work)
_ROWS = (
    _row(
        "embed",
        {},
        _embed_part,
        BOX,
        cost=(_embed_params, _no_work),
        init="own",
        attrs={"scale?": str},
        level=_token_level,
    ),
    _row(
        "block",
        {"stream": STREAM, "recall?": STREAM},
        _block_part,
        Drawing("box", dashes=("recall",)),
        cost=(_block_params, _block_work),
        init="own",
        attrs={"block": str, "recall?": str, "positions?": str},
        lookahead=_block_lookahead,
        decode="remembers",
        call=_block_call,
        sees="own",
    ),
    _pool("mean", "pooling.MeanPool"),
    _pool("last", "pooling.LastPool"),
    _pool("self_aggregate", "pooling.SelfAggregatePool", width=True, cost=_scorer, init="own"),
    _pool("linear", "pooling.LinearPool", width=True, cost=_pool_mix, init="own"),
    _pool(
        "attention",
        "pooling.AttentionPool",
        width=True,
        cost=(_pool_attention_params, _pool_attention_work),
        init="small",
    ),
    _upscale("uniform", "upscale.UniformUpscale"),
    _upscale("learned", "upscale.LearnedUpscale", width=True, cost=_allocation, init="own"),
    _row("join.base", {"update": STREAM}, None, _join_sign(_PLUS, "⊕ sum"), identity=lambda node, levels: True),
    _row("join.sum", {"update": STREAM, "states*": STREAM}, None, _join_sign(_PLUS, "⊕ sum")),
    _row(
        "join.weighted",
        {"terms*": STREAM},
        _weighted_part,
        _join_sign(_CROSS, "⊗ weighted sum"),
        cost=(_weighted_params, _no_work),
        init="own",
        attrs={"factors": tuple, "learned": bool},
    ),
    _row(
        "join.mixture",
        {"update": STREAM, "state": STREAM, "supports*": STREAM},
        lambda graph, node, levels: part("joins.MixtureJoin", graph.d_model, len(levels) - 2),
        _join_sign(_CIRCLE + _DOT, "◎ mixture by a router", hides=("state",)),
        cost=_mixture,
        init="small",
    ),
    _row("step.add", {"stream": STREAM}, _made("joins.AddStep", width=True), _STEP, cost=_VECTOR, init="small"),
    _row("step.scale", {"stream": STREAM}, _made("joins.ScaleStep", width=True), _STEP, cost=_VECTOR, init="own"),
    _row("memory", {"first": STREAM}, _made("memory.OpenMemory"), BUS, gives=MEMORY, attrs={"slots": int}),
    _row(
        "write",
        {"memory": MEMORY, "update": STREAM, "state": STREAM},
        _routed("memory.WriteMemory"),
        _WRITE,
        cost=_router,
        init="small",
        gives=MEMORY,
        attrs={"slots": int},
    ),
    _row(
        "read",
        {"memory": MEMORY, "state": STREAM},
        _routed("memory.ReadMemory"),
        _READ,
        cost=_router,
        init="small",
        attrs={"slots": int},
    ),
    *_norms(),
    *_recalls(),
    _row(
        "head",
        {"stream": STREAM},
        _head_part,
        BOX,
        cost=(_head_params, _head_work),
        init="own",
        gives=LOGITS,
        attrs={"norm": str},
        level=_token_level,
        call=lambda graph, node: {"weight": "self.embed.weight"} if graph.tie_embeddings else {},
    ),
    _row(
        "loss.z",
        {"logits": LOGITS},
        lambda graph, node, levels: part("losses.ZLoss", node.attr("weight", float)),
        BOX,
        gives=Kind.LOSS,
        attrs={"weight": float},
    ),
)

_ALONE = ("embed", "block", "memory", "write", "read", "head")
_JOINS = ("base", "sum", "weighted", "mixture")  # residual, anchor and the like are written out as sums
_NAMES = (
    *_ALONE,
    *(f"pool.{kind}" for kind in get_args(PoolKind)),
    *(f"upscale.{kind}" for kind in get_args(UpscaleKind)),
    *(f"join.{kind}" for kind in _JOINS),
    *(f"step.{kind}" for kind in get_args(StepKind)),
    *(f"norm.{kind}" for kind in get_args(NormKind)),
    *(f"recall.{kind}" for kind in get_args(RecallKind)),
    *(f"loss.{kind}" for kind in get_args(LossKind)),
)
OPS = table("an operation", _ROWS, _NAMES)
