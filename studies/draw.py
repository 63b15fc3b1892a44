"""Pictures of architectures, the spiral ladder: time across, resolution down, a box for every call of a block.

A picture is planned first (columns, wires, lanes), then drawn. Distances are pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple, TypeAlias
from xml.etree import ElementTree as ET

from builder import compile_arch
from builder.cost import breakdown, estimate
from builder.ir import TOKEN_LEVEL, Graph, Level, Node
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.nodes import LoopNode
from studies.describe import short, summarize

_Point: TypeAlias = tuple[float, float]

_MARGIN, _PAGE = 16, 860
_BOX, _LEAST, _MOST = 42, 31, 72  # a box's height, and its least and largest width
_INSET = 8  # from a box's side to the wire that enters or leaves by its top
_TRACK = 10  # between wires side by side
_ROW, _TOKENS, _CELL = 21, 24, 12  # of what stands below the ladder
_TERMINAL = 80

_BOXES = ("embed", "block", "head")
_HIDDEN_INPUTS = {"write": (0, 2), "read": (0, 1), "join.mixture": (1,)}  # memories, and what routers read
_RECALLED = {"block": 1, "recall.add": 1, "recall.linear": 1, "recall.concat": 1}  # the input drawn dashed
_CIRCLE = "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0"
_DOT = "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0"


class _Sign(NamedTuple):
    """How a small operation looks: a path around (0, 0), half its width, least space before it, words for it."""

    shape: str
    style: str
    half: int
    space: int
    words: str = ""


_SIGNS = {
    "join.sum": _Sign(_CIRCLE + "M-5 0H5M0-5V5", "sign", 5, 4, "⊕ sum"),
    "join.weighted": _Sign(_CIRCLE + "M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5", "sign", 5, 4, "⊗ weighted sum"),
    "join.mixture": _Sign(_CIRCLE + _DOT, "sign", 5, 4, "◎ mixture by a router"),
    "recall": _Sign("M-5 0 0-5 5 0 0 5z", "sign", 5, 6),
    "step": _Sign("M-4-4h8v8h-8z", "sign", 4, 6, "□ step vector"),
    "norm": _Sign("M-1.5-7h3v14h-3z", "solid", 2, 4, "▮ norm"),
    "write": _Sign(_DOT, "solid", 0, 9),
    "read": _Sign(_DOT, "solid", 0, 7),
}

_LIGHT = {"paper": "#ffffff", "ink": "#1c2128", "dim": "#59626e", "faint": "#d5dae1"}
_DARK = {"paper": "#14181d", "ink": "#e4e8ed", "dim": "#9aa5b1", "faint": "#343c46"}
_TINTS = (  # of shared and of coarse blocks: fill and line, light; fill and line, dark; hatch, to do without colours
    ("#d9e8f7", "#1f66a8", "#1b344d", "#74b3ec", "M0 3H6"),
    ("#fbe6cc", "#a85c06", "#452e12", "#eda95a", "M-1 7 7-1M-1 1 1-1M5 7 7 5"),
    ("#d8eedd", "#24763c", "#193c25", "#6fc98a", "M1.5 0V6M4.5 0V6"),
    ("#ecdff4", "#7a3d9c", "#382347", "#c594e2", "M1 3h3"),
    ("#f9dcdf", "#ab2f42", "#4a2027", "#ee8795", "M0 1H6M0 5H6"),
)
_STYLE = """
.ladder { font: 11px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif }
.ladder text, .ladder .solid { fill: %(ink)s }
.ladder .name { font-weight: 600 }
.ladder .title { font-weight: 600; font-size: 15px }
.ladder .dim, .ladder .bar { fill: %(dim)s }
.ladder .middle { text-anchor: middle }
.ladder .paper { fill: %(paper)s }
.ladder .box, .ladder .sign { fill: %(paper)s; stroke: %(ink)s; stroke-width: 1.2 }
.ladder .wire { fill: none; stroke: %(ink)s; stroke-width: 1.2 }
.ladder .dashed { stroke-dasharray: 4 3 }
.ladder .line { fill: none; stroke: %(dim)s }
.ladder .lane { stroke: %(faint)s }
.ladder .chunk { fill: %(faint)s }
"""


def draw_svg(arch: ArchSpec) -> str:
    """The ladder as SVG: self-contained, light or dark as the reader's screen."""
    return ET.tostring(_drawing(_Plan(arch)), encoding="unicode")


