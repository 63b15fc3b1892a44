"""Where everything stands in the picture of an architecture: time across, resolution down, calls as boxes.

A plan holds columns, wires and lanes; `studies.show.svg` draws it. Distances are pixels. There is a text form too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

from builder import compile_arch
from builder.graph.ir import TOKEN_LEVEL, Graph, Level, Node
from builder.graph.ops import OPS
from builder.graph.row import Drawing
from builder.pricing.cost import breakdown
from searchspace.arch import ArchSpec

Point: TypeAlias = tuple[float, float]

MARGIN, _PAGE = 16, 860  # pixels; what a README shows without scaling
BOX, _LEAST, _MOST = 42, 31, 72  # a box's height, and its least and largest width
_INSET = 8  # from a box's side to the wire that enters or leaves by its top
_TRACK = 10  # between wires side by side
_TERMINAL = 80  # columns


def boxes() -> tuple[str, ...]:
    """Operations that are drawn as boxes."""
    return tuple(row.name for row in OPS.values() if row.draw.form == "box")


@dataclass(eq=False, slots=True)
class Mark:
    """A node with its place on a lane: a box, or a sign on the line."""

    node: Node
    lane: int
    sign: Drawing | None
    """None: a box."""
    x: float = 0.0
    half: float = 0.0
    """Half its width."""
    dropped_from: Mark | None = None
    """What it reads by a pool just before it."""

    @property
    def half_height(self) -> float:
        return BOX / 2 if self.sign is None else 5 if self.half else 0

    @property
    def right(self) -> float:
        return self.x + self.half


@dataclass(eq=False, slots=True)
class Edge:
    """A value on its way from mark to mark; a pool or an up-scaling on the way is a change of lane."""

    source: Mark
    target: Mark
    dashed: bool
    track: int = 0
    """0: on the line of its lane; 1, 2, ...: above that lane's boxes."""

    @property
    def lane(self) -> int:
        """Where it runs: on the finer of the two."""
        return min(self.source.lane, self.target.lane)

    @property
    def rises(self) -> bool:
        return self.source.lane > self.lane

    @property
    def drops(self) -> bool:
        return self.target.lane > self.lane

    @property
    def start(self) -> float:
        """Where its run begins: above the boxes, beside what leaves on the line."""
        if self.rises and not self.source.sign:
            return self.source.right - _INSET * (2 if self.track else 1)
        return self.source.right + (4 if self.rises or self.track else 0)

    @property
    def end(self) -> float:
        """Where its run ends; recalled values enter a box in the middle."""
        if self.dashed or self.target.sign:
            return self.target.x
        return self.target.x - self.target.half + (_INSET if self.drops or self.track else 0)

    @property
    def run(self) -> tuple[Mark, int, int, bool]:
        """Edges with one run carry one value on one track."""
        return self.source, self.lane, self.track, self.dashed


@dataclass(slots=True)
class Bus:
    """A memory, drawn as a bus of its slots or lanes over the loop."""

    source: Mark
    slots: int
    words: str
    users: list[Mark] = field(default_factory=list)
    top: float = 0.0

    @property
    def height(self) -> int:
        return 4 * min(self.slots, 8)


