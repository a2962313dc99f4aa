"""Weights between GPUs: vLLM's `nccl` backend, packed into buckets, from learner rank 0 to one engine a link.

Never run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from prism_ray.weights.files import Shapes
from prism_ray.weights.source import Trainer
from prism_ray.weights.staging import FreePort, Passive, StagedSender
from prism_ray.weights.transports import Wire


class NcclSender(StagedSender):
    """The learner's side: vLLM's trainer-side engine for each link, which reads from what is set aside."""

    def __init__(self, wire: Wire, trainer: Trainer, shapes: Shapes, rank: int, free_port: FreePort) -> None:
        super().__init__(wire, trainer, shapes, rank, free_port)
        self._infos: dict[str, NCCLTrainerInitInfo] = {}
        self._engines: dict[str, NCCLTrainerWeightTransferEngine] = {}

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        if old := self._engines.pop(link, None):
            old.shutdown()
        host, port = self._free_port()
        info = NCCLTrainerInitInfo(host, port, 1 + workers, packed_buffer_size_bytes=self.wire.bucket_bytes, rank=0)
        self._infos[link] = info
        return worker_init_payload(
            NCCLWeightTransferInitInfo(
                master_address=info.master_address,
                master_port=info.master_port,
                rank_offset=1,
                world_size=info.world_size,
                packed=info.packed,
                packed_buffer_size_bytes=info.packed_buffer_size_bytes,
                packed_num_buffers=info.packed_num_buffers,
            )
        )

    def meet(self, link: str) -> None:
        self._engines[link] = NCCLTrainerWeightTransferEngine.trainer_init(
            self._infos[link], client=Passive(), source=self.staging
        )

    def updates(self, link: str) -> list[dict[str, Any]]:
        """All weights at once: they are cut into buckets on both sides by their sizes."""
        metas = self.staging.metadata()
        return [
            {
                "names": [meta.name for meta in metas],
                "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
                "shapes": [list(meta.shape) for meta in metas],
            }
        ]

    def send(self, link: str) -> None:
        self._engines[link].send_weights()
