"""Ladders: laws that are there are found, differences are told with intervals that cover, and bad files are refused."""

import csv
import itertools
import json

import numpy as np
import pytest
from helpers import ROOT, run_cli

from builder import compile_arch, estimate
from searchspace import SpecError, load_arch
from studies.commands.coordinates import repeated
from studies.commands.scale import read_runs
from studies.scale.law import Law, Run, fit_law, forecast
from studies.scale.pairs import FARTHEST, rate
from studies.scale.recurrence import Point, phi_of, shared_of
from studies.scale.sizes import scaled
from studies.sections import SizeConfig
from studies.training.recipe import size_of

SIZES = (3e4, 1e5, 3e5)


def made_ladder(seed, *, target=1e6, candidates=6, seeds=2, noise=0.008, form=0.004, drift=0.03):
    """Runs of a law with errors of form that candidates share, and of their own; and the differences at a target."""
    draw = np.random.default_rng(seed)
    level, slope = (np.r_[0.0, draw.normal(0, spread, candidates)] for spread in (0.08, drift))

    def loss(c, size):
        return 0.8 + 20 * size**-0.3 * (1 + level[c] + slope[c] * np.log(size / 1e5)) + 30 * (60 * size) ** -0.3

    runs = []
    for size in SIZES:
        shared, own = draw.normal(0, 0.01), draw.normal(0, form, candidates + 1)
        for s in range(seeds):
            order = draw.normal(0, noise)
            for c in range(candidates + 1):
                value = loss(c, size) + shared + own[c] + order + draw.normal(0, noise / 2)
                runs.append(Run(f"c{c}", size, 60 * size, float(value), f"{size}", s))
    wrong = draw.normal(0, form, candidates + 1)
    truth = [loss(c, target) - loss(0, target) + wrong[c] - wrong[0] for c in range(candidates + 1)]
    return runs, {f"c{c}": value for c, value in enumerate(truth)}


@pytest.mark.parametrize("horizons", [(60,), (15, 60, 240)])
def test_a_law_is_found(horizons):
    runs = [
        Run(name, n, h * n, 1.5 + a * n**-0.35 + (40 * (h * n) ** -0.28 if len(horizons) > 1 else 0))
        for name, a in (("x", 100.0), ("y", 90.0))
        for n in (1e5, 3e5, 1e6, 3e6)
        for h in horizons
    ]
    law = fit_law(runs)
    assert law.spread < 2e-3
    for run in runs:
        assert law.loss(run.candidate, run.size, run.tokens) == pytest.approx(run.loss, abs=0.01)
    assert law.factors["y"] / law.factors["x"] == pytest.approx(0.9, abs=0.02)
    assert law.loss("x", 1e7, 60e7) < min(run.loss for run in runs if run.candidate == "x")


def rated_against_truth(seeds, draws, **world):
    """Of many ladders: whether a difference is in its interval, its error, and that of the largest size alone."""
    inside, errors, at_top = [], [], []
    for seed in seeds:
        runs, truth = made_ladder(seed, **world)
        for rated in rate(runs, "c0", 1e6, 6e7, draws=draws).rated:
            if rated.candidate != "c0":
                low, high = rated.interval
                inside.append(low <= truth[rated.candidate] <= high)
                errors.append(rated.difference - truth[rated.candidate])
                at_top.append(rated.at_top - truth[rated.candidate])
    return inside, errors, at_top


def test_intervals_cover_as_often_as_they_say_and_err_less_than_the_largest_size():
    inside, errors, at_top = rated_against_truth(range(12), 120)
    assert 0.7 <= np.mean(inside) <= 0.95
    assert np.std(errors) < 0.8 * np.sqrt(np.mean(np.square(at_top)))


@pytest.mark.slow
@pytest.mark.parametrize("world", [{}, {"drift": 0.0}, {"form": 0.0}, {"drift": 0.1}], ids=str)
def test_coverage_over_many_ladders(world):
    """`-s` prints the figures of docs/results.md."""
    inside, errors, at_top = rated_against_truth(range(100, 125), 200, **world)
    top = np.sqrt(np.mean(np.square(at_top)))
    print(f"\n{world or 'as they are'}: {np.mean(inside):.0%} inside, error {np.std(errors):.4f}, at the top {top:.4f}")
    assert 0.65 <= np.mean(inside) <= 1
    assert np.std(errors) < (1.3 if world.get("drift") == 0.1 else 0.8) * top  # what drifts far can't be followed


