"""What a coordinate check found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, show
from searchspace.nodes import LoopNode
from studies.scale.sizes import scaled
from studies.sections import SizeConfig
from studies.show.terminal import say
from studies.training.coordinates import FLAT, Slope, slopes

_SHOWN = 12


def check_coordinates(
    arch: ArchSpec, console: Console, *, widths: str | None, uses: str | None, lr: float, seeds: int
) -> None:
    """Print how activations go with width, or with uses of what is looped.

    Args:
        arch: to be grown.
        console: to print on.
        widths: to hold against each other, as ``32,64,128``; None where uses are given.
        uses: how often a loop runs its schedule, written the same way.
        lr: rate of AdamW.
        seeds: over which sizes are averaged.

    Raises:
        SpecError: if neither or both are given, or the architecture can't be built there.
    """
    if (widths is None) == (uses is None):
        raise SpecError("--widths", "give either widths or uses", "write --widths 32,64,128, or --uses 1,2,4")
    what, given = ("uses", uses) if widths is None else ("widths", widths)
    values = _numbers(given or "", f"--{what}")
    loops = [node for node in arch.graph.values() if isinstance(node, LoopNode)]
    if uses and not loops:
        raise SpecError("--uses", "the architecture has no loop", "give --widths")
    grown = {float(n): scaled(arch, SizeConfig(d_model=n)) if widths else repeated(arch, n) for n in values}
    # Within a loop a first use knows less than a last one, so its own sites are not asked to stay.
    inside = ("sites.", *(f"blocks.{loop.loop}." for loop in loops)) if uses else ()
    with console.status("training a few steps at each size"):
        found = slopes(grown, lr=lr, seeds=seeds)
    found = [slope for slope in found if slope.step > 0 and not f"{slope.site}.".replace("#", ".").startswith(inside)]
    console.print(_table(found, values, what))
    flat = sum(abs(slope.slope) <= FLAT for slope in found)
    say(
        console,
        f"{flat} of {len(found)} sizes of activations go with {what} by a power of {FLAT} or less "
        f"({arch.parametrization} parametrization, rate {lr:g}, {seeds} seed{'s' if seeds != 1 else ''}).",
    )


def _numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part[:9]) > 0 and len(part) < 9 for part in parts):
        raise SpecError(option, f"can't read {show(text)}", "write numbers between commas: 32,64,128")
    if len(values := sorted({int(part) for part in parts})) < 2:
        raise SpecError(option, f"{text} alone has no slope", "give two or more")
    return values


def repeated(arch: ArchSpec, times: int) -> ArchSpec:
    """Every loop runs its schedule so many times."""
    graph = {
        name: replace(node, schedule=node.schedule * times) if isinstance(node, LoopNode) else node
        for name, node in arch.graph.items()
    }
    return replace(arch, graph=graph)


def _table(found: Sequence[Slope], values: Sequence[int], what: str) -> Table:
    table = Table(title=f"The steepest, by {what}", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("call site", overflow="fold")
    for name in ("step", "slope", *(str(value) for value in values)):
        table.add_column(name, justify="right", no_wrap=True)
    shown: set[tuple[float, ...]] = set()
    for slope in found:
        if slope.sizes in shown or len(shown) == _SHOWN:  # a module and what it ends with
            continue
        shown.add(slope.sizes)
        table.add_row(slope.site, str(slope.step), f"{slope.slope:+.3f}", *(f"{size:.3g}" for size in slope.sizes))
    return table
