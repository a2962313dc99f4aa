"""One private Ray instance for every test of a session that needs one: starting it once saves minutes."""

from pathlib import Path

import pytest
import ray


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