def test_the_answer_adds_up():
    runs, _ = made_ladder(3)
    answer = rate(runs, "c0", 1e6, 6e7, draws=200)
    assert sum(rated.best for rated in answer.rated) == pytest.approx(1)
    assert [rated.difference for rated in answer.rated] == sorted(rated.difference for rated in answer.rated)
    for rated in answer.rated:
        (low, high), (less, more) = rated.interval, rated.multiplier_interval
        assert low <= rated.difference <= high
        assert less <= rated.multiplier <= more
        assert (rated.multiplier > 1) == (rated.difference < 0) or rated.candidate == "c0"
        better = answer.law.loss("c0", 1e6 * rated.multiplier**0.5, 6e7 * rated.multiplier**0.5)
        assert better == pytest.approx(answer.law.loss("c0", 1e6, 6e7) + rated.difference, abs=1e-4)
    again = rate(runs, "c0", 1e6, 6e7, draws=200)
    assert again.rated == answer.rated


def test_what_the_law_gets_wrong_for_all_alike_moves_no_difference():
    runs, _ = made_ladder(1, noise=0.002, form=0.0)
    bent = [Run(r.candidate, r.size, r.tokens, r.loss + 0.05 * (r.size == 1e5), r.rung, r.seed) for r in runs]
    straight, other = (
        {r.candidate: r.difference for r in rate(x, "c0", 1e6, 6e7, draws=20).rated} for x in (runs, bent)
    )
    assert all(other[name] == pytest.approx(value, abs=0.006) for name, value in straight.items())


def test_curves_that_cross_are_told():
    slopes = {"base": 0.0, "late": -0.02, "later": -0.01, "early": 0.015, "never": 0.0}
    runs = [
        Run(name, size, 60 * size, 1.0 + 20 * size**-0.3 * (1 + slope * np.log(size / 1e6)) + (name == "never") * 0.01,
            f"{size}")
        for size in (1e4, *SIZES)
        for name, slope in slopes.items()
    ]  # fmt: skip
    found = {rated.candidate: rated for rated in rate(runs, "base", 1e7, 6e8, draws=20).rated}
    assert found["late"].at_top > 0 > found["late"].difference
    assert found["early"].at_top < 0 < found["early"].difference
    assert 5e5 < found["late"].crosses < 2e6
    assert found["never"].crosses is None


def test_too_little_is_refused():
    runs, _ = made_ladder(0)
    two = [run for run in runs if run.size != SIZES[0]]
    for few in (lambda: rate(two, "c0", 1e6, 6e7), lambda: forecast(two, "c0", 1e6, 6e7)):
        with pytest.raises(SpecError, match="2 are too few for a law"):
            few()
    rising = [Run(r.candidate, r.size, r.tokens, 1 + np.log(r.size), r.rung, r.seed) for r in runs]
    with pytest.raises(SpecError, match="losses do not fall"):
        rate(rising, "c0", 1e6, 6e7)
    with pytest.raises(SpecError, match="the only candidate"):
        rate([run for run in runs if run.candidate == "c0"], "c0", 1e6, 6e7)
    one = [
        Run(r.candidate, r.size * (1 + 0.01 * int(r.candidate[1:])), r.tokens, r.loss, "a")
        for r in runs
        if r.size == 3e4
    ]
    with pytest.raises(SpecError, match="1 are too few"):
        rate(one, "c0", 1e6, 6e7)
    (far,) = [r for r in rate([*runs, *(Run("low", n, 60 * n, 0.3, f"{n}") for n in SIZES)], "c0", 1e6, 6e7, draws=20).rated
              if r.candidate == "low"]  # fmt: skip
    assert far.multiplier == FARTHEST
    apart = [*runs, Run("alone", 5e4, 3e6, 2.0, "elsewhere")]
    with pytest.raises(SpecError, match="alone: shares no rung with c0"):
        rate(apart, "c0", 1e6, 6e7)


def test_a_forecast_of_one_loss_has_an_interval_that_grows_with_the_distance():
    runs, _ = made_ladder(2)
    near, far = (forecast(runs, "c0", size, 60 * size, draws=60) for size in (4e5, 1e7))
    for middle, low, high in (near, far):
        assert low < middle < high
    assert far[2] - far[1] > near[2] - near[1]


