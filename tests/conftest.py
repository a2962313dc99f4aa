"""One private Ray instance for every test of a process that needs one, and which process a test runs in."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from xdist.scheduler import LoadScopeScheduling

LONGEST = ("end_to_end", "stages", "rollout", "discriminator", "weights", "serve", "verify", "learner", "corpora")
"""Rooms whose tests take minutes, the longest first: they begin, so that the short ones fill the gaps at the end."""


class RoomScheduling(LoadScopeScheduling):
    """The tests of a room stay together: they share its engines, models and Ray instance."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("/")[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RoomScheduling:
    return RoomScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: LONGEST.index(rooms[item]) if rooms[item] in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def cluster():
    environments = str(Path(__file__).parent / "verify")  # test_verifier_pool's faulty environments
    folder = tempfile.mkdtemp(prefix="ray")  # as private clusters of ours have one; its sockets need a short path
    ray.init(
        _temp_dir=folder,
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
    shutil.rmtree(folder, ignore_errors=True)
