"""From a verified graph to a runnable module: straight-line code over `spiralformer`'s parts.

The code is written once, in the four functions that `spiralformer.model.SpiralFormer` runs; an export to Hugging Face
carries the same text.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from builder.graph.ops import OPS
from builder.graph.row import Kind, Operation, PartCall, PartName
from builder.parametrization import factors_of
from searchspace.errors import SpecError
from spiralformer.init import init_weights
from spiralformer.model import SpiralFormer


def build_model(graph: Graph, *, seed: int | None = 0, device: str | torch.device = "cpu") -> SpiralFormer:
    """Build the module with initial weights.

    Args:
        graph: verified, from `compile_arch`.
        seed: of the initial weights; each parameter depends on (seed, its name) alone. None leaves memory as it
            is, for weights that are loaded next.
        device: where it is to live; ``meta`` gives shapes without memory. Weights may be assigned to such a model
            (``load_state_dict(assign=True)``); its rotary tables are computed where the tokens lie.

    Returns:
        A module from tokens (B, L) to logits (B, L, V).
    """
    with torch.device("meta"):
        model = _lower(graph)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for name, module in model.named_modules():
        if callable(reset := getattr(module, "reset", None)):
            reset()
        elif next(module.buffers(recurse=False), None) is not None:
            what = f"{name} ({type(module).__name__}) has a buffer, and no method reset that fills it"
            raise SpecError("", what, "give it one: a model is built without memory first")
    if seed is None:
        return model
    stretched = {name: factors.init for name, factors in factors_of(model, graph).items() if factors.init != 1.0}
    init_weights(model, seed=seed, stretched=stretched, **init_settings(graph))
    return model


def build_view(graph: Graph, of: SpiralFormer, trained: Graph, held: Mapping[str, int] | None = None) -> SpiralFormer:
    """The module of another graph that runs the parts of one that is there: they are the same objects.

    Args:
        graph: what to run.
        of: the module whose parts it takes.
        trained: its graph.
        held: by loop, how many of its first iterations pass no gradient.

    Raises:
        MissingPartError: if the graph has parameters that the module lacks, or has in another form.
    """
    known = {step.target: step.part for step in steps_of(trained) if step.part is not None}
    device = next(of.parameters()).device

    def taken(target: str, part: PartCall) -> nn.Module:
        if known.get(target) == part:
            return of.get_submodule(target)
        module: nn.Module = made(part).to(device)
        if next(module.parameters(), None) is not None:
            raise MissingPartError(target, is_known=target in known)
        return module

    return _lower(graph, taken, held or {}).train(of.training)


class MissingPartError(ValueError):
    """A module lacks a part that a graph needs, or has it in another form."""

    def __init__(self, target: str, *, is_known: bool) -> None:
        super().__init__(target)
        self.target, self.is_known = target, is_known


def init_settings(graph: Graph) -> dict[str, Any]:
    """What initial weights depend on beside the parts (`spiralformer.init`)."""
    scaled = graph.residual_scale != "none"
    layers = graph.num_layers if graph.base is None or graph.base.layers is None else graph.base.layers
    return {"d_model": graph.d_model, "num_layers": layers, "scaled_branches": scaled}


# -- parts -----------------------------------------------------------------------------------------


def class_of(name: PartName) -> Any:
    """The class that a table names."""
    if name.module:
        return attrgetter(name.path.partition(":")[2])(import_module(name.module))
    return _own_class(name.path)


@lru_cache(maxsize=256)
def _own_class(path: str) -> Any:
    home, _, attribute = path.rpartition(".")
    return getattr(import_module("torch.nn" if home == "nn" else f"spiralformer.{home}"), attribute)


def made(value: object) -> Any:
    """What the tables say, with every class looked up and every part built."""
    if isinstance(value, PartName):
        return class_of(value)
    if isinstance(value, PartCall):
        settings = {name: made(setting) for name, setting in value.settings.items()}
        return class_of(value.name)(*[made(argument) for argument in value.args], **settings)
    return value


def source_of(value: object) -> str:
    """The same as Python; settings at their default are left out."""
    if not isinstance(value, PartCall):
        return str(value) if isinstance(value, PartName) else repr(value)
    known = inspect.signature(class_of(value.name)).parameters
    settings = [
        f"{name}={source_of(setting)}"
        for name, setting in value.settings.items()
        if name not in known or type(setting) is not type(known[name].default) or setting != known[name].default
    ]
    return f"{value.name}({', '.join([*map(source_of, value.args), *settings])})"


def names_of(value: object) -> set[tuple[str, str]]:
    """All classes of `spiralformer` and of plugins in it: the plugin's module, or nothing, and the name."""
    if isinstance(value, PartName):
        return set() if value.path.startswith("nn.") else {(value.module, str(value))}
    if isinstance(value, PartCall):
        return names_of(value.name).union(*map(names_of, (*value.args, *value.settings.values())))
    return set()


