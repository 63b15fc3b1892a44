"""Writing operations one after another: what unrolling nodes and loops is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from builder.graph.ir import TOKEN_LEVEL, Attr, Graph, Level, Node
from builder.graph.ops import OPS
from searchspace.arch import ArchSpec, LevelSpec
from searchspace.errors import SpecError
from searchspace.nodes import LevelUse


@dataclass(frozen=True, slots=True)
class Value:
    """A node's result, and how its latents are spread when it is upscaled."""

    node: str
    level: Level
    upscale: str = "uniform"
    positions: str = "chunk_index"
    front: str = "read"


Inputs: TypeAlias = Mapping[str, "Value | Sequence[Value] | None"]
"""What is read, by port; None where an optional one is left out."""


@dataclass(slots=True)
class Emitter:
    """Appends operations of the table to a graph to be."""

    graph: Graph
    """All but the nodes."""
    arch: ArchSpec
    levels: Mapping[str, Level]
    nodes: list[Node] = field(default_factory=list)
    key: str = ""
    """The key of the file that is being written out."""

    def emit(
        self,
        name: str,
        op: str,
        inputs: Inputs,
        level: Level,
        attrs: Mapping[str, Attr] | None = None,
        *,
        owner: str = "",
        key: str = "",
    ) -> Value:
        """One operation; ``owner`` says whose parameters it uses if it has any, else it owns them itself."""
        read: list[Value] = []
        ports: list[str] = []
        for port, given in inputs.items():
            values = [given] if isinstance(given, Value) else list(given or ())
            read += values
            ports += [port] * len(values)
        levels = [value.level for value in read]
        names, kept = tuple([value.node for value in read]), tuple((attrs or {}).items())
        made = Node(name, op, names, tuple(ports), level, "", kept, key or self.key)
        if owner in ("embed", "head") or OPS[op].params(self.graph, made, levels):
            made = Node(name, op, names, made.ports, level, owner or f"sites.{name}", kept, made.key)
        self.nodes.append(made)
        if not read:
            return Value(name, level)
        return Value(name, level, read[0].upscale, read[0].positions, read[0].front)

    def level_of(self, use: LevelUse) -> Level:
        """The level that a node or a schedule entry uses."""
        level = self.levels[use.level]
        return level if use.offset is None else Level(level.chunk, use.offset)

    def like(self, declared: LevelSpec, use: LevelUse) -> Value:
        """A value of a level, as it says of its latents."""
        return Value("", TOKEN_LEVEL, use.upscale or declared.upscale, declared.positions, declared.front)

    def block(self, name: str, block: str, source: Value, recalled: Value | None = None, *, key: str = "") -> Value:
        """A call of a block; with ``recalled``, of one with internal recall."""
        attrs: dict[str, Attr] = {"block": block}
        if recalled is not None:
            attrs["recall"] = str(self.arch.blocks[block].recall)
        if source.positions != "chunk_index" and source.level != TOKEN_LEVEL:
            attrs["positions"] = source.positions
        inputs = {"stream": source, "recall": recalled}
        return self.emit(name, "block", inputs, source.level, attrs, owner=f"blocks.{block}", key=key)

    def pool(self, name: str, source: Value, use: LevelUse, *, owner: str = "", key: str = "") -> Value:
        """Latents of a coarser level."""
        declared, level = self.arch.levels[use.level], self.level_of(use)
        kind = use.pool or declared.pool
        owner = f"{owner}_{kind}" if owner else ""
        pooled = self.emit(name, f"pool.{kind}", {"stream": source}, level, owner=owner, key=key)
        return replace(self.like(declared, use), node=pooled.node, level=level)

    def upscale(
        self, name: str, source: Value, then: Value, delay: int, reads: str, *, owner: str = "", key: str = ""
    ) -> Value:
        """Spread ``source`` back to the level of ``then``, which says how that is spread in turn."""
        if reads == "auto":
            reads = "closed" if self.arch.causal else "own_chunk"
        attrs: dict[str, Attr] = {"delay": delay, "reads": reads}
        if source.front != "read" and reads == "closed":
            attrs["front"] = source.front
        owner = f"{owner}_{source.upscale}" if owner else ""
        spread = self.emit(
            name, f"upscale.{source.upscale}", {"latents": source}, then.level, attrs, owner=owner, key=key
        )
        return replace(then, node=spread.node)

    def sum(self, name: str, update: Value, states: Sequence[Value], *, key: str = "") -> Value:
        """The update added to states; the value is of the last one's kind."""
        op = "join.sum" if states else "join.base"
        inputs: Inputs = {"update": update, "states": states} if states else {"update": update}
        last = (update, *states)[-1]
        return replace(last, node=self.emit(name, op, inputs, last.level, key=key).node)

    def weighted(
        self,
        name: str,
        terms: Sequence[Value],
        factors: Sequence[float],
        *,
        learned: bool,
        owner: str = "",
        key: str = "",
    ) -> Value:
        """A sum with factors; fewer factors than terms: the first terms have none."""
        shown = tuple(float(f"{factor:.12g}") for factor in factors)
        attrs: dict[str, Attr] = {"factors": shown, "learned": learned}
        last = terms[-1]
        made = self.emit(name, "join.weighted", {"terms": terms}, last.level, attrs, owner=owner, key=key)
        return replace(last, node=made.node)

    def mixture(
        self, name: str, update: Value, state: Value, supports: Sequence[Value], *, owner: str = "", key: str = ""
    ) -> Value:
        """The update and supports, weighted by a router that reads the state."""
        last = supports[-1]
        inputs: Inputs = {"update": update, "state": state, "supports": supports}
        return replace(last, node=self.emit(name, "join.mixture", inputs, last.level, owner=owner, key=key).node)

    def write(self, name: str, memory: Value, update: Value, state: Value, *, owner: str = "", key: str = "") -> Value:
        """A new memory."""
        inputs = {"memory": memory, "update": update, "state": state}
        slots = {"slots": self._slots(memory, key)}
        return self.emit(name, "write", inputs, state.level, slots, owner=owner, key=key)

    def read(self, name: str, memory: Value, state: Value, *, owner: str = "", key: str = "") -> Value:
        """What a memory holds for a state."""
        inputs = {"memory": memory, "state": state}
        slots = {"slots": self._slots(memory, key)}
        made = self.emit(name, "read", inputs, state.level, slots, owner=owner, key=key)
        return replace(state, node=made.node)

    def _slots(self, value: Value, key: str) -> int:
        memory = next(node for node in self.nodes if node.name == value.node)
        if memory.op not in ("memory", "write"):
            what = f"'{memory.name}' is not a memory"
            raise SpecError(key or self.key, what, "name a node made by memory or write")
        return memory.attr("slots", int)

    def recall(self, name: str, kind: str, state: Value, source: Value, *, owner: str = "", key: str = "") -> Value:
        """A stream injected into a state."""
        return self.emit(name, f"recall.{kind}", {"state": state, "recall": source}, state.level, owner=owner, key=key)

    def norm(self, name: str, kind: str, source: Value, *, owner: str = "", key: str = "") -> Value:
        """A stream, normalised."""
        return self.emit(name, f"norm.{kind}", {"stream": source}, source.level, owner=owner, key=key)

    def noise(self, name: str, source: Value, std: float, *, replaces: bool, key: str = "") -> Value:
        """Normal noise on a stream, or in its place."""
        attrs: dict[str, Attr] = {"std": float(std), "replaces": replaces}
        return self.emit(name, "noise", {"stream": source}, source.level, attrs, key=key)

    def carry(self, name: str, source: Value, loop: str, *, key: str = "") -> Value:
        """A loop's first state, in whose place training may put the one that an earlier run ended with."""
        return self.emit(name, "carry", {"stream": source}, source.level, {"loop": loop}, key=key)

    def step(self, name: str, kind: str, source: Value, *, owner: str = "", key: str = "") -> Value:
        """A stream and a vector of the iteration's own."""
        return self.emit(name, f"step.{kind}", {"stream": source}, source.level, owner=owner, key=key)
