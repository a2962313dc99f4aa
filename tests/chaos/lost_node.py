"""Run by test_lost_node.py in a process of its own: a cluster of local nodes loses the one with the learner."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.chaos.world import World, actors


def main(folder: Path) -> None:
    memory: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1} | memory)
    for _ in range(2):
        cluster.add_node(num_cpus=2, **memory)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ["PYTHONPATH"]}
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": environment})

    def lose() -> None:
        (learner,) = actors("LearnerRank")
        raylet = learner.parent()
        assert raylet is not None and raylet.name() == "raylet"
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    async def run():
        # Two CPUs for the learner, which only the other nodes have; everything else finds room on the first.
        world = World(folder, "rollout.engines=1", "learner.ranks=1", "learner.cpus_per_rank=2")
        try:
            return await world.rlvr("node", {3: lose})
        finally:
            await world.close()

    found = asyncio.run(run())
    found.check_exactly_once()
    found.check_cause("the stage goes on from update 2")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