# -- code ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a model's code: ``label = self.target(*inputs, **settings)``, or a sum of the inputs."""

    label: str
    node: Node
    row: Operation
    target: str | None
    """Dotted name of the module; None for a sum."""
    part: PartCall | None
    """How that module is made; the first step that uses it tells."""
    inputs: tuple[str, ...]
    """Labels of earlier steps, or ``tokens``."""
    settings: Mapping[str, str]
    source: Level
    """Of the value that it reads first."""

    @property
    def remembers(self) -> bool:
        return self.row.decode == "remembers"

    def call(self, *, of: str = "", more: Mapping[str, str] | None = None) -> str:
        """The right-hand side of its line; ``of`` is a method of its module or memory."""
        if self.target is None:
            return " + ".join(self.inputs)
        settings = [f"{name}={value}" for name, value in {**self.settings, **(more or {})}.items()]
        what = of or f"self.{self.target}"
        return f"{what}({', '.join([*self.inputs, *settings])})"

    def in_state(self, method: str) -> str:
        """A method of what is remembered at this call site."""
        return f'state["{self.label}"].{method}'


_TAKEN = ("self", "tokens", "state", "keep", "lengths", "opening", "torch", "nn", "last_of", "visible", "held")


def steps_of(graph: Graph) -> list[Step]:
    """A model's code, operation by operation."""
    labels: dict[str, str] = {}
    levels = {node.name: node.level for node in graph.nodes}
    known: set[str] = set()
    taken = {*_TAKEN, *(f(level) for level in levels.values() for f in (at_level, seen_at))}
    steps = []
    for node in graph.nodes:
        row = OPS[node.op]
        label = _attribute(node.name.replace(".", "_"))
        while label in taken:
            label += "_"
        taken.add(label)
        labels[node.name] = label
        inputs = tuple(labels[source] for source in node.inputs) or ("tokens",)
        sources = [levels[source] for source in node.inputs]
        source = sources[0] if sources else node.level
        if row.part is None:
            steps.append(Step(label, node, row, None, None, inputs, {}, source))
            continue
        target = ".".join(map(_attribute, (node.owner or f"ops.{node.name}").split(".")))
        part = None if target in known else row.part(graph, node, sources)
        known.add(target)
        settings = dict(row.call(graph, node))
        if row.sees and not graph.causal:
            settings["visible"] = seen_at(node.level if row.sees == "own" else source)
        steps.append(Step(label, node, row, target, part, inputs, settings, source))
    return steps


def at_level(level: Level) -> str:
    """The name of the rows that close a chunk of a level."""
    return f"at_{level.chunk}_{level.offset}"


def seen_at(level: Level) -> str:
    """The name of the latents of a level that are no padding."""
    return f"seen_{level.chunk}_{level.offset}"


def model_code(graph: Graph, steps: Sequence[Step], held: Mapping[str, int] | None = None) -> str:
    """The functions ``forward``, and where the graph can be decoded ``open``, ``prefill`` and ``decode``.

    A graph with losses of its own, or a loop that trains otherwise than it runs, has ``with_losses`` too.

    Args:
        graph: of the model.
        steps: of it.
        held: by loop, how many of its first iterations pass no gradient in training.
    """
    special = graph.losses or any((held or {}).values()) or any(step.node.op == "carry" for step in steps)
    with_losses = [_with_losses(graph, steps, held or {})] if special else []
    steps = [step for step in steps if step.row.gives is not Kind.LOSS]
    functions = [_forward(graph, steps), *with_losses]
    if not why_undecodable(graph):
        functions += [_open(steps), _prefill(graph, steps), _decode(graph, steps)]
    return "\n\n".join(functions) + "\n"


