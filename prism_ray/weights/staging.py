"""A copy of the trainer's weights, set aside in buckets: training goes on while engines fetch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from prism_ray.weights.files import Shapes
from prism_ray.weights.source import Trainer, TrainerWeights
from prism_ray.weights.transports import TRANSPORTS, Wire

FreePort = Callable[[], tuple[str, int]]


@dataclass
class Bucket:
    """Some tensors side by side in one flat buffer of bytes, as vLLM's packed transfers want them: without gaps."""

    metas: list[ParamMeta]
    buffer: Tensor

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [_bytes(meta) for meta in self.metas]

    @property
    def described(self) -> dict[str, Any]:
        """Names, types and shapes, as vLLM's update infos have them."""
        return {
            "names": [meta.name for meta in self.metas],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in self.metas],
            "shapes": [list(meta.shape) for meta in self.metas],
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor by name: views of the buffer."""
        for meta, part in zip(self.metas, self.buffer.split(self.sizes), strict=True):
            yield meta.name, part.view(meta.dtype).view(meta.shape)


class Staging(WeightSource):
    """The weights of `trainer` as they were when `fill` was last called, for an engine with `shapes`.

    They have one type, that of the engines: a type for each tensor would leave some of them at odd bytes of a bucket,
    where nothing can read them in place. A rank that does not `keep` them takes part in putting them together only.
    `device`: where they are kept, if not where the trainer has them.
    """

    def __init__(
        self,
        trainer: Trainer,
        shapes: Shapes,
        dtype: torch.dtype,
        bucket_bytes: int,
        keep: bool = True,
        device: str | None = None,
    ) -> None:
        self._source = TrainerWeights(trainer, shapes, dtype)
        self._bucket_bytes, self._keep, self._device = bucket_bytes, keep, device
        self.buckets: list[Bucket] = []

    def fill(self) -> None:
        """Copy the weights as they are now, over those before. Every rank must call it."""
        places: dict[str, Tensor] = {}
        for name, tensor in self._source:
            if self._keep:
                places = places or self._places(tensor.device)
                places[name].copy_(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever sends does so on another stream

    def _places(self, device: torch.device) -> dict[str, Tensor]:
        self.buckets = self.buckets or self._allocate(torch.device(self._device) if self._device else device)
        return dict(self)

    def metadata(self) -> list[ParamMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self.buckets:
            yield from bucket.tensors()

    def _allocate(self, device: torch.device) -> list[Bucket]:
        groups: list[list[ParamMeta]] = []
        room = 0
        for meta in self.metadata():
            if not groups or _bytes(meta) > room:
                groups.append([])
                room = self._bucket_bytes  # a larger tensor has a bucket of its own
            groups[-1].append(meta)
            room -= _bytes(meta)
        empty = [torch.empty(sum(map(_bytes, metas)), dtype=torch.uint8, device=device) for metas in groups]
        return [Bucket(metas, buffer) for metas, buffer in zip(groups, empty, strict=True)]


def _bytes(meta: ParamMeta) -> int:
    return torch.Size(meta.shape).numel() * meta.dtype.itemsize


class StagedSender:
    """What the senders of this room have in common; see `transports.Sender`."""

    def __init__(self, wire: Wire, trainer: Trainer, shapes: Shapes, rank: int, free_port: FreePort) -> None:
        self.wire, self.rank, self._free_port = wire, rank, free_port
        self.staging = self._make_staging(trainer, shapes)

    def _make_staging(self, trainer: Trainer, shapes: Shapes, device: str | None = None) -> Staging:
        keep = self.rank == 0 or TRANSPORTS[self.wire.transport].every_rank
        return Staging(trainer, shapes, getattr(torch, self.wire.dtype), self.wire.bucket_bytes, keep, device)

    def stage(self) -> None:
        self.staging.fill()


class Passive:
    """vLLM's client of an engine for its trainer-side engines: here the engine takes those steps itself, in time with
    its own decoding. What it would have been told first is `told`."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.told = init_info

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        pass

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass
