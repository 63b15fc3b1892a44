"""What can be told of a study before its first trial: `check`, the dry run and `search` all ask here.

Data, space, baselines, budget, training and resources are held against each other, so that what no candidate can
satisfy is said at once, and by its own name.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, fields

from builder.graph.compiler import compile_arch
from builder.pricing.cost import Cost, estimate
from searchspace.arch import ArchSpec
from searchspace.choices import RandomChooser
from searchspace.errors import SpecError
from studies.candidates.drawing import Candidates
from studies.candidates.feasibility import Survey, survey
from studies.candidates.listing import LISTINGS
from studies.config import StudyConfig, num_climbers
from studies.data.corpus import find_path
from studies.data.dataset import DataFacts
from studies.records.folder import read_settings
from studies.report.tracking import check_trackers
from studies.scale.ladder import ladder_of
from studies.sections import MiddleChooser, TrainingConfig, check_training, decide_training, rooted
from studies.show.summary import notes_on, short, span
from studies.strategy.stopper import rung_shares
from studies.strategy.surrogate import Surrogate
from studies.training.plan import FEW_STEPS, make_plan
from studies.training.recipe import BYTES_PER_PARAMETER, horizon_of

_TRIES = 16  # draws of open training settings for one candidate
_FEWEST = 2  # candidates of a ladder
_MOST_EPOCHS = 4  # arXiv 2305.16264
_STARVED = 6  # times short of it: where plain models of 57K parameters changed places with what had won


@dataclass(frozen=True, slots=True)
class Preflight:
    """A study that can run."""

    survey: Survey
    notes: tuple[str, ...]
    """What its author should know before it does."""
    recipe: str
    """How the first baseline is trained, or a sample."""
    steps: tuple[int, int]
    """The fewest and the most that a full training takes, of the candidates looked at and the baselines."""


def preflight(study: StudyConfig, facts: DataFacts, *, here: bool = True) -> Preflight:
    """Hold everything in a study against everything else.

    Args:
        study: its settings.
        facts: of its data.
        here: trials run on this machine, not on a cluster.

    Raises:
        SpecError: if no trial could be trained, naming what stands against it.
    """
    check_resources(study, here=here)
    check_trackers(study)
    if study.search.from_ is not None:
        source = find_path(study.search.from_, study.base)
        try:
            read_settings(source)
        except SpecError as error:
            raise SpecError("search.from", f"{source} is no study: {error.problem}", "give a study's folder") from error
    if study.search.sampler in LISTINGS:
        LISTINGS[study.search.sampler](study)
    if study.search.sampler == "predictor":
        Surrogate(study.search.predictor, study.search.seed)
    middle = decide_training(study.training, MiddleChooser()).tree
    budget = study.absolute_budget()
    candidates = Candidates(study, budget, facts)
    steps: list[int] = []
    for i, arch in enumerate(study.baselines):
        try:
            steps.append(candidates.plan(arch, estimate(compile_arch(arch)), middle).num_steps)
        except SpecError as error:
            error.path = f"baseline.{i}.{error.path}" if error.path in ("causal", "vocab_size") else error.path
            raise
    for i, given in enumerate(study.search.enqueue):
        path = f"search.enqueue.{i}"
        if given.arch is not None:
            rooted(path, lambda arch=given.arch: candidates.of_arch(arch))
        elif candidates.of_decisions(given.decisions) is None:
            what = "no candidate with these decisions was found within the budget"
            raise SpecError(path, what, "give fewer decisions, or widen the budget")
    drawn = iter(range(1 << 62))

    def runnable(arch: ArchSpec, cost: Cost) -> None:
        for last in [False] * (_TRIES if study.training.size() > 1 else 0) + [True]:
            training = decide_training(study.training, RandomChooser(next(drawn))).tree
            try:
                plan = candidates.plan(arch, cost, training)
            except SpecError:
                if last:
                    raise
                continue
            if budget.allows(cost):
                steps.append(plan.num_steps)
            return

    found = survey(study.space, budget, runnable)
    sample = study.space.sample(0).arch
    notes = [*facts.notes, *notes_on(sample)]
    lengths = {arch.seq_len for arch in study.baselines} | found.seq_lens
    if len(lengths) > 1:
        each = ", ".join(map(str, sorted(lengths)))
        notes.append(f"contexts differ (seq_len {each}): losses and relative budgets do not compare evenly")
    fewest, most = min(steps), max(steps)
    if fewest < FEW_STEPS:
        rung = max(1, round(fewest * rung_shares(study.search.stopper)[0]))
        notes.append(
            f"trials take {span(fewest, most)} steps, the first rung after {rung}: under {FEW_STEPS} steps tell "
            "little of longer training; give more training.flops or tokens, or smaller training.batch_tokens"
        )
    if study.scale is not None:
        notes += _check_ladder(study, facts, found)
    recipe, note = "differs by trial", list[str]()
    first = study.baselines[0] if study.baselines else found.example.arch if found.example is not None else None
    with suppress(SpecError):  # the middle of what is open need not suit the first that is feasible
        if first is not None:
            recipe, note = _tell_recipe(check_training(middle), first, facts)
    return Preflight(found, tuple(dict.fromkeys([*notes, *note])), recipe, (fewest, most))


def _check_ladder(study: StudyConfig, facts: DataFacts, found: Survey) -> list[str]:
    """What to know of a study's ladder. Raises `SpecError` if what is known of it can't be trained."""
    if study.task.headline.better != "lower" and "loss" not in study.task.metrics:
        what = f"this task measures {study.task.headline.words} and no loss, which alone follows a law"
        raise SpecError("scale", what, "leave it out")
    ladder = ladder_of(study, [], facts)
    if ladder.left_out:
        raise SpecError("baseline", ladder.left_out[0].rstrip("."), "leave it out, or give scale.sizes that fit")
    climbing = len(ladder.candidates) + num_climbers(study) - len(study.baselines)
    if climbing < _FEWEST:
        what = f"there are {climbing} candidates to go up the ladder, which says nothing"
        raise SpecError("scale", what, "list two baselines or more, or give search.num_trials and scale.candidates")
    if found.example is not None:
        ladder = ladder.standing_in(found.example.arch)
    seed = study.search.seed
    for cell in ladder.cells:
        if cell.seed == seed:
            ladder.flops(cell)
    config = check_training(ladder.training(ladder.cells[0]))
    if ladder.shares[0] * (1 - config.decay) < config.warmup:
        what = f"the shortest would branch off while the rate still warms up (training.warmup {config.warmup:g})"
        raise SpecError("scale.horizons", what, "give horizons closer to each other, or a shorter warm-up")
    longest = max((ladder.training(cell)["tokens"] for cell in ladder.cells), default=0.0)
    epochs = longest / max(1, facts.train_tokens)
    if epochs <= _MOST_EPOCHS or facts.task != "text_lm":
        return []
    return [
        f"the ladder's largest size sees the text {epochs:.1f} times ({short(longest)} tokens): beyond about "
        f"{_MOST_EPOCHS} repeated text teaches little, so give more of it, or lower scale.sizes"
    ]


def _tell_recipe(config: TrainingConfig, arch: ArchSpec, facts: DataFacts) -> tuple[str, list[str]]:
    """What is decided by size, how much text that is, and a note where it is far from compute-optimal."""
    cost = estimate(compile_arch(arch))
    plan = make_plan(config, arch, cost)
    recipe = plan.recipe
    by_size = [each.name for each in fields(recipe) if getattr(config, each.name) is None]
    told = f"batch {plan.tokens_per_step:,} tokens, beta2 {recipe.beta2:g}, peak rate {recipe.lr:g}"
    told += f", falling to {f'{recipe.final_lr:.2g} of it' if recipe.final_lr else 'zero'}"
    told += f" ({', '.join(by_size)} by size)" if by_size else ""
    if facts.task != "text_lm" or not facts.says_bytes:
        return told, []
    found = horizon_of(config, arch, cost, facts.train_tokens, facts.bytes_per_token)
    told += f"; {found.bytes_per_parameter:.3g} bytes of text per parameter, {found.epochs:.2g} epochs"
    if found.bytes_per_parameter > BYTES_PER_PARAMETER / _STARVED:
        return told, []
    return told, [
        f"a trial sees {found.bytes_per_parameter:.2g} bytes of text per parameter, {BYTES_PER_PARAMETER:.0f} are "
        "about compute-optimal: so starved, who reads most wins; the same FLOPs suit "
        f"{short(found.size)} parameters, d_model {found.width}"
    ]


def check_resources(study: StudyConfig, *, here: bool = True) -> None:
    """Raise `SpecError` if trials are to run on this machine, and ask for more than it has."""
    asked = study.resources
    if not here:
        return
    cores = os.cpu_count() or 1
    if asked.cpus_per_trial > cores:
        what = f"asks for {asked.cpus_per_trial}, this machine has {cores}"
        raise SpecError("resources.cpus_per_trial", what, "lower it, or give --address of a cluster that has them")
    if asked.gpus_per_trial:
        import torch  # seconds of imports, for those who ask for a GPU only

        if (known := torch.cuda.device_count()) < asked.gpus_per_trial:
            what = f"asks for {asked.gpus_per_trial:g}, this machine has {known} GPUs"
            remedy = "set it to 0, or give --address of a cluster that has them"
            raise SpecError("resources.gpus_per_trial", what, remedy)


def device_of(study: StudyConfig) -> str:
    """Where trials train."""
    return "cuda" if study.resources.gpus_per_trial else "cpu"


def check_device(name: str) -> str:
    """A device for one model, as given on the command line. Raises `SpecError` if there is none of that name here."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal() or not index.isascii())):
        raise SpecError("--device", f"unknown device '{name}'", "choose cpu, cuda or cuda:N")
    if kind == "cuda":
        import torch

        if (known := torch.cuda.device_count()) <= int(index or 0):
            raise SpecError("--device", f"there is no {name}: this machine has {known} GPUs", "use --device cpu")
    return name


def look_at_data(study: StudyConfig, *, prepare: bool = True) -> DataFacts:
    """Facts of a study's data, with nothing left behind; where they can't be told, there is plenty of it.

    Args:
        study: its settings.
        prepare: count the tokens of text too, where that takes seconds.

    Raises:
        SpecError: if there is none, or it is no data of its kind.
    """
    return study.task.look(study.data, study.base, prepare=prepare)
