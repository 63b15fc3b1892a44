"""The ``spiralformer`` command. Heavy packages are imported by the commands that need them."""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from searchspace.errors import SpecError
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
    from builder.halting import Halt
    from studies.data.settings import TextData

app = typer.Typer(
    help="Compile, search and export multi-resolution looped Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = TerminalConsole()

Arch = Annotated[str, typer.Argument(help="Architecture: a file, or a shipped name.")]
Space = Annotated[str, typer.Argument(help="Space: a file, or a shipped name.")]
StudyDir = Annotated[Path, typer.Argument(help="Folder that search made.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.path=value, laid over the file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Schedules = Annotated[
    list[str] | None,
    typer.Option("--schedule", help="Run a loop otherwise: h=30 iterations, or h=word,token. May be repeated."),
]
HaltAt = Annotated[
    list[str] | None,
    typer.Option(
        "--halt", help="End each row's loop at rest: state=0.01 (relative change), or logits=5e-4 (KL, nats); or none."
    ),
]
TextField = Annotated[str, typer.Option(help="Field of a row that holds the text.")]
# Choices that --help lists; spelt out, as their tables take long to import (tests hold them to the tables).
Language = Literal["architecture", "space", "study"]
EXPORT_FORMATS = ["bundle", "hf", "torch"]
Learner = Literal["auto", "cost", "scaling_law", "tabular", "gnn"]
TextSource = Literal["text", "jsonl", "parquet", "hf", "tokens"]
TextKind = Annotated[TextSource, typer.Option(help="Of the data; tokens: their val.bin.")]


def _load_plugins(sources: list[str] | None) -> list[str] | None:
    """Before any other option is read: a plugin may add to its choices."""
    from searchspace.plugin_loading import load_plugin

    for source in sources or ():
        try:
            load_plugin(source)
        except SpecError as error:
            _end(error, interrupted=False)
    return sources


PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE_OR_MODULE",
        callback=_load_plugins,
        is_eager=True,
        help="Run this plugin's code first, and use what it adds; may be repeated.",
    ),
]


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
    def run(*args: Any, plugin: Any = None, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone shows '?'
        with interrupts() as interrupted:
            try:
                function(*args, **kwargs)
                sys.stdout.flush()
            except (Exception, KeyboardInterrupt) as error:
                _end(error, interrupted=bool(interrupted))

    known = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=PluginOption)
    run.__signature__ = known.replace(parameters=[*known.parameters.values(), option])  # type: ignore[attr-defined]
    return app.command(function.__name__.replace("_shipped", "").replace("_", "-"))(run)


def _version(asked: bool) -> None:
    if asked:
        from searchspace.plugins import tell

        print("\n".join([f"spiralformer {version('spiralformer')}", *tell()]))
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
    from studies.commands.files import list_files

    list_files(console)


@_command
def keys() -> None:
    """Print the reference of every YAML key, as Markdown (docs/keys.md)."""
    from studies.show.keys import key_reference

    print(key_reference(), end="")


@_command
def schema(language: Annotated[Language, typer.Argument(help="Of files.")]) -> None:
    """Print the JSON Schema of a YAML language (docs/schema), for editors."""
    from studies.show.schema import json_schema

    print(json.dumps(json_schema(language), indent=1))


@_command
def describe(
    arch: Arch,
    overrides: Overrides = None,
    code: Annotated[bool, typer.Option(help="Print the generated forward too.")] = False,
) -> None:
    """Show an architecture: its summary, levels, expanded graph and cost; of a space, its decisions and costs."""
    from studies.commands.files import describe as tell

    graph = tell(arch, overrides or (), console)
    if code and graph is not None:
        from builder import build_model

        print(build_model(graph, device="meta").code)


