"""What rows of the table of operations say of levels, lookahead, parameters, work and modules.

Conventions: FLOPs count matrix products and attention, a multiply-add as 2, attention dense, forward.
Lookahead is how many tokens past its own a value may depend on; a latent's own token is the one that
closes its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from builder.graph.blocks import FEED_FORWARDS, NORM_PLACES, NORMS, RECALLS, RESIDUALS, ffn_dim, norm_params
from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from builder.graph.row import ParamsRule, PartCall, PartRule, Work, WorkRule, named, part
from searchspace.arch import head_dim, rotary_dim

# -- levels ----------------------------------------------------------------------------------------


def same_level(node: Node, levels: Sequence[Level]) -> str:
    """All inputs stand at its own level."""
    for level in levels:
        if level != node.level:
            shown = " and ".join(str(level) for level in dict.fromkeys(levels))
            return f"joins values of different levels (chunk+offset {shown}); pool or upscale them to one level first"
    return ""


def token_level(node: Node, levels: Sequence[Level]) -> str:
    """All inputs stand at full resolution."""
    if any(level != TOKEN_LEVEL for level in levels):
        return f"needs full resolution, its input is at level {levels[0]}; upscale it first"
    return ""


def coarser(node: Node, levels: Sequence[Level]) -> str:
    """It leads to a level whose chunks are whole chunks of its input's."""
    finer = levels[0]
    if node.level.chunk < finer.chunk:
        return f"pools from {finer} to the finer {node.level}; use upscale for that"
    return nesting(node.level, finer)


def finer(node: Node, levels: Sequence[Level]) -> str:
    """It leads to a level of whose chunks its input's are made."""
    if levels[0].chunk < node.level.chunk:
        return f"upscales from {levels[0]} to the coarser {node.level}; use pool for that"
    return nesting(levels[0], node.level)


def nesting(coarse: Level, fine: Level) -> str:
    """What keeps chunks of one level from being whole chunks of another."""
    if coarse.nests_in(fine):
        return ""
    if coarse.chunk % fine.chunk:
        return f"chunk {fine.chunk} does not divide chunk {coarse.chunk}; choose a multiple"
    return (
        f"the borders of level {coarse} are not borders of level {fine}; choose offsets that are equal modulo "
        f"{fine.chunk}, or offset: auto"
    )


# -- lookahead -------------------------------------------------------------------------------------


