"""Predictors learn what is there to be learned, and rank what they have not seen."""

import numpy as np
import pytest
import torch

from builder import compile_arch, estimate
from searchspace import load_space
from studies.predictors import GraphNetwork, make_example, make_predictor, rank_correlation


@pytest.fixture(scope="module")
def known():
    """Schedules of the quickstart space with a loss made of their levels: coarse first is good, many calls are too."""
    examples, losses, seen = [], [], set()
    for seed in range(200):
        graph = compile_arch(load_space("quickstart").sample(seed).arch)
        if graph.arch_id in seen:
            continue
        seen.add(graph.arch_id)
        calls = [node for node in graph.nodes if node.op == "block"]
        loss = -0.3 * np.log2(calls[1].level.chunk) - 0.2 * len(calls) + 0.05 * sum(1 / c.level.chunk for c in calls)
        examples.append(make_example(graph, estimate(graph)))
        losses.append(float(loss))
    return examples, losses


@pytest.mark.parametrize(("name", "tau"), [("cost", 0.0), ("scaling_law", 0.1), ("tabular", 0.75), ("gnn", 0.7)])
def test_held_out_schedules_are_ranked(name, tau, known):
    torch.set_num_threads(1)
    examples, losses = known
    predictor = make_predictor(name) if name != "gnn" else GraphNetwork(members=2)
    predictor.fit(examples[:80], losses[:80], seed=0)
    mean, spread = predictor.predict(examples[80:])
    assert mean.shape == spread.shape == (len(examples) - 80,)
    assert (spread > 0).all()
    assert rank_correlation(mean, losses[80:]) > tau


@pytest.mark.parametrize("name", ["cost", "scaling_law", "tabular", "gnn"])
def test_a_fit_is_repeatable(name, known):
    examples, losses = known
    found = []
    for _ in range(2):
        predictor = make_predictor(name) if name != "gnn" else GraphNetwork(members=1, epochs=20)
        predictor.fit(examples[:30], losses[:30], seed=3)
        found.append(predictor.predict(examples[30:40])[0])
    assert np.array_equal(*found)
