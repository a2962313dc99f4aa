"""One private Ray instance for every test of a process that needs one, and which process a test runs in."""

from pathlib import Path

import pytest
import ray

LONGEST = ("end_to_end", "stages", "rollout", "discriminator", "weights", "serve", "verify", "learner", "corpora")
"""Rooms whose tests take minutes, the longest first: they begin, so that the short ones fill the gaps at the end."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """The tests of a room stay together (`--dist loadgroup`): they share its engines, models and Ray instance."""
    item.add_marker(pytest.mark.xdist_group(_room(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(_room(item)) if _room(item) in LONGEST else len(LONGEST))


def _room(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(scope="session")
def cluster():
    environments = str(Path(__file__).parent / "verify")  # test_verifier_pool's faulty environments
    ray.init(
        address="local",  # else it would join whatever cluster somebody left on this machine
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        logging_level="error",
        log_to_driver=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": environments}},
    )
    yield
    ray.shutdown()
