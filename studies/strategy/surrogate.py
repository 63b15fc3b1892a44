"""What the sampler ``predictor`` knows: a predictor fitted again and again on the study's own trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from builder.pricing.cost import Cost
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.plain import decode
from studies.candidates.proposal import Proposal
from studies.sections import LearnerName

if TYPE_CHECKING:
    from studies.predict.features import Example, Observation
    from studies.predict.predictor import Predictor

_LEAST_TAU = 0.1  # rank correlation on held-out trials below which it knows nothing


@dataclass(frozen=True, slots=True)
class _Fit:
    """A predictor, and whether it ranks held-out trials better than simpler ones do."""

    predictor: Predictor
    best: float
    """The lowest loss seen, as the predictor states losses."""
    trusted: bool
    note: str


class Surrogate:
    """A predictor of a study that is running.

    It is fitted on the first 8, 12, 16, ... trials that ended (in steps of a tenth later on), so that with one worker
    a study that was cut off proposes what it would have proposed.

    Args:
        learner: what it learns with; it is trusted while it ranks held-out trials better than ``cost`` does, and not
            worse than ``tabular``.
        seed: of the study.
        background: fit in a thread, and go on with the last fit until it is done.

    Raises:
        SpecError: if scikit-learn is missing.
    """

    def __init__(self, learner: LearnerName, seed: int, *, background: bool = False) -> None:
        if find_spec("sklearn") is None:
            raise SpecError("search.sampler", "predictor needs scikit-learn", "pip install 'spiralformer[predict]'")
        self.learner, self.seed, self.background = learner, seed, background
        self.note = ""
        """Why it is not followed, or how well it ranks."""
        self._examples: dict[int, list[Observation]] = {}
        self._fitted_on = 0
        self._fit: _Fit | None = None
        self._pending: Future[_Fit] | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predictor")

    @property
    def trusted(self) -> bool:
        """Whether it is worth following now."""
        return self._fit is not None and self._fit.trusted

    def learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Fit again if enough trials have ended since."""
        if self._pending is not None and (self._pending.done() or not self.background):
            self._take(self._pending)
        ended = [t for t in trials if t.state.is_finished() and "rung.0" in t.user_attrs]
        due = _last_step(len(ended))
        if due <= self._fitted_on or self._pending is not None:
            return
        ended.sort(key=lambda t: (t.datetime_complete, t.number))
        from studies.predict.features import MOST_TRIALS

        shown = ended[:due][-MOST_TRIALS:]
        seen = [o for trial in shown for o in self._observe(trial)]
        kept = {trial.number for trial in shown}
        self._examples = {number: found for number, found in self._examples.items() if number in kept}
        self._fitted_on = due
        self._pending = self._threads.submit(self._fit_to, seen)
        if not self.background:
            self._take(self._pending)

    def _take(self, fitted: Future[_Fit]) -> None:
        """A fit that fails stops no search."""
        self._pending = None
        try:
            self._fit = fitted.result()
            self.note = self._fit.note
        except (ValueError, ArithmeticError, RuntimeError) as error:
            self._fit, self.note = None, f"predictor {self.learner} set aside for tpe: {error}"

    def _observe(self, trial: FrozenTrial) -> list[Observation]:
        from studies.predict.features import observe

        if trial.number not in self._examples:
            launch = trial.user_attrs["launch"]
            rungs: list[tuple[float, float]] = []
            while (rung := trial.user_attrs.get(f"rung.{len(rungs)}")) is not None:
                rungs.append((rung["flops"], rung["score"]))
            arch, cost = decode(ArchSpec, launch["arch"]), Cost(**launch["cost"])
            self._examples[trial.number] = observe(arch, cost, launch["training"], rungs, trial.number)
        return self._examples[trial.number]

    def _fit_to(self, seen: Sequence[Observation]) -> _Fit:
        from studies.predict.features import adjust
        from studies.predict.predictor import Predictor

        predictor = Predictor(self.learner)
        predictor.fit(seen, self.seed)
        trusted, note = predictor.tau > _LEAST_TAU, f"ranks held-out trials with tau {predictor.tau:.2f}"
        rivals: tuple[LearnerName, ...] = ("cost", "tabular")
        for name in rivals:
            if name == self.learner:
                continue
            rival = Predictor(name)
            rival.fit(seen, self.seed)
            if rival.tau > predictor.tau or (name == "cost" and rival.tau == predictor.tau):
                trusted, note = False, f"{note}, {name} with {rival.tau:.2f}"
        return _Fit(
            predictor,
            float(adjust(seen)[0].min()),
            trusted,
            f"predictor {self.learner} {'followed' if trusted else 'set aside for tpe'}: it {note}",
        )

    def expected_improvement(self, candidates: Sequence[Proposal]) -> list[float]:
        """Of each over the best seen, in standard deviations of the losses."""
        from studies.predict.features import make_example

        assert self._fit is not None
        examples: list[Example] = [make_example(c.graph, c.cost, c.training) for c in candidates]
        means, spreads = self._fit.predictor.predict(examples)
        return [_gain(self._fit.best - float(m), float(s)) for m, s in zip(means, spreads, strict=True)]


def _gain(lead: float, spread: float) -> float:
    """Expected improvement of a normal variable whose mean is better than the best by ``lead``."""
    z = lead / spread
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return lead * 0.5 * (1 + math.erf(z / math.sqrt(2))) + spread * density


def _last_step(ended: int) -> int:
    """The last of the counts 8, 12, 16, ... that has been reached; 0 before the first."""
    step = 0
    following = 8
    while following <= ended:
        step = following
        following += max(4, following // 10)
    return step
