"""Pictures of architectures, the spiral ladder: time across, resolution down, a box for every call of a block."""

from __future__ import annotations

from html import escape
from importlib import import_module
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from xml.etree import ElementTree as ET

from builder.graph.ir import TOKEN_LEVEL
from builder.graph.ops import OPS
from builder.graph.row import Kind
from builder.pricing.cost import breakdown, estimate
from searchspace.arch import ArchSpec
from searchspace.disk import write_file
from searchspace.errors import SpecError
from searchspace.nodes import LoopNode
from studies.show.ladder import (
    BOX,
    MARGIN,
    Bus,
    Mark,
    Plan,
    Point,
    boxes,
    call_shares,
    fit,
    ladder_text,
    loop_of,
    text_width,
    title_of,
)
from studies.show.summary import short, summarize, topology_name

_ROW, _TOKENS, _CELL = 21, 24, 12  # of what stands below the ladder

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
    return ET.tostring(_drawing(Plan(arch)), encoding="unicode")


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
        write_file(file, draw_svg(arch))
    elif file.suffix == ".html":
        write_file(file, draw_html(arch))
    elif file.suffix == ".png":
        write_file(file, _to_png(draw_svg(arch)))
    else:
        raise SpecError("", f"can't draw into '{file.name}'", "end the name in .svg, .html or .png")


def _to_png(svg: str) -> bytes:
    """At twice the size, in light colours: CairoSVG leaves media queries out."""
    try:
        cairosvg = import_module("cairosvg")
    except (ImportError, OSError) as error:  # OSError: the package is there, the library cairo is not
        raise SpecError(
            "", f".png needs CairoSVG: {error}", "pip install 'spiralformer[draw]', or draw .svg or .html"
        ) from error
    png: bytes = cairosvg.svg2png(bytestring=svg.encode(), scale=2)
    return png


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or not share else f"{share:.1%}"


def _add(parent: ET.Element, tag: str, style: str = "", text: str = "", **attributes: object) -> ET.Element:
    """A new child; ``_`` in the name of an attribute stands for ``-``."""
    child = ET.SubElement(parent, tag, {"class": style} if style else {})
    for name, value in attributes.items():
        child.set(name.replace("_", "-"), f"{value:.5g}" if isinstance(value, float) else str(value))
    child.text = text or None
    return child


def _write(parent: ET.Element, x: float, y: float, text: str, style: str = "") -> None:
    _add(parent, "text", style, text, x=x, y=y)


def _wire(parent: ET.Element, points: list[Point], style: str = "wire", head: bool = False) -> None:
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


def _drawing(plan: Plan) -> ET.Element:
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
        head = not edge.target.sign or edge.dashed or (edge.target.sign.follows and edge.target.sign.half > 0)
        _wire(svg, points, "wire dashed" if edge.dashed else "wire", head)
        for x, y in dots:
            _add(svg, "circle", "solid", cx=x, cy=y, r=2)
    shares = call_shares(plan.graph)
    for name, mark in plan.marks.items():
        if mark.sign:
            _add(svg, "path", mark.sign.style, d=mark.sign.shape, transform=_at(mark.x, plan.ys[mark.lane]))
        else:
            _draw_box(svg, plan, mark, shares[name])
    y = _draw_loops(svg, plan) + 8
    for line in wrap(_legend(plan), int((plan.width - 2 * MARGIN) / text_width("m"))):
        y += 16
        _write(svg, MARGIN, y, line, "dim")
    height = max(_draw_strip(svg, plan, y + 36), _draw_costs(svg, plan, y + 36)) + MARGIN
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


def _draw_title(svg: ET.Element, plan: Plan) -> None:
    cost, room = estimate(plan.graph), plan.width - 2 * MARGIN
    facts = f"{short(cost.params)} parameters, {short(cost.flops_per_token)} FLOPs per token at {cost.seq_len:,} tokens"
    _write(svg, MARGIN, 26, fit(plan.arch.name, room, 16), "title")
    _write(svg, MARGIN, 43, fit(f"{summarize(plan.arch)}; {facts}", room), "dim")


def _draw_lanes(svg: ET.Element, plan: Plan) -> None:
    for level, y in zip(plan.levels, plan.ys, strict=True):
        name, what = plan.lane_label(level)
        _add(svg, "path", "lane", d=f"M{plan.left:.5g} {y:.5g}H{plan.width - MARGIN:.5g}")
        _write(svg, MARGIN, y - 3, name, "name")
        _write(svg, MARGIN, y + 11, what, "dim")


def _draw_bus(svg: ET.Element, plan: Plan, bus: Bus) -> None:
    left, right, middle = bus.users[0].x - 14, bus.users[-1].x + 6, bus.top + bus.height / 2
    _add(svg, "rect", "sign", x=left, y=bus.top, width=right - left, height=bus.height, rx=2)
    for y in range(4, bus.height, 4):
        _add(svg, "path", "line", d=f"M{left:.5g} {bus.top + y:.5g}H{right:.5g}")
    _write(svg, left, bus.top - 5, bus.words, "dim")
    source = bus.source
    top = plan.ys[source.lane] - source.half_height
    _wire(svg, [(source.x, top), (source.x, middle), (left, middle)], head=True)
    for mark in bus.users:
        ends = [(mark.x, plan.ys[mark.lane]), (mark.x, bus.top + bus.height)]
        _wire(svg, ends if OPS[mark.node.op].gives is Kind.MEMORY else ends[::-1], head=True)


