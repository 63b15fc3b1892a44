"""From a verified graph to a runnable module: straight-line `torch.fx` code over `spiralformer`'s parts."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from builder.graph.ir import Graph, Level, Node
from searchspace.arch import ffn_dim, head_dim, rotary_dim
from spiralformer.block import Block, BlockConfig
from spiralformer.decoding import SITE, UNDECODABLE, Clock, Site
from spiralformer.embedding import Head, ScaledEmbedding, TiedHead
from spiralformer.init import init_weights
from spiralformer.joins import AddStep, MixtureJoin, ScaleStep, WeightedJoin
from spiralformer.memory import OpenMemory, ReadMemory, WriteMemory
from spiralformer.model import SpiralFormer
from spiralformer.norm import make_norm
from spiralformer.pooling import AttentionPool, LastPool, LinearPool, MeanPool, SelfAggregatePool
from spiralformer.recall import make_recall
from spiralformer.rope import Rotary
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
    init_weights(model, seed=seed, **init_settings(graph))
    return model


def init_settings(graph: Graph) -> dict[str, Any]:
    """What initial weights depend on beside the parts (`spiralformer.init`)."""
    scaled = graph.residual_scale != "none"
    return {"d_model": graph.d_model, "num_layers": graph.num_layers, "scaled_branches": scaled}


@dataclass(frozen=True, slots=True)
class Part:
    """A module to be. Its text is the code that makes it."""

    make: Callable[..., nn.Module]
    args: tuple[object, ...]
    settings: Mapping[str, object]

    def build(self) -> nn.Module:
        return self.make(*self.args, **self.settings)

    def __str__(self) -> str:
        settings = (f"{name}={value!r}" for name, value in self.settings.items())
        home = "nn." if self.make.__module__.startswith("torch.") else ""
        return f"{home}{self.make.__name__}({', '.join([*map(repr, self.args), *settings])})"


def part(make: Callable[..., nn.Module], *args: object, **settings: object) -> Part:
    """``make(*args, **settings)``, later."""
    return Part(make, args, settings)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a model's forward: ``label = self.target(*inputs, **settings)``, or a sum of the inputs."""

    label: str
    node: Node
    target: str | None
    """Dotted name of the module; None for a sum."""
    part: Part | None
    """How that module is made; the first step that uses it tells."""
    inputs: tuple[str, ...]
    """Labels of earlier steps, ``tokens``, or ``embed.weight``."""
    settings: Mapping[str, int]
    site: Site


def steps_of(graph: Graph) -> list[Step]:
    """A model's forward, line by line."""
    labels: dict[str, str] = {}
    levels = {node.name: node.level for node in graph.nodes}
    made: set[str] = set()
    taken = {"self", "tokens", "state", "keep", "token", "torch", "nn"}
    steps = []
    for node in graph.nodes:
        inputs = ["tokens"] if node.op == "embed" else [labels[source] for source in node.inputs]
        label = _attribute(node.name.replace(".", "_"))
        while label in taken:
            label += "_"
        taken.add(label)
        labels[node.name] = label
        if node.op == "join.sum":
            steps.append(Step(label, node, None, None, tuple(inputs), {}, _site(node, levels)))
            continue
        target = ".".join(map(_attribute, (node.owner or f"ops.{node.name}").split(".")))
        module = None if target in made else MODULES[node.op](graph, node, [levels[source] for source in node.inputs])
        made.add(target)
        if node.op.startswith("upscale."):
            inputs.append("tokens")
        if node.op == "head" and graph.tie_embeddings:
            inputs.append("embed.weight")
        settings: dict[str, int] = {}
        if node.op == "block" and any(name == "positions" for name, _ in node.attrs):
            settings = {"stride": node.level.chunk, "first": node.level.chunk - node.level.offset - 1}
        steps.append(Step(label, node, target, module, tuple(inputs), settings, _site(node, levels)))
    return steps


def _lower(graph: Graph) -> SpiralFormer:
    root = nn.Module()
    code = fx.Graph()
    values: dict[str, fx.Node] = {"tokens": code.placeholder("tokens")}
    steps = steps_of(graph)
    for step in steps:
        inputs = [code.get_attr(name) if name == "embed.weight" else values[name] for name in step.inputs]
        if step.target is None:
            value = inputs[0]
            for other in inputs[1:]:
                value = code.create_node("call_function", operator.add, (value, other), name=step.label)
                value.meta[SITE] = step.site
        else:
            if step.part is not None:
                _register(root, step.target, step.part.build())
            value = code.create_node("call_module", step.target, tuple(inputs), dict(step.settings), name=step.label)
        value.meta[SITE] = step.site
        values[step.label] = value
    logits = next(step.label for step in steps if step.node.name == graph.output)
    code.output(values[logits]).meta[UNDECODABLE] = why_undecodable(graph)
    return SpiralFormer(root, code)