def draw_html(arch: ArchSpec) -> str:
    """A page with the ladder in it."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>{escape(arch.name)}</title>
<style>
body {{ margin: 2rem; background: {_LIGHT["paper"]} }}
@media (prefers-color-scheme: dark) {{ body {{ background: {_DARK["paper"]} }} }}
</style>
{draw_svg(arch)}
</html>
"""


def write_drawing(arch: ArchSpec, file: Path) -> None:
    """Draw into ``file``, by its suffix.

    Raises:
        SpecError: for a suffix that is none of .svg, .html and .png, and for .png where CairoSVG is missing.
    """
    if file.suffix == ".svg":
        file.write_text(draw_svg(arch), encoding="utf-8")
    elif file.suffix == ".html":
        file.write_text(draw_html(arch), encoding="utf-8")
    elif file.suffix == ".png":
        file.write_bytes(_to_png(draw_svg(arch)))
    else:
        raise SpecError("", f"can't draw into '{file.name}'", "end the name in .svg, .html or .png")


def _to_png(svg: str) -> bytes:
    """At twice the size, in light colours: CairoSVG leaves media queries out."""
    try:
        cairosvg = import_module("cairosvg")
    except (ImportError, OSError) as error:  # OSError: the package is there, the library cairo is not
        raise SpecError("", f".png needs CairoSVG: {error}", "pip install cairosvg, or draw .svg or .html") from error
    png: bytes = cairosvg.svg2png(bytestring=svg.encode(), scale=2)
    return png


@dataclass(eq=False, slots=True)
class _Mark:
    """A node with its place on a lane: a box, or a sign on the line."""

    node: Node
    lane: int
    sign: _Sign | None
    """None: a box."""
    x: float = 0.0
    half: float = 0.0
    """Half its width."""
    dropped_from: _Mark | None = None
    """What it reads by a pool just before it."""

    @property
    def half_height(self) -> float:
        return _BOX / 2 if self.sign is None else 5 if self.half else 0

    @property
    def right(self) -> float:
        return self.x + self.half


@dataclass(eq=False, slots=True)
class _Edge:
    """A value on its way from mark to mark; a pool or an up-scaling on the way is a change of lane."""

    source: _Mark
    target: _Mark
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
    def run(self) -> tuple[_Mark, int, int, bool]:
        """Edges with one run carry one value on one track."""
        return self.source, self.lane, self.track, self.dashed


@dataclass(slots=True)
class _Bus:
    """A memory, drawn as a bus of its slots over the loop."""

    source: _Mark
    slots: int
    users: list[_Mark] = field(default_factory=list)
    top: float = 0.0

    @property
    def height(self) -> int:
        return 4 * min(self.slots, 8)