def between_embedding_and_head(steps: Sequence[Step]) -> list[Step]:
    """The steps without the embedding and the head's matrix: from ``tokens`` embedded (B, L, D) to the head's norm.

    That norm is the module ``norm``. Other libraries hold embedding and head themselves.
    """
    given = {step.label for step in steps if step.node.op == "embed"}
    inner = []
    for step in steps:
        if step.node.op == "embed":
            continue
        if step.node.op == "head":
            norm = step.part.args[-1] if step.part is not None else None
            assert isinstance(norm, PartCall)
            step = replace(step, target="norm", part=norm, settings={})
        inner.append(replace(step, inputs=tuple("tokens" if name in given else name for name in step.inputs)))
    return inner


def _result(graph: Graph, steps: Sequence[Step]) -> Step:
    return next(step for step in steps if step.node.name == graph.output)


def _forward(graph: Graph, steps: Sequence[Step]) -> str:
    lines = ["def forward(self, tokens, lengths=None):", '    """All positions at once."""']
    return "\n".join([*lines, *_parallel(graph, steps), f"    return {_result(graph, steps).label}"])


def _with_losses(graph: Graph, steps: Sequence[Step], held: Mapping[str, int]) -> str:
    lines = [
        "def with_losses(self, tokens, carried={}):",
        '    """The logits, losses of the model\'s own, and states to go on from."""',
        *(["    lengths = None"] if not graph.causal else []),
    ]
    losses = ", ".join(f'"{step.node.name}": {step.label}' for step in steps if step.row.gives is Kind.LOSS)
    loops = [step.node.attr("loop", str) for step in steps if step.node.op == "carry"]
    states = ", ".join(f'"{loop}": {last_state(loop, steps).label}.detach()' for loop in loops)
    own = [
        replace(step, inputs=(f'carried.get("{step.node.attr("loop", str)}", {step.inputs[0]})',))
        if step.node.op == "carry"
        else step
        for step in steps
    ]
    body = _parallel(graph, own, _held_nodes(graph, held))
    return "\n".join([*lines, *body, f"    return {_result(graph, steps).label}, {{{losses}}}, {{{states}}}"])


def last_state(loop: str, steps: Sequence[Step]) -> Step:
    """The step that gives a loop's state after its last iteration."""
    return [step for step in steps if step.node.iteration[0] == loop and step.row.gives is Kind.STREAM][-1]


def _held_nodes(graph: Graph, held: Mapping[str, int]) -> set[str]:
    """The nodes of a loop's first iterations, from its first block on: what comes before is read by later ones too."""
    found: set[str] = set()
    for node in graph.nodes:
        loop, t = node.iteration
        if t is not None and t < held.get(loop, 0) and (node.op == "block" or not found.isdisjoint(node.inputs)):
            found.add(node.name)
    return found


def _parallel(graph: Graph, steps: Sequence[Step], held: Collection[str] = ()) -> list[str]:
    lines = []
    seen = dict.fromkeys(
        step.source if step.row.sees == "source" else step.node.level for step in steps if step.row.sees
    )
    if not graph.causal:
        lines += [f"    {seen_at(level)} = visible(lengths, {level.chunk}, {level.offset}, tokens)" for level in seen]
    holds = False
    for place, step in _with_places(steps):
        is_held = step.node.name in held
        if is_held and not holds:
            lines.append("    with held():")
        holds = is_held
        indent = "    " if is_held else ""
        lines += [*(indent + line for line in place), f"{indent}    {step.label} = {step.call()}"]
    return lines


def _open(steps: Sequence[Step]) -> str:
    lines = ["def open(self, opening):", '    """What decoding remembers, by call site."""', "    return {"]
    for step in (step for step in steps if step.remembers):
        clocks = f"{tuple(step.node.level)}, {tuple(step.source)}"
        lines.append(f'        "{step.label}": self.{step.target}.open(opening.at({clocks})),')
    return "\n".join([*lines, "    }"])


