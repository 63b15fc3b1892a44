"""Predictors of a candidate's loss from its graph, cost and training settings, learned from finished trials.

Four learners: ``cost`` is a line through FLOPs per token, ``scaling_law`` the looped law, ``tabular`` ridge and boosted
trees over counts and paths, ``gnn`` a graph network trained to order pairs. `Predictor` makes an ensemble of one of
them, each member blind to one fold of the trials: together they say how unsure they are, and how well they rank what
they have not seen. What they predict is the loss at the full budget, in standard deviations of the losses learned from
(less is better); `docs/results.md` compares them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays

from builder.graphdata import BLOCK_FEATURES, OP_FEATURES
from searchspace.disk import check_regular, new_folder, read_json, write_file
from searchspace.errors import SpecError
from studies.predict.features import FEATURES, Array, Example, Observation, Scale, adjust, last_rungs
from studies.predict.learners import LEARNERS, Member
from studies.sections import LearnerName

_FORMAT, _VERSION = "spiralformer-predictor", 1
_FACTS, _WEIGHTS = "predictor.json", "predictor.safetensors"
FEWEST = 8
"""Trials below which nothing is learned."""


class Predictor:
    """An ensemble of one learner.

    Args:
        learner: its name.
        members: folds of the trials, each held out from one member.
    """

    def __init__(self, learner: LearnerName, members: int = 5) -> None:
        self.learner, self.members = learner, members
        self.tau = 0.0
        """Kendall's tau between the losses and what a member predicts that has not seen them."""
        self.scales: dict[str, Scale] = {}
        self._error = 1.0
        self._fitted: list[Member] = []

    def fit(self, seen: Sequence[Observation], seed: int = 0) -> None:
        """Learn from finished and stopped trials.

        Raises:
            SpecError: if there are fewer than 8, or ``tabular`` finds no scikit-learn.
        """
        trials = sorted({(o.study, str(o.trial)) for o in seen})
        if len(trials) < FEWEST:
            raise SpecError("", f"{len(trials)} trials are too few to learn from", f"train {FEWEST} or more")
        y, self.scales = adjust(seen)
        random.Random(seed).shuffle(trials)
        fold = {trial: i % self.members for i, trial in enumerate(trials)}
        folds = np.array([fold[o.study, str(o.trial)] for o in seen])
        groups = [(o.study, o.rung) for o in seen]
        held_out, self._fitted = np.zeros(len(seen)), []
        for i in range(self.members):
            member = LEARNERS[self.learner]()
            keep, left = np.flatnonzero(folds != i).tolist(), np.flatnonzero(folds == i).tolist()
            member.fit([seen[j].example for j in keep], y[keep], [groups[j] for j in keep], seed * 1000 + i)
            held_out[left] = member.predict([seen[j].example for j in left])
            self._fitted.append(member)
        judged = last_rungs(seen)
        self.tau = rank_correlation(held_out[judged], y[judged])
        self._error = float(np.sqrt(np.mean((held_out[judged] - y[judged]) ** 2)))

    def predict(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        """Mean and standard deviation for each, in standard deviations of the losses learned from."""
        each = np.stack([member.predict(examples) for member in self._fitted])
        return each.mean(0), np.sqrt(each.var(0) + self._error**2)

    def save(self, folder: Path) -> None:
        """Write ``predictor.json`` and ``predictor.safetensors``. Raises `SpecError` if others' files are there."""
        arrays = {
            f"{i}.{name}": np.ascontiguousarray(value)
            for i, member in enumerate(self._fitted)
            for name, value in member.state().items()
        }
        facts = {
            "format": _FORMAT,
            "version": _VERSION,
            "learner": self.learner,
            "members": self.members,
            "tau": self.tau,
            "error": self._error,
            "scales": {study: [scale.middle, scale.spread] for study, scale in self.scales.items()},
            "features": _known_features(),
        }
        with new_folder(folder, predictor_contents, "a predictor") as work:
            write_file(work / _WEIGHTS, save_arrays(arrays))
            write_file(work / _FACTS, json.dumps(facts, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> Predictor:
        """Read what `save` wrote. Raises `SpecError` if it is damaged, or made with other features."""
        file = folder / _FACTS
        try:
            facts = read_json(file)
        except SpecError as error:
            raise SpecError("", error.problem, "give a folder that predict --save made", str(file)) from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise SpecError("", "is no predictor", "give a folder that predict --save made", str(file))
        if facts.get("version") != _VERSION or facts.get("features") != _known_features():
            raise SpecError("", "was made by another version", "fit it again: predict --save", str(file))
        file = folder / _WEIGHTS
        check_regular(file)
        try:
            arrays = load_file(file)
            predictor = Predictor(facts["learner"], int(facts["members"]))
            predictor.tau, predictor._error = float(facts["tau"]), float(facts["error"])
            predictor.scales = {str(study): Scale(*map(float, pair)) for study, pair in facts["scales"].items()}
            for i in range(predictor.members):
                member = LEARNERS[predictor.learner]()
                mine = {n.partition(".")[2]: value for n, value in arrays.items() if n.partition(".")[0] == str(i)}
                member.restore(mine)
                predictor._fitted.append(member)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SpecError("", f"is damaged: {reason}", "fit it again: predict --save", str(file)) from error
        return predictor


def predictor_contents(folder: Path) -> set[str] | None:
    """Names of a saved predictor's files; None if the folder holds none."""
    try:
        facts = read_json(folder / _FACTS)
    except SpecError:
        return None
    return {_FACTS, _WEIGHTS} if isinstance(facts, dict) and facts.get("format") == _FORMAT else None


def fit_best(
    seen: Sequence[Observation], seed: int = 0, names: Iterable[LearnerName] = ("tabular", "gnn", "scaling_law", "cost")
) -> list[Predictor]:
    """Every learner fitted, the best in cross-validation first."""
    fitted = []
    for name in names:
        predictor = Predictor(name)
        predictor.fit(seen, seed)
        fitted.append(predictor)
    return sorted(fitted, key=lambda predictor: -predictor.tau)


def rank_correlation(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Kendall's tau; 0 where one side is constant."""
    if np.ptp(np.asarray(a)) == 0 or np.ptp(np.asarray(b)) == 0:
        return 0.0
    from scipy.stats import kendalltau  # a second to import, which a report whose map is kept never needs

    return float(kendalltau(a, b).statistic)


def _known_features() -> dict[str, list[str]]:
    return {"all": list(FEATURES), "op": list(OP_FEATURES), "block": list(BLOCK_FEATURES)}
