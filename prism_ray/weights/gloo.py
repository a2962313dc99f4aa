"""Weights over the network between CPUs: gloo's broadcast from learner rank 0 to an engine's workers, in buckets.

Both sides are ours. Importing this module registers the receiving one with vLLM's factory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from prism_ray.weights.files import Shapes
from prism_ray.weights.reload import ReloadingEngine, check_experts, register
from prism_ray.weights.source import Trainer
from prism_ray.weights.staging import StagedSender, Staging
from prism_ray.weights.transports import TRANSPORTS

BACKEND = TRANSPORTS["gloo"].backend


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where rank 0, the learner, is met by the others: the engine's workers."""

    host: str
    port: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What is in one bucket, in its order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooSender(StagedSender):
    """The learner's side. The copy that is set aside is in the CPU's memory, wherever the weights are."""

    def _make_staging(self, trainer: Trainer, shapes: Shapes, device: str | None = None) -> Staging:
        self._links: dict[str, GlooInitInfo] = {}
        self._groups: dict[str, Any] = {}
        return super()._make_staging(trainer, shapes, "cpu")

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        self._groups.pop(link, None)
        self._links[link] = GlooInitInfo(*self._free_port(), 1 + workers, self.wire.timeout_s)
        return asdict(self._links[link])

    def meet(self, link: str) -> None:
        self._groups[link] = _join(self._links[link], 0)

    def updates(self, link: str) -> list[dict[str, Any]]:
        return [bucket.described for bucket in self.staging.buckets]

    def send(self, link: str) -> None:
        for bucket in self.staging.buckets:
            self._groups[link].broadcast(bucket.buffer, 0).wait()


class GlooWeightTransferEngine(ReloadingEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving side, in a vLLM worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Refuse, before anything is sampled, a model that could not take new weights; meet the learner."""
        check_experts(self.model)
        here = self.parallel_config
        self._group = _join(init_info, 1 + here.data_parallel_index * here.world_size + here.rank)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        pairs = zip(update_info.shapes, dtypes, strict=True)
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        self._group.broadcast(buffer, 0).wait()
        self.load(unpack_tensor(buffer, update_info.names, update_info.shapes, dtypes, sizes))

    def shutdown(self) -> None:
        self._group = None


def _join(info: GlooInitInfo, rank: int) -> Any:
    """The group of a learner and an engine, beside whatever groups their processes are in."""
    timeout = timedelta(seconds=info.timeout_s)
    return stateless_init_torch_distributed_process_group(
        info.host, info.port, rank, info.world_size, "gloo", timeout=timeout
    )


register(BACKEND, GlooWeightTransferEngine)
