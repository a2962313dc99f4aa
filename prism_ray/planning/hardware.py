"""The cluster a plan is made for: its nodes, and what one GPU of it can do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_ray.planning.architecture import PlanError
from prism_ray.planning.layout import Node

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Nodes, and per node and GPU what the nodes do not say. Defaults are those of a p5.48xlarge and its H100."""

    nodes: tuple[Node, ...]
    gpu_gib: float = 79.6
    node_gib: float = 2048.0
    disk_gib: float | None = None
    """Free where the run's folder is; None: not known."""
    gpu_tflops: float = 989.0
    """Dense bfloat16, as the maker states it."""
    gpu_tb_per_s: float = 3.35
    """Of its memory."""

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


def parse_cluster(text: str, node_cpus: float, head_cpus: float) -> tuple[Node, ...]:
    """The nodes of `4x8`: four with eight GPUs each. `head_cpus` above 0 adds a head without GPUs; else the first node
    is the head. Raises PlanError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) < 1:
        raise PlanError(f"--cluster is {text!r} but should be NODESxGPUS, such as 4x8, or live")
    count, gpus = int(match[1]), int(match[2])
    workers = [Node(f"node {i}", node_cpus, gpus, head=not head_cpus and i == 0) for i in range(count)]
    return (*([Node("head", head_cpus, 0, head=True)] if head_cpus else []), *workers)
