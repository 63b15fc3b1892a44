"""The ``spiralformer`` command. Heavy packages are imported by the commands that need them."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from searchspace.errors import SpecError, printable
from searchspace.files import add_line
from studies.show.terminal import (
    EXIT_BAD_INPUT,
    EXIT_HALTED,
    EXIT_INTERRUPTED,
    TerminalConsole,
    fail,
    interrupts,
    say,
    silence,
    told,
    unheard,
)

if TYPE_CHECKING:
    from searchspace import SpaceSpec

app = typer.Typer(
    help="Compile, search and export multi-resolution looped Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = TerminalConsole()

Arch = Annotated[str, typer.Argument(help="Architecture: a file, or a shipped name.")]
Space = Annotated[str, typer.Argument(help="Space: a file, or a shipped name.")]
StudyDir = Annotated[Path, typer.Argument(help="Folder that search made.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.path=value, laid over the file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def _end(error: Exception | KeyboardInterrupt, *, interrupted: bool) -> None:
    """Say what ended a command, and exit with its code; raises again what is a fault of ours."""
    if isinstance(error, KeyboardInterrupt) or (interrupted and not isinstance(error, typer.Exit)):
        fail("interrupted", EXIT_INTERRUPTED, error)
    if isinstance(error, SpecError):
        add_line(error)
        fail(str(error), EXIT_BAD_INPUT, error)
    if isinstance(error, BrokenPipeError):
        silence()
    elif isinstance(error, OSError | MemoryError | RuntimeError) and (known := told(error)) is not None:
        fail(*known, error)
    else:
        raise error


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that ends with one message and a documented exit code, whatever the system does to it."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone shows '?'
        with interrupts() as interrupted:
            try:
                function(*args, **kwargs)
                sys.stdout.flush()
            except (Exception, KeyboardInterrupt) as error:
                _end(error, interrupted=bool(interrupted))

    return app.command(function.__name__.replace("_shipped", "").replace("_", "-"))(run)


def _version(asked: bool) -> None:
    if asked:
        print(f"spiralformer {version('spiralformer')}")
        raise typer.Exit


@app.callback()
def _main(
    _version_: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile, search and export multi-resolution looped Transformers."""


@_command
def list_shipped() -> None:
    """List the shipped architectures, spaces and studies."""
    from builder import compile_arch, estimate
    from searchspace import load_arch
    from searchspace.files import PACKAGE, purpose_of
    from studies.show.summary import short

    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(no_wrap=True, min_width=24)
    table.add_column(justify="right", no_wrap=True, min_width=10)
    table.add_column(overflow="fold", ratio=1)
    for what, folder in (
        ("architectures", PACKAGE / "architectures"),
        ("spaces", PACKAGE / "spaces"),
        ("studies", Path(__file__).parent / "configs"),
    ):
        table.add_row(f"[bold]{what}[/]", "parameters" if what == "architectures" else "", "")
        for file in sorted(folder.glob("*.yaml")):
            size = short(estimate(compile_arch(load_arch(file))).params) if what == "architectures" else ""
            table.add_row(f"  {file.stem}", size, escape(purpose_of(file)))
    console.print(table)


@_command
def keys() -> None:
    """Print the reference of every YAML key, as Markdown (docs/keys.md)."""
    from studies.show.keys import key_reference

    print(key_reference(), end="")


@_command
def schema(language: Annotated[str, typer.Argument(help="architecture, space or study.")]) -> None:
    """Print the JSON Schema of a YAML language (docs/schema), for editors."""
    from searchspace.errors import one_of, show
    from studies.show.schema import LANGUAGES, json_schema

    if language not in LANGUAGES:
        raise SpecError("", f"unknown language {show(language)}", one_of(LANGUAGES, language))
    print(json.dumps(json_schema(language), indent=1))


@_command
def describe(
    arch: Arch,
    overrides: Overrides = None,
    code: Annotated[bool, typer.Option(help="Print the generated forward too.")] = False,
) -> None:
    """Show an architecture: its summary, levels, expanded graph and cost; of a space, its decisions and costs."""
    from builder import compile_arch, estimate
    from searchspace import load_arch
    from studies.show.ladder import ladder_text
    from studies.show.summary import cost_lines, cost_rows, draw_strip, summarize

    space: SpaceSpec | None = None
    with suppress(SpecError):
        space = _space_of(arch, overrides or ())
    if space is not None and space.decisions:
        _describe_space(space)
        return
    spec = load_arch(arch, overrides or ())
    graph = compile_arch(spec)
    console.print(f"[bold]{spec.name}[/]  {summarize(spec)}", highlight=False, soft_wrap=True)
    print(f"arch_id {graph.arch_id}\n\n{ladder_text(graph)}")
    if strip := draw_strip(graph):
        console.print("\nlevels, chunks on the first tokens ('>' closes one):", highlight=False)
        print(strip)
    print(f"\n{graph.to_text()}")
    _print_cost(cost_rows(graph), cost_lines(estimate(graph)), spec.seq_len)
    if code:
        from builder import build_model

        print(build_model(graph, device="meta").code)