class Plan:
    """What stands where in the picture of one architecture."""

    def __init__(self, arch: ArchSpec) -> None:
        self.arch, self.graph = arch, compile_arch(arch)
        self.nodes = self.graph.by_name()
        self.levels = sorted({node.level for node in self.graph.nodes})
        self.tints = _tinted_blocks(self.graph)
        self.marks: dict[str, Mark] = {}
        for node in self.graph.nodes:
            drawing = OPS[node.op].draw
            if drawing.form in ("box", "sign"):
                sign = drawing if drawing.form == "sign" else None
                self.marks[node.name] = Mark(node, self.levels.index(node.level), sign, half=drawing.half)
        self.boxes = [mark for mark in self.marks.values() if not mark.sign]
        self.edges = list(self._make_edges())
        self.buses = self._make_buses()
        self.left = MARGIN + 14 + max(text_width(text) for level in self.levels for text in self.lane_label(level))
        self.width = self._place_columns()
        self._choose_tracks()
        self.ys = self._place_lanes()

    def lane_label(self, level: Level) -> tuple[str, str]:
        """A lane's name, and what it holds."""
        alike = {name: spec for name, spec in self.arch.levels.items() if spec.chunk == level.chunk}
        exact = [name for name, spec in alike.items() if spec.offset in ("auto", level.offset)]
        what = "every token" if level == TOKEN_LEVEL else f"chunk {level.chunk}, offset {level.offset}"
        return fit(", ".join(exact or alike) or "token", 105), what

    def _origin(self, name: str) -> Mark:
        """Where a value comes from, before pools and up-scalings."""
        while name not in self.marks:
            name = self.nodes[name].inputs[0]
        return self.marks[name]

    def _make_edges(self) -> Iterator[Edge]:
        """Every value read, once even if a join reads it twice."""
        for mark in self.marks.values():
            drawing = OPS[mark.node.op].draw
            read = [
                (self._origin(name), port in drawing.dashes)
                for port, name in zip(mark.node.ports, mark.node.inputs, strict=True)
                if port not in drawing.hides
            ]
            for source, dashed in dict.fromkeys(read):
                edge = Edge(source, mark, dashed)
                if edge.drops and not dashed:
                    mark.dropped_from = source
                yield edge

    def _make_buses(self) -> list[Bus]:
        buses: dict[str, Bus] = {}
        for mark in self.marks.values():
            node = mark.node
            while memory := node.reads("memory"):
                node = self.nodes[memory]
            if OPS[node.op].draw.form == "bus":
                held = dict(node.attrs)
                slots = next((value for value in held.values() if isinstance(value, int)), 1)
                words = OPS[node.op].draw.words.format(**held) or node.op
                buses.setdefault(node.name, Bus(self._origin(node.inputs[0]), slots, words)).users.append(mark)
        return list(buses.values())

    def _place_columns(self) -> float:
        """Choose the boxes' width and the space between columns; the width of the page."""
        widths = range(_MOST, _LEAST, -1)
        common = next((width for width in widths if self._place_marks(width) <= _PAGE - MARGIN), _LEAST)
        least = self._place_marks(common)
        spaces = self._place_marks(common, space=1) - least
        return self._place_marks(common, max(_PAGE - MARGIN - least, 0) / spaces) + MARGIN

    def _place_marks(self, common: float, space: float = 0) -> float:
        """Put every mark at its x, in order; where the last one ends."""
        x = box_end = self.left
        box_lane = 0
        last: Mark | None = None
        for mark in self.marks.values():
            follows = mark.sign is not None and mark.sign.follows  # the box before it; other signs lead to the next box
            if last and not follows and (not last.sign or last.sign.follows):
                x, box_end = x + space, box_end + space
            if mark.sign is None:
                own = _LEAST if loop_of(mark.node) else min(text_width(title_of(mark.node)) + 10, _MOST)
                mark.half = max(own, common) / 2
                if last is None:
                    left = x
                elif mark.dropped_from is None or last.lane == mark.lane:
                    left = max(x + 9, box_end + _INSET)
                else:
                    in_line = mark.dropped_from is last and bool(last.sign and last.sign.over_drop)
                    left = max(x - (_INSET if in_line else 3), box_end + _INSET)
                mark.x = left + mark.half
                box_end, box_lane = mark.right, mark.lane
            elif last and not last.sign and last.lane > mark.lane:
                mark.x = box_end - _INSET
            else:
                mark.x = (max(x, box_end) if mark.lane == box_lane else x) + mark.sign.space + mark.half
                if mark.sign.over_drop:  # in line with the wire that drops into the next box
                    mark.x = max(mark.x, box_end + 2 * _INSET)
            x, last = mark.right, mark
        return x

    def _choose_tracks(self) -> None:
        """Edges run on the line of their lane where it is free, else above it; one value's edges share a track."""
        on_line: list[Edge] = []
        above: dict[tuple[Mark, int, int, bool], list[Edge]] = {}
        for edge in self.edges:
            others = [mark for mark in self.marks.values() if mark not in (edge.source, edge.target)]
            spans = [(mark.x - mark.half, mark.right) for mark in others if mark.lane == edge.lane]
            spans += [(e.start, e.end) for e in on_line if e.lane == edge.lane and e.source is not edge.source]
            if edge.dashed or any(start < edge.end and edge.start < end for start, end in spans):
                above.setdefault(edge.run, []).append(edge)
            else:
                on_line.append(edge)
        taken: list[tuple[int, int, float, float]] = []
        for edges in sorted(above.values(), key=lambda edges: edges[-1].end - edges[0].start):
            lane, start, end, track = edges[0].lane, edges[0].start, edges[-1].end, 1
            while any((lane, track) == other[:2] and other[2] < end and start < other[3] for other in taken):
                track += 1
            taken.append((lane, track, start, end))
            for edge in edges:
                edge.track = track

    def _place_lanes(self) -> list[float]:
        """Give every bus and every lane its y, with room for the wires above its boxes."""
        y, ys = 50.0, []
        for bus in self.buses:
            bus.top = y + 18
            y = bus.top + bus.height
        for lane in range(len(self.levels)):
            y += 24 + _TRACK * max((edge.track for edge in self.edges if edge.lane == lane), default=0) + BOX
            ys.append(y - BOX / 2)
        return ys

    def route(self, edge: Edge) -> tuple[list[Point], list[Point]]:
        """The corners of what no shorter edge with the same run has drawn, and the dots where they part."""
        source, target, line = edge.source, edge.target, self.ys[edge.lane]
        y = line - BOX / 2 - edge.track * _TRACK if edge.track else line
        ends = [other.end for other in self.edges if other.run == edge.run]
        drawn = max((end for end in ends if end < edge.end), default=None)
        points = [(edge.start if drawn is None else drawn - 6, y), (edge.end, y)]
        dots = []
        if drawn is None and edge.rises and not source.sign:
            points.insert(0, (edge.start, self.ys[source.lane] - source.half_height))
        elif drawn is None and (edge.rises or edge.track):
            points[:0] = [(source.right, self.ys[source.lane]), (edge.start, self.ys[source.lane])]
            dots += [(edge.start, line) for other in self.edges if other.run == (source, edge.lane, 0, False)]
        if edge.track or edge.drops:
            points.append((edge.end, self.ys[target.lane] - target.half_height))
            dots += [(edge.end, y)] if max(ends) > edge.end else []
        elif edge.rises and abs(edge.end - edge.start) < 1:
            points[1:] = [(edge.end, line + target.half_height)]
        elif target.sign:
            points[-1] = (edge.end - target.half, line)
        return points, dots


