"""Budgets: limits on a `Cost`, absolute or relative to a baseline's; one feasibility rule for everybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from builder.pricing.cost import COSTS, Cost
from searchspace.errors import SpecError, one_of, show
from searchspace.plain import decoder_for, encode, expect_mapping, join_path, key

_UNITS = {
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "B": 1e9,
    "T": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
_AMOUNT = re.compile(rf"{_NUMBER}\s*([A-Za-z]*)")
_SHARE = re.compile(rf"{_NUMBER}\s*%\s+of\s+baseline")
_REMEDY = "write e.g. 1500000, 1.5M, 64KiB or 90% of baseline"


@dataclass(frozen=True, slots=True)
class Amount:
    """A bound: absolute, or a share of the baseline's cost."""

    value: float
    of_baseline: bool = False

    @staticmethod
    def __decode__(data: object, path: str) -> Amount:
        if isinstance(data, int | float) and not isinstance(data, bool) and 0 < data < 1e30:
            return Amount(float(data))
        if isinstance(data, str):
            if (match := _SHARE.fullmatch(data.strip())) and float(match[1]) > 0:
                return Amount(float(match[1]) / 100, of_baseline=True)
            match = _AMOUNT.fullmatch(data.strip())
            if match and match[2] in _UNITS and 0 < float(match[1]) < 1e30:
                return Amount(float(match[1]) * _UNITS[match[2]])
        raise SpecError(path, f"can't read the limit {show(data)}", _REMEDY)

    def __encode__(self) -> object:
        return f"{self.value * 100:g}% of baseline" if self.of_baseline else self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Lower and upper bound, inclusive; a bare amount is an upper bound."""

    min: Amount | None = key("Smallest value allowed.", default=None)
    max: Amount | None = key("Largest value allowed.", default=None)

    @staticmethod
    def __decode__(data: object, path: str) -> Band:
        if isinstance(data, dict):
            low = Amount.__decode__(data["min"], f"{path}.min") if "min" in data else None
            high = Amount.__decode__(data["max"], f"{path}.max") if "max" in data else None
            if set(data) <= {"min", "max"} and data:
                return Band(min=low, max=high)
            raise SpecError(path, f"can't read the limit {show(data)}", "write {min: ..., max: ...}")
        return Band(max=Amount.__decode__(data, path))


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """Limits by metric (`builder.pricing.cost.COSTS`), as a study states them."""

    bands: Mapping[str, Band] = field(default_factory=dict)

    @staticmethod
    def __decode__(data: object, path: str) -> BudgetSpec:
        given = expect_mapping(data, path, "a mapping of limits")
        for name in given:
            if name not in COSTS:
                raise SpecError(join_path(path, name), "unknown key", one_of(COSTS, name))
        decode_band = decoder_for(Band)
        return BudgetSpec({name: decode_band(v, join_path(path, name)) for name, v in given.items() if v is not None})

    def __encode__(self) -> object:
        return {name: encode(band) for name, band in self.bands.items()}

    def resolve(self, baseline: Cost | None) -> Budget:
        """Make every limit absolute.

        Raises:
            SpecError: if a limit is relative and there is no baseline, or a band is empty.
        """
        limits = []
        for name, band in self.bands.items():
            low, high = _absolute(band.min, name, baseline), _absolute(band.max, name, baseline)
            if low is not None and high is not None and low > high:
                raise SpecError(f"budget.{name}", f"min {low:,.0f} is above max {high:,.0f}", "swap them")
            limits.append(Limit(name, low, high))
        return Budget(tuple(limits))


@dataclass(frozen=True, slots=True)
class Limit:
    """One metric's band, absolute."""

    metric: str
    min: float | None
    max: float | None

    def excess(self, cost: Cost) -> float:
        """How far outside, as a share of the bound broken; <= 0 inside."""
        value = metric_of(cost, self.metric)
        over = value / self.max - 1 if self.max is not None else -1.0
        under = 1 - value / self.min if self.min is not None else -1.0
        return max(over, under)


@dataclass(frozen=True, slots=True)
class Budget:
    """Absolute limits; a candidate is feasible when it keeps all of them."""

    limits: tuple[Limit, ...] = ()

    def excesses(self, cost: Cost) -> Mapping[str, float]:
        """Excess by metric; feasible when none is above 0."""
        return {limit.metric: limit.excess(cost) for limit in self.limits}

    def allows(self, cost: Cost) -> bool:
        """The feasibility rule."""
        return all(limit.excess(cost) <= 0 for limit in self.limits)


def metric_of(cost: Cost, metric: str) -> float:
    """A cost's value by metric name. Raises `SpecError` where the architecture has none."""
    value = COSTS[metric].of(cost)
    if value is None:
        raise SpecError(f"budget.{metric}", "a model with causal: false does not decode", "drop this limit")
    return float(value)


def _absolute(amount: Amount | None, metric: str, baseline: Cost | None) -> float | None:
    if amount is None or not amount.of_baseline:
        return None if amount is None else amount.value
    if baseline is None:
        raise SpecError(
            f"budget.{metric}",
            "is relative, but the study has no baseline",
            "give baseline: ARCH, or an absolute limit",
        )
    return amount.value * metric_of(baseline, metric)