@_command
def cost(
    arch: Arch,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="Tell what training keeps in memory, too.")] = False,
    lengths: Annotated[str | None, typer.Option(help="A table over these contexts instead, as 512,2048.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price an architecture, without building it."""
    from builder import compile_arch, estimate
    from searchspace import load_arch
    from studies.commands.files import print_cost, print_lengths, print_memory
    from studies.show.summary import summarize

    spec = load_arch(arch, overrides or ())
    graph = compile_arch(spec)
    total = estimate(graph)
    if as_json and lengths is not None:
        raise SpecError("--lengths", "prints a table, no JSON", "leave one of them out")
    if as_json:
        per_token = ("flops", "training_flops", "kv_cache_bytes", "decode_flops")
        ratios: dict[str, Any] = {f"{name}_per_token": getattr(total, f"{name}_per_token") for name in per_token}
        if memory:
            from builder.pricing.memory import training_memory

            ratios["training_memory"] = asdict(training_memory(graph))
        print(json.dumps({"name": spec.name, "arch_id": graph.arch_id, **asdict(total), **ratios}, indent=2))
        return
    console.print(f"[bold]{spec.name}[/]  {summarize(spec)}", highlight=False, soft_wrap=True)
    if lengths is not None:
        print_lengths(spec, lengths, console, memory=memory)
        return
    print_cost(graph, console)
    if memory:
        print_memory(graph, console)


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


@_command
def check(
    file: Annotated[str, typer.Argument(help="Architecture, space or study file.")], overrides: Overrides = None
) -> None:
    """Check a file: every choice decided each way, compiled, and for a study its budget."""
    from studies.commands.files import check_files

    check_files(file, overrides or (), console)


@_command
def verify(
    slow: Annotated[bool, typer.Option("--all", help="In every combination with what is built in.")] = False,
) -> None:
    """Hold what the plugins given add, or else those installed, to the laws that our own parts are held to."""
    from studies.commands.verify import verify_plugins

    verify_plugins(console, everything=slow)


@_command
def count(
    space: Space,
    overrides: Overrides = None,
    budget: Annotated[list[str] | None, typer.Option(help="A limit, e.g. params=1.5M; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Architecture for limits such as '90% of baseline'.")] = None,
) -> None:
    """Count a space's candidates, and those within a budget; of a study, within its own."""
    from studies.commands.files import count as count_candidates

    count_candidates(space, overrides or (), budget or (), baseline)


@_command
def sample(
    space: Space,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", "--num", min=1, help="How many.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 0,
) -> None:
    """Draw random architectures from a space, as YAML documents."""
    from studies.commands.files import space_of

    spec = space_of(space, overrides or ())
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
    from studies.strategy.driver import StudyHaltedError

    check_replaceable(out, bundle_contents, "a bundle")
    probe_folder(out.parent, "-o")
    with unheard():
        try:
            bundle = train_one(spec, settings, out, device, console)
        except StudyHaltedError as error:
            say(console, f"halted: {error}")
            raise typer.Exit(EXIT_HALTED) from None
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
    from studies.strategy.driver import StudyHaltedError

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
    folder: StudyDir,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until nothing drives it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far a study is."""
    if as_json:
        from studies.api.study import Study

        print(json.dumps(Study(folder).to_dict(), indent=2))
        return
    from studies.commands.status import show_status, watch_status

    if watch:
        watch_status(folder, console)
    else:
        show_status(folder, console)


@_command
def report(
    folder: StudyDir,
    top: Annotated[int, typer.Option(help="Rows of the ranking.")] = 20,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again and again until nothing drives the study.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write every trial here instead, a row each; - prints.")] = None,
) -> None:
    """Ranking and notes here; plots, diagrams and how to reproduce in DIR/report.html."""
    if csv is not None:
        from searchspace.disk import write_file
        from studies.api.study import Study

        frame = Study(folder).to_dataframe()
        if str(csv) == "-":
            print(frame.to_csv(), end="")
            return
        write_file(csv, frame.to_csv())
        say(console, f"wrote {len(frame)} trials to {csv}")
        return
    from studies.commands.results import show_results
    from studies.commands.status import watch_report
    from studies.records.folder import is_driven
    from studies.records.reading import read_study

    if watch:
        watch_report(folder, console)
    records, corpus, settings = read_study(folder)
    show_results(records, folder, corpus, console, settings, top=top, driven=is_driven(folder))


@_command
def compare(first: StudyDir, second: StudyDir) -> None:
    """Two studies beside each other: what each asked, spent and found, and how their orders agree."""
    from studies.api.compare import compare_studies

    compare_studies(first, second, console)


@_command
def export(
    folder: Annotated[Path, typer.Argument(help="Folder that search made, or a bundle.")],
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Where to; default DIR/export/trial-N.")] = None,
    trial: Annotated[int | None, typer.Option(help="Trial number; default: the best.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar=f"[{'|'.join(EXPORT_FORMATS)}]",
            autocompletion=lambda: EXPORT_FORMATS,
            help="hf: Hugging Face; torch: a .pt2; or a plugin's.",
        ),
    ] = "bundle",
    schedule: Schedules = None,
    halt: HaltAt = None,
) -> None:
    """Export a trained trial for use elsewhere; what is written is compared with the model before it says done."""
    from studies.commands.export import run_export

    run_export(folder, console, number=trial, form=form, out=out, schedules=schedule or (), halt=_halt(halt))


@_command
def predict(
    folder: StudyDir,
    space: Annotated[str | None, typer.Argument(help="Space to rank; default: the study's own.")] = None,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    candidates: Annotated[int, typer.Option(min=8, help="How many to draw where the space can't be listed.")] = 1000,
    learner: Annotated[Learner, typer.Option(help="auto: what ranks best.")] = "auto",
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
def scale(
    ladder: Annotated[
        Path, typer.Argument(help="Folder of a study with scale; or CSV: candidate, size, tokens, loss, seed, rung.")
    ],
    baseline: Annotated[str | None, typer.Option(help="Held against the others; default: the first.")] = None,
    size: Annotated[
        float | None, typer.Option(min=1, help="Parameters of the target; default: 10x the largest.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="That it sees; default: in proportion to size.")] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.99, help="Of the intervals.")] = 0.8,
) -> None:
    """Say who wins at a size that nobody trained, and how sure that is, from runs at three sizes or more."""
    from studies.commands.scale import scale_ladder

    scale_ladder(ladder, console, baseline=baseline, size=size, tokens=tokens, confidence=confidence)


@_command
def coordinates(
    arch: Arch,
    overrides: Overrides = None,
    widths: Annotated[str | None, typer.Option(help="Widths, as 32,64,128.")] = None,
    uses: Annotated[str | None, typer.Option(help="Runs of each loop's schedule, as 1,2,4.")] = None,
    lr: Annotated[float, typer.Option(min=1e-9, help="Rate of AdamW: at least what training would use.")] = 0.01,
    seeds: Annotated[int, typer.Option(min=1, help="Averaged over.")] = 3,
) -> None:
    """Check that activations keep their size as a model grows wider, or its loops longer: that settings carry over."""
    from searchspace import load_arch
    from studies.commands.coordinates import check_coordinates

    check_coordinates(load_arch(arch, overrides or ()), console, widths=widths, uses=uses, lr=lr, seeds=seeds)


@_command
def eval(
    bundle: Annotated[Path, typer.Argument(help="Folder that export made.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, folders or globs; may be repeated. Tasks that make their examples need none."),
    ] = None,
    kind: TextKind = "text",
    text_field: TextField = "text",
    tokens: Annotated[int, typer.Option(min=2, help="To look at, at most.")] = 1_000_000,
    schedule: Schedules = None,
    halt: HaltAt = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a bundle on what it has not seen: text that is given, or examples that its task makes."""
    from studies.commands.evaluate import examine, score_text
    from studies.commands.preflight import check_device

    check_device(device)
    when = _halt(halt)
    if not data:
        examine(bundle, console, tokens=tokens, device=device, as_json=as_json, schedules=schedule or (), halt=when)
        return
    config, given = _text_data(data, kind, text_field), schedule or ()
    score_text(bundle, config, console, tokens=tokens, device=device, as_json=as_json, schedules=given, halt=when)


@_command
def probe(
    bundles: Annotated[list[Path], typer.Argument(help="Folders that export made; up to six share each picture.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: files, folders or globs; may be repeated. Default: held-out examples of its own."),
    ] = None,
    kind: TextKind = "text",
    text_field: TextField = "text",
    tokens: Annotated[int, typer.Option(min=2, help="To look at: one example at least, 500 at most.")] = 131_072,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write; default: beside the first bundle.")
    ] = None,
    schedule: Schedules = None,
    device: Device = "cpu",
) -> None:
    """Look inside models: where iterations attend, how far they move the state, what each is worth; as a page."""
    from studies.commands.preflight import check_device
    from studies.commands.probe import run_probe

    check_device(device)
    given = None if not data else _text_data(data, kind, text_field)
    run_probe(bundles, given, console, tokens=tokens, device=device, out=out, schedules=schedule or ())


@_command
def tokenize(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs; with --kind hf a dataset.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for train.bin, val.bin and what they are.")],
    kind: Annotated[Literal["text", "jsonl", "parquet", "hf"], typer.Option(help="Of the data.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; default: every byte a token.")] = None,
    text_field: TextField = "text",
    held_out: Annotated[float, typer.Option(help="Share kept for evaluation.")] = 0.05,
) -> None:
    """Write token files once, for any number of studies: data: {kind: tokens, path: FOLDER}."""
    from searchspace.disk import probe_folder
    from searchspace.plain import decode
    from studies.commands.files import print_notes
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
    print_notes(facts.notes)


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
    schedule: Schedules = None,
    halt: HaltAt = None,
    device: Device = "cpu",
) -> None:
    """Continue a text."""
    from studies.commands.preflight import check_device
    from studies.commands.results import print_sample

    print_sample(
        bundle, prompt, tokens, console,
        temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, schedules=schedule or (),
        halt=_halt(halt), device=check_device(device),
    )  # fmt: skip


def _halt(texts: list[str] | None) -> Halt | None:
    from builder.halting import Halt

    if texts and len(texts) > 1:
        raise SpecError("--halt", f"is given {len(texts)} times", "keep one")
    return Halt.read(texts[0]) if texts else None


def _text_data(paths: list[str], kind: TextSource, text_field: str) -> TextData:
    from searchspace.plain import decode
    from studies.data.settings import TextData

    path = paths if len(paths) > 1 else paths[0]
    return decode(TextData, _given(kind=kind, path=path, text_field=text_field), "data")


def _given(**settings: object) -> dict[str, object]:
    """What was given, without what stands for nothing given."""
    plain = {"text_field": "text", "tokenizer": None}
    return {name: value for name, value in settings.items() if (name, value) not in plain.items()}


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
