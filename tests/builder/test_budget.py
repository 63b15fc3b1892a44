import pytest
from helpers import tiny_arch

from builder import BudgetSpec, compile_arch, estimate
from builder.pricing.budget import Amount
from searchspace import SpecError
from searchspace.plain import decode

COST = estimate(compile_arch(tiny_arch()))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.5M", 1.5e6), ("64KiB", 65536), (1000, 1000), ("2e6", 2e6), ("1 G", 1e9), ("3B", 3e9), ("10", 10)],
)
def test_amounts(text, value):
    assert decode(Amount, text) == Amount(value)
    assert decode(Amount, "90% of baseline") == Amount(0.9, of_baseline=True)


@pytest.mark.parametrize("text", ["", "-1", "1.5Q", "90%", "90% of best", "nan", True, None, [1], "1e400"])
def test_unreadable_amounts(text):
    with pytest.raises(SpecError, match="can't read"):
        decode(Amount, text, "budget.params")


def test_band_relative_to_the_baseline():
    spec = decode(BudgetSpec, {"params": {"min": "90% of baseline", "max": "110% of baseline"}}, "budget")
    budget = spec.resolve(COST)
    assert budget.allows(COST)
    (limit,) = budget.limits
    assert (limit.min, limit.max) == (0.9 * COST.params, pytest.approx(1.1 * COST.params))


def test_bounds_are_inclusive_and_excess_is_a_share():
    at = decode(BudgetSpec, {"params": COST.params, "flops_per_token": COST.flops_per_token / 2}, "budget").resolve(
        None
    )
    excesses = at.excesses(COST)
    assert excesses["params"] == 0
    assert excesses["flops_per_token"] == pytest.approx(1.0)
    assert not at.allows(COST)


def test_relative_without_baseline_and_empty_bands():
    with pytest.raises(SpecError, match="no baseline"):
        decode(BudgetSpec, {"params": "90% of baseline"}, "budget").resolve(None)
    with pytest.raises(SpecError, match="swap"):
        decode(BudgetSpec, {"params": {"min": 10, "max": 5}}, "budget").resolve(None)


@pytest.mark.parametrize("metric", ["decode_flops_per_token", "kv_cache_bytes_per_token"])
def test_no_decode_limit_for_models_that_do_not_decode(metric):
    cost = estimate(compile_arch(tiny_arch({"causal": False})))
    with pytest.raises(SpecError, match="does not decode"):
        decode(BudgetSpec, {metric: 1000}, "budget").resolve(None).allows(cost)
