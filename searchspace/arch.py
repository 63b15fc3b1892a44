"""The architecture language: frozen specs of levels, blocks and the graph that wires them.

An `ArchSpec` has no open choice left. Everything that can be told from the file alone (names,
references, divisibility) is checked when it is made; levels, lookahead and cost are the builder's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from searchspace.errors import SpecError, one_of, show
from searchspace.loops import MOST_ITERATIONS, check_loop
from searchspace.nodes import (
    ArrangeNode,
    BlockNode,
    EmbedNode,
    FfnKind,
    FrontRule,
    HeadNode,
    JoinNode,
    LevelUse,
    LoopNode,
    NodeSpec,
    NormKind,
    NormNode,
    NormPlace,
    Parametrization,
    PoolKind,
    PoolNode,
    Positions,
    QkNorm,
    RecallKind,
    RecallNode,
    ResidualKind,
    ResidualScale,
    UpscaleKind,
    WriteNode,
    decode_graph,
    level_uses,
    node_inputs,
)
from searchspace.plain import dump_yaml, encode, key

_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9_]{0,62}[A-Za-z0-9])?")
_MOST_LEVELS = 24  # pairs of levels are checked for nesting
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""Of architectures and studies: also the name of a folder, and shown without quotes."""


_JOIN_ARITY: dict[str, tuple[int, int]] = {
    "base": (1, 1),
    "residual": (2, 2),
    "anchor": (2, 2),
    "anchor_star": (2, 2),
    "sum": (2, 64),
    "weighted": (1, 64),
    "mixture": (3, 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSpec:
    """A resolution level: how tokens become latents, and how updates come back."""

    chunk: int = key("Tokens merged into one latent; 1 is full resolution.", low=1, high=65536)
    offset: int | Literal["auto"] = key(
        "Shift of the chunk borders, 0 .. chunk - 1; auto picks chunk/2, or the nearest value that "
        "nests where a pool is pooled again.",
        default="auto",
    )
    pool: PoolKind = key("How a chunk becomes a latent.", default="self_aggregate")
    upscale: UpscaleKind = key("How a latent's update is spread over the tokens.", default="learned")
    front: FrontRule = key(
        "Whether the first chunk - 1 tokens read the short chunk that an offset leaves at the front, or zeros as a "
        "literal right shift gives (SpiralFormer leaves it open).",
        default="read",
    )
    positions: Positions = key(
        "What the rotary embedding is told of a latent: chunk_index, or the position of the chunk's last_token.",
        default="chunk_index",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """A named stack of Transformer layers; every use of the name shares its weights."""

    layers: int = key("Layers (attention + feed-forward) in the stack.", low=1, high=512)
    heads: int = key("Attention heads.", low=1, high=1024)
    kv_heads: int | None = key("Key-value heads (grouped-query attention); default: heads.", default=None, low=1)
    head_dim: int | None = key("Width of a head; default: d_model / heads.", default=None, low=1, high=4096)
    ffn: FfnKind = key("Feed-forward kind.", default="swiglu")
    ffn_dim: int | None = key(
        "Hidden width; default by the kind: 4 d_model, or 8/3 d_model rounded up to a multiple of 8 where it is gated.",
        default=None,
        low=1,
        high=1 << 20,
    )
    norm: NormKind = key("Normalization kind.", default="rms")
    norm_place: NormPlace = key(
        "pre: before each branch. peri: also on its output. post: after each residual sum (outer normalization). "
        "sandwich: pre and post.",
        default="pre",
    )
    residual: ResidualKind = key(
        "How a branch's output meets the state: add, gate (a gate on each), or gru (a GRU cell).", default="add"
    )
    recall: RecallKind | None = key("Inject the loop's input inside each branch (internal recall).", default=None)
    parallel_residual: bool = key("Attention and feed-forward read the same input (GPT-NeoX).", default=False)
    rotary_fraction: float = key("Share of each head that is rotated.", default=1.0, low=0.0, high=1.0)
    rotary_base: float = key("Base of the rotary frequencies.", default=10000.0, low=1.0)
    axes: tuple[int, ...] = key(
        "Sides of a grid that positions go over row by row, as [9, 9]; each has its share of the rotated dimensions.",
        default=(),
    )
    shared_branches: bool = key(
        "Attention and feed-forward share one norm for each place, and one residual's weights (arXiv 2604.15259).",
        default=False,
    )
    qk_norm: QkNorm = key(
        "Normalise queries and keys per head (RMS), before rotation; or after_rotation.", default=False
    )
    bias: bool = key("Biases on all linear maps.", default=False)
    dropout: float = key("Dropout on each branch in training.", default=0.0, low=0.0, high=0.95)
    window: int | None = key(
        "Attend to so many latents, itself the last of them; both ways, the middle one. A mask: it costs as without.",
        default=None,
        low=1,
        high=1 << 20,
    )
    bidirectional: bool | None = key("Attend both ways; default: only in a model with causal: false.", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSpec:
    """The model whose settings are carried over (``parametrization``): at its width and depth nothing changes."""

    d_model: int = key("Its width.", low=2, high=1 << 17)
    layers: int | None = key(
        "completep: its unrolled layers, every use of a shared layer counted.", default=None, low=1, high=1 << 20
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchSpec:
    """One concrete architecture. Raises `SpecError` when its parts do not fit together."""

    name: str = key("What people call it.", default="unnamed")
    vocab_size: int = key("Size of the vocabulary.", low=2, high=1 << 24)
    seq_len: int = key("Length at which costs are stated, and the longest trained.", low=2, high=1 << 24)
    d_model: int = key("Width of every stream.", low=2, high=1 << 17)
    causal: bool = key("false: the model sees its whole input (grids, puzzles).", default=True)
    tie_embeddings: bool = key("The head uses the embedding's weights.", default=False)
    norm_eps: float = key("Epsilon of every normalization.", default=1e-5, low=1e-12, high=1.0)
    residual_scale: ResidualScale = key(
        "Factor on every residual branch: 1, 1/N or 1/sqrt(N) for N unrolled layers.", default="none"
    )
    parametrization: Parametrization = key(
        "How initial weights, rates, decay and residual branches go with size: standard, or so that the base's "
        "settings carry over widths (mup, arXiv 2203.03466), and depths and uses too (completep, arXiv 2505.01618).",
        default="standard",
    )
    base: BaseSpec | None = key("The size at which mup and completep change nothing.", default=None)
    levels: Mapping[str, LevelSpec] = key("Resolution levels by name.", default=dict)
    blocks: Mapping[str, BlockSpec] = key("Owners of parameters by name.", default=dict)
    graph: Mapping[str, NodeSpec] = key("Named nodes.", decoder=decode_graph)

    def __post_init__(self) -> None:
        _check_names(self)
        if len(self.levels) > _MOST_LEVELS:
            raise SpecError("levels", f"there are {len(self.levels)} of them", f"use at most {_MOST_LEVELS}")
        _check_parametrization(self)
        for name, level in self.levels.items():
            if isinstance(level.offset, int) and not 0 <= level.offset < level.chunk:
                raise SpecError(
                    f"levels.{name}.offset",
                    f"offset {level.offset} is beyond the chunk of {level.chunk}",
                    f"use 0 .. {level.chunk - 1}, or auto",
                )
        for name, block in self.blocks.items():
            _check_block(block, self, f"blocks.{name}")
        _check_graph(self)

    def to_yaml(self) -> str:
        """The architecture as YAML that `load_arch` reads back to an equal spec."""
        return dump_yaml(encode(self))


def head_dim(block: BlockSpec, d_model: int) -> int:
    """Width of one attention head."""
    return block.head_dim or d_model // block.heads


def rotary_dim(block: BlockSpec, d_model: int) -> int:
    """How many of a head's dimensions are rotated."""
    return int(head_dim(block, d_model) * block.rotary_fraction)


def _check_names(arch: ArchSpec) -> None:
    if not NAME.fullmatch(arch.name):
        raise SpecError("name", f"{show(arch.name)} can't be used as a name", "use letters, digits, '_', '-' and '.'")
    for part in ("levels", "blocks", "graph"):
        for name in getattr(arch, part):
            if not _NAME.fullmatch(name):
                raise SpecError(
                    f"{part}.{show(name, 30)}",
                    "can't be used as a name",
                    "start with a letter, then letters, digits and '_', not last; at most 64",
                )


def _check_parametrization(arch: ArchSpec) -> None:
    kind, base = arch.parametrization, arch.base
    if (kind == "standard") != (base is None):
        what = "is missing" if base is None else "has no meaning with parametrization: standard"
        remedy = (
            f"give {kind} a base, e.g. {{d_model: 64}}" if base is None else "leave it out, or choose mup or completep"
        )
        raise SpecError("base", what, remedy)
    if base is None:
        return
    if (kind == "completep") != (base.layers is not None):
        what = "is missing" if base.layers is None else "has no meaning with mup, which is about width"
        raise SpecError("base.layers", what, "give it for completep, and for completep alone")
    if arch.tie_embeddings:
        what = f"a head that is the embedding can't have a rate of its own, as {kind} needs"
        raise SpecError("tie_embeddings", what, "set it to false, or parametrization: standard")


def _check_block(block: BlockSpec, arch: ArchSpec, path: str) -> None:
    d_model = arch.d_model
    if block.window is not None and block.bidirectional and block.window % 2 == 0:
        what = f"{block.window} has no middle, and the block looks both ways"
        raise SpecError(f"{path}.window", what, f"use {block.window - 1} or {block.window + 1}")
    if block.head_dim is None and d_model % block.heads:
        raise SpecError(
            f"{path}.heads",
            f"heads ({block.heads}) does not divide d_model ({d_model})",
            "choose a divisor, or give head_dim",
        )
    if block.heads % (block.kv_heads or block.heads):
        raise SpecError(
            f"{path}.kv_heads", f"kv_heads ({block.kv_heads}) does not divide heads ({block.heads})", "choose a divisor"
        )
    if block.axes and min(block.axes) < 1:
        raise SpecError(f"{path}.axes", f"{[*block.axes]} are no sides of a grid", "give e.g. [9, 9]")
    if block.axes:
        _check_grid(block.axes, arch.seq_len, f"{path}.axes")
    if block.axes and rotary_dim(block, d_model) % (2 * len(block.axes)):
        what = f"{rotary_dim(block, d_model)} rotated dimensions are no whole pairs for each of {[*block.axes]}"
        raise SpecError(f"{path}.axes", what, f"rotate a multiple of {2 * len(block.axes)}")
    if rotary_dim(block, d_model) % 2:
        raise SpecError(
            f"{path}.rotary_fraction",
            f"rotates {rotary_dim(block, d_model)} of {head_dim(block, d_model)} dimensions, an odd number",
            "choose heads, head_dim and rotary_fraction so that it is even",
        )
    plain_of = (("norm_place", "pre"), ("residual", "add"), ("recall", None), ("shared_branches", False))
    for name, plain in plain_of:
        if block.parallel_residual and getattr(block, name) != plain:
            raise SpecError(
                f"{path}.{name}",
                f"'{getattr(block, name)}' has no meaning with parallel_residual",
                f"leave {name} out, or set parallel_residual: false",
            )


def _check_graph(arch: ArchSpec) -> None:
    heads = [name for name, node in arch.graph.items() if isinstance(node, HeadNode)]
    if len(heads) != 1:
        raise SpecError(
            "graph",
            f"has {len(heads)} heads{': ' if heads else ''}{', '.join(heads)}",
            "give exactly one node {head: lm, in: ...}",
        )
    embeds = [name for name, node in arch.graph.items() if isinstance(node, EmbedNode)]
    if not embeds:
        raise SpecError("graph", "has no embed", "give a node {embed: tokens}")
    iterations = sum(node.most_iterations for node in arch.graph.values() if isinstance(node, LoopNode))
    if iterations > MOST_ITERATIONS:
        what = f"has up to {iterations} iterations in all its loops"
        draws = any(
            isinstance(node, LoopNode) and node.iterations and node.iterations.sample == "poisson_lognormal"
            for node in arch.graph.values()
        )
        more = "; poisson_lognormal draws up to four times train" if draws else ""
        raise SpecError("graph", what, f"keep to {MOST_ITERATIONS}{more}")
    in_segments = {name: node.segments for name, node in arch.graph.items() if isinstance(node, LoopNode)}
    if len(counts := {count for count in in_segments.values() if count > 1}) > 1:
        last = [name for name, count in in_segments.items() if count > 1][-1]
        what = f"loops train a batch in {' and '.join(map(str, sorted(counts)))} segments"
        raise SpecError(f"graph.{last}.iterations.segments", what, "give all of them one number")
    for name, node in arch.graph.items():
        _check_node(arch, node, f"graph.{name}", embeds)
        deep = arch.residual_scale != "none" or arch.parametrization == "completep"
        if deep and isinstance(node, LoopNode) and node.varies:
            what = "goes by the number of layers, and its iterations vary"
            setting = "residual_scale" if arch.residual_scale != "none" else "parametrization"
            raise SpecError(f"graph.{name}.iterations", f"{setting} {what}", "set it to none, or mup")
    _check_acyclic(arch)


def _check_node(arch: ArchSpec, node: NodeSpec, path: str, embeds: list[str]) -> None:
    for where, source in node_inputs(node):
        if source not in arch.graph:
            raise SpecError(f"{path}.{where}", f"no node is called {show(source)}", one_of(arch.graph, source))
    for where, use in level_uses(node):
        _check_use(arch, use, f"{path}.{where}")
    if isinstance(node, BlockNode | LoopNode):
        op, block = ("block", node.block) if isinstance(node, BlockNode) else ("loop", node.loop)
        if block not in arch.blocks:
            raise SpecError(f"{path}.{op}", f"no block is called {show(block)}", one_of(arch.blocks, block))
        recall = arch.blocks[block].recall
        if isinstance(node, BlockNode) and (recall is None) != (node.recall is None):
            raise SpecError(
                f"{path}.recall",
                f"block {block} has recall: {recall or 'null'}, the node recalls {node.recall or 'nothing'}",
                "give both the block a recall kind and the node a stream to recall, or neither",
            )
    if isinstance(node, JoinNode):
        low, high = _JOIN_ARITY[node.join]
        if not low <= len(node.inputs) <= high:
            wanted = str(low) if low == high else f"{low} or more"
            raise SpecError(f"{path}.in", f"join {node.join} has {len(node.inputs)} inputs", f"give it {wanted}")
        if len(node.factors) != (len(node.inputs) if node.join == "weighted" else 0):
            raise SpecError(
                f"{path}.factors",
                f"join {node.join} of {len(node.inputs)} inputs has {len(node.factors)} factors",
                "give weighted one factor for each input, other joins none",
            )
    if isinstance(node, WriteNode | RecallNode) and len(node.inputs) != 2:
        wanted = "[update, state]" if isinstance(node, WriteNode) else "[state, input]"
        raise SpecError(f"{path}.in", f"has {len(node.inputs)} inputs", f"give it {wanted}")
    if isinstance(node, NormNode | RecallNode) and node.weights is not None and not _NAME.fullmatch(node.weights):
        raise SpecError(
            f"{path}.weights", f"{show(node.weights)} can't be used as a name", "use letters, digits and '_'"
        )
    if isinstance(node, ArrangeNode):
        _check_arrange(node, arch.seq_len, path)
    if isinstance(node, PoolNode) and node.pool.delay:
        raise SpecError(f"{path}.pool.delay", "has no meaning for a pool", "delay the upscale that reads it")
    if isinstance(node, LoopNode):
        check_loop(node, path, core_recalls=arch.blocks[node.loop].recall is not None, embeds=embeds)


def _check_arrange(node: ArrangeNode, seq_len: int, path: str) -> None:
    if not 2 <= len(node.arrange) <= 8 or min(node.arrange) < 1 or math.prod(node.arrange) > 1 << 24:
        raise SpecError(f"{path}.arrange", f"{[*node.arrange]} are no sides of a grid", "give two to eight, as [9, 9]")
    if sorted(node.axes) != [*range(len(node.arrange))]:
        what = f"{[*node.axes]} is no order of the {len(node.arrange)} axes"
        raise SpecError(f"{path}.axes", what, f"give each of 0 .. {len(node.arrange) - 1} once")
    _check_grid(node.arrange, seq_len, f"{path}.arrange")


def _check_grid(sides: Sequence[int], seq_len: int, path: str) -> None:
    """Positions are whole grids: rows that wrap elsewhere than a board's mean nothing."""
    if seq_len % math.prod(sides):
        what = f"{[*sides]} has {math.prod(sides)} places, and seq_len {seq_len} is no multiple of that"
        raise SpecError(path, what, "give the sides of the board, or its number of places as seq_len")


def _check_use(arch: ArchSpec, use: LevelUse, path: str) -> None:
    level = arch.levels.get(use.level)
    if level is None:
        raise SpecError(path, f"no level is called {show(use.level)}", one_of(arch.levels, use.level))
    if use.offset is not None and use.offset >= level.chunk:
        raise SpecError(
            f"{path}.offset", f"offset {use.offset} is beyond the chunk of {level.chunk}", f"use 0 .. {level.chunk - 1}"
        )


def _check_acyclic(arch: ArchSpec) -> None:
    done: set[str] = set()
    for start in arch.graph:
        trail: list[tuple[str, Iterator[tuple[str, str]]]] = []
        on_trail: list[str] = []
        if start not in done:
            trail.append((start, node_inputs(arch.graph[start])))
            on_trail.append(start)
        while trail:
            _, sources = trail[-1]
            source = next(sources, None)
            if source is None:
                done.add(trail.pop()[0])
                on_trail.pop()
            elif source[1] in on_trail:
                cycle = [*on_trail[on_trail.index(source[1]) :], source[1]]
                raise SpecError(
                    f"graph.{on_trail[-1]}.{source[0]}",
                    f"the graph has a cycle: {' <- '.join(cycle)}",
                    "repeat a block with {loop: ...} instead",
                )
            elif source[1] not in done:
                trail.append((source[1], node_inputs(arch.graph[source[1]])))
                on_trail.append(source[1])