class _Plan:
    """What stands where in the picture of one architecture."""

    def __init__(self, arch: ArchSpec) -> None:
        self.arch, self.graph = arch, compile_arch(arch)
        self.nodes = self.graph.by_name()
        self.levels = sorted({node.level for node in self.graph.nodes})
        self.tints = _tinted_blocks(self.graph)
        self.marks: dict[str, _Mark] = {}
        for node in self.graph.nodes:
            sign = _SIGNS.get(node.op) or _SIGNS.get(_kind(node))
            if sign or node.op in _BOXES:
                self.marks[node.name] = _Mark(node, self.levels.index(node.level), sign, half=sign.half if sign else 0)
        self.boxes = [mark for mark in self.marks.values() if not mark.sign]
        self.edges = list(self._make_edges())
        self.buses = self._make_buses()
        self.left = _MARGIN + 14 + max(_text_width(text) for level in self.levels for text in self.lane_label(level))
        self.width = self._place_columns()
        self._choose_tracks()
        self.ys = self._place_lanes()

    def lane_label(self, level: Level) -> tuple[str, str]:
        """A lane's name, and what it holds."""
        alike = {name: spec for name, spec in self.arch.levels.items() if spec.chunk == level.chunk}
        exact = [name for name, spec in alike.items() if spec.offset in ("auto", level.offset)]
        what = "every token" if level == TOKEN_LEVEL else f"chunk {level.chunk}, offset {level.offset}"
        return _fit(", ".join(exact or alike) or "token", 105), what

    def _origin(self, name: str) -> _Mark:
        """Where a value comes from, before pools and up-scalings."""
        while name not in self.marks:
            name = self.nodes[name].inputs[0]
        return self.marks[name]

    def _make_edges(self) -> Iterator[_Edge]:
        """Every value read, once even if a join reads it twice."""
        for mark in self.marks.values():
            op = mark.node.op
            read = [
                (self._origin(name), _RECALLED.get(op) == i)
                for i, name in enumerate(mark.node.inputs)
                if i not in _HIDDEN_INPUTS.get(op, ())
            ]
            for source, dashed in dict.fromkeys(read):
                edge = _Edge(source, mark, dashed)
                if edge.drops and not dashed:
                    mark.dropped_from = source
                yield edge

    def _make_buses(self) -> list[_Bus]:
        buses: dict[str, _Bus] = {}
        for mark in self.marks.values():
            node = mark.node
            while node.op in ("write", "read"):
                node = self.nodes[node.inputs[0]]
            if node.op == "memory":
                bus = buses.setdefault(node.name, _Bus(self._origin(node.inputs[0]), node.int_attr("slots")))
                bus.users.append(mark)
        return list(buses.values())

    def _place_columns(self) -> float:
        """Choose the boxes' width and the space between columns; the width of the page."""
        widths = range(_MOST, _LEAST, -1)
        common = next((width for width in widths if self._place_marks(width) <= _PAGE - _MARGIN), _LEAST)
        least = self._place_marks(common)
        spaces = self._place_marks(common, space=1) - least
        return self._place_marks(common, max(_PAGE - _MARGIN - least, 0) / spaces) + _MARGIN

    def _place_marks(self, common: float, space: float = 0) -> float:
        """Put every mark at its x, in order; where the last one ends."""
        x = box_end = self.left
        box_lane = 0
        last: _Mark | None = None
        for mark in self.marks.values():
            follows = _kind(mark.node) in ("join", "write")  # the box before it; other signs lead to the next box
            if last and not follows and (not last.sign or _kind(last.node) in ("join", "write")):
                x, box_end = x + space, box_end + space
            if mark.sign is None:
                own = _LEAST if _loop_of(mark.node) else min(_text_width(_title(mark.node)) + 10, _MOST)
                mark.half = max(own, common) / 2
                if last is None:
                    left = x
                elif mark.dropped_from is None or last.lane == mark.lane:
                    left = max(x + 9, box_end + _INSET)
                else:
                    in_line = mark.dropped_from is last and last.node.op == "read"
                    left = max(x - (_INSET if in_line else 3), box_end + _INSET)
                mark.x = left + mark.half
                box_end, box_lane = mark.right, mark.lane
            elif last and not last.sign and last.lane > mark.lane:
                mark.x = box_end - _INSET
            else:
                mark.x = (max(x, box_end) if mark.lane == box_lane else x) + mark.sign.space + mark.half
                if mark.node.op == "read":  # in line with the wire that drops into the next box
                    mark.x = max(mark.x, box_end + 2 * _INSET)
            x, last = mark.right, mark
        return x

    def _choose_tracks(self) -> None:
        """Edges run on the line of their lane where it is free, else above it; one value's edges share a track."""
        on_line: list[_Edge] = []
        above: dict[tuple[_Mark, int, int, bool], list[_Edge]] = {}
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
            y += 24 + _TRACK * max((edge.track for edge in self.edges if edge.lane == lane), default=0) + _BOX
            ys.append(y - _BOX / 2)
        return ys

    def route(self, edge: _Edge) -> tuple[list[_Point], list[_Point]]:
        """The corners of what no shorter edge with the same run has drawn, and the dots where they part."""
        source, target, line = edge.source, edge.target, self.ys[edge.lane]
        y = line - _BOX / 2 - edge.track * _TRACK if edge.track else line
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