def loop_of(node: Node) -> str:
    """The loop that a written-out node belongs to, or ''."""
    return node.name.partition(".")[0] if "." in node.name else ""


def title_of(node: Node) -> str:
    """What its box is called."""
    return node.attr("block", str) if node.op == "block" else node.op


def _tinted_blocks(graph: Graph) -> dict[str, int]:
    """The blocks that are shared or work on latents, numbered: they get a colour and a hatch."""
    calls = [(title_of(node), node.level) for node in graph.nodes if node.op == "block"]
    names = [name for name, _ in calls]
    shown = [name for name, level in calls if names.count(name) > 1 or level != TOKEN_LEVEL]
    return {name: number for number, name in enumerate(dict.fromkeys(shown))}


def call_shares(graph: Graph) -> dict[str, float]:
    """Each box's share of the forward FLOPs: calls of one block at one level cost the same."""
    parts = {(part.part, part.level): part for part in breakdown(graph)}
    total = sum(part.flops for part in parts.values()) or 1
    boxes = [
        (node.name, parts.get((node.owner, node.level))) for node in graph.nodes if OPS[node.op].draw.form == "box"
    ]
    return {name: part.flops / part.uses / total if part else 0.0 for name, part in boxes}


def text_width(text: str, size: float = 11) -> float:
    """A guess, for wide sans-serif fonts."""
    return 0.6 * size * len(text)


def fit(text: str, width: float, size: float = 11) -> str:
    """The text, or as much of it as fits and an ellipsis."""
    return _cut(text, int(width / text_width("m", size)))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "…"


def ladder_text(graph: Graph) -> str:
    """The ladder for a terminal: calls across, levels down, in each cell the call's share of the forward FLOPs."""
    shares, levels = call_shares(graph), sorted({node.level for node in graph.nodes})
    stub = _text_block("", [["", *map(str, levels)]])
    room = _TERMINAL - len(stub[0]) - 3
    pages = [[stub]]
    calls = [node for node in graph.nodes if node.op == "block"]
    for _, group in groupby(calls, key=lambda node: loop_of(node) or node.name):
        nodes = list(group)
        in_loop = bool(loop_of(nodes[0]))
        cells = [[_cell(shares[node.name]) if node.level == level else "·" for level in levels] for node in nodes]
        columns = [[str(number) if in_loop else "", *column] for number, column in enumerate(cells, start=1)]
        title = title_of(nodes[0]) + (f" × {len(nodes)}" if in_loop else "")
        for first in range(0, len(columns), room // 4):
            block = _text_block(title, columns[first : first + room // 4])
            if sum(len(shown[0]) + 3 for shown in pages[-1]) + len(block[0]) > _TERMINAL:
                pages.append([stub])
            pages[-1].append(block)
    texts = [[" │ ".join(row).rstrip() for row in zip(*page, strict=True)] for page in pages]
    return "\n\n".join("\n".join(row for row in rows if row.strip(" │")) for rows in texts)


def _text_block(title: str, columns: list[list[str]]) -> list[str]:
    """Columns side by side under a title."""
    rows = [" ".join(f"{cell:>3}" for cell in row) for row in zip(*columns, strict=True)]
    width = max(min(len(title), 16), *map(len, rows))
    return [f"{_cut(title, width):^{width}}", *[f"{row:>{width}}" for row in rows]]


def _cell(share: float) -> str:
    return "<1%" if share < 0.005 else f"{share:.0%}"
