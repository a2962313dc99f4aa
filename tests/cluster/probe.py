"""Submitted by test_submit.py: prints, as one JSON line, what a job finds on the nodes of its cluster."""

import json
import os
import sys
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import prism_ray
from prism_ray.config.run import RunSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.runtime import cluster
from prism_ray.runtime.sharing import require_shared
from prism_ray.runtime.submitted import at_home


@ray.remote(num_cpus=0)
def look() -> dict[str, str]:
    import prism_ray.records

    return {
        "package": prism_ray.records.__file__,
        "threads": os.environ["OMP_NUM_THREADS"],
        "hub": os.environ["HF_HUB_OFFLINE"],
    }


def refusal(output: Path, **inputs: list[Path]) -> str:
    try:
        require_shared(output, inputs, 60.0)
    except cluster.ClusterError as error:
        return str(error)
    return ""


def main(shared: Path, hidden: Path) -> None:
    cluster.start(ClusterSettings())
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    seen = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    found = {
        "cwd": os.getcwd(),
        "package": prism_ray.__file__,
        "shipped": sorted(path.name for path in Path().iterdir()),
        "runs": str(at_home(RunSettings(), output="runs").runs),
        "nodes": ray.get(seen, timeout=60),
        "shared": refusal(shared),
        "output": refusal(hidden / "run"),
        "input": refusal(shared, policy=[hidden / "policy"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
