"""What a search would take, before it starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console

from builder.graph.compiler import compile_arch
from builder.pricing.cost import estimate
from studies.commands.preflight import check_resources, device_of, preflight
from studies.config import StudyConfig, num_baselines, num_climbers, num_promotions
from studies.data.dataset import Dataset
from studies.records.resume import check_settings
from studies.scale.ladder import ladder_of
from studies.sections import MiddleChooser, check_training, decide_training
from studies.show.summary import short, span
from studies.show.terminal import say
from studies.strategy.stopper import expected_work, rung_shares
from studies.tasks.table import prepare_data
from studies.training.trainer import measure_speed

_SECONDS_TO_START, _SECONDS_PER_TRIAL = 12.0, 1.0  # Ray and its workers; building a model, checkpoints


def dry_run(settings: StudyConfig, folder: Path, console: Console) -> None:
    """Say what would run: size, feasible share, FLOPs, and time after a short calibration."""
    check_settings(settings, folder)
    check_resources(settings)
    training = check_training(decide_training(settings.training, MiddleChooser()).tree)
    trials, baselines = settings.search.num_trials, num_baselines(settings)
    with tempfile.TemporaryDirectory() as scratch:
        with console.status("preparing data"):
            corpus = prepare_data(settings.data, Path(scratch) / "data", settings.base)
        found = preflight(settings, corpus.facts)
        with console.status("measuring speed"):
            speed = measure_speed(settings, corpus, device_of(settings))
    say(
        console,
        f"space: {found.survey.size} candidates; {found.survey.share:.1%} of {found.survey.looked_at} looked at are "
        "within the budget",
    )
    for note in found.notes:
        say(console, f"note: {note}")
    what = f"trials: {trials}, and {baselines} baseline{'s' if baselines != 1 else ''} in full"
    if settings.search.promote.trials:
        what += f"; the best {settings.search.promote.trials} again, {settings.search.promote.seeds} times each"
    say(console, what)
    ladder_flops, rungs_said = _ladder(settings, corpus)
    if rungs_said:
        say(console, rungs_said)
    arch = settings.baselines[0] if settings.baselines else settings.space.sample(0).arch
    cost = estimate(compile_arch(arch))
    per_trial = training.flops or (training.tokens or 0.0) * cost.training_flops_per_token
    promote, rungs = settings.search.promote, len(rung_shares(settings.search.stopper))
    again = num_promotions(settings)
    share, evaluations = expected_work(settings.search.stopper)
    full = baselines + again * promote.factor
    expected, most = (per_trial * (n + full) + ladder_flops for n in (trials * share, trials))
    evaluated = min(training.eval_tokens, corpus.facts.val_tokens)  # no more is held out
    if evaluated < training.eval_tokens:
        asked, there = short(training.eval_tokens), short(corpus.facts.val_tokens)
        say(console, f"note: training.eval_tokens asks for {asked} tokens, {there} are held out")
    evaluation = evaluated * cost.flops_per_token
    looked = evaluation * (trials * evaluations + baselines * rungs + again)
    looked_most = evaluation * ((trials + baselines) * rungs + again)
    workers = max(1, (os.cpu_count() or 1) // settings.resources.cpus_per_trial)
    workers = min(workers, settings.resources.max_concurrent or workers)
    apart = _SECONDS_TO_START + _SECONDS_PER_TRIAL * (trials + baselines + again) / workers
    usual, worst = ((flops / speed / workers) + apart for flops in (expected + looked, most + looked_most))
    fewest, most_steps = found.steps
    say(console, f"training: {found.recipe}")
    console.print(f"steps: {span(fewest, most_steps)} a trial", highlight=False)
    console.print(f"training FLOPs: about {short(expected)}, at most {short(most)}", highlight=False)
    console.print(
        f"time: about {_duration(usual)}, at most {_duration(worst)}, on {workers} workers at {speed:.2g} FLOP/s each, "
        "with evaluation and starting them",
        highlight=False,
    )
    seen = per_trial / cost.training_flops_per_token
    if (epochs := seen / max(1, corpus.facts.train_tokens)) > 1.5 and corpus.facts.train_tokens:
        console.print(
            f"a trial sees the data about {epochs:.1f} times ({short(seen)} of {short(corpus.facts.train_tokens)} "
            "tokens): give more data, or train less, lest memory be what is ranked",
            highlight=False,
        )


def _ladder(settings: StudyConfig, corpus: Dataset) -> tuple[float, str]:
    """Training FLOPs of the whole ladder, and what it is made of; the found are taken to cost what a baseline does."""
    scale = settings.scale
    if scale is None:
        return 0.0, ""
    ladder = ladder_of(settings, [], corpus.facts).standing_in(settings.space.sample(0).arch)
    known, wanted = len(ladder.candidates), num_climbers(settings)
    flops = sum(ladder.flops(cell) for cell in ladder.cells) * wanted / known
    sizes = [short(ladder.size(cell)) for cell in ladder.cells[:: known * scale.seeds]]
    allotted = ", fewer where the order is clear sooner" if scale.allot else ""
    return flops, (
        f"ladder: {wanted} candidates at {', '.join(sizes)} parameters of blocks and head, {scale.seeds} "
        f"run{'s' if scale.seeds != 1 else ''} each, {short(flops)} FLOPs at most{allotted}"
    )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
