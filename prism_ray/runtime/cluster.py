"""Starting or joining the Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from prism_ray.config.runtime import ClusterSettings
from prism_ray.runtime.submitted import given_environment, short_grace

log = logging.getLogger(__name__)

WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""In every actor: one thread each (more threads than cores cost 5-10x on a CPU machine), and never a model hub."""

ANSWERS_WITHIN_S = 10.0
"""Seconds for the head of a cluster to accept a connection."""


class ClusterError(RuntimeError):
    """The cluster cannot be joined, or cannot hold what the configuration asks for."""


def start(settings: ClusterSettings) -> None:
    """Join the configured cluster, or start a private one on this machine. Raises ClusterError if there is none."""
    address = _address(settings)
    given = given_environment()
    environment = {"env_vars": {name: value for name, value in WORKER_ENV.items() if name not in given}}
    if warning := short_grace(settings.stop_grace_s):
        log.warning("%s", warning)
    if address:
        _join(address, environment)
        return
    with _own_folder() as folder:
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
    log.info("what Ray itself logs: %s", folder / "ray" / "session_latest" / "logs")


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for the files of a private cluster, and of nobody else.

    In Ray's usual one lies the address that `ray start` last wrote, and Ray's workers take it for their own cluster's:
    Ray Train's watchman then asks a foreign one for the trainer, hears that there is none, and has its ranks killed.
    """
    before = os.environ.get("RAY_TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="prism-", dir=before))
    os.environ["RAY_TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        del os.environ["RAY_TMPDIR"]
        if before is not None:
            os.environ["RAY_TMPDIR"] = before


def joins(settings: ClusterSettings) -> bool:
    """Whether the run joins a cluster, which may still grow, and does not start one of its own."""
    return bool(_address(settings))


def _join(address: str, environment: dict[str, Any]) -> None:
    if "://" in address:
        raise ClusterError(
            f"{address} is the address of a dashboard or of Ray's client; a run joins a cluster from one of its nodes, "
            "by HOST:6379 or `auto` (cluster.address, RAY_ADDRESS), and is sent there with `ray job submit`"
        )
    if address != "auto":
        _knock(address)
    try:
        ray.init(address=address, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RayError) as error:
        first = str(error).strip().splitlines()[0]
        raise ClusterError(f"cannot join the Ray cluster {address} (cluster.address, RAY_ADDRESS): {first}") from error


def _knock(address: str) -> None:
    """Raise ClusterError where nothing answers: Ray itself would go on trying for longer than anybody waits."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} (cluster.address, RAY_ADDRESS): {error}; give HOST:PORT of its head, "
            "as `ray start` said it there, or unset both to run on this machine"
        ) from error


def _address(settings: ClusterSettings) -> str | None:
    given = settings.address
    return os.environ.get("RAY_ADDRESS", given) if given in (None, "auto") else given
