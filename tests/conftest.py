import os

os.environ["OMP_NUM_THREADS"] = "1"  # the programs that tests start would spin on cores that other tests need

import pytest
import torch
from hypothesis import HealthCheck, settings

from searchspace import plugins

torch.set_num_threads(1)

# tests/test_fuzz.py measures time itself; by default it looks at the same examples every time.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=60, derandomize=True, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=1700, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, they would run while every other core has nothing left to do."""
    items.sort(key=lambda item: item.path.name not in ("test_ray.py", "test_readme.py", "test_ladder.py"))


@pytest.fixture(autouse=True)
def _no_plugins():
    """What a test loads is no other test's."""
    yield
    plugins.forget_plugins()
