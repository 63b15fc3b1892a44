"""Drawings: well-formed, complete, inside their frame, and the same numbers as the graph's."""

import re
import sys
import types
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from helpers import ARCHITECTURES, TOPOLOGIES, tiny_arch

from builder import compile_arch, estimate
from searchspace import SpecError, load_arch
from studies.show.ladder import ladder_text
from studies.show.summary import short, summarize
from studies.show.svg import draw_html, draw_svg, write_drawing

SVG = "{http://www.w3.org/2000/svg}"
MIXED = ["phrase"] * 4 + ["word"] * 5 + ["token"] * 3


def looped(schedule, **loop):
    return tiny_arch({"graph": {"h": {"schedule": schedule, **loop}}})


def parse(arch):
    return ET.fromstring(draw_svg(arch))


def words(svg):
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def boxes(svg):
    """The rectangle of every box by its node."""
    groups = [group for group in svg.iter(f"{SVG}g") if "data-node" in group.attrib]
    rects = [group.find(f"{SVG}rect") for group in groups]
    assert len({group.get("data-node") for group in groups}) == len(groups)
    return {group.get("data-node"): rect for group, rect in zip(groups, rects, strict=True)}


def frame(rect):
    left, top, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
    return left, top, left + width, top + height


def assert_inside(svg):
    _, _, width, height = map(float, svg.get("viewBox").split())
    for text in svg.iter(f"{SVG}text"):
        long = 0.6 * (15 if text.get("class") == "title" else 11) * len(text.text)
        left = float(text.get("x")) - (long / 2 if "middle" in text.get("class", "") else 0)
        assert left >= 0, text.text
        assert left + long <= width, text.text
        assert 11 <= float(text.get("y")) <= height - 3, text.text


def assert_apart(rects):
    frames = [frame(rect) for rect in rects]
    for i, (left, top, right, bottom) in enumerate(frames):
        for left2, top2, right2, bottom2 in frames[i + 1 :]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top


def assert_wires_apart(svg):
    """No two level pieces of wires lie on each other; pieces of one wire overlap by the rounding of a corner."""
    paths = [path.get("d") for path in svg.iter(f"{SVG}path") if path.get("class", "").startswith("wire")]
    corners = [[tuple(map(float, at)) for at in re.findall(r"([\d.]+) ([\d.]+)(?=[LQ]|$)", path)] for path in paths]
    level = [(y, min(x, x2), max(x, x2)) for at in corners for (x, y), (x2, y2) in pairwise(at) if y == y2]
    for i, (y, start, end) in enumerate(level):
        for y2, start2, end2 in level[i + 1 :]:
            assert y != y2 or min(end, end2) - max(start, start2) <= 6


@pytest.mark.parametrize("file", ARCHITECTURES, ids=lambda p: p.stem)
def test_shipped_architectures(file):
    arch = load_arch(file)
    graph, svg = compile_arch(arch), parse(arch)
    found = boxes(svg)
    assert list(found) == [node.name for node in graph.nodes if node.op in ("embed", "block", "head")]
    lanes = [path for path in svg.iter(f"{SVG}path") if path.get("class") == "lane"]
    assert len(lanes) == len({node.level for node in graph.nodes})
    assert_inside(svg)
    assert_apart(found.values())
    assert_wires_apart(svg)
    text = ladder_text(graph)
    assert max(map(len, text.splitlines())) <= 80
    assert svg.find(f"{SVG}title").text == arch.name
    assert text in svg.find(f"{SVG}desc").text


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("extra", [{}, {"recall": "linear", "norm": "rms", "step": "add"}], ids=["plain", "all"])
def test_every_topology(topology, extra):
    svg = parse(looped(["phrase", "word", "word", "token"], topology=topology, **extra))
    assert_inside(svg)
    assert_apart(boxes(svg).values())
    assert_wires_apart(svg)
    assert ("dashed: recall" in " ".join(words(svg))) == bool(extra)


@pytest.mark.parametrize("topology", ["residual", "anchor", "mesh"])
def test_twelve_iterations_fit_a_laptop(topology):
    svg = parse(looped(MIXED, topology=topology))
    assert float(svg.get("width")) <= 900
    assert_inside(svg)
    assert_apart(boxes(svg).values())
    assert_wires_apart(svg)
    assert words(svg).count("core") == 12 + 1  # and the row of the cost table
    assert {str(i) for i in range(1, 13)} <= set(words(svg))


def test_boxes_of_a_level_share_a_lane_and_coarser_lanes_are_lower():
    found = boxes(parse(looped(MIXED)))
    tops = [float(found[f"h.t{t}.block"].get("y")) for t in range(12)]
    assert len(set(tops[:4])) == len(set(tops[4:9])) == len(set(tops[9:])) == 1
    assert tops[0] > tops[4] > tops[9] == float(found["x"].get("y"))


def test_one_block_has_one_colour_and_hatch():
    def style(node):
        rect = found[node]
        group = next(group for group in svg.iter(f"{SVG}g") if group.get("data-node") == node)
        return rect.get("class"), *[other.get("fill") for other in group.iter(f"{SVG}rect")][1:]

    svg = parse(load_arch("two_cores_small"))
    found = boxes(svg)
    assert style("h0") == style("y") == ("box",)
    assert not {"box", *style("near")} & set(style("far"))
    svg = parse(load_arch("hourglass_small"))
    found = boxes(svg)
    assert style("wide") == style("up") != style("deep")


