"""The four learners behind `studies.predict.predictor.Predictor`, each one fitted model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np

from searchspace.errors import SpecError
from studies.predict.features import FEATURES, Array, Example, State, shaped
from studies.sections import LearnerName

NEEDS_SKLEARN = "the tabular predictor needs scikit-learn"


class Member(Protocol):
    """One fitted model."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        """Learn; only examples of one group compare."""

    def predict(self, examples: Sequence[Example]) -> Array:
        """A number for each; less is better."""

    def state(self) -> State:
        """What `restore` makes it again from."""

    def restore(self, state: State) -> None:
        """Be what another was."""


class _Cost:
    """A plane through FLOPs per token and progress, in the direction that the examples show."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        self._plane = np.linalg.lstsq(self._inputs(examples), y, rcond=None)[0]

    def predict(self, examples: Sequence[Example]) -> Array:
        return np.asarray(self._inputs(examples) @ self._plane)

    def _inputs(self, examples: Sequence[Example]) -> Array:
        return np.array([[1.0, math.log(e.cost.flops_per_token), e.progress] for e in examples])

    def state(self) -> State:
        return {"plane": self._plane}

    def restore(self, state: State) -> None:
        self._plane = shaped(state["plane"], (3,))


class _ScalingLaw:
    """``L = E + A (N_once + r^0.46 N_rec)^-alpha + B D^-beta`` (arXiv 2604.21106), D the tokens seen."""

    EXPONENT: ClassVar[float] = 0.46

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        size, tokens = self._inputs(examples)
        self._origin = np.array([size.mean(), tokens.mean()])

        def residual(p: Array) -> Array:
            return self._law(p, size, tokens) - y

        from scipy.optimize import least_squares  # as scikit-learn below: only who fits needs it

        self._fitted = least_squares(residual, np.array([0.0, 0.0, 0.0, -1.0, -1.0]), loss="soft_l1").x

    def predict(self, examples: Sequence[Example]) -> Array:
        return self._law(self._fitted, *self._inputs(examples))

    def _inputs(self, examples: Sequence[Example]) -> tuple[Array, Array]:
        size = np.array([math.log(e.once + e.loops**self.EXPONENT * e.looped + 1) for e in examples])
        tokens = [math.log(e.full_flops * e.share / e.cost.training_flops_per_token) for e in examples]
        return size, np.array(tokens)

    def _law(self, p: Array, size: Array, tokens: Array) -> Array:
        floor, a, b, alpha, beta = p
        terms = (a, alpha, size - self._origin[0]), (b, beta, tokens - self._origin[1])
        parts = [scale * np.exp(-np.exp(np.clip(power, -6, 2)) * x) for scale, power, x in terms]
        return np.asarray(floor + parts[0] + parts[1])

    def state(self) -> State:
        return {"fitted": self._fitted, "origin": self._origin}

    def restore(self, state: State) -> None:
        self._fitted, self._origin = shaped(state["fitted"], (5,)), shaped(state["origin"], (2,))


class _Tabular:
    """The mean of ridge regression and boosted trees over `FEATURES` and progress."""

    def fit(self, examples: Sequence[Example], y: Array, groups: Sequence[object], seed: int) -> None:
        self._fit(self._inputs(examples), y, seed)

    def _fit(self, x: Array, y: Array, seed: int) -> None:
        try:
            from sklearn.ensemble import GradientBoostingRegressor
            from sklearn.linear_model import RidgeCV
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise SpecError("", NEEDS_SKLEARN, "pip install 'spiralformer[predict]'") from error
        self._x, self._y, self._seed = x, y, seed
        models = (
            make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))),
            GradientBoostingRegressor(
                n_estimators=150, max_depth=3, learning_rate=0.06, subsample=0.7, random_state=seed
            ),
        )
        self._models = [model.fit(x, y) for model in models]

    def predict(self, examples: Sequence[Example]) -> Array:
        x = self._inputs(examples)
        return np.asarray(np.mean([model.predict(x) for model in self._models], axis=0))

    def _inputs(self, examples: Sequence[Example]) -> Array:
        return np.stack([np.append(e.features, e.progress) for e in examples])

    def state(self) -> State:
        """What it learned from: learning it again takes a moment, and trees have no format of their own."""
        return {"x": self._x, "y": self._y, "seed": np.array([self._seed])}

    def restore(self, state: State) -> None:
        y = np.asarray(state["y"], dtype=np.float64)
        x = shaped(state["x"], (len(y), len(FEATURES) + 1))
        self._fit(x, shaped(y, (len(y),)), int(state["seed"][0]))


def _graph_network() -> Member:
    from studies.predict.gnn import GraphNetwork

    return GraphNetwork()


LEARNERS: dict[LearnerName, Callable[[], Member]] = {
    "cost": _Cost,
    "scaling_law": _ScalingLaw,
    "tabular": _Tabular,
    "gnn": _graph_network,
}
