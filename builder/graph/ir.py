"""The graph between YAML and PyTorch: one node type, immutable, torch-free.

Passes make new graphs; `builder.graph.ops` says what each operation means, `builder.graph.verify` what is legal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, TypeVar

from builder.graph.blocks import RESIDUAL_SCALES, ffn_dim
from searchspace.arch import BaseSpec, BlockSpec, head_dim, rotary_dim
from searchspace.nodes import IterationsSpec
from searchspace.plain import encode

Attr: TypeAlias = int | bool | str | float | tuple[float, ...]
T = TypeVar("T", int, str, bool, float)


class Level(NamedTuple):
    """A resolution: token i belongs to chunk floor((i + offset) / chunk)."""

    chunk: int
    offset: int

    def closed_chunks(self, tokens: int) -> int:
        """How many chunks ``tokens`` tokens close."""
        return (tokens + self.offset) // self.chunk

    def nests_in(self, finer: Level) -> bool:
        """Whether every chunk border here is one of ``finer`` too."""
        return self.chunk % finer.chunk == 0 and (self.offset - finer.offset) % finer.chunk == 0

    def relative_to(self, finer: Level) -> Level:
        """This level counted in latents of ``finer``."""
        return Level(self.chunk // finer.chunk, (self.offset - finer.offset) // finer.chunk)

    def __str__(self) -> str:
        return f"{self.chunk}+{self.offset}"


TOKEN_LEVEL = Level(1, 0)


def meet(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    """Where two (period, residue) classes of integers meet, by the Chinese remainder theorem; None if never."""
    common = math.gcd(a[0], b[0])
    if (b[1] - a[1]) % common:
        return None
    step = (b[1] - a[1]) // common * pow(a[0] // common, -1, b[0] // common) % (b[0] // common)
    return math.lcm(a[0], b[0]), a[1] + a[0] * step


@dataclass(frozen=True, slots=True)
class Node:
    """One operation."""

    name: str
    """Unique; a loop's parts are ``LOOP.tN.PART``."""
    op: str
    """A row of `builder.graph.ops.OPS`."""
    inputs: tuple[str, ...]
    """Names of the nodes that it reads."""
    ports: tuple[str, ...]
    """What it reads each of them as, in the order of its row."""
    level: Level
    """Level of the value it gives."""
    owner: str = ""
    """Whose parameters it uses: nodes with one owner share them; empty if it has none."""
    attrs: tuple[tuple[str, Attr], ...] = ()
    key: str = field(default="", compare=False)
    """The key of the file that it comes from: ``graph.h.topology``."""

    @property
    def iteration(self) -> tuple[str, int | None]:
        """The loop that it is a part of, and its iteration, from 0; None for what is of none."""
        loop, _, rest = self.name.partition(".t")
        number = rest.partition(".")[0]
        return (loop, int(number)) if number.isdigit() else (self.name, None)

    def reads(self, port: str) -> str | None:
        """The node read as ``port``; None if there is none."""
        return next((source for name, source in zip(self.ports, self.inputs, strict=True) if name == port), None)

    def attr(self, name: str, kind: type[T]) -> T:
        """An attribute that the operation always has."""
        for key, value in self.attrs:
            if key == name:
                assert isinstance(value, kind), f"{self.name}.{name} is {value!r}"
                return value
        raise KeyError(f"{self.name} ({self.op}) has no attribute {name}")

    def get(self, name: str, default: T) -> T:
        """An attribute, or what stands for one that is not given."""
        value = dict(self.attrs).get(name, default)
        assert isinstance(value, type(default)), f"{self.name}.{name} is {value!r}"
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """An attribute that is a list of numbers."""
        value = dict(self.attrs)[name]
        assert isinstance(value, tuple), f"{self.name}.{name} is {value!r}"
        return value