def worst_input(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    """As far as the input that looks furthest."""
    return max(ahead, default=0)


def block_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    """As its inputs, or without end where it attends both ways."""
    return max(ahead) if graph.is_causal_block(graph.block_of(node)) else math.inf


def read_lookahead(graph: Graph, node: Node, levels: Sequence[Level], ahead: Sequence[float]) -> float:
    """As its input, by the chunk that is read, less the delay."""
    delay = node.attr("delay", int) * node.level.chunk
    if node.attr("reads", str) == "closed":
        return ahead[0] - delay
    return ahead[0] + levels[0].chunk - node.level.chunk - delay


# -- parameters and work ---------------------------------------------------------------------------


def no_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """It has none."""
    return 0


def no_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    """No matrix product."""
    return Work(node.level, 0)


def linear(outputs: Callable[[Graph, Node, Sequence[Level]], int]) -> tuple[ParamsRule, WorkRule]:
    """Rules of one linear map from d_model, with biases, run at the output's level."""

    def params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
        return (graph.d_model + 1) * outputs(graph, node, levels)

    def work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
        return Work(node.level, 2 * graph.d_model * outputs(graph, node, levels))

    return params, work


ChunkCount: TypeAlias = Callable[[int, int], int]
"""Of (G, D): the coarse level's chunk in positions of the fine one, and the width."""


def of_chunk(params: ChunkCount, at_latent: ChunkCount, at_member: ChunkCount) -> tuple[ParamsRule, WorkRule]:
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


def nothing(chunk: int, d: int) -> int:
    """Of no chunk and no width."""
    return 0


def block_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """Those of the block that it calls."""
    block, d = graph.block_of(node), graph.d_model
    h, f = head_dim(block, d), ffn_dim(block, d)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    qkv = (heads + 2 * kv_heads) * h
    matrices = d * qkv + heads * h * d
    biases = qkv + d if block.bias else 0
    ffn = FEED_FORWARDS[block.ffn].params(d, f, block.bias)
    norms = NORM_PLACES[block.norm_place].count * norm_params(block.norm, d)
    branches = (1 if block.shared_branches else 2) * (norms + RESIDUALS[block.residual].params(d))
    branches += (2 * h if block.qk_norm else 0) + (RECALLS[block.recall].params(d) if block.recall else 0)
    return block.layers * (matrices + biases + ffn + branches)


def block_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    """Matrix products of every layer, attention, and what is cached."""
    block, d = graph.block_of(node), graph.d_model
    h, f = head_dim(block, d), ffn_dim(block, d)
    heads, kv_heads = block.heads, block.kv_heads or block.heads
    matrices = d * (heads + 2 * kv_heads) * h + heads * h * d + FEED_FORWARDS[block.ffn].work(d, f)
    matrices += 2 * RESIDUALS[block.residual].work(d)
    matrices += 2 * RECALLS[block.recall].work(d) if block.recall else 0  # the one map serves both sub-layers
    return Work(node.level, 2 * matrices * block.layers, 4 * heads * h * block.layers, 2 * kv_heads * h * block.layers)


def embed_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """A vector for each token."""
    return graph.vocab_size * graph.d_model


def head_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """Norm, hidden layer, and the logits' matrix unless it is the embedding's."""
    logits = 0 if graph.tie_embeddings else graph.vocab_size * graph.d_model
    hidden = graph.d_model * (graph.d_model + 1) if node.get("hidden", False) else 0
    return logits + hidden + norm_params(node.attr("norm", str), graph.d_model)


def head_work(graph: Graph, node: Node, levels: Sequence[Level]) -> Work:
    """The logits' matrix, and the hidden layer's."""
    hidden = graph.d_model if node.get("hidden", False) else 0
    return Work(node.level, 2 * graph.d_model * (graph.vocab_size + hidden))


def weighted_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """A factor for each input, if they are learned."""
    return len(node.numbers("factors")) if node.attr("learned", bool) else 0


def vector_params(graph: Graph, node: Node, levels: Sequence[Level]) -> int:
    """One vector."""
    return graph.d_model


router = linear(lambda graph, node, levels: node.attr("slots", int))
mixture = linear(lambda graph, node, levels: len(levels) - 1)


# -- modules ---------------------------------------------------------------------------------------


def made(path: str | type, *, width: bool = False) -> PartRule:
    """Made with nothing, or with d_model."""
    return lambda graph, node, levels: part(path, graph.d_model) if width else part(path)


def routed(path: str) -> PartRule:
    """Made with d_model and the number of slots."""
    return lambda graph, node, levels: part(path, graph.d_model, node.attr("slots", int))


def norm_part(kind: str) -> PartRule:
    """A norm of the model's epsilon."""
    return lambda graph, node, levels: part(NORMS[kind].part, graph.d_model, eps=graph.norm_eps)


def embed_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    """An embedding, scaled if the file says so."""
    scaled = node.get("scale", "") == "sqrt_d_model"
    return part("embedding.ScaledEmbedding" if scaled else "nn.Embedding", graph.vocab_size, graph.d_model)


def block_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
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


def block_call(graph: Graph, node: Node) -> dict[str, str]:
    """What the rotary embedding is told of latents whose position is their chunk's last token."""
    if not node.get("positions", ""):
        return {}
    return {"stride": str(node.level.chunk), "first": str(node.level.chunk - node.level.offset - 1)}


def head_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    """Norm, hidden layer and logits."""
    kind = node.attr("norm", str)
    norm = part("nn.Identity") if kind == "none" else norm_part(kind)(graph, node, levels)
    if node.get("hidden", False):
        norm = part("embedding.HiddenLayer", graph.d_model, norm)
    if graph.tie_embeddings:
        return part("embedding.TiedHead", norm)
    return part("embedding.Head", graph.d_model, graph.vocab_size, norm)


def pool_part(path: str | type, width: bool) -> PartRule:
    """Made with chunk and offset among its input's positions; with d_model if it has ``width``."""

    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = node.level.relative_to(levels[0])
        return part(path, chunk, offset, graph.d_model) if width else part(path, chunk, offset)

    return rule


def upscale_part(path: str | type, width: bool) -> PartRule:
    """Made as `pool_part`, and with how it reads."""

    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
        chunk, offset = levels[0].relative_to(node.level)
        settings: dict[str, object] = {"d_model": graph.d_model} if width else {}
        settings |= {"delay": node.attr("delay", int), "own_chunk": node.attr("reads", str) == "own_chunk"}
        settings |= {"zero_front": node.get("front", "") == "zero"}
        return part(path, chunk, offset, target=tuple(node.level), **settings)

    return rule


def arrange_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    """Made with the grid and the order of its axes."""
    sides, axes = node.numbers("sides"), node.numbers("axes")
    return part("arranging.Arrange", sides, axes, back=node.attr("back", bool))


def is_sorted(node: Node) -> bool:
    """Whether the order of the axes changes nothing."""
    return node.numbers("axes") == tuple(range(len(node.numbers("axes"))))


def weighted_part(graph: Graph, node: Node, levels: Sequence[Level]) -> PartCall:
    """Made with the factors."""
    return part("joins.WeightedJoin", node.numbers("factors"), learned=node.attr("learned", bool))


def by_width(params: Callable[[int], int], work: Callable[[int], int]) -> tuple[ParamsRule, WorkRule]:
    """Rules from parameters and multiply-adds at one position, of d_model."""
    return (
        lambda graph, node, levels: params(graph.d_model),
        lambda graph, node, levels: Work(node.level, 2 * work(graph.d_model)),
    )
