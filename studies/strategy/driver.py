"""The driver of a study: proposes, prices, launches, listens and tells. Knows Optuna, not Ray.

Executors (`studies.execution.run`) ask it for trials and hand it reports; it decides what goes on. All it
knows can be rebuilt from the journal.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import optuna
from optuna.trial import TrialState as OptunaState

from builder.graph.compiler import compile_arch
from builder.pricing.budget import Budget
from builder.pricing.cost import COSTS, Cost, estimate
from searchspace.arch import ArchSpec
from searchspace.plain import encode
from searchspace.plugins import used_by
from searchspace.space import Candidate
from studies.candidates.drawing import HintedChooser, trial_key
from studies.candidates.proposal import Proposal
from studies.config import StudyConfig, most_trials, num_baselines, num_promotions
from studies.data.corpus import find_path
from studies.data.dataset import Dataset
from studies.records.folder import TRIALS, mark_study, study_id
from studies.records.journal import Journal, revive
from studies.records.reading import STATES
from studies.records.trial import Purpose, Report, TrialRecord, TrialSpec
from studies.scale.allot import next_cell
from studies.scale.ladder import Cell, Ladder, key_of, ladder_of
from studies.sections import LOSS, Enqueued, MiddleChooser, check_training, decide_training
from studies.show.summary import summarize
from studies.strategy.proposer import Proposer
from studies.strategy.stopper import rung_shares, should_stop
from studies.strategy.warm_start import warm_start
from studies.training.checkpoint import Store, attempts_in, open_store, remove_attempts
from studies.training.run_trial import is_disk_full

MAX_ATTEMPTS = 3  # a machine may be lost twice; thrice is the trial's fault

T = TypeVar("T")


class Listener(Protocol):
    """Who is told of what is journaled; it must not raise."""

    def rung(self, record: TrialRecord, index: int) -> None:
        """A trial has reached a rung."""

    def end(self, record: TrialRecord) -> None:
        """A trial has ended."""


class StudyHaltedError(RuntimeError):
    """The study can't go on now; what is finished is kept, and the same command goes on later."""


@dataclass(slots=True)
class _Running:
    trial: optuna.Trial
    record: TrialRecord
    attempt: int = 0
    report: Report | None = None
    """The last."""

    @property
    def flops(self) -> float:
        return self.report.flops if self.report is not None else 0.0


@dataclass(slots=True)
class Progress:
    """Counts for whoever watches."""

    launched: int = 0
    total: int = 0
    complete: int = 0
    stopped: int = 0
    failed: int = 0
    running: int = 0
    rejected: int = 0
    flops_spent: float = 0.0
    best: TrialRecord | None = None
    baseline: TrialRecord | None = None
    note: str = ""
    predictor: str = ""
    """What the sampler ``predictor`` says of itself."""
    events: list[TrialRecord] = field(default_factory=list)
    """Trials that ended since the last look."""
    live: list[tuple[TrialRecord, Report]] = field(default_factory=list)
    """Trials that run, and what each said last."""