def _kind(node: Node) -> str:
    """The family of its operation: join for join.sum."""
    return node.op.partition(".")[0]


def _loop_of(node: Node) -> str:
    """The loop that a written-out node belongs to, or ''."""
    return node.name.partition(".")[0] if "." in node.name else ""


def _title(node: Node) -> str:
    """What its box is called."""
    return str(node.attr("block")) if node.op == "block" else node.op


def _tinted_blocks(graph: Graph) -> dict[str, int]:
    """The blocks that are shared or work on latents, numbered: they get a colour and a hatch."""
    calls = [(_title(node), node.level) for node in graph.nodes if node.op == "block"]
    names = [name for name, _ in calls]
    shown = [name for name, level in calls if names.count(name) > 1 or level != TOKEN_LEVEL]
    return {name: number for number, name in enumerate(dict.fromkeys(shown))}


def _shares(graph: Graph) -> dict[str, float]:
    """Each box's share of the forward FLOPs: calls of one block at one level cost the same."""
    parts = {(part.part, part.level): part for part in breakdown(graph)}
    total = sum(part.flops for part in parts.values()) or 1
    boxes = [(node.name, parts[node.owner, node.level]) for node in graph.nodes if node.op in _BOXES]
    return {name: part.flops / part.uses / total for name, part in boxes}


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or not share else f"{share:.1%}"


def _text_width(text: str, size: float = 11) -> float:
    """A guess, for wide sans-serif fonts."""
    return 0.6 * size * len(text)


def _fit(text: str, width: float, size: float = 11) -> str:
    """The text, or as much of it as fits and an ellipsis."""
    return _cut(text, int(width / _text_width("m", size)))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "…"


def _add(parent: ET.Element, tag: str, style: str = "", text: str = "", **attributes: object) -> ET.Element:
    """A new child; ``_`` in the name of an attribute stands for ``-``."""
    child = ET.SubElement(parent, tag, {"class": style} if style else {})
    for name, value in attributes.items():
        child.set(name.replace("_", "-"), f"{value:.5g}" if isinstance(value, float) else str(value))
    child.text = text or None
    return child


def _write(parent: ET.Element, x: float, y: float, text: str, style: str = "") -> None:
    _add(parent, "text", style, text, x=x, y=y)


def _wire(parent: ET.Element, points: list[_Point], style: str = "wire", head: bool = False) -> None:
    """A line of upright and level pieces with rounded corners, perhaps with an arrow's head."""
    points = [point for i, point in enumerate(points) if i == 0 or point != points[i - 1]]
    path = "M{:.5g} {:.5g}".format(*points[0])
    for i in range(1, len(points) - 1):
        (x, y), ends = points[i], []
        for x2, y2 in (points[i - 1], points[i + 1]):
            length = abs(x2 - x) + abs(y2 - y)
            part = min(5, length / 2) / length
            ends += [x + (x2 - x) * part, y + (y2 - y) * part]
        path += "L{:.5g} {:.5g}Q{:.5g} {:.5g} {:.5g} {:.5g}".format(*ends[:2], x, y, *ends[2:])
    line = _add(parent, "path", style, d=path + "L{:.5g} {:.5g}".format(*points[-1]))
    if head:
        line.set("marker-end", "url(#ladder-head)")


