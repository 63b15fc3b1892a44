"""What a study found, in the terminal and as a page; and what its best model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from searchspace.errors import SpecError, show
from searchspace.plugins import changed
from studies.config import StudyConfig
from studies.data.codec import codec_of_bundle
from studies.data.dataset import Dataset
from studies.records.folder import REPORT, check_links
from studies.records.trial import TrialRecord
from studies.report.changes import changes_table
from studies.report.ranking import notes, promotion_table, ranking_table
from studies.report.scaling import Told, answer_lines, ladder_answer, scale_table
from studies.show.terminal import say

if TYPE_CHECKING:
    from builder.halting import Halt


def show_results(
    records: Sequence[TrialRecord],
    folder: Path,
    corpus: Dataset,
    console: Console,
    settings: StudyConfig,
    *,
    top: int = 20,
    driven: bool = False,
) -> None:
    """Ranking, promotions and notes here; with plots and diagrams in ``report.html``."""
    check_links(folder)
    if settings.scale is None or any(record.ranks for record in records):
        console.print(ranking_table(records, corpus, objectives=settings.objectives, top=top))
    if (table := promotion_table(records, corpus)) is not None:
        console.print(table)
    if (table := changes_table(records, corpus)) is not None:
        console.print(table)
    for line in (*changed(settings.plugins), *notes(records, corpus, driven=driven)):
        say(console, line)
    with console.status("fitting the ladder"):
        told, missing = ladder_answer(records, settings, corpus)
    if told is not None:
        show_answer(told, console)
    elif missing and any(record.purpose == "ladder" for record in records):
        say(console, missing)
    with console.status("writing the report"):
        file = write_page(records, folder, corpus, settings, driven=driven)
    say(console, f"wrote {file}")


def write_page(
    records: Sequence[TrialRecord], folder: Path, corpus: Dataset, settings: StudyConfig, *, driven: bool = False
) -> Path:
    """Write ``report.html`` into a study's folder."""
    from studies.report.page import write_html  # a second of imports that nothing else needs

    return write_html(records, settings, corpus, folder / REPORT, driven=driven)


def print_sample(
    bundle: Path,
    prompt: str,
    tokens: int,
    console: Console,
    *,
    temperature: float,
    seed: int,
    top_k: int = 0,
    top_p: float = 1.0,
    device: str = "cpu",
    schedules: Sequence[str] = (),
    halt: Halt | None = None,
) -> None:
    """Continue a text with a bundle's model. Raises `SpecError` if nothing tells what its tokens stand for."""
    import torch

    from builder.exchange.bundle import load_bundle

    loaded = load_bundle(bundle, device=device, schedules=schedules, halt=halt)
    codec = codec_of_bundle(bundle, loaded)
    if not prompt:
        raise SpecError("--prompt", "is empty", "give at least one character")
    ids = codec.encode(prompt.encode("utf-8", errors="replace"))
    if not ids:
        raise SpecError("--prompt", f"{show(prompt)} has no tokens", "give another")
    share, used = (top_p if top_p < 1 else None), list[int]()
    loaded.model.register_forward_hook(lambda *_: used.extend(loaded.model.iterations_used))
    out = loaded.model.generate(
        torch.tensor([ids], device=device), tokens, temperature=temperature, top_k=top_k or None, top_p=share, seed=seed
    )
    console.print(f"a sample at temperature {temperature}:", highlight=False)
    say(console, codec.decode(out[0].tolist()))
    if used:
        say(console, f"the loop ran {sum(used) / len(used):.1f} times for a token in the mean, {max(used)} at most")


def show_answer(told: Told, console: Console) -> None:
    """What a ladder says: a table, and in words."""
    console.print(scale_table(told))
    for line in answer_lines(told):
        say(console, line)
