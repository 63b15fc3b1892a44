"""The table belongs to the space beside it, and a search over it replays."""

import sys

import pytest
from helpers import ROOT

from builder import compile_arch, estimate
from searchspace import FixedChooser, load_space
from searchspace.space import assignments
from studies.data.corpus import DataFacts

sys.path.insert(0, str(ROOT / "benchmarks/tabular"))

from simulate import Table, simulate, study


@pytest.fixture(scope="module")
def table():
    return Table()


def test_every_candidate_of_the_space_stands_in_the_table_at_its_price(table):
    space = load_space(ROOT / "benchmarks/tabular/space.yaml")
    rows = {(tuple(row["schedule"]), row["topology"]): row for row in table.data["rows"]}
    for choices in assignments(space.template):
        graph = compile_arch(space.resolve(FixedChooser(choices)))
        places = [choices[f"graph.h.schedule.{i}"] for i in range(choices["graph.h.schedule.length"])]
        row = rows.pop((tuple(places), choices["graph.h.topology"]))
        assert row["arch_id"] == graph.arch_id
        assert row["flops_per_token"] == estimate(graph).flops_per_token
        losses = row["losses"]["0"]
        assert losses == sorted(losses, reverse=True)
    assert rows == {}


def test_seeds_rank_alike(table):
    assert table.data["noise"][-1]["kendall_tau"] >= 0.7
    assert table.data["noise"][-1]["pairs"] >= 20


class Facts:
    """All that a simulated study asks of its data."""

    folder = ROOT
    facts = DataFacts(
        text="bytes",
        kind="python_source", vocab_size=256, bytes_per_token=1.0, dtype="uint8", train_tokens=10**6, val_tokens=10**6, source="", digest=""
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["random", "evolution"])
def test_a_search_replays_the_same_and_finds_something_good(sampler, table):
    limit = 150_000
    settings = study({"sampler": sampler, "stopper": {"asha": {"rungs": 3, "reduction": 3}}, "seed": 3}, limit)
    traces = [simulate(settings, table, Facts, spend=6, max_flops_per_token=limit) for _ in range(2)]
    assert traces[0] == traces[1]
    spent, losses = zip(*traces[0], strict=True)
    assert list(spent) == sorted(spent)
    assert list(losses) == sorted(losses, reverse=True)
    assert losses[-1] - table.best(limit) < 0.05