HEAD = "candidate,size,tokens,loss,seed\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "candidate: is no column"),
        ("candidate,size,tokens\nx,1,1\n", "loss: is no column"),
        ("candidate,size,tokens,loss,sede\nx,1,1,1,0\n", "did you mean 'seed'"),
        (HEAD, "holds no runs"),
        ("[" * 200_000, "is no CSV"),
        (HEAD + "x,1e6," + "1" * 200_000 + ",2.0,0\n", "is no CSV"),
        (HEAD + "x,1e6,1e8,nan,0\n", ":2: loss: 'nan' is no positive number"),
        (HEAD + "x,1e6,1e8,2.0,0\nx,,1e8,2.0,0\n", ":3: size: '' is no positive number"),
        (HEAD + "x,-1,1e8,2.0,0\n", "is no positive number"),
        (HEAD + "x,1e6,1e8,2.0,zero\n", "seed: 'zero' is no whole number"),
        (HEAD + "x,1e6,1e8,2.0\n", "has more or fewer values"),
        (HEAD + "x,1e6,1e8,2.0,0,7\n", "has more or fewer values"),
        (HEAD + " ,1e6,1e8,2.0,0\n", "candidate: is empty"),
        (HEAD + "x,1e6,1e8,2.0," + "7" * 5000 + "\n", "is no whole number"),
    ],
)
def test_files_that_are_no_ladder(text, told, tmp_path):
    file = tmp_path / "ladder.csv"
    file.write_text(text)
    with pytest.raises(SpecError) as error:
        read_runs(file)
    assert told in str(error.value).replace(str(file), "")


def test_the_command(tmp_path):
    file = tmp_path / "ladder.csv"
    with file.open("w", newline="") as text:
        lines = csv.writer(text)
        lines.writerow(["candidate", "size", "tokens", "loss", "seed"])
        for run in made_ladder(0)[0]:
            lines.writerow([run.candidate, run.size, run.tokens, run.loss, run.seed])
    told = run_cli("scale", file)
    assert "At 3M parameters and 180M tokens, against c0" in told
    assert "42 losses at 3 sizes" in told.replace("\n", " ")
    marked = file.read_text().replace("c1,", "[/b],").replace("candidate,", " candidate , ", 1)
    (tmp_path / "marked.csv").write_text(marked)
    assert "[/b]" in run_cli("scale", tmp_path / "marked.csv")
    assert "no number to reach" in run_cli("scale", file, "--size", "inf", code=2)
    assert "baseline" in told
    assert "no candidate" in run_cli("scale", file, "--baseline", "c9", code=2)
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in run_cli("scale", file, code=2)


@pytest.mark.parametrize("phi", [-0.2, 0.3, 0.65, 1.0])
def test_the_worth_of_a_further_use_is_found(phi):
    arch = load_arch("three_layers")
    law = Law(0.8, {"plain": 20.0}, 0.0, 0.35, 0.0, 0.0)
    draw = np.random.default_rng(3)
    points = []
    for width in (32, 64, 128):
        for times, seed in itertools.product((2, 4), range(3)):
            grown = scaled(arch, SizeConfig(d_model=width))
            base, loop = (shared_of(compile_arch(repeated(grown, n))) for n in (1, times))
            assert base.often == ()
            assert base.once == size_of(grown, estimate(compile_arch(grown)))
            assert [uses for _, uses in loop.often] == [times]
            assert loop.effective(0.0) == pytest.approx(base.once)
            gap = 20 * (loop.effective(phi) ** -0.35 - base.once**-0.35)
            points.append(Point(f"{width}", seed, loop, base, gap + draw.normal(0, 1e-3)))
    found, low, high = phi_of(points, law, 20.0)
    assert found == pytest.approx(phi, abs=0.05)
    assert low - 0.02 <= phi <= high + 0.02


def test_coarse_uses_count_whole_or_by_their_tokens():
    arch = load_arch("three_layers", ["graph.h.schedule=[phrase,word,token]", "graph.h.topology=mesh"])
    ((_, whole),) = shared_of(compile_arch(arch)).often
    ((_, share),) = shared_of(compile_arch(arch), by_tokens=True).often
    assert whole == 3
    assert share == pytest.approx(1 / 8 + 1 / 4 + 1)


def test_a_pair_of_seeds_makes_nobody_certain():
    """Where nothing can be told apart, the first runs with a second seed don't tell it either (our own ladder's did)."""
    found = json.loads((ROOT / "benchmarks/results/ladder.json").read_text())["runs"]
    runs = [Run(*values) for values in found]
    first = [run for run in runs if run.seed == 0]
    pair = [
        run for run in runs if run.seed == 1 and run.rung.startswith("16,") and run.candidate in ("plain", "spiral-21")
    ]
    assert len(pair) == 4
    before, after = (rate(some, "plain", 2.6e6, 1e8) for some in (first, first + pair))
    for answer in (before, after):
        assert max(rated.best for rated in answer.rated) < 0.9
        for rated in answer.rated[1:]:
            low, high = rated.multiplier_interval
            assert high / low > 1.25, rated.candidate
