"""What ``spiralformer predict`` does and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from searchspace.disk import check_replaceable, new_folder, probe_folder, write_file
from searchspace.errors import SpecError
from searchspace.files import load_space
from searchspace.plain import dump_yaml, encode
from studies.config import StudyConfig
from studies.data.dataset import Dataset
from studies.predict.explain import Drawn, Explanation, Pool, Ranked, explain, observe_all, rank, transfer, with_space
from studies.predict.features import Observation
from studies.predict.importance import measured_importance
from studies.predict.predictor import FEWEST, Predictor, fit_best, predictor_contents
from studies.records.reading import read_study
from studies.records.trial import TrialRecord
from studies.sections import LearnerName
from studies.show.summary import labels, short
from studies.show.terminal import say

_SOURCE = "from"
_EXPLAINED = 8  # decisions listed: what fits beside the rest on a screen


def run_predict(
    folder: Path,
    space: str | None,
    overrides: Sequence[str],
    console: Console,
    *,
    top: int,
    candidates: int,
    learner: str,
    source: Path | None,
    why: bool,
    save: Path | None,
    load: Path | None,
    out: Path | None,
    seed: int,
) -> None:
    """Fit, rank, show. Raises `SpecError` if there is too little to learn from, or nothing is feasible."""
    for option, target, contents, what in (
        ("-o", out, _written, "predicted architectures"),
        ("--save", save, predictor_contents, "a predictor"),
    ):
        if target is not None:  # before the work, not after it
            check_replaceable(target, contents, what)
            probe_folder(target, option)
    records, corpus, settings = read_study(folder)
    own = observe_all(records)
    names = get_args(LearnerName) if learner == "auto" else (cast(LearnerName, learner),)
    if load is not None:
        predictor = Predictor.load(load)
        if "" not in predictor.scales:
            raise SpecError("--load", "was not fitted on a study of its own", "fit it again: predict --save")
        say(console, f"{predictor.learner} from {load}, tau {predictor.tau:.2f} when it was fitted")
    else:
        seen = list(own)
        if source is not None:
            seen += observe_all(read_study(source)[0], _SOURCE)
        predictor = _fit(seen, names, seed, console)
        if source is not None:
            _show_transfer([o for o in seen if o.study == _SOURCE], own, predictor.learner, console)
    if save is not None:
        predictor.save(save)
        say(console, f"kept the predictor in {save}")
    over = settings if space is None else with_space(settings, load_space(space, overrides))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        pool = Pool(over, corpus.facts)
        task = progress.add_task("drawing candidates", total=candidates)
        drawn = pool.draw(candidates, seed, lambda done, of: progress.update(task, completed=done, total=of))
        if not drawn.proposals:
            what = f"none of the {drawn.looked_at:,} ways looked at keeps the study's budget"
            raise SpecError("", what, "see `spiralformer count --budget`")
        ranked = rank(drawn.proposals, predictor)
    _show(ranked[:top], drawn, records, corpus, console)
    if why:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("asking why", total=None)

            def tick(done: int, of: int) -> None:
                progress.update(task, completed=done, total=of)

            found = explain(pool, drawn.proposals, predictor, seed=seed, tick=tick)
        _show_reasons(found, records, corpus, settings, console)
    if out is not None:
        _write(ranked[:top], out, console)


def _fit(seen: list[Observation], names: Sequence[LearnerName], seed: int, console: Console) -> Predictor:
    with console.status("learning"):
        fitted = fit_best(seen, seed, names)
    best = fitted[0]
    trials = len({(o.study, o.trial) for o in seen})
    each = ", ".join(f"{p.learner} {p.tau:.2f}" for p in fitted)
    console.print(f"learned from {trials} trials; rank correlation (tau) on trials held out: {each}", highlight=False)
    if best.tau < 0.2:
        console.print("[yellow]That is hardly better than chance: do not trust the ranking; train more trials.[/]")
    return best


def _show_transfer(
    source: Sequence[Observation], own: Sequence[Observation], learner: LearnerName, console: Console
) -> None:
    table = Table(
        title=f"What the other study adds ({learner}; tau on the rest of this one)", title_justify="left", box=SIMPLE
    )
    for name in ("own trials", "with it", "without it"):
        table.add_column(name, justify="right")
    for number, with_it, without in transfer(source, own, learner):
        table.add_row(str(number), f"{with_it:.2f}", "" if without is None else f"{without:.2f}")
    console.print(table)


def _show(
    ranked: Sequence[Ranked], drawn: Drawn, records: Sequence[TrialRecord], corpus: Dataset, console: Console
) -> None:
    trained = {record.arch_id: record.number for record in records}
    table = Table(
        title=f"Predicted best of {drawn}; none of these figures is measured",
        title_justify="left",
        expand=True,
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("#", justify="right")
    table.add_column("architecture", overflow="fold", ratio=1)
    for name in ("params", "FLOPs/tok", corpus.headline.label, "trained"):
        table.add_column(name, justify="right", no_wrap=True)
    told = labels([(candidate.proposal.candidate.arch, candidate.proposal.choices) for candidate in ranked])
    for place, (candidate, label) in enumerate(zip(ranked, told, strict=True), start=1):
        proposal = candidate.proposal
        number = trained.get(proposal.graph.arch_id)
        table.add_row(
            str(place),
            label,
            short(proposal.cost.params),
            short(proposal.cost.flops_per_token),
            f"{corpus.headline.value(candidate.loss):.3f} ± {corpus.headline.spread(candidate.spread):.3f}",
            "" if number is None else f"trial {number}",
        )
    console.print(table)


def _show_reasons(
    found: Explanation, records: Sequence[TrialRecord], corpus: Dataset, settings: StudyConfig, console: Console
) -> None:
    measured = measured_importance(records, settings)
    table = Table(title="Decisions that matter", title_justify="left", box=SIMPLE)
    table.add_column("decision")
    table.add_column(f"predicted change, {corpus.headline.label}", justify="right")
    if measured:
        table.add_column("share of the variance (Optuna)", justify="right")
    for name, value in list(found.importance.items())[:_EXPLAINED]:
        share = [f"{measured[name]:.0%}" if name in measured else ""] if measured else []
        table.add_row(name, f"{corpus.headline.spread(value):.4f}", *share)
    console.print(table)
    if not measured:
        console.print(f"Optuna's own importances need {FEWEST} complete trials.", highlight=False)
    places = sorted({place for place, _ in found.effect})
    levels = sorted({level for _, level in found.effect})
    if not places:
        return
    table = Table(
        title="Effect of a level at each iteration, in thousandths of a bit per byte (less is better)",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("level")
    for place in places:
        table.add_column(str(place + 1), justify="right")
    for level in levels:
        effects = [found.effect.get((place, level)) for place in places]
        table.add_row(level, *("" if e is None else f"{corpus.headline.value(e) * 1000:+.0f}" for e in effects))
    console.print(table)


def _write(ranked: Sequence[Ranked], out: Path, console: Console) -> None:
    with new_folder(out, _written, "predicted architectures") as work:
        for place, candidate in enumerate(ranked, start=1):
            name = f"predicted-{place:03d}"
            text = dump_yaml({**encode(candidate.proposal.candidate.arch), "name": name})
            write_file(work / f"{name}.yaml", text)
    say(console, f"wrote {len(ranked)} architectures to {out}")


def _written(folder: Path) -> set[str]:
    """What `_write` may have left there."""
    return {file.name for file in folder.glob("predicted-[0-9]*.yaml")}
