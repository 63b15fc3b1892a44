"""The closed table of operations: what each takes and gives, looks ahead, owns, costs, and how it is made and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping

from builder.graph import rules
from builder.graph.blocks import NORMS, RECALLS, NormRow, RecallRow
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
    PartRule,
    Sees,
    Work,
    WorkRule,
    part,
    ports,
)
from searchspace.nodes import LossKind, NormKind, PoolKind, RecallKind, StepKind, UpscaleKind
from searchspace.tables import TableError, options, table

STREAM, MEMORY, LOGITS = Kind.STREAM, Kind.MEMORY, Kind.LOGITS

BOX, LANE = Drawing("box"), Drawing("lane")
_CIRCLE = "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0"
_DOT = "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0"
_PLUS, _CROSS = _CIRCLE + "M-5 0H5M0-5V5", _CIRCLE + "M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5"


def _join_sign(shape: str, words: str, hides: tuple[str, ...] = ()) -> Drawing:
    return Drawing("sign", shape, half=5, space=4, words=words, follows=True, hides=hides)


def operation(
    name: str,
    takes: Mapping[str, Kind],
    part: PartRule | None,
    draw: Drawing,
    *,
    cost: tuple[ParamsRule, WorkRule] = (rules.no_params, rules.no_work),
    init: Init = "nothing",
    gives: Kind = STREAM,
    attrs: Mapping[str, type] | None = None,
    level: LevelRule = rules.same_level,
    lookahead: LookaheadRule = rules.worst_input,
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
    params: rules.ChunkCount = rules.nothing,
    at_latent: rules.ChunkCount = rules.nothing,
    at_member: rules.ChunkCount = rules.nothing,
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
        rules.pool_part(part, width),
        LANE,
        cost=rules.of_chunk(params, at_latent, at_member),
        init=init,
        level=rules.coarser,
        decode="remembers",
        identity=lambda node, levels: levels[0] == node.level,
    )


def upscale(
    name: str,
    part: str | type,
    *,
    width: bool = False,
    params: rules.ChunkCount = rules.nothing,
    at_latent: rules.ChunkCount = rules.nothing,
    at_member: rules.ChunkCount = rules.nothing,
    init: Init = "nothing",
) -> Operation:
    """An up-scaling: as `pool`, of a subclass of `spiralformer.upscale.Upscale`."""
    return operation(
        f"upscale.{name}",
        {"latents": STREAM},
        rules.upscale_part(part, width),
        LANE,
        cost=rules.of_chunk(params, at_latent, at_member),
        init=init,
        attrs={"delay": int, "reads": str, "front?": str},
        level=rules.finer,
        lookahead=rules.read_lookahead,
        decode="remembers",
        call=lambda graph, node: {"tokens": "tokens"},
        sees="source",
        identity=lambda node, levels: levels[0] == node.level and node.attr("delay", int) == 0,
    )


def _norm(row: NormRow) -> Operation:
    sign = Drawing("sign", "M-1.5-7h3v14h-3z", "solid", half=2, space=4, words="▮ norm")
    cost = rules.by_width(row.params, lambda d: 0)
    return operation(f"norm.{row.name}", {"stream": STREAM}, rules.norm_part(row.name), sign, cost=cost, init="own")


def _recall(row: RecallRow) -> Operation:
    return operation(
        f"recall.{row.name}",
        {"state": STREAM, "recall": STREAM},
        rules.made(row.part, width=True),
        Drawing("sign", "M-5 0 0-5 5 0 0 5z", half=5, space=6, dashes=("recall",)),
        cost=rules.by_width(row.params, row.work),
        init="own" if row.params(1) else "nothing",
    )


_STEP = Drawing("sign", "M-4-4h8v8h-8z", half=4, space=6, words="□ step vector")
_VECTOR = (rules.vector_params, rules.no_work)


def _step(kind: str, path: str, init: Init) -> Operation:
    return operation(f"step.{kind}", {"stream": STREAM}, rules.made(path, width=True), _STEP, cost=_VECTOR, init=init)


_WRITE = Drawing("sign", _DOT, "solid", space=9, follows=True, hides=("memory", "state"))
_READ = Drawing("sign", _DOT, "solid", space=7, over_drop=True, hides=("memory", "state"))
_LSTM = {"update": STREAM, "state": STREAM, "cell": STREAM}
_ROWS = (
    operation(
        "embed",
        {},
        rules.embed_part,
        BOX,
        cost=(rules.embed_params, rules.no_work),
        init="own",
        attrs={"scale?": str},
        level=rules.token_level,
    ),
    operation(
        "block",
        {"stream": STREAM, "recall?": STREAM},
        rules.block_part,
        Drawing("box", dashes=("recall",)),
        cost=(rules.block_params, rules.block_work),
        init="own",
        attrs={"block": str, "recall?": str, "positions?": str},
        lookahead=rules.block_lookahead,
        decode="remembers",
        call=rules.block_call,
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
        rules.weighted_part,
        _join_sign(_CROSS, "⊗ weighted sum"),
        cost=(rules.weighted_params, rules.no_work),
        init="own",
        attrs={"factors": tuple, "learned": bool},
    ),
    operation(
        "join.mixture",
        {"update": STREAM, "state": STREAM, "supports*": STREAM},
        lambda graph, node, levels: part("joins.MixtureJoin", graph.d_model, len(levels) - 2),
        _join_sign(_CIRCLE + _DOT, "◎ mixture by a router", hides=("state",)),
        cost=rules.mixture,
        init="small",
    ),
    operation(
        "step.add", {"stream": STREAM}, rules.made("joins.AddStep", width=True), _STEP, cost=_VECTOR, init="small"
    ),
    operation(
        "step.scale", {"stream": STREAM}, rules.made("joins.ScaleStep", width=True), _STEP, cost=_VECTOR, init="own"
    ),
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
        rules.arrange_part,
        Drawing("sign", "M-4-4 4 4M-4 4 4-4", half=4, space=6, words="⨯ positions in another order"),
        attrs={"sides": tuple, "axes": tuple, "back": bool},
        level=rules.token_level,
        lookahead=lambda graph, node, levels, ahead: ahead[0] if rules.is_sorted(node) else math.inf,
        decode="no",
        sees="own",
        identity=lambda node, levels: rules.is_sorted(node),
    ),
    operation(
        "mean",
        {"stream": STREAM},
        rules.made("arranging.MeanOfAll"),
        Drawing("sign", "M-4 4 0-4 4 4z", half=4, space=6, words="△ mean over all positions"),
        level=rules.token_level,
        lookahead=lambda graph, node, levels, ahead: math.inf,
        decode="no",
        sees="own",
    ),
    operation(
        "memory",
        {"first": STREAM},
        rules.made("memory.OpenMemory"),
        Drawing("bus", words="memory, {slots} slots"),
        gives=MEMORY,
        attrs={"slots": int},
    ),
    operation(
        "write",
        {"memory": MEMORY, "update": STREAM, "state": STREAM},
        rules.routed("memory.WriteMemory"),
        _WRITE,
        cost=rules.router,
        init="small",
        gives=MEMORY,
        attrs={"slots": int},
    ),
    operation(
        "read",
        {"memory": MEMORY, "state": STREAM},
        rules.routed("memory.ReadMemory"),
        _READ,
        cost=rules.router,
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
        cost=(lambda graph, node, levels: node.attr("lanes", int), rules.no_work),
        init="small",
        attrs={"lanes": int, "first": int},
    ),
    operation(
        "lstm.cell",
        _LSTM,
        rules.made("lanes.LstmCell", width=True),
        _join_sign(_CIRCLE + _DOT, "◎ gated cell", hides=("state", "cell")),
        cost=rules.by_width(lambda d: 3 * d * (2 * d + 1), lambda d: 6 * d * d),
        init="small",
    ),
    operation(
        "lstm.state",
        _LSTM,
        rules.made("lanes.LstmState", width=True),
        _join_sign(_CIRCLE + _DOT, "◎ gated cell", hides=("update", "state")),
        cost=rules.by_width(lambda d: d * (2 * d + 1), lambda d: 2 * d * d),
        init="small",
    ),
    *map(_norm, NORMS.values()),
    *map(_recall, RECALLS.values()),
    operation(
        "head",
        {"stream": STREAM},
        rules.head_part,
        BOX,
        cost=(rules.head_params, rules.head_work),
        init="own",
        gives=LOGITS,
        attrs={"norm": str, "hidden?": bool},
        level=rules.token_level,
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