def _prefill(graph: Graph, steps: Sequence[Step]) -> str:
    lines = [
        "def prefill(self, tokens, state, lengths, keep):",
        '    """Prompts at once into an empty state; the last token\'s logits for keep 1, all for 0."""',
    ]
    result = _result(graph, steps)
    for place, step in _with_places(steps):
        call = step.call(of=step.in_state("prefill"), more={"lengths": "lengths"}) if step.remembers else step.call()
        if step is result:
            call = call.replace(f"({step.inputs[0]}", f"(last_of({step.inputs[0]}, lengths, keep)", 1)
        lines += [*place, f"    {step.label} = {call}"]
    return "\n".join([*lines, f"    return {result.label}"])


def _decode(graph: Graph, steps: Sequence[Step]) -> str:
    """Lines under the level that must close a chunk for them to run; neighbours share one ``if``."""
    levels = dict.fromkeys(level for step in steps for level in (step.source, step.node.level))
    lines = [
        "def decode(self, tokens, state):",
        '    """One more token (B, 1) of every row; a level\'s lines run for the rows that close a chunk of it."""',
        *(f"    {at_level(level)} = state.rows({level.chunk}, {level.offset})" for level in levels),
    ]
    guard = TOKEN_LEVEL
    for step in steps:
        for level, line in _decode_step(step):
            if level != guard and level != TOKEN_LEVEL:
                lines.append(f"    if {at_level(level)} is not None:")
            guard = level
            lines.append(f"    {line}" if level == TOKEN_LEVEL else f"        {line}")
    return "\n".join([*lines, f"    return {_result(graph, steps).label}"])


def _decode_step(step: Step) -> Iterator[tuple[Level, str]]:
    own = step.node.level
    if not step.remembers:
        yield own, f"{step.label} = {step.call()}"
        return
    settings = {name: value for name, value in step.settings.items() if name != "tokens"}
    told = ", ".join([*step.inputs, f"rows={at_level(step.source)}", *(f"{n}={v}" for n, v in settings.items())])
    yield step.source, f"{step.in_state('take')}({told})"
    yield own, f"{step.label} = {step.in_state('give')}({at_level(own)})"


def _with_places(steps: Sequence[Step]) -> Iterator[tuple[list[str], Step]]:
    """Each step, with a comment before the first of an iteration or of a level."""
    heading = ""
    for step in steps:
        chunk, offset = step.node.level
        where = "tokens" if chunk == 1 else f"chunks of {chunk}" + (f", offset {offset}" if offset else "")
        loop, t = step.node.iteration
        place = where if t is None else f"{loop}, iteration {t + 1}: {where}"
        yield ([] if place == heading else [f"    # {place}"]), step
        heading = place


def why_undecodable(graph: Graph) -> str:
    """Why a model can't decode, or nothing: levels as clocks need every latent to be known when it is read."""
    if not graph.causal:
        return "it sees its whole input (causal: false)"
    levels = {node.name: node.level for node in graph.nodes}
    for node in graph.nodes:
        if OPS[node.op].decode == "no":
            return f"'{node.name}' ({node.op}) has no form for one token at a time"
        if OPS[node.op].family == "upscale" and node.attr("reads", str) == "own_chunk":
            chunk, _ = levels[node.inputs[0]].relative_to(node.level)
            if node.attr("delay", int) < chunk - 1:
                return f"'{node.name}' reads a chunk that is not closed yet"
    return ""


def _lower(
    graph: Graph,
    module_of: Callable[[str, PartCall], nn.Module] = lambda target, part: made(part),
    held: Mapping[str, int] | None = None,
) -> SpiralFormer:
    steps, root = steps_of(graph), nn.Module()
    for step in steps:
        if step.target is not None and step.part is not None:
            _register(root, step.target, module_of(step.target, step.part))
    code = model_code(graph, steps, held)
    return SpiralFormer(root, code, undecodable=why_undecodable(graph), causal=graph.causal)


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
