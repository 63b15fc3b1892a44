"""The closed table of operations: what each takes and gives, looks ahead, owns, costs, and how it is made and drawn.

Conventions: FLOPs count matrix products and attention, a multiply-add as 2, attention dense, forward.
Lookahead is how many tokens past its own a value may depend on; a latent's own token is the one that
closes its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from builder.graph.blocks import (
    FEED_FORWARDS,
    NORM_PLACES,
    NORMS,
    RECALLS,
    RESIDUALS,
    NormRow,
    RecallRow,
    ffn_dim,
    norm_params,
)
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
    PartRule,
    Sees,
    Work,
    WorkRule,
    named,
    part,
    ports,
)
from searchspace.arch import BlockSpec, head_dim, rotary_dim
from searchspace.nodes import LossKind, NormKind, PoolKind, RecallKind, StepKind, UpscaleKind
from searchspace.tables import TableError, options, table

STREAM, MEMORY, LOGITS = Kind.STREAM, Kind.MEMORY, Kind.LOGITS

BOX, LANE = Drawing("box"), Drawing("lane")
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


def _linear(outputs: Callable[[Graph, Node, Sequence[Level]], int]) -> tuple[ParamsRule, WorkRule]:
    """Rules of one linear map from d_model, with biases, run at the output's level."""

    def params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
        return (graph.d_model + 1) * outputs(graph, node, levels)

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
        return Work(node.level, 2 * graph.d_model * outputs(graph, node, levels))

    return params, work


ChunkCount: TypeAlias = Callable[[int, int], int]
"""Of (G, D): the coarse level's chunk in positions of the fine one, and the width."""