def test_light_and_dark():
    style = parse(tiny_arch()).find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    selectors = [re.findall(r"^(\.ladder[^{]*){", rules, re.M) for rules in (light, dark)]
    assert selectors[0] == selectors[1]
    assert not set(re.findall("#[0-9a-f]{6}", light)) & set(re.findall("#[0-9a-f]{6}", dark))
    assert min(int(size) for size in re.findall(r"(\d+)px", light)) >= 11


def test_names_are_escaped_and_cut():
    arch = looped(["word"])
    object.__setattr__(arch, "name", "<&>" * 100)
    svg = parse(arch)
    assert svg.find(f"{SVG}title").text == arch.name
    assert_inside(svg)
    assert words(svg)[0].endswith("<…")
    assert "&lt;&amp;&gt;" in draw_html(arch)
    assert "<&>" not in draw_html(arch)


def test_long_names_are_cut():
    name = "a_very_long_name_for_a_shared_block_or_a_level"
    loop = {"loop": name, "in": "x", "schedule": [name, "token"]}
    over = {"levels": {name: {"chunk": 2}}, "blocks": {name: {"layers": 1, "heads": 2}}, "graph": {"h": loop}}
    svg = parse(tiny_arch(over))
    assert_inside(svg)
    assert name not in words(svg)
    assert sum(text.endswith("…") for text in words(svg)) >= 4
    assert max(map(len, ladder_text(compile_arch(tiny_arch(over))).splitlines())) <= 80


def test_a_dot_closes_each_chunk():
    arch = load_arch("spiralformer_small")
    levels = {node.level for node in compile_arch(arch).nodes}
    dots = [circle for circle in parse(arch).iter(f"{SVG}circle") if circle.get("class") == "bar"]
    assert len(dots) == sum(level.closed_chunks(24) for level in levels) == 24 + 6 + 2


def test_memory_shows_its_slots():
    assert "memory, 6 slots" in words(parse(load_arch("spiralformer_small")))
    assert not any("memory" in text for text in words(parse(tiny_arch())))


def test_costs_are_those_of_the_graph():
    arch = load_arch("plain_4")
    texts, cost = words(parse(arch)), estimate(compile_arch(arch))
    assert f"4; {short(cost.params)} parameters, {short(cost.flops_per_token)} FLOPs per token at 128 tokens" in texts
    assert texts[-10:] == ["embed", "16.38K", "0%", "4", "stack", "201.2K", "94%", "head", "16.45K", "5.8%"]


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_files(suffix, tmp_path):
    file = tmp_path / f"x{suffix}"
    write_drawing(tiny_arch(), file)
    text = file.read_text(encoding="utf-8")
    assert draw_svg(tiny_arch()) in text
    assert not re.search(r"(href|src)=|@import|url\((?!#)", text)  # self-contained


def test_png_wants_cairosvg(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(SpecError, match=r"spiralformer\[draw\]"):
        write_drawing(tiny_arch(), tmp_path / "x.png")
    fake = types.SimpleNamespace(svg2png=lambda bytestring, scale: b"png of " + bytestring[:4])
    monkeypatch.setitem(sys.modules, "cairosvg", fake)
    write_drawing(tiny_arch(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"png of <svg"


@pytest.mark.parametrize("name", ["x.pdf", "x"])
def test_other_suffixes_are_refused(name, tmp_path):
    with pytest.raises(SpecError, match=r"\.svg, \.html or \.png"):
        write_drawing(tiny_arch(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_text_of_a_loop():
    assert ladder_text(compile_arch(load_arch("spiralformer_small"))).splitlines() == [
        "     │ prelude │  core × 3   │ coda",
        "     │         │   1   2   3 │",
        " 1+0 │     22% │   ·   · 45% │  22%",
        " 4+2 │       · │   ·  8%   · │    ·",
        "16+8 │       · │  2%   ·   · │    ·",
    ]


def test_text_without_a_loop():
    assert ladder_text(compile_arch(load_arch("hourglass_small"))).splitlines() == [
        "     │ outer │ middle │ bottom │ middle │ last",
        " 1+0 │   40% │      · │      · │      · │  40%",
        " 4+2 │     · │     7% │      · │     7% │    ·",
        "16+6 │     · │      · │     3% │      · │    ·",
    ]


def test_text_wraps():
    for iterations in range(8, 24):
        schedule = f"graph.h.schedule=[{', '.join(['word'] * iterations)}]"
        text = ladder_text(compile_arch(load_arch("spiralformer_small", [schedule])))
        assert max(map(len, text.splitlines())) <= 80
    text = ladder_text(compile_arch(looped(["phrase"] * 50 + ["token"] * 50)))
    assert max(map(len, text.splitlines())) <= 80
    numbers = [line for page in text.split("\n\n") for line in page.splitlines()[1:2]]
    assert [int(number) for line in numbers for number in line.replace("│", " ").split()] == list(range(1, 101))


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (["token"] * 4, "1R[1 1 1 1], anchor"),
        (["token"] * 12, "1R[1 x12], anchor"),
        (["phrase", "word", *["token"] * 6, "word"], "1R[8 4 1 x6 4], anchor"),
    ],
)
def test_many_iterations_of_one_level_are_counted(schedule, told):
    assert summarize(tiny_arch({"graph": {"h": {"schedule": schedule}}})) == told
