"""Weights within a GPU that a learner rank and an engine's worker share: vLLM's `ipc` backend, by handles of buckets.

Each rank offers the copy on its own GPU, and a worker opens the one on its own: nothing is sent. Never run on a GPU
yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from prism_ray.weights.staging import StagedSender


class IpcSender(StagedSender):
    """A learner rank's side."""

    def stage(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # what engines have closed since
        super().stage()

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        return {"packed": True}

    def meet(self, link: str) -> None:
        pass

    def updates(self, link: str) -> list[dict[str, Any]]:
        return [
            bucket.described | {"tensor_sizes": bucket.sizes, "ipc_handles": handle(bucket.buffer)}
            for bucket in self.staging.buckets
        ]

    def send(self, link: str) -> None:
        pass


def handle(buffer: torch.Tensor) -> dict[str, tuple[Any, ...]]:
    """How a process on the same GPU opens the buffer, by the GPU's own identity. Each is to be opened once: torch
    counts."""
    _, arguments = reduce_tensor(buffer)
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): arguments}