def _drawing(plan: _Plan) -> ET.Element:
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "ladder", "role": "img"})
    _add(svg, "title", text=plan.arch.name)
    _add(svg, "desc", text=f"{summarize(plan.arch)}\n{ladder_text(plan.graph)}")
    _draw_styles(svg)
    page = _add(svg, "rect", "paper", width=plan.width, rx=6)
    _draw_title(svg, plan)
    _draw_lanes(svg, plan)
    for bus in plan.buses:
        _draw_bus(svg, plan, bus)
    for edge in plan.edges:
        points, dots = plan.route(edge)
        head = not edge.target.sign or edge.dashed or _kind(edge.target.node) == "join"
        _wire(svg, points, "wire dashed" if edge.dashed else "wire", head)
        for x, y in dots:
            _add(svg, "circle", "solid", cx=x, cy=y, r=2)
    shares = _shares(plan.graph)
    for name, mark in plan.marks.items():
        if mark.sign:
            _add(svg, "path", mark.sign.style, d=mark.sign.shape, transform=_at(mark.x, plan.ys[mark.lane]))
        else:
            _draw_box(svg, plan, mark, shares[name])
    y = _draw_loops(svg, plan) + 8
    for line in wrap(_legend(plan), int((plan.width - 2 * _MARGIN) / _text_width("m"))):
        y += 16
        _write(svg, _MARGIN, y, line, "dim")
    height = max(_draw_strip(svg, plan, y + 36), _draw_costs(svg, plan, y + 36)) + _MARGIN
    page.set("height", f"{height:.5g}")
    svg.attrib |= {"width": f"{plan.width:.5g}", "viewBox": f"0 0 {plan.width:.5g} {height:.5g}"}
    return svg


def _at(x: float, y: float) -> str:
    return f"translate({x:.5g} {y:.5g})"


def _draw_styles(svg: ET.Element) -> None:
    def rules(colours: dict[str, str], first: int) -> str:
        tints = [
            f".ladder .tint{i} {{ fill: {tint[first]}; stroke: {tint[first + 1]} }}\n"
            f".ladder .hatch{i} {{ stroke: {tint[first + 1]}; stroke-width: 1.5 }}\n"
            for i, tint in enumerate(_TINTS)
        ]
        return _STYLE % colours + "".join(tints)

    _add(svg, "style", text=f"{rules(_LIGHT, 0)}@media (prefers-color-scheme: dark) {{{rules(_DARK, 2)}}}\n")
    defs = _add(svg, "defs")
    head = _add(defs, "marker", id="ladder-head", orient="auto", refX=6, refY=3, markerWidth=6, markerHeight=6)
    head.set("markerUnits", "userSpaceOnUse")
    _add(head, "path", "solid", d="M0 0 6 3 0 6z")
    for i, tint in enumerate(_TINTS):
        cell = _add(defs, "pattern", id=f"ladder-hatch{i}", width=6, height=6, patternUnits="userSpaceOnUse")
        _add(cell, "path", f"hatch{i}", d=tint[4])


def _draw_title(svg: ET.Element, plan: _Plan) -> None:
    cost, room = estimate(plan.graph), plan.width - 2 * _MARGIN
    facts = f"{short(cost.params)} parameters, {short(cost.flops_per_token)} FLOPs per token at {cost.seq_len:,} tokens"
    _write(svg, _MARGIN, 26, _fit(plan.arch.name, room, 16), "title")
    _write(svg, _MARGIN, 43, _fit(f"{summarize(plan.arch)}; {facts}", room), "dim")


def _draw_lanes(svg: ET.Element, plan: _Plan) -> None:
    for level, y in zip(plan.levels, plan.ys, strict=True):
        name, what = plan.lane_label(level)
        _add(svg, "path", "lane", d=f"M{plan.left:.5g} {y:.5g}H{plan.width - _MARGIN:.5g}")
        _write(svg, _MARGIN, y - 3, name, "name")
        _write(svg, _MARGIN, y + 11, what, "dim")


def _draw_bus(svg: ET.Element, plan: _Plan, bus: _Bus) -> None:
    left, right, middle = bus.users[0].x - 14, bus.users[-1].x + 6, bus.top + bus.height / 2
    _add(svg, "rect", "sign", x=left, y=bus.top, width=right - left, height=bus.height, rx=2)
    for y in range(4, bus.height, 4):
        _add(svg, "path", "line", d=f"M{left:.5g} {bus.top + y:.5g}H{right:.5g}")
    _write(svg, left, bus.top - 5, f"memory, {bus.slots} slots", "dim")
    source = bus.source
    top = plan.ys[source.lane] - source.half_height
    _wire(svg, [(source.x, top), (source.x, middle), (left, middle)], head=True)
    for mark in bus.users:
        ends = [(mark.x, plan.ys[mark.lane]), (mark.x, bus.top + bus.height)]
        _wire(svg, ends if mark.node.op == "write" else ends[::-1], head=True)


def _draw_box(svg: ET.Element, plan: _Plan, mark: _Mark, share: float) -> None:
    title, y, width = _title(mark.node), plan.ys[mark.lane], 2 * mark.half
    box = _add(svg, "g", data_node=mark.node.name)
    _add(box, "title", text=f"{mark.node.name}: {title} at {mark.node.level}, {_percent(share)} of the forward FLOPs")
    _draw_swatch(box, plan.tints.get(title), mark.x - mark.half, y - _BOX / 2, width, _BOX)
    _write(box, mark.x, y - 4 if share else y + 4, _fit(title, width - 4), "middle")
    if share:
        _write(box, mark.x, y + 10, _percent(share), "middle dim")


def _draw_swatch(parent: ET.Element, tint: int | None, x: float, y: float, width: float, height: float) -> None:
    """A block's rectangle; a tinted one has its hatch along the foot."""
    style = "box" if tint is None else f"box tint{tint % len(_TINTS)}"
    _add(parent, "rect", style, x=x, y=y, width=width, height=height, rx=3)
    if tint is not None:
        foot = _add(parent, "rect", width=width - 2, height=5, fill=f"url(#ladder-hatch{tint % len(_TINTS)})")
        foot.set("transform", _at(x + 1, y + height - 6))


def _draw_loops(svg: ET.Element, plan: _Plan) -> float:
    """Number the iterations and name the loops; where the ladder ends."""
    y = end = plan.ys[-1] + _BOX / 2
    for loop, group in groupby(plan.boxes, key=lambda box: _loop_of(box.node)):
        boxes = list(group)
        if not loop:
            continue
        for number, box in enumerate(boxes, start=1):
            _write(svg, box.x, y + 16, str(number), "middle dim")
        left, right, end = boxes[0].x - boxes[0].half, boxes[-1].right, y + 44
        _wire(svg, [(left, y + 21), (left, y + 26), (right, y + 26), (right, y + 21)], "line")
        spec = plan.arch.graph[loop]
        topology = f", {spec.topology.kind}" if isinstance(spec, LoopNode) else ""
        text = f"{loop}: {_title(boxes[0].node)} × {len(boxes)}{topology}"
        _write(svg, (left + right) / 2, y + 40, _fit(text, max(right - left, 120)), "middle")
    return end


