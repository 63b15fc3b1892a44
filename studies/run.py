"""A study from start to results: what ``spiralformer search`` does, and how its folder is laid out."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from builder.bundle import load_bundle
from builder.compiler import compile_arch
from builder.cost import estimate
from searchspace.errors import SpecError, show
from searchspace.loading import read_file
from studies.checkpoint import write_durably
from studies.config import MiddleChooser, StudyConfig, check_training, decide_training, study_from_data
from studies.data import Corpus, prepare_corpus
from studies.describe import short
from studies.documents import source_files
from studies.execution import run_on_ray, run_serial
from studies.export import export_trial
from studies.journal import JOURNAL, SUMS, exclusive, mend, open_for_reading
from studies.progress import StudyView
from studies.proposer import list_candidates
from studies.report import best_of, notes, promotion_table, ranked, ranking_table
from studies.searcher import StudyDriver, StudyHaltedError
from studies.stopper import expected_work, rung_shares
from studies.surrogate import Surrogate
from studies.survey import Survey, measure_speed, survey
from studies.text import TOKENIZER, codec_of
from studies.tracking import Tracking
from studies.training import make_plan
from studies.trial import TrialRecord

EXIT_TERMINATED = 143

_STUDY = "study.yaml"
_SECONDS_TO_START, _SECONDS_PER_TRIAL = 12.0, 1.0  # Ray and its workers; building a model, checkpoints
_MAY_CHANGE = ("search.num_trials", "search.max_failures", "search.promote", "resources", "name", "tracking")
"""Settings that may differ when a study goes on."""


def run_study(settings: StudyConfig, folder: Path, console: Console, *, serial: bool, address: str | None) -> None:
    """Start a study, or go on with it, and show its results.

    Raises:
        SpecError: if the folder holds something else or is in use, or nothing is feasible.
        StudyHaltedError: if it can't go on now: too many failures in a row, or a full disk.
    """
    if folder.is_dir() and not (folder / _STUDY).is_file() and any(p.name != "lock" for p in folder.iterdir()):
        raise SpecError("", "exists and holds no study", "use another --dir", file=str(folder))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive(folder):
        if damage := mend(folder):
            console.print(damage, highlight=False)
        check_settings(settings, folder)
        with console.status("looking at what is within the budget"):
            found = survey_study(settings)
        console.print(
            f"[bold]{settings.name}[/]: {found.size} candidates, {found.share:.1%} of {found.looked_at} looked at "
            "are within the budget",
            highlight=False,
        )
        with console.status("preparing data"):
            corpus = prepare_data(settings, folder)
        device = device_of(settings, here=address is None)
        keep_settings(settings, folder)
        driver = StudyDriver(settings, folder, corpus, device)
        if driver.warm_start_note:
            console.print(driver.warm_start_note, highlight=False)
        now = driver.progress()
        ended = now.complete + now.stopped + now.failed
        if now.launched:
            console.print(f"going on: {ended} trials ended before", highlight=False)
        if ended < now.total:
            if not serial:
                console.print("starting workers", highlight=False)
            driver.tracking = Tracking(settings, folder, corpus)
            with (
                contextlib.closing(driver.tracking),
                StudyView(driver, corpus, console) as view,
                _Signals() as signals,
            ):

                def watch() -> None:
                    signals.check()
                    view()

                if serial:
                    run_serial(driver, watch)
                else:
                    run_on_ray(driver, watch, address=address)
            if driver.tracking.note:
                console.print(driver.tracking.note, highlight=False)
        if driver.halted:
            raise StudyHaltedError(driver.halted)
        if note := driver.progress().note:
            console.print(note, highlight=False)
        show_results(driver.records, folder, corpus, console, settings)
        if best_of(driver.records) is not None:
            bundle = export_trial(driver.records, folder, corpus, trials=driver.trials, out=folder / "best")
            console.print(f"exported the best trial to {bundle}", highlight=False)
            if (first := ranked(driver.records)[0]).purpose == "baseline":
                what = f"the baseline {first.name} is better still: export it with --trial {first.number}"
                console.print(what, highlight=False)
            print_sample(bundle, "def ", 160, console, temperature=0.7, seed=0)


class _Signals:
    """SIGINT ends the study at the next report, a second one at once; SIGTERM at once.

    An exception raised inside a library may be swallowed there: it is raised again at the next report.
    """

    def __enter__(self) -> _Signals:
        self._raised: BaseException | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        first = self._raised is None
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(EXIT_TERMINATED)
        if not (first and number == signal.SIGINT):
            raise self._raised
        os.write(2, b"\nstopping at the next report; once more stops at once\n")

    def check(self) -> None:
        """Raise what came and was lost; take the handlers back from whoever replaced them (Ray does)."""
        for number in self._before:
            signal.signal(number, self._on_signal)
        if self._raised is not None:
            raise self._raised


def open_study(folder: Path) -> tuple[list[TrialRecord], Corpus, StudyConfig]:
    """A study folder's records, data and settings. Raises `SpecError` if it is none."""
    records = open_for_reading(folder)
    return records, Corpus(folder / "data"), study_from_data(read_file(folder / _STUDY))


