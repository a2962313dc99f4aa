"""Starting or joining the Ray cluster, and refusing at once what it cannot hold."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

import ray

from prism_ray.config.runtime import ClusterSettings

WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""In every actor: one thread each (more threads than cores cost 5-10x on a CPU machine), and never a model hub."""


class ClusterError(RuntimeError):
    """The cluster cannot hold what the configuration asks for."""


def start(settings: ClusterSettings) -> None:
    """Join the configured cluster, or start a private one on this machine."""
    address = _address(settings)
    environment = {"env_vars": WORKER_ENV}
    if address:
        ray.init(address=address, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",  # without it, Ray joins any cluster that `ray start` has left on this machine
        num_cpus=settings.cpus or os.cpu_count(),
        object_store_memory=settings.object_store_mb * 2**20,
        include_dashboard=False,
        runtime_env=environment,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _metrics_export_port=settings.metrics_port,
    )


def _address(settings: ClusterSettings) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")


def require(needs: Mapping[str, Mapping[str, float]], settings: ClusterSettings) -> None:
    """Check that the cluster has what all actors together need: `{"rollout engines (2 x)": {"CPU": 2, "GPU": 2}, …}`.

    Raises ClusterError with one sentence: what is needed, what is there, who asks for most, and what to change. A
    cluster that was joined may still be growing and is given `pending_timeout_s`.
    """
    growing, deadline = bool(_address(settings)), time.monotonic() + settings.pending_timeout_s
    total = {r: sum(n.get(r, 0.0) for n in needs.values()) for r in ("CPU", "GPU")}
    while True:
        there = ray.cluster_resources()
        missing = [r for r, amount in total.items() if amount > there.get(r, 0.0) + 1e-9]
        if not missing:
            return
        if not growing or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    resource = missing[0]
    who = ", ".join(f"{name}: {need[resource]:g}" for name, need in needs.items() if need.get(resource))
    raise ClusterError(
        f"the configuration asks for {total[resource]:g} {resource}s ({who}) but the cluster has "
        f"{there.get(resource, 0.0):g}; lower the number of engines or ranks or their {resource.lower()}s, "
        "or use a larger cluster"
    )
