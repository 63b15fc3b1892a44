"""A bundle's score on what it has not seen, printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from builder.halting import Halt
from studies.data.settings import TextData
from studies.training.evaluate import evaluate, examine_bundle, position_bins


def examine(
    bundle: Path,
    console: Console,
    *,
    tokens: int,
    device: str,
    as_json: bool,
    schedules: Sequence[str] = (),
    halt: Halt | None = None,
) -> None:
    """On examples that the bundle's task makes."""
    with console.status("making examples of every level, and scoring them under every number of iterations"):
        found = examine_bundle(bundle, most_tokens=tokens, device=device, schedules=schedules, halt=halt)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    console.print(", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items()), highlight=False)
    _print_rows(found.title, found.columns, found.rows, console)


def score_text(
    bundle: Path,
    data: TextData,
    console: Console,
    *,
    tokens: int,
    device: str,
    as_json: bool,
    schedules: Sequence[str] = (),
    halt: Halt | None = None,
) -> None:
    """On text that is given."""
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("windows", total=None)
        found = evaluate(
            bundle,
            data,
            most_tokens=tokens,
            device=device,
            schedules=schedules,
            halt=halt,
            tick=lambda done, of: progress.update(task, completed=done, total=of),
        )
    if as_json:
        facts = {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}
        print(json.dumps({**facts, **asdict(found)}, indent=2))
        return
    bits = found.bits_per_byte
    per_byte = "bytes per token not known" if bits is None else f"{bits:.4f} bits/byte"
    console.print(
        f"{per_byte}, {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, over {found.tokens:,} tokens",
        highlight=False,
    )
    if found.halted:
        console.print(", ".join(f"{name} {value:.4g}" for name, value in found.halted.items()), highlight=False)
    title, columns = "By position in the window", ("position", "nats per token")
    _print_rows(title, columns, position_bins(found.by_position), console)


def _print_rows(title: str, columns: Sequence[str], rows: Sequence[tuple[str | float, ...]], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row))
    console.print(table)
