"""Run by test_private.py in a process of its own: a private cluster beside one that `ray start` might have left."""

import json
import os
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from prism_ray.config.runtime import ClusterSettings
from prism_ray.runtime import cluster


@ray.remote
def asked() -> str:
    """The cluster of which a worker asks when it does not say which, as Ray Train's watchman does not."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return canonicalize_bootstrap_address_or_die(None)
    except ConnectionError as error:  # it sees that there are two, and that it cannot know
        return str(error)


def main() -> None:
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    known = (Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").read_text()
    cluster.start(ClusterSettings(cpus=1, object_store_mb=80))
    found = {"other": other.address, "known": known, "asked": ray.get(asked.remote())}
    found["own"] = ray.get_runtime_context().gcs_address
    ray.shutdown()
    other.shutdown()
    print(json.dumps(found | {"left": os.environ["RAY_TMPDIR"]}))


if __name__ == "__main__":
    main()
