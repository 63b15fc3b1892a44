"""What goes on inside trained models: numbers, and a page of pictures."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from builder.exchange.bundle import Bundle, load_bundle
from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from searchspace.arch import ArchSpec
from searchspace.disk import probe_folder, write_file
from searchspace.errors import SpecError
from spiralformer.model import SpiralFormer
from studies.commands.export import trained_model
from studies.config import StudyConfig
from studies.data.dataset import FACTS, Dataset
from studies.data.settings import TextData
from studies.probes.look import Inside, LoopSeen, look, rows_at_once
from studies.records.folder import BEST, DATA, PROBED
from studies.records.trial import TrialRecord
from studies.report.inside import MOST_MODELS, examples_of, mean_of, write_probe
from studies.report.ranking import baseline_beside, best_of
from studies.show.summary import summarize
from studies.show.terminal import say
from studies.tasks.table import decode_data, prepare_data, task_named
from studies.training.evaluate import text_rows

_Batches: TypeAlias = Sequence[tuple[Tensor, Tensor]]
_Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

PAGE = "probe.html"
_ROWS = 500  # as SpiralFormer and MeSH look at
_FAREWELL_ROWS, _FAREWELL_FLOPS = 64, 3e11  # a matter of seconds


def run_probe(
    bundles: Sequence[Path],
    data: TextData | None,
    console: Console,
    *,
    tokens: int,
    device: str,
    out: Path | None,
    schedules: Sequence[str] = (),
) -> None:
    """Look inside bundles; write ``probe.json`` and a page, and print what the page says in brief.

    Args:
        bundles: folders that export made; the first few are drawn in one picture.
        data: text; None: held-out examples of each bundle's own data.
        console: to tell of it.
        tokens: to look at, at most.
        device: where to compute.
        out: folder; default: beside the first bundle.
        schedules: to run the loops under, as ``h=30``.

    Raises:
        SpecError: if a bundle is damaged, or there is nothing to look at.
    """
    if len(bundles) > MOST_MODELS:
        raise SpecError("", f"{len(bundles)} bundles are too many for one picture", f"give at most {MOST_MODELS}")
    out = out or bundles[0].resolve().with_name(f"{bundles[0].resolve().name}-probe")
    probe_folder(out, "-o")
    seen, archs = [], []
    for bundle, name in zip(bundles, _names(bundles), strict=True):
        loaded = load_bundle(bundle, device=device, schedules=schedules)
        if loaded.halt is not None:
            say(console, f"note: {name} ends its loop at rest ({loaded.halt}); all its iterations are shown")
        with console.status(f"preparing what {name} is shown"):
            batches, loss = _examples(bundle, loaded, data, tokens)
        seen.append(_look(loaded.model, loaded.arch, batches, loss, name, console, device=device))
        archs.append(loaded.arch)
        _print(seen[-1], loaded.arch, console)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / PROBED, probe_json(seen))
    page = write_probe(out / PAGE, seen, archs, _command(bundles, data, tokens, schedules))
    say(console, f"wrote {out / PROBED} and {page}")


def probe_json(seen: Sequence[Inside]) -> str:
    """What stands in ``probe.json``."""
    return json.dumps({"models": [each.to_plain() for each in seen]}, allow_nan=False)


def probe_study(
    records: Sequence[TrialRecord], folder: Path, corpus: Dataset, settings: StudyConfig, console: Console
) -> None:
    """Look inside the best trial and the baseline beside it, for the report; large models are left alone."""
    best = best_of(records)
    if best is None:
        return
    seen = []
    for record, name in ((best, "the best"), (baseline_beside(best, records), "the baseline")):
        if record is None:
            continue
        arch = record.arch_spec()
        rows = min(_FAREWELL_ROWS, int(_FAREWELL_FLOPS / estimate(compile_arch(arch)).flops))
        if not rows:
            say(
                console,
                f"what goes on inside is not looked at: `spiralformer probe {folder / BEST}` takes minutes here",
            )
            return
        model = trained_model(record, folder, corpus, settings)
        batches = _of_dataset(corpus, arch, rows * arch.seq_len)
        seen.append(_look(model, arch, batches, corpus.loss, name, console, stability=False))
    write_file(folder / PROBED, probe_json(seen))


def _look(
    model: SpiralFormer,
    arch: ArchSpec,
    batches: _Batches,
    loss: _Loss,
    name: str,
    console: Console,
    *,
    device: str = "cpu",
    stability: bool = True,
) -> Inside:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"looking inside {name}", total=sum(len(inputs_BL) for inputs_BL, _ in batches))
        return look(
            model.eval(),
            arch,
            [(inputs_BL.to(device), targets_BL.to(device)) for inputs_BL, targets_BL in batches],
            loss,
            name=name,
            stability=stability,
            tick=lambda rows: progress.update(task, completed=rows),
        )


def _names(bundles: Sequence[Path]) -> list[str]:
    """Of their folders, with as much before it as tells them apart."""
    paths = [bundle.resolve() for bundle in bundles]
    for count in range(1, 4):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len({*names}) == len(names):
            break
    return names


def _command(bundles: Sequence[Path], data: TextData | None, tokens: int, schedules: Sequence[str]) -> str:
    parts = ["spiralformer", "probe", *map(str, bundles), "--tokens", str(tokens)]
    if data is not None:
        paths = [data.path] if isinstance(data.path, str) else data.path or ()
        parts += ["--kind", data.kind, *(part for path in paths for part in ("--data", path))]
        parts += ["--text-field", data.text_field] if data.text_field != "text" else []
    return shlex.join([*parts, *(part for schedule in schedules for part in ("--schedule", schedule))])


def _examples(folder: Path, bundle: Bundle, data: TextData | None, tokens: int) -> tuple[_Batches, _Loss]:
    """Held-out examples in slices, and the loss on them."""
    if data is not None:
        rows, _ = text_rows(folder, bundle, data, tokens)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).round().astype(int)]
        tokens_BL = torch.from_numpy(rows.astype(np.int64))
        slices = tokens_BL.split(rows_at_once(bundle.arch, tokens_BL.shape[1]))
        return [(part_BL[:, :-1], part_BL[:, 1:]) for part_BL in slices], _cross_entropy
    facts = bundle.manifest.get("data", {})
    task = task_named(facts.get("task"))
    if task is None or task.name == "custom" or not (given := bundle.manifest.get("data_settings")):
        what = f"does not say how to make examples of {facts.get('source', 'what it was trained on')}"
        raise SpecError("", what, "give text with --data, or call studies.probes.look", str(folder))
    for above in folder.resolve().parents[:2]:  # of a study that has them prepared
        if (above / DATA / FACTS).is_file():
            prepared = task.dataset(above / DATA)
            if prepared.facts.content == facts.get("content"):
                return _of_dataset(prepared, bundle.arch, tokens), prepared.loss
    with tempfile.TemporaryDirectory() as scratch:
        made = prepare_data(decode_data(given, "data_settings"), Path(scratch) / DATA)
        return _of_dataset(made, bundle.arch, tokens), made.loss


def _of_dataset(dataset: Dataset, arch: ArchSpec, tokens: int) -> _Batches:
    length = arch.seq_len
    rows = max(1, min(tokens // length, _ROWS))
    slices = math.ceil(rows / rows_at_once(arch, length))
    return list(dataset.eval_batches(rows * length, rows // slices, length))


def _cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def _print(seen: Inside, arch: ArchSpec, console: Console) -> None:
    """Its loops, iteration by iteration."""
    console.print(
        f"[bold]{escape(seen.name)}[/]: {escape(summarize(arch))}, loss {seen.loss:.4f} nats on {examples_of(seen)}",
        highlight=False,
    )
    for loop in seen.loops:
        table = Table(title=f"{loop.name}, by iteration", title_justify="left", box=SIMPLE)
        for name in ("", "chunk", "entropy", "distance", "nearby", "update", "CKA", "rank", "worth"):
            table.add_column(name, justify="right")
        for row in _rows(loop):
            table.add_row(*row)
        console.print(table)
    if not seen.loops:
        say(console, "it has no loop: the page shows where its layers attend")


def _rows(loop: LoopSeen) -> Iterator[list[str]]:
    places = {t: i for i, t in enumerate(loop.states)}
    for t, chunk in enumerate(loop.chunks, start=1):
        picked = [mean_of(heads_TN[t - 1], loop.changed) for heads_TN in loop.heads.values()] or [math.nan] * 3
        i = places.get(t)
        alike = loop.similarity[i - 1][i] if i else math.nan
        rank = math.nan if i is None else loop.ranks[i]
        values = (*picked, loop.core[t - 1], alike, rank, loop.worth.get(t, math.nan))
        forms = (".3f", ".1f", ".3f", ".3f", ".3f", ".1f", "+.4f")
        told = ["" if math.isnan(v) else f"{v:{form}}" for v, form in zip(values, forms, strict=True)]
        yield [f"{t}", f"{chunk}", *told]
