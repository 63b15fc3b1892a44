"""What is told of the files that people write: what is shipped, whether one is right, what it costs. Without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.pricing.budget import BudgetSpec
from builder.pricing.cost import estimate
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError, printable, show
from searchspace.files import (
    PACKAGE,
    find_file,
    is_of_study,
    load_arch,
    load_space,
    parse_overrides,
    purpose_of,
    read_data,
)
from searchspace.plain import decode
from searchspace.space import SpaceSpec
from studies.candidates.feasibility import count_feasible
from studies.config import find_study, load_study
from studies.show.ladder import ladder_text
from studies.show.summary import (
    cost_lines,
    cost_ranges,
    cost_rows,
    decision_rows,
    draw_strip,
    in_bytes,
    notes_on,
    short,
    summarize,
)
from studies.show.terminal import say

_SHIPPED = {
    "architectures": PACKAGE / "architectures",
    "spaces": PACKAGE / "spaces",
    "studies": Path(__file__).parent.parent / "configs",
}


def list_files(console: Console) -> None:
    """What is shipped: names, sizes, purposes."""
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(no_wrap=True, min_width=24)
    table.add_column(justify="right", no_wrap=True, min_width=10)
    table.add_column(overflow="fold", ratio=1)
    for what, folder in _SHIPPED.items():
        table.add_row(f"[bold]{what}[/]", "parameters" if what == "architectures" else "", "")
        for file in sorted(folder.glob("*.yaml")):
            size = short(estimate(compile_arch(load_arch(file))).params) if what == "architectures" else ""
            table.add_row(f"  {file.stem}", size, escape(purpose_of(file)))
    console.print(table)


def is_study(name: str, overrides: Sequence[str]) -> bool:
    """Whether a file is a study, or a shipped study has this name, and no space."""
    if not os.path.isfile(name):
        with suppress(SpecError):
            find_file(name, folder="spaces")
            return False
    with suppress(SpecError):
        return is_of_study(read_data(find_study(name), overrides))
    return False


def space_of(name: str, overrides: Sequence[str]) -> SpaceSpec:
    """A space, or that of a study."""
    return load_study(name, overrides).space if is_study(name, overrides) else load_space(name, overrides)


def check_files(name: str, overrides: Sequence[str], console: Console) -> None:
    """Every choice decided each way, compiled, and for a study its budget. Raises `SpecError` for what is wrong."""
    found: list[Path] = []  # a shipped name may be that of a space and of a study
    for folder in ("architectures", "spaces"):
        with suppress(SpecError):
            found.append(find_file(name, folder=folder))
    if not found or not Path(name).is_file():
        with suppress(SpecError):
            found.append(find_study(name))
    for file in dict.fromkeys(found or [find_study(name)]):
        if is_of_study(read_data(file, overrides)):
            _check_study(file, overrides, console)
        else:
            _check_space(file, overrides)


def _check_study(file: Path, overrides: Sequence[str], console: Console) -> None:
    from studies.commands.preflight import look_at_data, preflight  # imports Optuna

    study = load_study(file, overrides)
    study.space.check()
    with console.status("looking at the data, and at what is within the budget"):
        found = preflight(study, look_at_data(study), here=False)
    result = found.survey
    within = f"{result.share:.1%} of {result.looked_at} looked at are within the budget"
    print(f"ok: study, {result.size} candidates, {within}")
    print(f"training: {found.recipe}")
    print_notes(found.notes)


def _check_space(file: Path, overrides: Sequence[str]) -> None:
    space = load_space(file, overrides)
    if not space.decisions:
        arch = load_arch(file, overrides)
        compile_arch(arch)
        print("ok: architecture")
        print_notes(notes_on(arch))
        return
    space.check()
    compiled = 0
    for seed in range(100):
        with suppress(SpecError):
            compile_arch(space.sample(seed).arch)
            compiled += 1
    if not compiled:
        compile_arch(space.sample(0).arch)
    print(f"ok: space, {space.count()} candidates, {len(space.decisions)} decisions, {compiled} of 100 samples compile")
    print_notes(notes_on(space.sample(0).arch))


def print_notes(notes: Sequence[str]) -> None:
    """A line for each."""
    for note in notes:
        print(f"note: {printable(note)}")


def count(name: str, overrides: Sequence[str], budget: Sequence[str], baseline: str | None) -> None:
    """How many candidates there are, and how many within a budget; of a study, within its own.

    Raises:
        SpecError: if a limit can't be read, or a study is given one beside its own.
    """
    if is_study(name, overrides):
        study = load_study(name, overrides)
        if budget or baseline is not None:
            raise SpecError("--budget", "is not for a study, which has its own", "write budget.NAME=LIMIT behind it")
        print(count_feasible(study.space, study.absolute_budget()))
        return
    space = load_space(name, overrides)
    if not budget:
        print(f"{space.count()} candidates")
        return
    for text in budget:
        if "=" not in text:
            raise SpecError("--budget", f"can't read the limit {show(text)}", "write NAME=LIMIT, e.g. params=1.5M")
    cost = estimate(compile_arch(load_arch(baseline))) if baseline else None
    print(count_feasible(space, decode(BudgetSpec, parse_overrides(budget), "budget").resolve(cost)))


def describe(name: str, overrides: Sequence[str], console: Console) -> Graph | None:
    """An architecture with its levels, graph and cost; of a space, its decisions and costs.

    Returns:
        The graph; None of a space.
    """
    space: SpaceSpec | None = None
    with suppress(SpecError):
        space = space_of(name, overrides)
    if space is not None and space.decisions:
        _describe_space(space, console)
        return None
    of_study = space is not None and is_study(name, overrides)  # one that has a ladder alone
    arch = space.sample(0).arch if space is not None and of_study else load_arch(name, overrides)
    graph = compile_arch(arch)
    console.print(f"[bold]{arch.name}[/]  {summarize(arch)}", highlight=False, soft_wrap=True)
    print(f"arch_id {graph.arch_id}\n\n{ladder_text(graph)}")
    if strip := draw_strip(graph):
        console.print("\nlevels, chunks on the first tokens ('>' closes one):", highlight=False)
        print(strip)
    print(f"\n{graph.to_text()}")
    print_cost(graph, console)
    return graph


def _describe_space(space: SpaceSpec, console: Console) -> None:
    table = Table(title=f"{space.name}: {space.count()} candidates", title_justify="left", box=SIMPLE)
    table.add_column("decision", overflow="fold")
    table.add_column("from", overflow="fold")
    for name, options in decision_rows(space):
        table.add_row(name, escape(options))
    console.print(table)
    for constraint in space.template.constraints:
        say(console, f"constraint: {constraint.text}")
    console.print("of 100 random candidates:")
    for name, values in cost_ranges(space):
        console.print(f"  {name:<32}{values:>24}", highlight=False)


def print_cost(graph: Graph, console: Console) -> None:
    """Parameters and FLOPs by part, and in all."""
    table = Table(title=f"Cost at {graph.seq_len} tokens", title_justify="left", box=SIMPLE)
    table.add_column("part")
    for name in ("chunk+offset", "uses", "params", "FLOPs"):
        table.add_column(name, justify="right")
    for row in cost_rows(graph):
        table.add_row(*row)
    console.print(table)
    for what, value in cost_lines(estimate(graph)):
        console.print(f"  {what:<32}{value:>18}", highlight=False)


def print_lengths(arch: ArchSpec, lengths: str, console: Console, *, memory: bool) -> None:
    """What changes with the length of the context. Raises `SpecError` for what is no list of lengths."""
    table = Table(box=SIMPLE)
    heads = ["tokens", "FLOPs per token", "decode FLOPs, last token", "KV cache (bf16)"]
    for name in [*heads, *(["activations"] if memory else [])]:
        table.add_column(name, justify="right")
    for text in lengths.split(","):
        if not text.strip().isdecimal() or not 1 <= int(text) <= 1 << 20:
            raise SpecError("--lengths", f"can't read {show(text)}", "write e.g. 512,2048")
        graph = compile_arch(replace(arch, seq_len=int(text)))
        cost = estimate(graph)
        decode = "" if cost.decode_flops is None else f"{cost.decode_flops_worst_token:,.0f}"
        row = [f"{int(text):,}", f"{cost.flops_per_token:,.0f}", decode, in_bytes(cost.kv_cache_bytes)]
        if memory:
            from builder.pricing.memory import training_memory

            row.append(in_bytes(training_memory(graph).activations))
        table.add_row(*row)
    console.print(table)


def print_memory(graph: Graph, console: Console) -> None:
    """What training keeps."""
    from builder.pricing.memory import training_memory

    found = training_memory(graph)
    for what, value in (
        ("training: weights, AdamW (fp32)", in_bytes(found.states)),
        ("  and for each sequence", in_bytes(found.activations)),
    ):
        console.print(f"  {what:<32}{value:>18}", highlight=False)