class StudyDriver:
    """One study in progress.

    Args:
        study: its settings.
        folder: its folder; the caller holds `folder.study_folder`.
        corpus: the prepared data.
        device: where trials train.
        journal: of the study; None opens the one in the folder.

    Raises:
        SpecError: if no candidate can be found within the budget.
    """

    def __init__(
        self,
        study: StudyConfig,
        folder: Path,
        corpus: Dataset,
        device: str = "cpu",
        journal: Journal | None = None,
    ) -> None:
        self.study, self.corpus, self.device = study, str(corpus.folder.absolute()), device
        self._data = corpus.facts.content
        self.folder = folder.absolute()  # workers run in folders of their own
        self.journal = journal or Journal(folder, study.objectives)
        self.id = mark_study(folder)
        self.trials = trials_store(study, self.folder)
        self.tracking: Listener | None = None
        """Told of rungs and ends, once they are journaled."""
        self.halted = ""
        """Why the study can't go on now, if it can't."""
        self.out_of_time = False
        """Whether that is its time budget."""
        self._begun: float | None = None
        """When the first trial was asked for: starting workers takes its time."""
        self.shares = rung_shares(study.search.stopper)
        self._baselines = [(arch, estimate(compile_arch(arch))) for arch in study.baselines]
        self.budget: Budget = study.budget.resolve(self._baselines[0][1] if self._baselines else None)
        self._proposer = Proposer(study, self.budget, corpus.facts)
        self._running: dict[int, _Running] = {}
        self._waiting: deque[int] = deque()
        self._records: dict[int, TrialRecord] = {}
        self._launched: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._flops_ended = 0.0
        self._best: dict[str, TrialRecord] = {}
        self._values: list[dict[int, tuple[float, ...]]] = [{} for _ in self.shares]
        """Objectives of searched trials, by rung and trial."""
        self._events: list[TrialRecord] = []
        self._failures = 0
        """Failed trials in a row."""
        self._facts = corpus.facts
        self._ladder: Ladder | None = None
        """Known once the search is done."""
        self._asked: tuple[tuple[int, int], Cell | None] | None = None
        self._adopt()
        self.warm_start_note = self._warm_start(corpus)

    # -- state -----------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over what the journal holds: finished trials stay, running ones are queued again."""
        for trial, record in self.journal.launched():
            if record.state == "failed" and record.purpose == "search" and self.study.is_custom:
                self._records[record.number] = record  # its author may have mended it: it counts for nothing
                continue
            self._note_launch(record)
            self._note_rungs(record)
            if record.state != "running":
                self._note_end(record)
            else:
                study = self.journal.studies[record.purpose]
                self._running[record.number] = _Running(revive(study, trial), record)
                self._waiting.append(record.number)
        with self.journal.batch():
            for proposal in self.journal.interrupted():
                self._proposer.reject(proposal, "interrupted before launch", {})

    def _warm_start(self, corpus: Dataset) -> str:
        source = self.study.search.from_
        if source is None:
            return ""
        found = warm_start(find_path(source, self.study.base), self.study, self.budget, corpus)
        self._proposer.queue.extend(Enqueued(decisions=choices) for choices in found.proposals)
        search = self.journal.studies["search"]
        if not any("from" in trial.user_attrs for trial in search.get_trials(deepcopy=False)):
            search.add_trials(found.evidence)
        return found.note

    def _note_launch(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        self._launched[record.purpose] += 1
        self._proposer.candidates.seen.add(trial_key(record.purpose, record.arch_id, record.training, record.seed))

    def _note_rungs(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        if record.purpose == "search":
            for index in range(len(record.rungs)):
                self._values[index][record.number] = record.objectives(self.study.objectives, index)

    def _note_end(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        self._ended[record.state] += 1
        self._flops_ended += record.flops
        best = self._best.get(record.purpose)
        if record.score is not None and (best is None or best.score is None or record.score < best.score):
            self._best[record.purpose] = record

    def progress(self) -> Progress:
        """Where the study stands."""
        running = sum(max(r.flops, r.record.flops) for r in self._running.values())
        events, self._events = self._events, []
        return Progress(
            launched=len(self._records),
            total=self._num_trials(),
            complete=self._ended["complete"],
            stopped=self._ended["stopped"],
            failed=self._ended["failed"],
            running=len(self._running) - len(self._waiting),
            rejected=self._proposer.rejected,
            flops_spent=self._flops_ended + running,
            best=self._best.get("search"),
            baseline=self._best.get("baseline"),
            note=self._proposer.exhausted,
            predictor=self._proposer.surrogate.note if self._proposer.surrogate else "",
            events=events,
            live=[(r.record, r.report) for r in self._running.values() if r.report is not None],
        )

    def record(self, number: int) -> TrialRecord:
        """One launched trial."""
        return self._records[number]

    @property
    def records(self) -> list[TrialRecord]:
        """Every launched trial, by number."""
        return [self._records[number] for number in sorted(self._records)]

    def learn_in_background(self) -> None:
        """Let a sampler ``predictor`` fit beside the launches, not before them: for executors that run many at once."""
        if self._proposer.surrogate is not None:
            self._proposer.surrogate.background = True

    # -- launching -------------------------------------------------------------------------------

    def next_trial(self) -> TrialSpec | None:
        """The next trial to run, already journaled; None when there is nothing to launch now (see `finished`)."""
        self._look_at_the_clock()
        return None if self.halted else self._guarded(self._next_trial, None)

    @property
    def finished(self) -> bool:
        """Whether nothing will be launched any more."""
        return bool(self.halted) or not self.is_unfinished

    def _look_at_the_clock(self) -> None:
        limit, now = self.study.search.time_budget_s, time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if not self.halted and limit is not None and now - self._begun > limit:
            self.halted, self.out_of_time = f"search.time_budget_s, {limit:g} seconds, is over", True

    def _halt(self, reason: str) -> None:
        self.halted, self.out_of_time = reason, False

    @property
    def num_waiting(self) -> int:
        """Enqueued candidates that `search.num_trials` leaves no place for."""
        return self._proposer.waiting(self.journal.studies["search"]) if self._searched() else 0

    @property
    def is_unfinished(self) -> bool:
        """Whether something runs, or is still to be launched, whatever halted it."""
        if self._waiting or self._running or not self._searched():
            return True
        return self._next_promotion() is not None or self._next_cell() is not None

    def _searched(self) -> bool:
        """Whether the search itself has launched all it will."""
        return self._launched["baseline"] >= num_baselines(self.study) and (
            bool(self._proposer.exhausted) or self._launched["search"] >= self.study.search.num_trials
        )

    def _num_trials(self) -> int:
        """How many trials there will be, as far as that is known."""
        if self._ladder is None:
            return most_trials(self.study)
        begun = {key_of(record) for record in self._records.values() if record.purpose == "ladder"}
        left = 0 if self.finished else sum(self._ladder.key(cell) not in begun for cell in self._ladder.cells)
        before = self.study.search.num_trials + num_baselines(self.study) + num_promotions(self.study)
        return before + self._launched["ladder"] + left

    def _next_trial(self) -> TrialSpec | None:
        if self._waiting:
            return self._spec(self._running[self._waiting.popleft()].record)
        number = len(self._records)
        if (done := self._launched["baseline"]) < num_baselines(self.study):
            return self._launch_baseline(number, *self._baselines[done])
        if not self._searched():
            found = self._proposer.propose(self.journal.studies["search"], number, self._launched["search"])
            if found is not None:
                return self._launch(number, "search", *found)
        if any(running.record.ranks for running in self._running.values()):
            return None  # who is best is not known yet
        if (promoted := self._next_promotion()) is not None:
            return self._launch_promotion(number, *promoted)
        if any(running.record.purpose == "promotion" for running in self._running.values()):
            return None
        cell = self._next_cell()
        return None if cell is None else self._launch_cell(number, cell)

    def _next_cell(self) -> Cell | None:
        """The ladder's next run; None where there is no ladder, or nothing left that could change its answer."""
        if self.study.scale is None:
            return None
        if self._ladder is None:
            self._ladder = ladder_of(self.study, self.records, self._facts)
        state = (self._launched["ladder"], len(self._running))
        if self._asked is None or self._asked[0] != state:  # a fit each time that something is new
            self._asked = state, next_cell(self._ladder, self.records)
        return self._asked[1]

    def _launch_cell(self, number: int, cell: Cell) -> TrialSpec:
        assert self._ladder is not None
        arch = self._ladder.arch(cell)
        training = self._ladder.training(cell)
        proposal = Proposal(Candidate(arch, {}), compile_arch(arch), self._ladder.cost(cell), training, {})
        trial = self.journal.studies["ladder"].ask()
        return self._launch(number, "ladder", trial, proposal, cell.seed, cell)

    def _next_promotion(self) -> tuple[TrialRecord, dict[str, Any], int] | None:
        """Who is trained again next, how, and with which seed."""
        promote = self.study.search.promote
        if not num_promotions(self.study):
            return None
        complete = [r for r in self._records.values() if r.purpose == "search" and r.state == "complete"]
        best = sorted(complete, key=lambda r: r.rungs[-1].score)[: promote.trials]
        if (baseline := self._best.get("baseline")) is not None:
            best.append(baseline)
        for record in best:
            chooser = HintedChooser(record.choices, 0) if record.choices else MiddleChooser()
            asked = decide_training(self.study.training, chooser).tree  # what goes by size is decided anew
            spent = "flops" if asked.get("flops") is not None else "tokens"
            training = {**asked, spent: asked[spent] * promote.factor}
            training = self._proposer.candidates.settle(record.arch_spec(), record.cost, training)
            for seed in range(record.seed + 1, record.seed + 1 + promote.seeds):
                if trial_key("promotion", record.arch_id, training, seed) not in self._proposer.candidates.seen:
                    return record, training, seed
        return None

    def _launch_promotion(self, number: int, source: TrialRecord, training: dict[str, Any], seed: int) -> TrialSpec:
        arch = source.arch_spec()
        proposal = Proposal(Candidate(arch, {}), compile_arch(arch), source.cost, training, source.choices)
        return self._launch(number, "promotion", self.journal.studies["promotion"].ask(), proposal, seed)

    def _guarded(self, act: Callable[[], T], otherwise: T) -> T:
        """One write to the journal for each act. A full disk halts the study: what is journaled stays."""
        try:
            with self.journal.batch():
                return act()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._halt(f"the disk is full ({error.filename or self.folder})")
            return otherwise

    def _launch_baseline(self, number: int, arch: ArchSpec, cost: Cost) -> TrialSpec:
        training = decide_training(self.study.training, MiddleChooser())
        settings = self._proposer.candidates.settle(arch, cost, training.tree)
        proposal = Proposal(Candidate(arch, {}), compile_arch(arch), cost, settings, {})
        trial = self.journal.studies["baseline"].ask()
        return self._launch(number, "baseline", trial, proposal)

    def _launch(
        self,
        number: int,
        purpose: Purpose,
        trial: optuna.Trial,
        proposal: Proposal,
        seed: int | None = None,
        cell: Cell | None = None,
    ) -> TrialSpec:
        arch = proposal.candidate.arch
        record = TrialRecord(
            number=number,
            purpose=purpose,
            name=arch.name,
            state="running",
            arch=encode(arch),
            arch_id=proposal.graph.arch_id,
            choices=proposal.choices,
            training=proposal.training,
            seed=self.study.search.seed if seed is None else seed,
            cost=proposal.cost,
            origin=cell.origin if cell else "",
            size=cell.size.label if cell else "",
            shares=list(self._ladder.shares) if cell and self._ladder else [],
            plugins=used_by(arch, f"task:{self.study.data.kind}"),
        )
        shown = {"trial": number, "architecture": summarize(arch)}
        shown |= {name: getattr(record.cost, name) for name in ("params", "flops_per_token")}
        record = self.journal.launch(trial, record, shown)
        self._note_launch(record)
        self._running[number] = _Running(trial, record)
        return self._spec(record)

    def _spec(self, record: TrialRecord) -> TrialSpec:
        return TrialSpec(
            number=record.number,
            arch=record.arch_spec(),
            arch_id=record.arch_id,
            training=check_training(record.training),
            seed=record.seed,
            corpus=self.corpus,
            data=self._data,
            folder=trial_store(self.trials, record.number).location,
            study=self.id,
            rungs=rungs_of(record, self.study),
            decayed=record.purpose == "ladder",
            device=self.device,
            threads=self.study.resources.cpus_per_trial,
            timeout_s=self._timeout_s(),
            until=self._until(),
            plugins=self.study.plugins,
        )

    def _until(self) -> float:
        limit = self.study.search.time_budget_s
        return (
            math.inf if limit is None or self._begun is None else time.time() + limit + self._begun - time.monotonic()
        )

    def _timeout_s(self) -> float:
        """A training function of one's own speaks at rungs alone: only who wrote it knows when it has hung."""
        given = "trial_timeout_s" in self.study.plain.get("resources", {})
        return self.study.resources.trial_timeout_s if given or self.study.train is None else math.inf

    # -- listening -------------------------------------------------------------------------------

    def report(self, number: int, report: Report) -> bool:
        """Take one report in. Returns whether the trial goes on."""
        self._look_at_the_clock()
        if self.halted and not (self.out_of_time and report.kind != "progress"):
            return False
        return self._guarded(lambda: self._report(number, report), otherwise=False) and not self.halted

    def _report(self, number: int, report: Report) -> bool:
        running = self._running.get(number)
        if running is None or report.attempt < running.attempt:
            return False
        running.attempt = report.attempt
        running.report = report
        if report.reason == "disk_full":  # no fault of the trial's, which is left to go on
            self._halt(f"the disk is full: {report.error.strip().splitlines()[-1]}")
            return False
        if report.reason == "no_plugin":
            self._halt(f"a worker can not run its trial: {report.error}")
            return False
        if any(not math.isfinite(rung.score) for rung in report.rungs):
            finite = tuple(rung for rung in report.rungs if math.isfinite(rung.score))
            report = replace(report, kind="failed", rungs=finite, reason="diverged", error="a loss is not finite")
        if lacks := self._lacks(report):
            what = f"measured {lacks[0]}, an objective, as nothing or no number"
            report = replace(report, kind="failed", rungs=running.record.rungs, reason="invalid", error=what)
        if report.kind == "failed":
            self._fail(running, report)
            return False
        known = len(running.record.rungs)
        for index in range(known, len(report.rungs)):
            self.journal.rung(running.trial, index, report.rungs[index])
            running.record = replace(running.record, rungs=(*running.record.rungs, report.rungs[index]))
            if self.tracking is not None:
                self.tracking.rung(running.record, index)
        self._note_rungs(running.record)
        if report.kind == "done":
            self._finish(running, OptunaState.COMPLETE, report)
            return False
        if report.kind == "rung" and self._should_stop(running.record):
            self._finish(running, OptunaState.PRUNED, report)
            return False
        return True

    def _lacks(self, report: Report) -> list[str]:
        """Objectives that a rung did not measure, of a training function of one's own, say."""
        asked = [o.name for o in self.study.objectives if o != LOSS and o.name not in COSTS]
        return [name for name in asked for r in report.rungs if not math.isfinite(r.metrics.get(name, math.nan))]

    def lost(self, number: int, error: str) -> None:
        """The worker died once too often."""
        running = self._running.get(number)
        if running is not None and not self.halted:
            report = Report(kind="failed", attempt=running.attempt, reason="worker_died", error=error)
            self._guarded(lambda: self._fail(running, report), None)

    def forget(self, record: TrialRecord) -> None:
        """Remove a trial's checkpoints."""
        store = trial_store(self.trials, record.number)
        remove_attempts(attempts_in(store), self.id)
        store.remove_empty()

    def _fail(self, running: _Running, report: Report) -> None:
        """Out of memory is told as pruned with a constraint broken, so that the sampler learns it."""
        if report.reason == "out_of_memory":
            running.trial.set_constraint("memory", report.memory_gib or 1.0)
        state = OptunaState.PRUNED if report.reason == "out_of_memory" else OptunaState.FAIL
        self._finish(running, state, report)

    def _should_stop(self, record: TrialRecord) -> bool:
        if record.purpose != "search":
            return False
        index = len(record.rungs) - 1
        others = [values for number, values in self._values[index].items() if number != record.number]
        return should_stop(self.study.search.stopper, record.objectives(self.study.objectives, index), others)

    def _finish(self, running: _Running, state: OptunaState, report: Report) -> None:
        record = running.record
        facts: dict[str, Any] = {
            "tokens": report.tokens,
            "steps": report.steps,
            "seconds": report.seconds,
            "reason": report.reason,
            "error": report.error,
            **({"curve": report.curve} if report.curve else {}),
        }
        values = None
        if state == OptunaState.COMPLETE:
            values = list(record.objectives(self.study.objectives))
        shown = dict(record.rungs[-1].metrics) if record.rungs else {}
        self.journal.finish(running.trial, state, values, facts, shown)
        finished = replace(record, state="failed" if report.reason else STATES[state], **facts)
        self._note_end(finished)
        self._events.append(finished)
        if self.tracking is not None:
            self.tracking.end(finished)
        del self._running[record.number]
        if state != OptunaState.COMPLETE:
            self.forget(record)
        self._failures = self._failures + 1 if state == OptunaState.FAIL else 0
        if self._failures >= self.study.search.max_failures:
            last = (finished.error.strip() or finished.reason).splitlines()[-1]
            self._halt(f"{self._failures} trials in a row failed, the last with: {last}")


def rungs_of(record: TrialRecord, study: StudyConfig) -> tuple[float, ...]:
    """Shares of its budget at which a trial is evaluated."""
    if record.purpose == "ladder":
        return tuple(record.shares)
    return rung_shares(study.search.stopper) if record.ranks else (1.0,)


def trials_store(study: StudyConfig, folder: Path) -> Store:
    """Where the checkpoints of a study's trials lie: in its folder, or in a place of its own elsewhere."""
    if study.resources.checkpoints is None:
        return open_store(folder / TRIALS)
    return open_store(study.resources.checkpoints).inside(f"spiralformer-{study_id(folder)}")


def trial_store(trials: Store, number: int) -> Store:
    """Where a trial's attempts write."""
    return trials.inside(f"{number:05d}")