def _legend(plan: _Plan) -> str:
    """The signs that occur, in words."""
    ops = list(dict.fromkeys(node.op for node in plan.graph.nodes))
    words = [mark.sign.words for mark in plan.marks.values() if mark.sign and mark.sign.words]
    for kind, word in (("pool.", "↓ pool: "), ("upscale.", "↑ up-scale: ")):
        kinds = [op.removeprefix(kind) for op in ops if op.startswith(kind)]
        words += [word + ", ".join(kinds)] if kinds else []
    words += ["dashed: recall"] if any(edge.dashed for edge in plan.edges) else []
    return " · ".join([*dict.fromkeys(words), "in a box: share of the forward FLOPs"])


def _draw_strip(svg: ET.Element, plan: _Plan, y: float) -> float:
    """Chunks on the first tokens, where there are any."""
    if plan.levels == [TOKEN_LEVEL]:
        return y
    tokens = min(_TOKENS, plan.graph.seq_len)
    _write(svg, plan.left, y, f"First {tokens} tokens; a dot closes a chunk", "name")
    for level in plan.levels:
        y += _ROW
        _write(svg, _MARGIN, y, plan.lane_label(level)[0])
        for start in range(-level.offset, tokens, level.chunk):
            first, end = max(start, 0), min(start + level.chunk, tokens)
            x, width = plan.left + first * _CELL, (end - first) * _CELL - 2
            _add(svg, "rect", "chunk", x=x, y=y - 11, width=width, height=15, rx=3)
            if start + level.chunk <= tokens:
                _add(svg, "circle", "bar", cx=x + width - 5, cy=y - 3.5, r=2.5)
    return y


def _draw_costs(svg: ET.Element, plan: _Plan, y: float) -> float:
    """Parameters and FLOPs of every part."""
    rows: dict[str, tuple[int, int]] = {}
    for part in breakdown(plan.graph):
        key = part.part if part.part.startswith((*_BOXES, "blocks.")) else "the rest"
        params, flops = rows.get(key, (0, 0))
        rows[key] = params + part.params, flops + part.flops
    totals = [sum(column) or 1 for column in zip(*rows.values(), strict=True)]
    left = plan.left if plan.levels == [TOKEN_LEVEL] else plan.width - _MARGIN - 356
    for x, text in ((0, "Part"), (106, "Layers"), (164, "Parameters"), (260, "Forward FLOPs")):
        _write(svg, left + x, y, text, "name")
    for key in sorted(rows, key=lambda key: key == "the rest"):
        y += _ROW
        name = key.removeprefix("blocks.")
        if name != key:
            uses = sum(box.node.owner == key for box in plan.boxes)
            _draw_swatch(svg, plan.tints.get(name), left, y - 11, 16, 15)
            _write(svg, left + 106, y, f"{plan.graph.blocks[name].layers}" + (f" × {uses}" if uses > 1 else ""))
        _write(svg, left + 22, y, _fit(name, 80))
        texts = short(rows[key][0]), _percent(rows[key][1] / totals[1])
        for x, amount, total, text in zip((164, 260), rows[key], totals, texts, strict=True):
            _add(svg, "rect", "bar", x=left + x, y=y - 8, width=44 * amount / total, height=8)
            _write(svg, left + x + 44 * amount / total + 4, y, text)
    return y


def ladder_text(graph: Graph) -> str:
    """The ladder for a terminal: calls across, levels down, in each cell the call's share of the forward FLOPs."""
    shares, levels = _shares(graph), sorted({node.level for node in graph.nodes})
    stub = _text_block("", [["", *map(str, levels)]])
    room = _TERMINAL - len(stub[0]) - 3
    pages = [[stub]]
    calls = [node for node in graph.nodes if node.op == "block"]
    for _, group in groupby(calls, key=lambda node: _loop_of(node) or node.name):
        nodes = list(group)
        in_loop = bool(_loop_of(nodes[0]))
        cells = [[_cell(shares[node.name]) if node.level == level else "·" for level in levels] for node in nodes]
        columns = [[str(number) if in_loop else "", *column] for number, column in enumerate(cells, start=1)]
        title = _title(nodes[0]) + (f" × {len(nodes)}" if in_loop else "")
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
