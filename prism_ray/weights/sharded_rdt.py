"""Every worker of a large engine fetches only its slice of the weights: vLLM's `sharded_rdt` backend, over NIXL.

vLLM can have all ranks produce; here rank 0 does, from its copy, for one engine a link: groups of ranks would have to
agree on every link by a collective, in the midst of training. Never run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups
from vllm.distributed.weight_transfer.sharded_rdt_trainer import (
    ShardedRDTTrainerInitInfo,
    ShardedRDTTrainerWeightTransferEngine,
)

from prism_ray.weights.files import Shapes
from prism_ray.weights.source import Trainer
from prism_ray.weights.staging import FreePort, Passive, StagedSender
from prism_ray.weights.transports import Wire

NAMESPACE = "prism_ray_weights"
"""Ray's, in which the learner's servers are found: vLLM's workers are of a Ray job of their own."""


class ShardedRdtSender(StagedSender):
    """The learner's side: vLLM's trainer-side engine, with its server actor, for each link."""

    def __init__(self, wire: Wire, trainer: Trainer, shapes: Shapes, rank: int, free_port: FreePort) -> None:
        if importlib.util.find_spec("nixl") is None:
            raise ValueError("rollout.weights: sharded_rdt needs the package nixl; install it, or use nccl")
        super().__init__(wire, trainer, shapes, rank, free_port)
        self._source = LayerByLayer(self.staging)
        self._engines: dict[str, RankZero] = {}

    def prepare(self, link: str, workers: int) -> dict[str, Any]:
        if old := self._engines.pop(link, None):
            old.shutdown()
        client = Passive()
        info = ShardedRDTTrainerInitInfo(
            num_consumers=workers,
            trainer_actor_namespace=NAMESPACE,
            stall_timeout_s=self.wire.timeout_s,
            rank=0,
        )
        self._engines[link] = RankZero.trainer_init(info, client=client, source=self._source)
        return client.told

    def meet(self, link: str) -> None:
        pass

    def updates(self, link: str) -> list[dict[str, Any]]:
        return [{}]

    def send(self, link: str) -> None:
        self._engines[link].send_weights()


class RankZero(ShardedRDTTrainerWeightTransferEngine):
    """vLLM's engine of a trainer of one rank, whatever process group it finds itself in."""

    def _world_and_rank(self) -> tuple[int, int]:
        return 1, 0


class LayerByLayer(WeightSource):
    """Weights in the order that this backend insists on: groups of one layer each, what is outside of any at the end.

    (Qwen3-VL's own order has the language model's embedding between the vision tower's layers and its own.)
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def metadata(self) -> list[ParamMeta]:
        metas = {meta.name: meta for meta in self._source.metadata()}
        return [metas[name] for group in layerwise_groups(list(metas)) for name in group]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tensors = dict(self._source)
        for meta in self.metadata():
            yield meta.name, tensors[meta.name]