def show_results(
    records: Sequence[TrialRecord],
    folder: Path,
    corpus: Corpus,
    console: Console,
    settings: StudyConfig,
    *,
    top: int = 20,
) -> None:
    """Ranking, promotions and notes here; with plots and diagrams in ``report.html``."""
    from studies.html_report import write_html  # a second of imports that nothing else needs

    console.print(ranking_table(records, corpus, objectives=settings.objectives, top=top))
    if (table := promotion_table(records, corpus)) is not None:
        console.print(table)
    for line in notes(records, corpus):
        console.print(line, highlight=False)
    with console.status("writing the report"):
        file = write_html(records, settings, corpus, folder / "report.html")
    console.print(f"wrote {file}", highlight=False)


def dry_run(settings: StudyConfig, folder: Path, console: Console) -> None:
    """Say what would run: size, feasible share, FLOPs, and time after a short calibration."""
    check_settings(settings, folder)
    found = survey_study(settings)
    training = check_training(decide_training(settings.training, MiddleChooser()).tree)
    trials, baselines = settings.search.num_trials, len(settings.baselines)
    console.print(
        f"space: {found.size} candidates; {found.share:.1%} of {found.looked_at} looked at are within the budget",
        highlight=False,
    )
    what = f"trials: {trials}, and {baselines} baseline{'s' if baselines != 1 else ''} in full"
    if settings.search.promote.trials:
        what += f"; the best {settings.search.promote.trials} again, {settings.search.promote.seeds} times each"
    console.print(what, highlight=False)
    with tempfile.TemporaryDirectory() as scratch, console.status("measuring speed"):
        corpus = prepare_data(settings, Path(scratch))
        speed = measure_speed(settings, corpus, device_of(settings))
    arch = settings.baselines[0] if settings.baselines else settings.space.sample(0).arch
    cost = estimate(compile_arch(arch))
    per_trial = training.flops or (training.tokens or 0.0) * cost.training_flops_per_token
    promote, rungs = settings.search.promote, len(rung_shares(settings.search.stopper))
    again = promote.seeds * (promote.trials + bool(baselines)) if promote.trials else 0
    share, evaluations = expected_work(settings.search.stopper)
    full = baselines + again * promote.factor
    expected, most = per_trial * (trials * share + full), per_trial * (trials + full)
    evaluation = training.eval_tokens * cost.flops_per_token
    looked = evaluation * (trials * evaluations + baselines * rungs + again)
    looked_most = evaluation * ((trials + baselines) * rungs + again)
    workers = max(1, (os.cpu_count() or 1) // settings.resources.cpus_per_trial)
    workers = min(workers, settings.resources.max_concurrent or workers)
    apart = _SECONDS_TO_START + _SECONDS_PER_TRIAL * (trials + baselines + again) / workers
    usual, worst = ((flops / speed / workers) + apart for flops in (expected + looked, most + looked_most))
    console.print(f"training FLOPs: about {expected:.2g}, at most {most:.2g}", highlight=False)
    console.print(
        f"time: about {_duration(usual)}, at most {_duration(worst)}, on {workers} workers at {speed:.2g} FLOP/s each, "
        "with evaluation and starting them",
        highlight=False,
    )
    seen = per_trial / cost.training_flops_per_token
    if (epochs := seen / corpus.facts.train_tokens) > 1.5:
        console.print(
            f"a trial sees the data about {epochs:.1f} times ({short(seen)} of {short(corpus.facts.train_tokens)} "
            "tokens): give more data, or train less, lest memory be what is ranked",
            highlight=False,
        )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def check_study(settings: StudyConfig) -> None:
    """What can be told without running: the data is there, and every baseline lasts for a step. Raises `SpecError`."""
    if settings.data.kind != "tokens":
        source_files(settings.data)
    if settings.search.sampler == "grid":
        list_candidates(settings)
    if settings.search.sampler == "predictor":
        Surrogate(settings.search.predictor, settings.search.seed)
    training = check_training(decide_training(settings.training, MiddleChooser()).tree)
    for arch in settings.baselines or (settings.space.sample(0).arch,):
        make_plan(training, arch.seq_len, estimate(compile_arch(arch)).training_flops_per_token)


def survey_study(settings: StudyConfig) -> Survey:
    """How much of a study's space is feasible. Raises `SpecError` if nothing is."""
    return survey(settings.space, settings.absolute_budget())


def prepare_data(settings: StudyConfig, folder: Path) -> Corpus:
    """The study's data, written once under its folder."""
    return prepare_corpus(settings.data, folder.absolute() / "data")


def device_of(settings: StudyConfig, *, here: bool = True) -> str:
    """Where trials train. Raises `SpecError` if that is on this machine and it has no such device."""
    if settings.resources.gpus_per_trial == 0:
        return "cpu"
    if here and torch.cuda.device_count() < settings.resources.gpus_per_trial:
        raise SpecError(
            "resources.gpus_per_trial",
            f"asks for {settings.resources.gpus_per_trial:g}, this machine has {torch.cuda.device_count()} GPUs",
            "set it to 0, or give --address of a cluster that has them",
        )
    return "cuda"


def print_sample(bundle: Path, prompt: str, tokens: int, console: Console, *, temperature: float, seed: int) -> None:
    """Continue a text with a bundle's model. Raises `SpecError` if it was not trained on bytes."""
    loaded = load_bundle(bundle)
    if loaded.manifest.get("data", {}).get("kind") == "tokens" and not (bundle / TOKENIZER).is_file():
        what = "was trained on token files, so text can't be encoded"
        raise SpecError("", what, f"call model.generate with token ids, or put a {TOKENIZER} into it", file=str(bundle))
    codec = codec_of(bundle)
    if not prompt:
        raise SpecError("--prompt", "is empty", "give at least one character")
    start = torch.tensor([codec.encode(prompt.encode())])
    out = loaded.model.generate(start, tokens, temperature=temperature, seed=seed)
    console.print(f"a sample at temperature {temperature}:", highlight=False)
    console.print(codec.decode(out[0].tolist()), markup=False, highlight=False)


def check_settings(settings: StudyConfig, folder: Path) -> None:
    """Raise `SpecError` if the folder's journal was begun with other settings."""
    file = folder / _STUDY
    if not file.is_file() or not (folder / JOURNAL).is_file():
        return
    if not open_for_reading(folder):  # nothing was launched: these settings may have been what was wrong
        return
    before = read_file(file)
    if differing := _first_difference(before, settings.plain):
        old, new = (show(_at(data, differing)) for data in (before, settings.plain))
        raise SpecError(
            differing, f"is {new}, but {old} in this folder's study", "use another --dir, or set it back", str(file)
        )


def keep_settings(settings: StudyConfig, folder: Path) -> None:
    """Write the study's settings into its folder, whole. A journal in which nothing was launched begins anew."""
    if (folder / JOURNAL).is_file() and not open_for_reading(folder):
        for name in (JOURNAL, SUMS):
            (folder / name).unlink(missing_ok=True)
    write_durably(folder / _STUDY, settings.to_yaml().encode())


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else data
    return data


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Dotted path of the first value that differs, but for those that may change between runs."""
    if path in _MAY_CHANGE:
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if found := _first_difference(old.get(name), new.get(name), f"{path}.{name}" if path else name):
                return found
        return ""
    return "" if old == new else path
