"""Whether all nodes of a cluster see the same files: actors read and write a run's folder wherever they are."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prism_ray.runtime.cluster import ClusterError
from prism_ray.runtime.submitted import HOME

APPEARS_WITHIN_S = 15.0
"""A network file system may show a new file late."""


def require_shared(output: Path | None, inputs: Mapping[str, Sequence[Path]], timeout_s: float) -> None:
    """Check that all nodes see the folder `output` (None: there is none) as this one does, and the paths of `inputs`
    (by their setting).

    Raises ClusterError with a sentence that names node, path and cure; also where a node does not answer within
    `timeout_s` seconds. Nodes that join later are not known yet.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    others.pop(here, None)
    if not others:
        return
    named = {path.resolve(): setting for setting, paths in inputs.items() for path in paths}
    with _probe(output) as probes:
        for node, missing in _missing(others, [*probes, *named], timeout_s):
            if missing in probes:
                raise ClusterError(
                    f"node {node} does not see the folder {missing.parent}, but what runs there writes into it; "
                    f"choose one on a file system that all nodes share, by the settings or by {HOME}"
                )
            raise ClusterError(
                f"node {node} does not see {missing} ({named[missing]}); put it on a file system that all nodes share"
            )


@contextmanager
def _probe(folder: Path | None) -> Iterator[list[Path]]:
    """A new file in the folder, by which others can tell that it is the same."""
    if folder is None:
        yield []
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder.resolve() / f".seen_{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield [probe]
    finally:
        probe.unlink(missing_ok=True)


def _missing(nodes: Mapping[str, str], paths: list[Path], timeout_s: float) -> list[tuple[str, Path]]:
    """Names of nodes, each with the first of `paths` that it does not see."""
    calls = {
        _LOOK.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths): name
        for node, name in nodes.items()
    }
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    if late:
        raise ClusterError(f"node {calls[late[0]]} did not answer within {timeout_s:g} s; look at it with `ray status`")
    try:
        return [(calls[call], missing) for call in done if (missing := ray.get(call)) is not None]
    except RayError as error:
        raise ClusterError(f"a node cannot look at its files: {str(error).strip().splitlines()[0]}") from error


def _look(paths: list[Path]) -> Path | None:
    """The first of `paths` that this node does not see."""
    deadline = time.monotonic() + APPEARS_WITHIN_S
    for path in paths:
        while not path.exists():
            if time.monotonic() > deadline:
                return path
            time.sleep(0.2)
    return None


_LOOK: Any = cast(Any, ray.remote)(num_cpus=0, max_retries=0)(_look)