def _of_chunk(params: ChunkCount, at_latent: ChunkCount, at_member: ChunkCount) -> tuple[ParamsRule, WorkRule]:
    """Rules of what leads from one level to another, from multiply-adds at each latent and at each of its members."""

    def sizes(graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[int, int]:
        fine, coarse = sorted((levels[0].chunk, node.level.chunk))
        return coarse // fine, graph.d_model

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> tuple[Work, ...]:
        fine, coarse = sorted((levels[0], node.level))
        size = sizes(graph, node, levels)
        works = (Work(coarse, 2 * at_latent(*size)), Work(fine, 2 * at_member(*size)))
        return tuple(item for item in works if item.per_position) or (Work(node.level, 0),)

    return lambda graph, node, levels: params(*sizes(graph, node, levels)), work


def _nothing(chunk: int, d: int) -> int:
    return 0


def block_params(block: BlockSpec, d_model: int) -> int:
    """Parameters of a whole block."""
    d, h, f = d_model, head_dim(block, d_model), ffn_dim(block, d_model)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    qkv = (heads + 2 * kv_heads) * h
    matrices = d * qkv + heads * h * d
    biases = qkv + d if block.bias else 0
    ffn = FEED_FORWARDS[block.ffn].params(d, f, block.bias)
    norms = NORM_PLACES[block.norm_place].count * norm_params(block.norm, d)
    branches = (1 if block.shared_branches else 2) * (norms + RESIDUALS[block.residual].params(d))
    branches += (2 * h if block.qk_norm else 0) + (RECALLS[block.recall].params(d) if block.recall else 0)
    return block.layers * (matrices + biases + ffn + branches)


def _block_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return block_params(graph.block_of(node), graph.d_model)


def _block_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    block, d = graph.block_of(node), graph.d_model
    h, f = head_dim(block, d), ffn_dim(block, d)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    matrices = d * (heads + 2 * kv_heads) * h + heads * h * d + FEED_FORWARDS[block.ffn].work(d, f)
    matrices += 2 * RESIDUALS[block.residual].work(d)
    matrices += 2 * RECALLS[block.recall].work(d) if block.recall else 0  # the one map serves both sub-layers
    return Work(node.level, 2 * matrices * block.layers, 4 * heads * h * block.layers, 2 * kv_heads * h * block.layers)


def _embed_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.vocab_size * graph.d_model


def _head_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    logits = 0 if graph.tie_embeddings else graph.vocab_size * graph.d_model
    hidden = graph.d_model * (graph.d_model + 1) if node.get("hidden", False) else 0
    return logits + hidden + norm_params(node.attr("norm", str), graph.d_model)


def _head_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    hidden = graph.d_model if node.get("hidden", False) else 0
    return Work(node.level, 2 * graph.d_model * (graph.vocab_size + hidden))


def _weighted_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return len(node.numbers("factors")) if node.attr("learned", bool) else 0


def _vector_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    return graph.d_model


_router = _linear(lambda graph, node, levels: node.attr("slots", int))
_mixture = _linear(lambda graph, node, levels: len(levels) - 1)


# -- modules ---------------------------------------------------------------------------------------


def _made(path: str | type, *, width: bool = False) -> PartRule:
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
    layer = "ParallelLayer" if block.parallel_residual else "SharedLayer" if block.shared_branches else "Layer"
    place = NORM_PLACES[block.norm_place]
    settings: dict[str, object] = {
        name: getattr(block, name)
        for name in ("layers", "heads", "window", "rotary_base", "axes", "qk_norm", "bias", "dropout")
    }
    settings.update(
        d_model=d_model,
        kv_heads=block.kv_heads or block.heads,
        head_dim=head_dim(block, d_model),
        ffn=named(FEED_FORWARDS[block.ffn].part),
        ffn_dim=ffn_dim(block, d_model),
        layer=named(f"block.{layer}"),
        norm=named(NORMS[block.norm].part),
        norm_eps=graph.norm_eps,
        norm_places=(place.pre, place.peri, place.post),
        residual=named(RESIDUALS[block.residual].part),
        recall=named(RECALLS[block.recall].part) if block.recall else None,
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
    if node.get("hidden", False):
        norm = part("embedding.HiddenLayer", graph.d_model, norm)
    if graph.tie_embeddings:
        return part("embedding.TiedHead", norm)
    return part("embedding.Head", graph.d_model, graph.vocab_size, norm)


def _pool_part(path: str | type, width: bool) -> PartRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = node.level.relative_to(levels[0])
        return part(path, chunk, offset, graph.d_model) if width else part(path, chunk, offset)

    return rule


def _upscale_part(path: str | type, width: bool) -> PartRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = levels[0].relative_to(node.level)
        settings: dict[str, object] = {"d_model": graph.d_model} if width else {}
        settings |= {"delay": node.attr("delay", int), "own_chunk": node.attr("reads", str) == "own_chunk"}
        settings |= {"zero_front": node.get("front", "") == "zero"}
        return part(path, chunk, offset, target=tuple(node.level), **settings)

    return rule


def _arrange_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    sides, axes = node.numbers("sides"), node.numbers("axes")
    return part("arranging.Arrange", sides, axes, back=node.attr("back", bool))


def _is_sorted(node: Node) -> bool:
    return node.numbers("axes") == tuple(range(len(node.numbers("axes"))))


def _weighted_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    return part("joins.WeightedJoin", node.numbers("factors"), learned=node.attr("learned", bool))


# -- rows ------------------------------------------------------------------------------------------


def operation(
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
    """A row of what works on each position alone, unless it says otherwise; see `Operation`.

    Args:
        name: ``FAMILY.NAME``.
        takes: kinds of its inputs by port; ``recall?`` is optional, ``states*`` are many.
        part: how its module is made.
        draw: how it stands in the picture.
        cost: rules of its parameters and of its FLOPs.
        init: as there, and so are the rest.
        gives: a stream, or what else.
        attrs: attributes with their types.
        level: what is wrong with its levels.
        lookahead: how far it looks ahead.
        decode: how it runs token by token.
        call: further keywords of its module.
        sees: whose padding it is told of.
        identity: whether it gives its input as it is.
    """
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


def pool(
    name: str,
    part: str | type,
    *,
    width: bool = False,
    params: ChunkCount = _nothing,
    at_latent: ChunkCount = _nothing,
    at_member: ChunkCount = _nothing,
    init: Init = "nothing",
) -> Operation:
    """A pool.

    Args:
        name: in files.
        part: a subclass of `spiralformer.pooling.Pool`, made with the chunk and the offset.
        width: whether it is made with d_model too.
        params: how many it has.
        at_latent: multiply-adds of matrix products at each latent.
        at_member: the same at each position that is pooled.
        init: as in `Operation`.
    """
    return operation(
        f"pool.{name}",
        {"stream": STREAM},
        _pool_part(part, width),
        LANE,
        cost=_of_chunk(params, at_latent, at_member),
        init=init,
        level=_coarser,
        decode="remembers",
        identity=lambda node, levels: levels[0] == node.level,
    )


def upscale(
    name: str,
    part: str | type,
    *,
    width: bool = False,
    params: ChunkCount = _nothing,
    at_latent: ChunkCount = _nothing,
    at_member: ChunkCount = _nothing,
    init: Init = "nothing",
) -> Operation:
    """An up-scaling: as `pool`, of a subclass of `spiralformer.upscale.Upscale`."""
    return operation(
        f"upscale.{name}",
        {"latents": STREAM},
        _upscale_part(part, width),
        LANE,
        cost=_of_chunk(params, at_latent, at_member),
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


def _norm(row: NormRow) -> Operation:
    sign = Drawing("sign", "M-1.5-7h3v14h-3z", "solid", half=2, space=4, words="▮ norm")
    cost = _by_width(row.params, lambda d: 0)
    return operation(f"norm.{row.name}", {"stream": STREAM}, _norm_part(row.name), sign, cost=cost, init="own")


def _recall(row: RecallRow) -> Operation:
    return operation(
        f"recall.{row.name}",
        {"state": STREAM, "recall": STREAM},
        _made(row.part, width=True),
        Drawing("sign", "M-5 0 0-5 5 0 0 5z", half=5, space=6, dashes=("recall",)),
        cost=_by_width(row.params, row.work),
        init="own" if row.params(1) else "nothing",
    )


_STEP = Drawing("sign", "M-4-4h8v8h-8z", half=4, space=6, words="□ step vector")
_WRITE = Drawing("sign", _DOT, "solid", space=9, follows=True, hides=("memory", "state"))
_READ = Drawing("sign", _DOT, "solid", space=7, over_drop=True, hides=("memory", "state"))

_VECTOR = (_vector_params, _no_work)
_LSTM = {"update": STREAM, "state": STREAM, "cell": STREAM}
_ROWS = (
    operation(
        "embed",
        {},
        _embed_part,
        BOX,
        cost=(_embed_params, _no_work),
        init="own",
        attrs={"scale?": str},
        level=_token_level,
    ),
    operation(
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
    pool("mean", "pooling.MeanPool"),
    pool("last", "pooling.LastPool"),
    pool(
        "self_aggregate",
        "pooling.SelfAggregatePool",
        width=True,
        params=lambda chunk, d: d,
        at_member=lambda chunk, d: d,
        init="own",
    ),
    pool(
        "linear",
        "pooling.LinearPool",
        width=True,
        params=lambda chunk, d: chunk * d**2,
        at_latent=lambda chunk, d: chunk * d**2,
        init="own",
    ),
    pool(
        "attention",
        "pooling.AttentionPool",
        width=True,
        params=lambda chunk, d: 4 * d**2,
        at_latent=lambda chunk, d: 2 * d**2,  # query and output
        at_member=lambda chunk, d: 2 * d**2,  # keys and values
        init="small",
    ),
    upscale("uniform", "upscale.UniformUpscale"),
    upscale(
        "learned",
        "upscale.LearnedUpscale",
        width=True,
        params=lambda chunk, d: chunk * (d + 1),
        at_latent=lambda chunk, d: chunk * d,
        init="own",
    ),
    operation("join.base", {"update": STREAM}, None, _join_sign(_PLUS, "⊕ sum"), identity=lambda node, levels: True),
    operation("join.sum", {"update": STREAM, "states*": STREAM}, None, _join_sign(_PLUS, "⊕ sum")),
    operation(
        "join.weighted",
        {"terms*": STREAM},
        _weighted_part,
        _join_sign(_CROSS, "⊗ weighted sum"),
        cost=(_weighted_params, _no_work),
        init="own",
        attrs={"factors": tuple, "learned": bool},
    ),
    operation(
        "join.mixture",
        {"update": STREAM, "state": STREAM, "supports*": STREAM},
        lambda graph, node, levels: part("joins.MixtureJoin", graph.d_model, len(levels) - 2),
        _join_sign(_CIRCLE + _DOT, "◎ mixture by a router", hides=("state",)),
        cost=_mixture,
        init="small",
    ),
    operation("step.add", {"stream": STREAM}, _made("joins.AddStep", width=True), _STEP, cost=_VECTOR, init="small"),
    operation("step.scale", {"stream": STREAM}, _made("joins.ScaleStep", width=True), _STEP, cost=_VECTOR, init="own"),
    operation(
        "noise",
        {"stream": STREAM},
        lambda graph, node, levels: part("joins.Noise", node.attr("std", float), node.attr("replaces", bool)),
        Drawing("sign", "M-4 4-4-4 4 4 4-4", half=4, space=6, words="N noise in training"),
        attrs={"std": float, "replaces": bool},
    ),
    operation(
        "carry",
        {"stream": STREAM},
        None,
        Drawing("sign", "M4-4a5.5 5.5 0 1 0 0 8M4-4v4M4-4h-4", half=5, space=6, words="↻ carried on in training"),
        attrs={"loop": str},
    ),
    operation(
        "arrange",
        {"stream": STREAM},
        _arrange_part,
        Drawing("sign", "M-4-4 4 4M-4 4 4-4", half=4, space=6, words="⨯ positions in another order"),
        attrs={"sides": tuple, "axes": tuple, "back": bool},
        level=_token_level,
        lookahead=lambda graph, node, levels, ahead: ahead[0] if _is_sorted(node) else math.inf,
        decode="no",
        sees="own",
        identity=lambda node, levels: _is_sorted(node),
    ),
    operation(
        "mean",
        {"stream": STREAM},
        _made("arranging.MeanOfAll"),
        Drawing("sign", "M-4 4 0-4 4 4z", half=4, space=6, words="△ mean over all positions"),
        level=_token_level,
        lookahead=lambda graph, node, levels, ahead: math.inf,
        decode="no",
        sees="own",
    ),
    operation(
        "memory",
        {"first": STREAM},
        _made("memory.OpenMemory"),
        Drawing("bus", words="memory, {slots} slots"),
        gives=MEMORY,
        attrs={"slots": int},
    ),
    operation(
        "write",
        {"memory": MEMORY, "update": STREAM, "state": STREAM},
        _routed("memory.WriteMemory"),
        _WRITE,
        cost=_router,
        init="small",
        gives=MEMORY,
        attrs={"slots": int},
    ),
    operation(
        "read",
        {"memory": MEMORY, "state": STREAM},
        _routed("memory.ReadMemory"),
        _READ,
        cost=_router,
        init="small",
        attrs={"slots": int},
    ),
    operation(
        "lanes",
        {"first": STREAM},
        lambda graph, node, levels: part("lanes.OpenLanes", node.attr("lanes", int)),
        Drawing("bus", words="{lanes} lanes"),
        gives=MEMORY,
        attrs={"lanes": int},
    ),
    operation(
        "lanes.write",
        {"memory": MEMORY, "update": STREAM},
        lambda graph, node, levels: part("lanes.WriteLanes", node.attr("lanes", int)),
        _WRITE,
        cost=(
            lambda graph, node, levels: node.attr("lanes", int) * (node.attr("lanes", int) + 1),
            lambda graph, node, levels: Work(node.level, 2 * node.attr("lanes", int) ** 2 * graph.d_model),
        ),
        init="own",
        gives=MEMORY,
        attrs={"lanes": int},
    ),
    operation(
        "lanes.read",
        {"memory": MEMORY},
        lambda graph, node, levels: part("lanes.ReadLanes", node.attr("lanes", int), node.attr("first", int)),
        _READ,
        cost=(lambda graph, node, levels: node.attr("lanes", int), _no_work),
        init="small",
        attrs={"lanes": int, "first": int},
    ),
    operation(
        "lstm.cell",
        _LSTM,
        _made("lanes.LstmCell", width=True),
        _join_sign(_CIRCLE + _DOT, "◎ gated cell", hides=("state", "cell")),
        cost=_by_width(lambda d: 3 * d * (2 * d + 1), lambda d: 6 * d * d),
        init="small",
    ),
    operation(
        "lstm.state",
        _LSTM,
        _made("lanes.LstmState", width=True),
        _join_sign(_CIRCLE + _DOT, "◎ gated cell", hides=("update", "state")),
        cost=_by_width(lambda d: d * (2 * d + 1), lambda d: 2 * d * d),
        init="small",
    ),
    *map(_norm, NORMS.values()),
    *map(_recall, RECALLS.values()),
    operation(
        "head",
        {"stream": STREAM},
        _head_part,
        BOX,
        cost=(_head_params, _head_work),
        init="own",
        gives=LOGITS,
        attrs={"norm": str, "hidden?": bool},
        level=_token_level,
        call=lambda graph, node: {"weight": "self.embed.weight"} if graph.tie_embeddings else {},
    ),
    operation(
        "loss.z",
        {"logits": LOGITS},
        lambda graph, node, levels: part("losses.ZLoss", node.attr("weight", float)),
        BOX,
        gives=Kind.LOSS,
        attrs={"weight": float},
    ),
)

_ALONE = ("embed", "block", "noise", "carry", "arrange", "mean", "memory", "write", "read", "lanes", "head")
_LOOPS = ("lanes.write", "lanes.read", "lstm.cell", "lstm.state")  # of topologies alone
_JOINS = ("base", "sum", "weighted", "mixture")  # residual, anchor and the like are written out as sums
_NAMES = (
    *_ALONE,
    *_LOOPS,
    *(f"pool.{kind}" for kind in options(PoolKind)),
    *(f"upscale.{kind}" for kind in options(UpscaleKind)),
    *(f"join.{kind}" for kind in _JOINS),
    *(f"step.{kind}" for kind in options(StepKind)),
    *(f"norm.{kind}" for kind in options(NormKind)),
    *(f"recall.{kind}" for kind in options(RecallKind)),
    *(f"loss.{kind}" for kind in options(LossKind)),
)
_WIDENS = ("pool", "upscale", "step", "loss")


def _places(row: Operation) -> tuple[str, ...]:
    family, _, name = row.name.partition(".")
    if family not in _WIDENS:
        raise TableError(f"operation '{row.name}' is none of {', '.join(f'{kind}.NAME' for kind in _WIDENS)}")
    return (f"{family}:{name}",)


OPS = table("an operation", _ROWS, _NAMES, places=_places)
OPS.follow(NORMS, _norm)
OPS.follow(RECALLS, _recall)
