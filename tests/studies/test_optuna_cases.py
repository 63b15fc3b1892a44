"""Optuna's own cases for samplers and storages, over those that a search uses: ``pytest -m slow``."""

import functools

import pytest
from optuna.storages import JournalStorage
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
)
from optuna.testing.pytest_storages import StorageTestCase

from studies.records.journal import _JournalFile
from studies.strategy.evolution import EvolutionSampler
from studies.strategy.predictor_sampler import PredictorSampler
from studies.strategy.samplers import SAMPLERS, Asked, make_sampler
from studies.strategy.surrogate import Surrogate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def never(choices, seed):
    """No mutant may run: what is drawn is drawn independently."""


def asked(name):
    return make_sampler(name, Asked(seed=0, num_trials=16, schedules=(), complete=never, surrogate=None))


MAKERS = {name: functools.partial(asked, name) for name in ("tpe", "nsga2", "gp", "evolution", "predictor")}
MAKERS["predictor, trusted"] = lambda: PredictorSampler((), 0, never, Surrogate("cost", 0))
MAKERS["evolution, another seed"] = lambda: EvolutionSampler((), 7, never)


class TestSamplers(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=MAKERS.values(), ids=MAKERS)
    def sampler(self, request):
        return request.param


def test_every_sampler_that_learns_is_here():
    assert {row.name for row in SAMPLERS.values() if row.make is not None} <= set(MAKERS)


class TestStorage(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path):
        return JournalStorage(_JournalFile(tmp_path))

    @pytest.mark.skip(reason="one process writes a journal, and none sends it: its running checksum can't be pickled")
    def test_pickle_storage(self):
        """Not offered."""
