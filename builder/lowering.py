"""From a verified graph to a runnable module: straight-line `torch.fx` code over `spiralformer`'s parts."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn

from builder.ir import Graph, Level, Node
from searchspace.arch import ffn_dim, head_dim, rotary_dim
from spiralformer.block import Block, BlockConfig
from spiralformer.decoding import SITE, UNDECODABLE, Clock, Site
from spiralformer.embedding import Head, TiedHead
from spiralformer.init import init_weights
from spiralformer.joins import AddStep, MixtureJoin, ScaleStep, WeightedJoin
from spiralformer.model import SpiralFormer
from spiralformer.norm import make_norm
from spiralformer.pooling import AttentionPool, LastPool, LinearPool, MeanPool, SelfAggregatePool
from spiralformer.recall import make_recall
from spiralformer.rope import Rotary
from spiralformer.topology import OpenMemory, ReadMemory, WriteMemory
from spiralformer.upscale import LearnedUpscale, UniformUpscale


def build_model(graph: Graph, *, seed: int | None = 0, device: str | torch.device = "cpu") -> SpiralFormer:
    """Build the module with initial weights.

    Args:
        graph: verified, from `compile_arch`.
        seed: of the initial weights; each parameter depends on (seed, its name) alone. None leaves memory as it
            is, for weights that are loaded next.
        device: where it is to live; ``meta`` gives shapes without memory.

    Returns:
        A module from tokens (B, L) to logits (B, L, V).
    """
    with torch.device("meta"):
        model = _lower(graph)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Rotary | WeightedJoin):
            module.reset()
    if seed is None:
        return model
    init_weights(
        model,
        seed=seed,
        d_model=graph.d_model,
        num_layers=graph.num_layers,
        scaled_branches=graph.residual_scale != "none",
    )
    return model


def _lower(graph: Graph) -> SpiralFormer:
    root = nn.Module()
    code = fx.Graph()
    tokens = code.placeholder("tokens")
    values: dict[str, fx.Node] = {}
    levels = {node.name: node.level for node in graph.nodes}
    for node in graph.nodes:
        inputs = [values[source] for source in node.inputs]
        if node.op == "embed":
            inputs = [tokens]
        label = _attribute(node.name.replace(".", "_")) if node.name != "self" else "self_"
        if node.op == "join.sum":
            value = inputs[0]
            for other in inputs[1:]:
                value = code.create_node("call_function", operator.add, (value, other), name=label)
                value.meta[SITE] = _site(node, levels)
        else:
            target = ".".join(map(_attribute, (node.owner or f"ops.{node.name}").split(".")))
            if not _has(root, target):
                _register(root, target, MODULES[node.op](graph, node, [levels[source] for source in node.inputs]))
            if node.op.startswith("upscale."):
                inputs.append(tokens)
            if node.op == "head" and graph.tie_embeddings:
                inputs.append(code.get_attr("embed.weight"))
            settings: dict[str, fx.node.Argument] = {}
            if node.op == "block" and any(name == "positions" for name, _ in node.attrs):
                settings = {"stride": node.level.chunk, "first": node.level.chunk - node.level.offset - 1}
            value = code.create_node("call_module", target, tuple(inputs), settings, name=label)
        value.meta[SITE] = _site(node, levels)
        values[node.name] = value
    code.output(values[graph.output]).meta[UNDECODABLE] = _why_undecodable(graph)
    return SpiralFormer(root, code)


def _site(node: Node, levels: Mapping[str, Level]) -> Site:
    kind = node.op.partition(".")[0]
    source = levels[node.inputs[0]] if node.inputs else node.level
    kind = kind if kind in ("block", "pool", "upscale", "head") else "plain"
    return Site(kind, Clock(*node.level), Clock(*source))


def _why_undecodable(graph: Graph) -> str:
    """Levels as clocks need every latent to be known when it is read."""
    if not graph.causal:
        return "it sees its whole input (causal: false)"
    levels = {node.name: node.level for node in graph.nodes}
    for node in graph.nodes:
        if node.op.startswith("upscale.") and node.attr("reads") == "own_chunk":
            chunk, _ = levels[node.inputs[0]].relative_to(node.level)
            if node.int_attr("delay") < chunk - 1:
                return f"'{node.name}' reads a chunk that is not closed yet"
    return ""


_EMPTY = nn.Module()


def _attribute(part: str) -> str:
    """A name as a module attribute: keywords, and what `nn.Module` has itself (``train``), get an underscore."""
    return f"{part}_" if keyword.iskeyword(part) or hasattr(_EMPTY, part) else part


def _has(root: nn.Module, target: str) -> bool:
    module: nn.Module | None = root
    for part in target.split("."):
        module = getattr(module, part, None)
        if module is None:
            return False
    return True


def _register(root: nn.Module, target: str, module: nn.Module) -> None:
    *parents, last = target.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


ModuleRule = Callable[[Graph, Node, Sequence[Level]], nn.Module]


def _block(graph: Graph, node: Node, levels: Sequence[Level]) -> nn.Module:
    block, d_model = graph.block_of(node), graph.d_model
    return Block(
        BlockConfig(
            d_model=d_model,
            layers=block.layers,
            heads=block.heads,
            kv_heads=block.kv_heads or block.heads,
            head_dim=head_dim(block, d_model),
            ffn=block.ffn,
            ffn_dim=ffn_dim(block, d_model),
            norm=block.norm,
            norm_place=block.norm_place,
            norm_eps=graph.norm_eps,
            parallel_residual=block.parallel_residual,
            residual=block.residual,
            recall=block.recall,
            rotary_dim=rotary_dim(block, d_model),
            rotary_base=block.rotary_base,
            qk_norm=block.qk_norm,
            bias=block.bias,
            dropout=block.dropout,
            causal=graph.is_causal_block(block),
            branch_scale=graph.branch_scale,
            max_len=graph.seq_len,
        )
    )


def _head(graph: Graph, node: Node, levels: Sequence[Level]) -> nn.Module:
    norm = str(node.attr("norm"))
    if graph.tie_embeddings:
        return TiedHead(graph.d_model, norm, graph.norm_eps)
    return Head(graph.d_model, graph.vocab_size, norm, graph.norm_eps)


def _pool(make: Callable[..., nn.Module], *, learned: bool = False) -> ModuleRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> nn.Module:
        chunk, offset = node.level.relative_to(levels[0])
        return make(chunk, offset, graph.d_model) if learned else make(chunk, offset)

    return rule


def _upscale(make: Callable[..., nn.Module], *, learned: bool = False) -> ModuleRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> nn.Module:
        chunk, offset = levels[0].relative_to(node.level)
        extra = {"d_model": graph.d_model} if learned else {}
        own_chunk = node.attr("reads") == "own_chunk"
        return make(chunk, offset, delay=node.int_attr("delay"), own_chunk=own_chunk, target=node.level, **extra)

    return rule


def _weighted(graph: Graph, node: Node, levels: Sequence[Level]) -> nn.Module:
    factors = [float(text) for text in str(node.attr("factors")).split(",")]
    return WeightedJoin(factors, learned=bool(node.attr("learned")))


def _norm(kind: str) -> ModuleRule:
    return lambda graph, node, levels: make_norm(kind, graph.d_model, graph.norm_eps)


MODULES: dict[str, ModuleRule] = {
    "embed": lambda graph, node, levels: nn.Embedding(graph.vocab_size, graph.d_model),
    "block": _block,
    "pool.mean": _pool(MeanPool),
    "pool.last": _pool(LastPool),
    "pool.self_aggregate": _pool(SelfAggregatePool, learned=True),
    "pool.linear": _pool(LinearPool, learned=True),
    "pool.attention": _pool(AttentionPool, learned=True),
    "upscale.uniform": _upscale(UniformUpscale),
    "upscale.learned": _upscale(LearnedUpscale, learned=True),
    "join.weighted": _weighted,
    "join.mixture": lambda graph, node, levels: MixtureJoin(graph.d_model, len(levels) - 2),
    "step.add": lambda graph, node, levels: AddStep(graph.d_model),
    "step.scale": lambda graph, node, levels: ScaleStep(graph.d_model),
    "memory": lambda graph, node, levels: OpenMemory(),
    "write": lambda graph, node, levels: WriteMemory(graph.d_model, node.int_attr("slots")),
    "read": lambda graph, node, levels: ReadMemory(graph.d_model, node.int_attr("slots")),
    "norm.rms": _norm("rms"),
    "norm.layer": _norm("layer"),
    "recall.add": lambda graph, node, levels: make_recall("add", graph.d_model),
    "recall.linear": lambda graph, node, levels: make_recall("linear", graph.d_model),
    "recall.concat": lambda graph, node, levels: make_recall("concat", graph.d_model),
    "head": _head,
}
"""How each operation is built; `join.sum` is plain addition, `join.base` never reaches lowering."""
