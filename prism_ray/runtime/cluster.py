"""Starting or joining the Ray cluster."""

from __future__ import annotations

import logging
import os

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
    )


def joins(settings: ClusterSettings) -> bool:
    """Whether the run joins a cluster, which may still grow, and does not start one of its own."""
    return bool(_address(settings))


def _address(settings: ClusterSettings) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")