@_command
def cost(
    arch: Arch,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price an architecture, without building it."""
    from builder import compile_arch, estimate
    from searchspace import load_arch
    from studies.show.summary import cost_lines, cost_rows, summarize

    spec = load_arch(arch, overrides or ())
    graph = compile_arch(spec)
    total = estimate(graph)
    if as_json:
        per_token = ("flops", "training_flops", "kv_cache_bytes", "decode_flops")
        ratios = {f"{name}_per_token": getattr(total, f"{name}_per_token") for name in per_token}
        print(json.dumps({"name": spec.name, "arch_id": graph.arch_id, **asdict(total), **ratios}, indent=2))
        return
    console.print(f"[bold]{spec.name}[/]  {summarize(spec)}", highlight=False, soft_wrap=True)
    _print_cost(cost_rows(graph), cost_lines(total), spec.seq_len)


@_command
def draw(
    arch: Arch,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help=".svg, .html or .png; default: text, here.")
    ] = None,
) -> None:
    """Draw an architecture as a spiral ladder: time across, resolution down."""
    from searchspace import load_arch

    spec = load_arch(arch, overrides or ())
    if out is None:
        from builder import compile_arch
        from studies.show.ladder import ladder_text

        print(ladder_text(compile_arch(spec)))
        print("in a cell: the call's share of the forward FLOPs")
        return
    from studies.show.svg import write_drawing

    out.parent.mkdir(parents=True, exist_ok=True)
    write_drawing(spec, out)
    say(console, f"drew {out}")


def _describe_space(space: SpaceSpec) -> None:
    from studies.show.summary import cost_ranges, decision_rows

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


def _print_cost(rows: list[tuple[str, str, str, str, str]], totals: list[tuple[str, str]], seq_len: int) -> None:
    table = Table(title=f"Cost at {seq_len} tokens", title_justify="left", box=SIMPLE)
    table.add_column("part")
    for name in ("chunk+offset", "uses", "params", "FLOPs"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for what, value in totals:
        console.print(f"  {what:<32}{value:>18}", highlight=False)


@_command
def check(
    file: Annotated[str, typer.Argument(help="Architecture, space or study file.")], overrides: Overrides = None
) -> None:
    """Check a file: every choice decided each way, compiled, and for a study its budget."""
    from searchspace.files import find_file
    from studies.config import find_study

    found: list[Path] = []  # a shipped name may be that of a space and of a study
    for folder in ("architectures", "spaces"):
        with suppress(SpecError):
            found.append(find_file(file, folder=folder))
    if not found or not Path(file).is_file():
        with suppress(SpecError):
            found.append(find_study(file))
    for place in dict.fromkeys(found or [find_study(file)]):
        _check_file(place, overrides or ())


def _check_file(file: Path, overrides: Sequence[str]) -> None:
    from builder import compile_arch
    from searchspace import load_arch, load_space
    from searchspace.files import read_data
    from studies.config import load_study

    if "space" in read_data(file, overrides):
        from studies.commands.preflight import look_at_data, preflight

        study = load_study(file, overrides)
        study.space.check()
        with console.status("looking at the data, and at what is within the budget"):
            found = preflight(study, look_at_data(study), here=False)
        result = found.survey
        within = f"{result.share:.1%} of {result.looked_at} looked at are within the budget"
        print(f"ok: study, {result.size} candidates, {within}")
        _print_notes(found.notes)
        return
    from studies.commands.preflight import notes_on

    space = load_space(file, overrides)
    if not space.decisions:
        arch = load_arch(file, overrides)
        compile_arch(arch)
        print("ok: architecture")
        _print_notes(notes_on(arch))
        return
    space.check()
    compiled = sum(_compiles(space.sample(seed).arch) for seed in range(100))
    if not compiled:
        compile_arch(space.sample(0).arch)
    print(f"ok: space, {space.count()} candidates, {len(space.decisions)} decisions, {compiled} of 100 samples compile")
    _print_notes(notes_on(space.sample(0).arch))


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}")


def _compiles(arch: Any) -> bool:
    from builder import compile_arch

    try:
        compile_arch(arch)
    except SpecError:
        return False
    return True


@_command
def count(
    space: Space,
    overrides: Overrides = None,
    budget: Annotated[list[str] | None, typer.Option(help="A limit, e.g. params=1.5M; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Architecture for limits such as '90% of baseline'.")] = None,
) -> None:
    """Count a space's candidates, and those within a budget; of a study, within its own."""
    from searchspace import load_space
    from studies.candidates.feasibility import count_feasible

    if _is_study(space, overrides or ()):
        from studies.config import load_study

        study = load_study(space, overrides or ())
        if budget or baseline is not None:
            raise SpecError("--budget", "is not for a study, which has its own", "write budget.NAME=LIMIT behind it")
        print(count_feasible(study.space, study.absolute_budget()))
        return
    spec = load_space(space, overrides or ())
    if not budget:
        print(f"{spec.count()} candidates")
        return
    from builder import BudgetSpec, compile_arch, estimate
    from searchspace import load_arch
    from searchspace.errors import show
    from searchspace.files import parse_overrides
    from searchspace.plain import decode

    for text in budget:
        if "=" not in text:
            raise SpecError("--budget", f"can't read the limit {show(text)}", "write NAME=LIMIT, e.g. params=1.5M")
    cost = estimate(compile_arch(load_arch(baseline))) if baseline else None
    limits = decode(BudgetSpec, parse_overrides(budget), "budget").resolve(cost)
    print(count_feasible(spec, limits))


def _is_study(name: str, overrides: Sequence[str]) -> bool:
    """Whether a file is a study, or a shipped study has this name, and no space."""
    from searchspace.files import find_file, read_data
    from studies.config import find_study

    if not os.path.isfile(name):
        with suppress(SpecError):
            find_file(name, folder="spaces")
            return False
    with suppress(SpecError):
        return "space" in read_data(find_study(name), overrides)
    return False


def _space_of(name: str, overrides: Sequence[str]) -> SpaceSpec:
    """A space, or that of a study."""
    from searchspace import load_space
    from studies.config import load_study

    return load_study(name, overrides).space if _is_study(name, overrides) else load_space(name, overrides)


@_command
def sample(
    space: Space,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", "--num", min=1, help="How many.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 0,
) -> None:
    """Draw random architectures from a space, as YAML documents."""
    spec = _space_of(space, overrides or ())
    for i in range(number):
        if i:
            print("---")
        print(spec.sample(seed + i).arch.to_yaml(), end="")


@_command
def train(
    arch: Arch,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle.")] = Path("trained"),
    study: Annotated[str, typer.Option(help="Study whose data and training settings to use.")] = "quickstart",
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    device: Device = "cpu",
) -> None:
    """Train one architecture in full and save it as a bundle. Overrides are the study's: training.flops=1e12."""
    from searchspace import load_arch
    from searchspace.disk import check_replaceable, probe_folder
    from studies.commands.preflight import check_device
    from studies.config import load_study

    check_device(device)
    settings = load_study(study, [*(overrides or ()), "search.stopper=none", f"search.seed={seed}", "name=train"])
    spec = load_arch(arch)
    out = Path(os.path.abspath(out))
    from builder.exchange.bundle import bundle_contents
    from studies.commands.search import train_one

    check_replaceable(out, bundle_contents, "a bundle")
    probe_folder(out.parent, "-o")
    with unheard():
        bundle = train_one(spec, settings, out, device, console)
        say(console, f"saved {bundle}")


@_command
def search(
    study: Annotated[str, typer.Argument(help="Study: a file, or a shipped name.")],
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Study folder; default runs/NAME.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    serial: Annotated[bool, typer.Option(help="In this process, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster.")] = None,
) -> None:
    """Start a study, or go on with it: the same command again keeps every finished trial.

    Exit codes: 0 done, 2 bad input or a place that can't be read or written, 3 halted (too many failures in a row, a
    full disk) or no trial completed, 130 interrupted, 129 and 143 ended by a signal.
    """
    from studies.config import load_study
    from studies.records.folder import check_place
    from studies.records.resume import check_settings

    settings = load_study(study, overrides or ())
    folder = folder or Path("runs") / settings.name
    check_place(folder)
    check_settings(settings, folder)  # seconds of imports before what takes none
    from studies.commands.dry_run import dry_run
    from studies.commands.search import NothingCompleteError, run_study
    from studies.search.driver import StudyHaltedError

    if dry:
        dry_run(settings, folder, console)
        return
    with unheard():
        try:
            run_study(settings, folder, console, serial=serial, address=address)
        except KeyboardInterrupt:
            say(console, f"interrupted; the same command goes on from {folder}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except NothingCompleteError as error:
            say(console, f"no trial completed: {error}")
            raise typer.Exit(EXIT_HALTED) from None
        except StudyHaltedError as error:
            say(console, f"halted: {error}")
            say(console, f"nothing is lost; the same command goes on from {folder}")
            raise typer.Exit(EXIT_HALTED) from None


@_command
def status(
    folder: StudyDir, watch: Annotated[bool, typer.Option(help="Follow it until nothing drives it.")] = False
) -> None:
    """How far a study is."""
    from studies.commands.status import show_status, watch_status

    if watch:
        watch_status(folder, console)
    else:
        show_status(folder, console)


@_command
def report(
    folder: StudyDir,
    top: Annotated[int, typer.Option(help="Rows of the ranking.")] = 20,
    watch: Annotated[bool, typer.Option(help="Write it again and again until nothing drives the study.")] = False,
) -> None:
    """Ranking and notes here; plots, diagrams and how to reproduce in DIR/report.html."""
    from studies.commands.results import show_results
    from studies.commands.status import watch_report
    from studies.records.folder import is_driven
    from studies.records.reading import open_study

    if watch:
        watch_report(folder, console)
    records, corpus, settings = open_study(folder)
    show_results(records, folder, corpus, console, settings, top=top, driven=is_driven(folder))


@_command
def export(
    folder: Annotated[Path, typer.Argument(help="Folder that search made, or a bundle.")],
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Where to; default DIR/export/trial-N.")] = None,
    trial: Annotated[int | None, typer.Option(help="Trial number; default: the best.")] = None,
    form: Annotated[str, typer.Option("--format", help="bundle, hf (Hugging Face) or torch (.pt2).")] = "bundle",
) -> None:
    """Export a trained trial for use elsewhere; what is written is compared with the model before it says done."""
    from searchspace.disk import probe_folder
    from searchspace.errors import one_of, show
    from studies.commands.export import FORMATS, convert_bundle, export_trial

    if form not in FORMATS:
        raise SpecError("--format", f"unknown format {show(form)}", one_of(FORMATS, form))
    if out is not None:
        probe_folder(out.parent, "-o")
        if form == "torch" and out.suffix != ".pt2":
            raise SpecError("-o", f"{show(str(out))} is no name for a program", "end it in .pt2")
    from builder.exchange.bundle import read_manifest
    from studies.records.folder import EXPORTS
    from studies.records.reading import open_study
    from studies.tasks.table import tell

    suffix = FORMATS[form].suffix
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / "manifest.json").is_file():
            records, corpus, settings = open_study(folder)
            place = out if form == "bundle" else Path(scratch) / "bundle"
            bundle = export_trial(records, folder, corpus, settings, number=trial, out=place)
            facts = read_manifest(bundle)
            what = f"trial {facts['trial']}, {tell(facts['data'].get('task', 'text_lm'), facts['metrics'])}"
            target = out or folder / EXPORTS / f"trial-{facts['trial']}{suffix}"
        elif form == "bundle" or trial is not None:
            raise SpecError("", "is a bundle already", "give --format hf or torch, and no --trial", file=str(folder))
        else:
            bundle, what, target = folder, "the bundle", out or folder.with_name(folder.name + suffix)
        if form == "bundle":
            say(console, f"exported {what}, to {bundle}")
            return
        with console.status("writing, loading again and comparing"):
            convert_bundle(bundle, form, target)
        say(console, f"exported {what}, to {target}; loaded again, it computes the same")


@_command
def predict(
    folder: StudyDir,
    space: Annotated[str | None, typer.Argument(help="Space to rank; default: the study's own.")] = None,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    candidates: Annotated[int, typer.Option(min=8, help="How many to draw where the space can't be listed.")] = 1000,
    learner: Annotated[str, typer.Option(help="cost, scaling_law, tabular, gnn; auto: what ranks best.")] = "auto",
    source: Annotated[Path | None, typer.Option("--from", help="Learn from this study too; says what it adds.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Say which decisions matter.")] = False,
    save: Annotated[Path | None, typer.Option(help="Keep the predictor in this folder.")] = None,
    load: Annotated[Path | None, typer.Option(help="Use the predictor kept there, instead of fitting one.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the best into this folder, as YAML.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Rank candidates that nobody trained, by what a study's trials teach."""
    from studies.commands.predict import run_predict

    run_predict(
        folder,
        space,
        overrides or (),
        console,
        top=top,
        candidates=candidates,
        learner=learner,
        source=source,
        why=why,
        save=save,
        load=load,
        out=out,
        seed=seed,
    )


@_command
def eval(
    bundle: Annotated[Path, typer.Argument(help="Folder that export made.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, folders or globs; may be repeated. Tasks that make their examples need none."),
    ] = None,
    kind: Annotated[str, typer.Option(help="text, jsonl, parquet, hf, or tokens (their val.bin).")] = "text",
    text_field: Annotated[str, typer.Option(help="Field of a row that holds the text.")] = "text",
    tokens: Annotated[int, typer.Option(min=2, help="To look at, at most.")] = 1_000_000,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a bundle on what it has not seen: text that is given, or examples that its task makes."""
    from rich.progress import Progress

    from searchspace.plain import decode
    from studies.commands.preflight import check_device
    from studies.data.settings import TextData
    from studies.training.evaluate import evaluate, examine_bundle, position_bins

    check_device(device)
    if not data:
        examined = examine_bundle(bundle, most_tokens=tokens, device=device)
        if as_json:
            print(json.dumps(asdict(examined), indent=2))
            return
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in examined.metrics.items())
        console.print(metrics, highlight=False)
        _print_rows(examined.title, examined.columns, examined.rows)
        return
    paths = data if len(data) > 1 else data[0]
    config = decode(TextData, _given(kind=kind, path=paths, text_field=text_field), "data")
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("windows", total=None)
        found = evaluate(
            bundle,
            config,
            most_tokens=tokens,
            device=device,
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
    _print_rows("By position in the window", ("position", "nats per token"), position_bins(found.by_position))


def _print_rows(title: str, columns: Sequence[str], rows: Sequence[tuple[str, float]]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in columns:
        table.add_column(name, justify="right")
    for name, value in rows:
        table.add_row(name, f"{value:.4f}")
    console.print(table)


@_command
def tokenize(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs; with --kind hf a dataset.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for train.bin, val.bin and what they are.")],
    kind: Annotated[str, typer.Option(help="text, jsonl, parquet or hf.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; default: every byte a token.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of a row that holds the text.")] = "text",
    held_out: Annotated[float, typer.Option(help="Share kept for evaluation.")] = 0.05,
) -> None:
    """Write token files once, for any number of studies: data: {kind: tokens, path: FOLDER}."""
    from searchspace.disk import probe_folder
    from searchspace.plain import decode
    from studies.data.corpus import prepare_corpus
    from studies.data.settings import TextData

    settings = {"kind": kind, "path": paths if len(paths) > 1 else paths[0], "tokenizer": tokenizer}
    config = decode(TextData, _given(**settings, text_field=text_field, held_out=held_out), "data")
    probe_folder(out.parent, "-o")
    with console.status("tokenizing"):
        facts = prepare_corpus(config, out).facts
    say(
        console,
        f"{facts.train_tokens:,} tokens to train on, {facts.val_tokens:,} held out, {facts.bytes_per_token:.2f} bytes "
        f"each, of a vocabulary of {facts.vocab_size:,}: {out}",
    )
    _print_notes(facts.notes)


@_command
def import_hf(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder of a GPT-NeoX or Llama model.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle.")] = Path("imported"),
) -> None:
    """Turn a checkpoint (config.json, *.safetensors) into a bundle."""
    from builder import import_hf as convert
    from searchspace.disk import probe_folder
    from studies.data.codec import TOKENIZER, Tokenizer

    probe_folder(out.parent, "-o")
    if (folder / TOKENIZER).is_file():
        Tokenizer(folder / TOKENIZER)  # what travels with the model can be read
    say(console, f"imported {convert(folder, out, note=lambda text: say(console, f'note: {text}'))}")


@_command
def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder that export made.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option("-n", "--num", min=1, help="How many to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many of the likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    device: Device = "cpu",
) -> None:
    """Continue a text."""
    from studies.commands.preflight import check_device
    from studies.commands.results import print_sample

    print_sample(
        bundle, prompt, tokens, console,
        temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, device=check_device(device),
    )  # fmt: skip


def _given(**settings: object) -> dict[str, object]:
    """What was given, without what stands for nothing given."""
    plain = {"text_field": "text", "tokenizer": None}
    return {name: value for name, value in settings.items() if (name, value) not in plain.items()}


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