def _site(node: Node, levels: Mapping[str, Level]) -> Site:
    kind = node.op.partition(".")[0]
    source = levels[node.inputs[0]] if node.inputs else node.level
    kind = kind if kind in ("block", "pool", "upscale", "head") else "plain"
    return Site(kind, Clock(*node.level), Clock(*source))


def why_undecodable(graph: Graph) -> str:
    """Why a model can't decode, or nothing: levels as clocks need every latent to be known when it is read."""
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


def _register(root: nn.Module, target: str, module: nn.Module) -> None:
    *parents, last = target.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


ModuleRule = Callable[[Graph, Node, Sequence[Level]], Part]


def _block(graph: Graph, node: Node, levels: Sequence[Level]) -> Part:
    block, d_model = graph.block_of(node), graph.d_model
    return part(
        Block,
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
        ),
    )


def _head(graph: Graph, node: Node, levels: Sequence[Level]) -> Part:
    norm = str(node.attr("norm"))
    if graph.tie_embeddings:
        return part(TiedHead, graph.d_model, norm, graph.norm_eps)
    return part(Head, graph.d_model, graph.vocab_size, norm, graph.norm_eps)


def _pool(make: Callable[..., nn.Module], *, learned: bool = False) -> ModuleRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> Part:
        chunk, offset = node.level.relative_to(levels[0])
        return part(make, chunk, offset, graph.d_model) if learned else part(make, chunk, offset)

    return rule


def _upscale(make: Callable[..., nn.Module], *, learned: bool = False) -> ModuleRule:
    def rule(graph: Graph, node: Node, levels: Sequence[Level]) -> Part:
        chunk, offset = levels[0].relative_to(node.level)
        extra: dict[str, object] = {"d_model": graph.d_model} if learned else {}
        if dict(node.attrs).get("front") == "zero":
            extra["zero_front"] = True
        own_chunk, target = node.attr("reads") == "own_chunk", tuple(node.level)
        return part(make, chunk, offset, delay=node.int_attr("delay"), own_chunk=own_chunk, target=target, **extra)

    return rule


def _weighted(graph: Graph, node: Node, levels: Sequence[Level]) -> Part:
    factors = [float(text) for text in str(node.attr("factors")).split(",")]
    return part(WeightedJoin, factors, learned=bool(node.attr("learned")))


def _norm(kind: str) -> ModuleRule:
    return lambda graph, node, levels: part(make_norm, kind, graph.d_model, graph.norm_eps)


MODULES: dict[str, ModuleRule] = {
    "embed": lambda graph, node, levels: part(
        ScaledEmbedding if dict(node.attrs).get("scale") else nn.Embedding, graph.vocab_size, graph.d_model
    ),
    "block": _block,
    "pool.mean": _pool(MeanPool),
    "pool.last": _pool(LastPool),
    "pool.self_aggregate": _pool(SelfAggregatePool, learned=True),
    "pool.linear": _pool(LinearPool, learned=True),
    "pool.attention": _pool(AttentionPool, learned=True),
    "upscale.uniform": _upscale(UniformUpscale),
    "upscale.learned": _upscale(LearnedUpscale, learned=True),
    "join.weighted": _weighted,
    "join.mixture": lambda graph, node, levels: part(MixtureJoin, graph.d_model, len(levels) - 2),
    "step.add": lambda graph, node, levels: part(AddStep, graph.d_model),
    "step.scale": lambda graph, node, levels: part(ScaleStep, graph.d_model),
    "memory": lambda graph, node, levels: part(OpenMemory),
    "write": lambda graph, node, levels: part(WriteMemory, graph.d_model, node.int_attr("slots")),
    "read": lambda graph, node, levels: part(ReadMemory, graph.d_model, node.int_attr("slots")),
    "norm.rms": _norm("rms"),
    "norm.layer": _norm("layer"),
    "recall.add": lambda graph, node, levels: part(make_recall, "add", graph.d_model),
    "recall.linear": lambda graph, node, levels: part(make_recall, "linear", graph.d_model),
    "recall.concat": lambda graph, node, levels: part(make_recall, "concat", graph.d_model),
    "head": _head,
}
"""How each operation is built; `join.sum` is plain addition, `join.base` never reaches lowering."""
