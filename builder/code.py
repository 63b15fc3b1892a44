"""A graph as Python: the functions that `spiralformer.model.SpiralFormer` runs, straight-line code over its parts.

An export to Hugging Face carries the same text.
"""

from __future__ import annotations

import keyword
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from builder.graph.ops import OPS
from builder.graph.row import Kind, Operation, PartCall, PartName
from searchspace.errors import SpecError


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


_TAKEN = ("self", "tokens", "state", "keep", "lengths", "opening", "torch", "nn", "last_of", "visible", "held",
          "carried", "states", "finish")  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Ending:
    """Of a loop that ends, row by row, where it has come to rest (`spiralformer.halting.Halting`)."""

    loop: str
    by: str
    threshold: float
    ends: tuple[int, ...]
    """After how many iterations it may end; the last number is all of them."""

    def parts(self, steps: Sequence[Step]) -> LoopParts:
        """The steps before the loop, of its iterations, and after it. Raises `SpecError` if they can't be parted."""
        own, after, before = dict[str, int](), dict[str, Step](), list[Step]()
        for step in steps:
            loop, t = step.node.iteration
            is_moved = any(name in own or name in after for name in step.inputs)
            if loop == self.loop and t is not None and (step.node.op == "block" or is_moved):
                own[step.label] = bisect_right(self.ends, t)
            elif is_moved:
                after[step.label] = step
            else:
                before.append(step)
        moving = [step for step in steps if step.label in own]
        rounds = [[step for step in moving if own[step.label] == t] for t in range(len(self.ends))]
        end = last_state(self.loop, moving)
        states = [_ends(each, end.node.level) for each in rounds]
        first = next(step for step in moving if step.node.op == "block")
        begun = self._begun(steps, first)
        if inner := [name for step in after.values() for name in step.inputs if name in own and name != end.label]:
            what = f"'{inner[0]}' is of an iteration, and read after the loop"
            raise SpecError(f"graph.{self.loop}", f"can't end early: {what}", "give what reads it a block of its own")
        return LoopParts(before, rounds, list(after.values()), begun, states)

    def _begun(self, steps: Sequence[Step], first: Step) -> str:
        """The label of the state that the loop begins with: what leads to its first block, at its own level."""
        labels = {step.label: step for step in steps}
        found = first
        while found.node.iteration == (self.loop, 0):
            if found.inputs[0] not in labels:
                return found.inputs[0]
            found = labels[found.inputs[0]]
        return found.label

    def made_for(self, steps: Sequence[Step]) -> PartCall:
        """How the module is made that ends it."""
        level = last_state(self.loop, steps).node.level
        return PartCall(PartName("halting.Halting"), (self.by, self.threshold, self.ends, *level))


@dataclass(frozen=True, slots=True)
class LoopParts:
    """A model's steps around a loop."""

    before: Sequence[Step]
    rounds: Sequence[Sequence[Step]]
    """Of the iterations to each place where it may end."""
    after: Sequence[Step]
    begun: str
    """The label of the state that it begins with."""
    states: Sequence[Step]
    """What gives the state at each of these places."""


def model_code(
    graph: Graph, steps: Sequence[Step], held: Mapping[str, int] | None = None, ending: Ending | None = None
) -> str:
    """The functions ``forward``, and where the graph can be decoded ``open``, ``prefill`` and ``decode``.

    A graph with losses of its own, or a loop that trains otherwise than it runs, has ``with_losses`` too.

    Args:
        graph: of the model.
        steps: of it.
        held: by loop, how many of its first iterations pass no gradient in training.
        ending: of a loop that ends where it has come to rest; such a model has ``forward`` alone.
    """
    special = graph.losses or any((held or {}).values()) or any(step.node.op == "carry" for step in steps)
    with_losses = [_with_losses(graph, steps, held or {})] if special else []
    steps = [step for step in steps if step.row.gives is not Kind.LOSS]
    if ending is not None:
        return _forward_until_rest(graph, steps, ending) + "\n"
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


def _forward_until_rest(graph: Graph, steps: Sequence[Step], ending: Ending) -> str:
    """The loop's states are given one by one to `spiralformer.halting.Halting`, and sent back by it."""
    parts = ending.parts(steps)
    lines = ["def forward(self, tokens, lengths=None):", '    """All positions at once, until each row rests."""']
    lines += [*_seen_lines(graph, steps), *_code(parts.before), "    def states():"]
    for each, state in zip(parts.rounds, parts.states, strict=True):
        lines += _code(each, "    ")
        lines.append(f"        {state.label} = yield {state.label}")
    last, result = parts.states[-1].label, _result(graph, steps).label
    lines += [f"    def finish({last}):", *_code(parts.after, "    "), f"        return {result}"]
    return "\n".join([*lines, f"    return self.halting({parts.begun}, states(), finish, lengths)"])


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


def _ends(steps: Sequence[Step], level: Level) -> Step:
    """The step that gives the state after one iteration."""
    return [step for step in steps if step.row.gives is Kind.STREAM and step.node.level == level][-1]


def _held_nodes(graph: Graph, held: Mapping[str, int]) -> set[str]:
    """The nodes of a loop's first iterations, from its first block on: what comes before is read by later ones too."""
    found: set[str] = set()
    for node in graph.nodes:
        loop, t = node.iteration
        if t is not None and t < held.get(loop, 0) and (node.op == "block" or not found.isdisjoint(node.inputs)):
            found.add(node.name)
    return found


def _parallel(graph: Graph, steps: Sequence[Step], held: Collection[str] = ()) -> list[str]:
    lines = _seen_lines(graph, steps)
    for is_held, group in groupby(steps, lambda step: step.node.name in held):
        lines += ["    with held():"] if is_held else []
        lines += _code([*group], "    " if is_held else "")
    return lines


def _seen_lines(graph: Graph, steps: Sequence[Step]) -> list[str]:
    """What tells latents from padding, in a model that sees its whole input."""
    if graph.causal:
        return []
    seen = dict.fromkeys(
        step.source if step.row.sees == "source" else step.node.level for step in steps if step.row.sees
    )
    return [f"    {seen_at(level)} = visible(lengths, {level.chunk}, {level.offset}, tokens)" for level in seen]


def _code(steps: Sequence[Step], indent: str = "") -> list[str]:
    lines = []
    for place, step in _with_places(steps):
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


def why_undecodable(graph: Graph, ending: Ending | None = None) -> str:
    """Why a model can't decode, or nothing: levels as clocks need every latent to be known when it is read."""
    if not graph.causal:
        return "it sees its whole input (causal: false)"
    if ending is not None:
        return f"its loop {ending.loop} ends where the whole row has come to rest"
    levels = {node.name: node.level for node in graph.nodes}
    for node in graph.nodes:
        if OPS[node.op].decode == "no":
            return f"'{node.name}' ({node.op}) has no form for one token at a time"
        if OPS[node.op].family == "upscale" and node.attr("reads", str) == "own_chunk":
            chunk, _ = levels[node.inputs[0]].relative_to(node.level)
            if node.attr("delay", int) < chunk - 1:
                return f"'{node.name}' reads a chunk that is not closed yet"
    return ""


_EMPTY = nn.Module()


def _attribute(part: str) -> str:
    """A name as a module attribute: keywords, and what `nn.Module` has itself (``train``), get an underscore."""
    return f"{part}_" if keyword.iskeyword(part) or hasattr(_EMPTY, part) else part