def attr_text(value: Attr) -> str:
    """An attribute in the text forms."""
    if isinstance(value, tuple):
        return ",".join(f"{number:.12g}" for number in value)
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(int(value)) if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole architecture: nodes in an order in which inputs come first."""

    name: str
    nodes: tuple[Node, ...]
    output: str
    """The node that gives the logits."""
    blocks: Mapping[str, BlockSpec]
    vocab_size: int
    seq_len: int
    d_model: int
    causal: bool
    tie_embeddings: bool
    norm_eps: float
    residual_scale: str
    parametrization: str = "standard"
    base: BaseSpec | None = None
    losses: tuple[str, ...] = ()
    """Nodes that give losses of its own, for training alone."""
    iterations: Mapping[str, IterationsSpec] = field(default_factory=dict)
    """Of loops whose iterations are drawn in training, or tried in other numbers."""
    training_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """How many forwards a step of training takes of each entry of a loop's schedule (`builder.iterations`)."""
    _arch_id: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    def by_name(self) -> dict[str, Node]:
        """The nodes by their names."""
        return {node.name: node for node in self.nodes}

    def with_nodes(self, nodes: tuple[Node, ...]) -> Graph:
        """The same architecture with other nodes."""
        return replace(self, nodes=nodes)

    def block_of(self, node: Node) -> BlockSpec:
        """The block that a ``block`` node calls."""
        return self.blocks[node.attr("block", str)]

    def is_causal_block(self, block: BlockSpec) -> bool:
        """Whether a block's attention sees only the past."""
        return self.causal if block.bidirectional is None else not block.bidirectional

    @property
    def num_layers(self) -> int:
        """Unrolled layers: every use of a shared layer counts."""
        return sum(self.block_of(node).layers for node in self.nodes if node.op == "block")

    @property
    def branch_scale(self) -> float:
        """Factor on every residual branch: ``residual_scale``; by completep the base's, over the depth's ratio."""
        layers, power = max(self.num_layers, 1), RESIDUAL_SCALES[self.residual_scale].power
        if self.base is None or self.base.layers is None:
            return float(layers**-power)
        return float(self.base.layers**-power) * (self.base.layers / layers)

    @property
    def width_ratio(self) -> float:
        """Width over the base's; 1 in the standard parametrization."""
        return 1.0 if self.base is None else self.d_model / self.base.d_model

    @property
    def depth_ratio(self) -> float:
        """Unrolled layers over the base's, where the parametrization goes by them."""
        return 1.0 if self.base is None or self.base.layers is None else max(self.num_layers, 1) / self.base.layers

    @property
    def arch_id(self) -> str:
        """Hash of the canonical graph: equal for architectures that differ in names alone."""
        if not self._arch_id:
            self._arch_id.append(hashlib.sha256(self.canonical_text().encode()).hexdigest()[:16])
        return self._arch_id[0]

    def to_text(self) -> str:
        """Stable text form for people: a line per node."""
        head = (
            f"graph {self.name}: d_model={self.d_model} vocab_size={self.vocab_size} seq_len={self.seq_len} "
            f"causal={str(self.causal).lower()}"
        )
        rows = []
        for node in self.nodes:
            attrs = "".join(f" {key}={attr_text(value)}" for key, value in node.attrs if key != "block")
            op = f"block {node.attr('block', str)}" if node.op == "block" else node.op
            owner = f" <{node.owner}>" if node.owner and node.op != "block" else ""
            rows.append(
                (f"%{node.name} = {op}({', '.join('%' + i for i in node.inputs)}){attrs}{owner}", f"@{node.level}")
            )
        width = max(len(left) for left, _ in rows)
        outputs = ", ".join(f"%{name}" for name in (self.output, *self.losses))
        return "\n".join([head, *(f"  {left:<{width}}  {right}" for left, right in rows), f"  -> {outputs}"]) + "\n"

    def canonical_text(self) -> str:
        """Text form without names: nodes and owners are numbered in the order of a walk from the outputs."""
        nodes = self.by_name()
        number: dict[str, int] = {}
        owners: dict[str, int] = {}
        lines: list[str] = []
        stack: list[tuple[str, bool]] = [(name, False) for name in (*self.losses, self.output)]
        while stack:
            name, ready = stack.pop()
            if name in number:
                continue
            node = nodes[name]
            if not ready:
                stack.append((name, True))
                stack.extend((source, False) for source in reversed(node.inputs))
                continue
            number[name] = len(number)
            owner = owners.setdefault(node.owner, len(owners)) if node.owner else ""
            attrs = ",".join(f"{key}={attr_text(value)}" for key, value in node.attrs if key != "block")
            block = _block_text(self, self.block_of(node)) if node.op == "block" else ""
            inputs = ",".join([str(number[source]) for source in node.inputs])
            lines.append(f"{node.op}|{inputs}|{node.level.chunk}+{node.level.offset}|{owner}|{attrs}|{block}")
        lines.append(
            f"{self.vocab_size}|{self.seq_len}|{self.d_model}|{self.causal}|{self.tie_embeddings}|{self.norm_eps}"
            f"|{self.residual_scale}"
            + ("" if self.base is None else f"|{self.parametrization} {self.base.d_model} {self.base.layers}")
        )
        return "\n".join([*lines, *(f"iterations|{encode(given)}" for given in self.iterations.values())])


def _block_text(graph: Graph, block: BlockSpec) -> str:
    """A block with its defaults filled in, so that a default and the same value written out are equal."""
    plain = encode(block)
    plain["kv_heads"] = block.kv_heads or block.heads
    plain["head_dim"] = head_dim(block, graph.d_model)
    plain["ffn_dim"] = ffn_dim(block, graph.d_model)
    plain["rotary_fraction"] = rotary_dim(block, graph.d_model)
    plain["bidirectional"] = not graph.is_causal_block(block)
    return ",".join(f"{key}={plain[key]}" for key in sorted(plain))