def _draw_box(svg: ET.Element, plan: Plan, mark: Mark, share: float) -> None:
    title, y, width = title_of(mark.node), plan.ys[mark.lane], 2 * mark.half
    box = _add(svg, "g", data_node=mark.node.name)
    _add(box, "title", text=f"{mark.node.name}: {title} at {mark.node.level}, {_percent(share)} of the forward FLOPs")
    _draw_swatch(box, plan.tints.get(title), mark.x - mark.half, y - BOX / 2, width, BOX)
    _write(box, mark.x, y - 4 if share else y + 4, fit(title, width - 4), "middle")
    if share:
        _write(box, mark.x, y + 10, _percent(share), "middle dim")


def _draw_swatch(parent: ET.Element, tint: int | None, x: float, y: float, width: float, height: float) -> None:
    """A block's rectangle; a tinted one has its hatch along the foot."""
    style = "box" if tint is None else f"box tint{tint % len(_TINTS)}"
    _add(parent, "rect", style, x=x, y=y, width=width, height=height, rx=3)
    if tint is not None:
        foot = _add(parent, "rect", width=width - 2, height=5, fill=f"url(#ladder-hatch{tint % len(_TINTS)})")
        foot.set("transform", _at(x + 1, y + height - 6))


def _draw_loops(svg: ET.Element, plan: Plan) -> float:
    """Number the iterations and name the loops; where the ladder ends."""
    y = end = plan.ys[-1] + BOX / 2
    for loop, group in groupby(plan.boxes, key=lambda box: loop_of(box.node)):
        boxes = list(group)
        if not loop:
            continue
        for number, box in enumerate(boxes, start=1):
            _write(svg, box.x, y + 16, str(number), "middle dim")
        left, right, end = boxes[0].x - boxes[0].half, boxes[-1].right, y + 44
        _wire(svg, [(left, y + 21), (left, y + 26), (right, y + 26), (right, y + 21)], "line")
        spec = plan.arch.graph[loop]
        topology = f", {topology_name(spec.topology)}" if isinstance(spec, LoopNode) else ""
        text = f"{loop}: {title_of(boxes[0].node)} × {len(boxes)}{topology}"
        _write(svg, (left + right) / 2, y + 40, fit(text, max(right - left, 120)), "middle")
    return end


def _legend(plan: Plan) -> str:
    """The signs that occur, in words."""
    ops = list(dict.fromkeys(node.op for node in plan.graph.nodes if OPS[node.op].draw.form == "lane"))
    words = [mark.sign.words for mark in plan.marks.values() if mark.sign and mark.sign.words]
    for kind, word in (("pool.", "↓ pool: "), ("upscale.", "↑ up-scale: ")):
        kinds = [op.removeprefix(kind) for op in ops if op.startswith(kind)]
        words += [word + ", ".join(kinds)] if kinds else []
    words += ["dashed: recall"] if any(edge.dashed for edge in plan.edges) else []
    return " · ".join([*dict.fromkeys(words), "in a box: share of the forward FLOPs"])


def _draw_strip(svg: ET.Element, plan: Plan, y: float) -> float:
    """Chunks on the first tokens, where there are any."""
    if plan.levels == [TOKEN_LEVEL]:
        return y
    tokens = min(_TOKENS, plan.graph.seq_len)
    _write(svg, plan.left, y, f"First {tokens} tokens; a dot closes a chunk", "name")
    for level in plan.levels:
        y += _ROW
        _write(svg, MARGIN, y, plan.lane_label(level)[0])
        for start in range(-level.offset, tokens, level.chunk):
            first, end = max(start, 0), min(start + level.chunk, tokens)
            x, width = plan.left + first * _CELL, (end - first) * _CELL - 2
            _add(svg, "rect", "chunk", x=x, y=y - 11, width=width, height=15, rx=3)
            if start + level.chunk <= tokens:
                _add(svg, "circle", "bar", cx=x + width - 5, cy=y - 3.5, r=2.5)
    return y


def _draw_costs(svg: ET.Element, plan: Plan, y: float) -> float:
    """Parameters and FLOPs of every part."""
    rows: dict[str, tuple[int, int]] = {}
    for part in breakdown(plan.graph):
        key = part.part if part.part.startswith((*boxes(), "blocks.")) else "the rest"
        params, flops = rows.get(key, (0, 0))
        rows[key] = params + part.params, flops + part.flops
    totals = [sum(column) or 1 for column in zip(*rows.values(), strict=True)]
    left = plan.left if plan.levels == [TOKEN_LEVEL] else plan.width - MARGIN - 356
    for x, text in ((0, "Part"), (106, "Layers"), (164, "Parameters"), (260, "Forward FLOPs")):
        _write(svg, left + x, y, text, "name")
    for key in sorted(rows, key=lambda key: key == "the rest"):
        y += _ROW
        name = key.removeprefix("blocks.")
        if name != key:
            uses = sum(box.node.owner == key for box in plan.boxes)
            _draw_swatch(svg, plan.tints.get(name), left, y - 11, 16, 15)
            _write(svg, left + 106, y, f"{plan.graph.blocks[name].layers}" + (f" × {uses}" if uses > 1 else ""))
        _write(svg, left + 22, y, fit(name, 80))
        texts = short(rows[key][0]), _percent(rows[key][1] / totals[1])
        for x, amount, total, text in zip((164, 260), rows[key], totals, texts, strict=True):
            _add(svg, "rect", "bar", x=left + x, y=y - 8, width=44 * amount / total, height=8)
            _write(svg, left + x + 44 * amount / total + 4, y, text)
    return y
