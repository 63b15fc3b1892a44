"""Narrowing steers into the budget and shuts nothing out that fits."""

import pytest

from builder import compile_arch, estimate
from builder.pricing.budget import BudgetSpec
from builder.pricing.narrowing import Narrower
from searchspace import FixedChooser, RandomChooser, SpecError, load_arch, load_space
from searchspace.plain import decode
from searchspace.space import assignments


def absolute(limits, baseline=None):
    cost = estimate(compile_arch(load_arch(baseline))) if baseline else None
    return decode(BudgetSpec, limits, "budget").resolve(cost)


def feasible(space, budget, chooser):
    try:
        return budget.allows(estimate(compile_arch(space.resolve(chooser))))
    except SpecError:
        return False


BAND = {"params": {"min": "90% of baseline", "max": "110% of baseline"}, "flops_per_token": "100% of baseline"}


def test_every_feasible_candidate_of_a_listed_space_passes_unchanged():
    space, budget = load_space("quickstart", ["d_model=64"]), absolute(BAND, "plain_4")
    narrower = Narrower(space, budget)
    fitting = [choices for choices in assignments(space.template) if feasible(space, budget, FixedChooser(choices))]
    assert len(fitting) == 193
    for choices in fitting:
        assert space.draw(narrower.wrap(FixedChooser(choices))).choices == choices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "most_lost"),
    [({"params": {"min": 200_000, "max": 210_000}}, 0.01), ({"flops_per_token": 300_000}, 0.0)],
)
def test_nearly_all_feasible_candidates_of_a_wide_space_pass_unchanged(limits, most_lost):
    space, budget = load_space("families"), absolute(limits)
    narrower = Narrower(space, budget)
    passed = looked_at = 0
    for seed in range(3000):
        if not feasible(space, budget, RandomChooser(seed)):
            continue
        looked_at += 1
        choices = space.draw(RandomChooser(seed)).choices
        try:
            passed += space.draw(narrower.wrap(FixedChooser(choices))).choices == choices
        except SpecError:
            continue
    assert looked_at > 50
    assert passed >= (1 - most_lost) * looked_at


def test_what_it_proposes_fits_far_more_often():
    space, budget = load_space("families"), absolute({"params": {"min": 200_000, "max": 210_000}})
    narrower = Narrower(space, budget)
    plain = sum(feasible(space, budget, RandomChooser(seed)) for seed in range(300))
    steered = sum(feasible(space, budget, narrower.wrap(RandomChooser(seed))) for seed in range(100))
    assert steered / 100 > 8 * plain / 300


def test_without_limits_nothing_is_wrapped():
    space = load_space("quickstart")
    chooser = RandomChooser(0)
    assert Narrower(space, absolute({})).wrap(chooser) is chooser
