"""Only what has changed, between GPUs: vLLM's `sparse_nccl` backend, from learner rank 0 to one engine a link.

What changed is found by comparing what is set aside with what was before it, both in the engines' type: a step that is
too small to be seen in bfloat16 costs nothing. Never run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.sparse_nccl_engine import (
    SparseNCCLTrainerInitInfo,
    SparseNCCLTrainerWeightTransferEngine,
    SparseWeightPatch,
)

from prism_ray.weights.files import Shapes
from prism_ray.weights.source import Trainer
from prism_ray.weights.staging import FreePort, Passive, StagedSender
from prism_ray.weights.transports import Wire


class SparseNcclSender(StagedSender):
    """The learner's side. An engine that has not taken the weights before these gets every number."""

    def __init__(self, wire: Wire, trainer: Trainer, shapes: Shapes, rank: int, free_port: FreePort) -> None:
        if mixture := next((name for name in shapes if ".experts." in name), None):
            raise ValueError(
                f"rollout.weights: sparse_nccl carries dense policies only (vLLM puts {mixture} together from pieces, "
                "where single numbers cannot be set); use nccl"
            )
        super().__init__(wire, trainer, shapes, rank, free_port)
        self._before = self._make_staging(trainer, shapes)
        self._number = 0
        self._holds: dict[str, int] = {}
        self._infos: dict[str, SparseNCCLTrainerInitInfo] = {}
        self._engines: dict[str, SparseNCCLTrainerWeightTransferEngine] = {}
        self._patches: dict[str, list[SparseWeightPatch]] = {}

    def stage(self) -> None:
        self.staging, self._before = self._before, self.staging
        self.staging.fill()
        self._number += 1

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        if old := self._engines.pop(link, None):
            old.shutdown()
        self._holds.pop(link, None)
        host, port = self._free_port()
        info = self._infos[link] = SparseNCCLTrainerInitInfo(host, port, 1 + workers, rank=0)
        return worker_init_payload(
            NCCLWeightTransferInitInfo(
                master_address=info.master_address,
                master_port=info.master_port,
                rank_offset=1,
                world_size=info.world_size,
            )
        )

    def meet(self, link: str) -> None:
        self._engines[link] = SparseNCCLTrainerWeightTransferEngine.trainer_init(self._infos[link], client=Passive())

    def updates(self, link: str) -> list[dict[str, Any]]:
        known = self._before if self._holds.get(link) == self._number - 1 else None
        self._holds.pop(link, None)  # until it has these: an update that fails leaves neither
        patches = self._patches[link] = changes(known, self.staging)
        if not patches:
            return []
        return [
            {
                "names": [patch.name for patch in patches],
                "dtype_names": [str(patch.values.dtype).removeprefix("torch.") for patch in patches],
                "shapes": [list(patch.full_shape) for patch in patches],
                "num_updates_list": [patch.indices.numel() for patch in patches],
            }
        ]

    def send(self, link: str) -> None:
        number = self._number
        self._engines[link].send_weights(self._patches.pop(link))
        self._holds[link] = number


def changes(before: Any, now: Any) -> list[SparseWeightPatch]:
    """What differs between two sources of the same weights, tensor by tensor; everything if `before` is None."""
    found = []
    known = None if before is None else dict(before)
    for name, tensor in now:
        flat = tensor.reshape(-1)
        where = _all(flat) if known is None else torch.nonzero(flat != known[name].reshape(-1)).flatten()
        if where.numel():
            found.append(SparseWeightPatch(name, where.to(torch.int32), flat[where], tuple(tensor.shape)))
    return found


def _all(flat: Tensor) -> Tensor:
    return torch.arange(flat.numel(), device=flat.device)
