"""A trained core under another schedule: longer, shorter, at other levels. The weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TypeAlias

from builder.graph.compiler import compile_arch
from builder.lowering import MissingPartError, build_view
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, one_of, show
from searchspace.nodes import IterationsSpec, LevelUse, LoopNode
from spiralformer.model import SpiralFormer

Schedule: TypeAlias = "int | Sequence[LevelUse | str]"
"""How many iterations, going round what the file says; or the level of each."""


def under(arch: ArchSpec, schedules: Mapping[str, Schedule], *, carries: bool = False) -> ArchSpec:
    """The architecture with other schedules in its loops, to run; what they say of training is left out.

    Args:
        arch: trained, or to be.
        schedules: by the name of the loop.
        carries: whether loops may still begin with the state that an earlier run ended with.

    Raises:
        SpecError: if there is no such loop, or the schedule does not fit it.
    """
    loops = {name: node for name, node in arch.graph.items() if isinstance(node, LoopNode)}
    graph = dict(arch.graph)
    for name, given in schedules.items():
        if name not in loops:
            raise SpecError(f"graph.{name}", f"there is no loop {show(name)}", one_of(loops, name))
        loop = loops[name]
        rest = IterationsSpec(segments=loop.segments) if carries and loop.segments > 1 else None
        graph[name] = replace(loop, schedule=_schedule(loop, given, name), iterations=rest)
    return replace(arch, graph=graph)


def _schedule(loop: LoopNode, given: Schedule, name: str) -> tuple[LevelUse, ...]:
    if isinstance(given, int):
        if given < 1:
            raise SpecError(f"graph.{name}.schedule", f"{given} are no iterations", "give 1 or more")
        return tuple(islice(cycle(loop.schedule), given))
    return tuple(LevelUse(level=use) if isinstance(use, str) else use for use in given)


def read_schedules(texts: Sequence[str], arch: ArchSpec) -> dict[str, Schedule]:
    """What a command line says: ``h=30``, or ``h=word,token,token``; with one loop its name may be left out.

    Raises:
        SpecError: if it can't be read.
    """
    loops = [name for name, node in arch.graph.items() if isinstance(node, LoopNode)]
    found: dict[str, Schedule] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals and len(loops) != 1:
            what = f"{show(text)} names no loop, and there are {len(loops)}"
            raise SpecError("--schedule", what, f"write one of: {', '.join(f'{loop}={text}' for loop in loops)}")
        if not equals and text in loops and text not in arch.levels:
            raise SpecError(
                "--schedule", f"{show(text)} does not say how", f"write e.g. {text}=8, or {text}=LEVEL,LEVEL"
            )
        if equals and not name:
            raise SpecError("--schedule", f"{show(text)} names no loop", one_of(loops))
        if (name := name or loops[0]) in found:
            raise SpecError("--schedule", f"says twice how {show(name)} runs", "keep one")
        levels = [part.strip() for part in value.split(",")]
        is_number = len(levels) == 1 and levels[0].isdecimal()
        if not is_number and levels[0] not in arch.levels and _is_number(levels[0]):
            what = f"{show(levels[0])} is no number of iterations"
            raise SpecError("--schedule", what, f"write e.g. {name}=8, or {name}=LEVEL,LEVEL")
        found[name] = int(levels[0]) if is_number else levels
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def model_under(
    model: SpiralFormer,
    arch: ArchSpec,
    schedules: Mapping[str, Schedule],
    held: Mapping[str, int] | None = None,
) -> tuple[ArchSpec, SpiralFormer]:
    """A model that shares its parameters with one that was trained, and runs other schedules.

    Args:
        model: trained.
        arch: of it.
        schedules: by the name of the loop.
        held: for training: by the name of the loop, how many of its first iterations pass no gradient in
            `SpiralFormer.with_losses`; there, loops with segments begin with what they are given.

    Returns:
        The architecture, and the model: its parameters are the same objects. In the first one's mode.

    Raises:
        SpecError: if an iteration has weights of its own that were never trained (``per: iteration``).
    """
    other = under(arch, schedules, carries=held is not None)
    before, graph = compile_arch(arch), compile_arch(other)
    if before.branch_scale != graph.branch_scale:
        what = f"goes by the number of layers, {before.num_layers} when it was trained and {graph.num_layers} now"
        raise SpecError("residual_scale", what, "train it with residual_scale: none, not under completep")
    try:
        return other, build_view(graph, model, before, held)
    except MissingPartError as error:
        raise SpecError("schedule", *_why_not(error.target, other, known=error.is_known)) from error


def tried_models(model: SpiralFormer, arch: ArchSpec) -> dict[int, SpiralFormer]:
    """The model by how many iterations its loops run, as their ``iterations.test`` says; empty where none says so."""
    asked = {
        name: node.iterations.test
        for name, node in arch.graph.items()
        if isinstance(node, LoopNode) and node.iterations is not None
    }
    counts = sorted({count for test in asked.values() for count in test})
    return {
        count: model_under(model, arch, {name: count for name, test in asked.items() if count in test})[1]
        for count in counts
    }


def _why_not(name: str, arch: ArchSpec, *, known: bool) -> tuple[str, str]:
    """What to say of a parameter that was not trained, or in another shape."""
    if known:
        return f"{name} goes by the number of iterations", "give mesh.slots a number, and train it so"
    loop = name.split(".")[1] if "." in name else ""
    node = arch.graph.get(loop.partition(".")[0])
    if isinstance(node, LoopNode) and node.per != "iteration":
        return f"{name} belongs to a level that was not trained", "use the levels of its own schedule"
    what = f"{name} is of one iteration alone, and none was trained for another"
    return what, "train with per: level or per: loop, so that iterations share it (docs/loops.md)"
