"""vLLM weight-transfer backend: new weights reach an engine's workers as safetensors files, best in shared memory.

Importing this module registers the backend with vLLM's factory; `rollout/engine.py` names a class that imports it as
the engine's worker extension, so that spawned workers have it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from prism_ray.weights.reload import ReloadingEngine, check_experts, register
from prism_ray.weights.transports import TRANSPORTS

BACKEND = TRANSPORTS["shared_memory"].backend


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on before the first update."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """`files`: safetensors files that every worker can read; whoever wrote them removes them afterwards."""

    files: list[str] = field(default_factory=list)


class SharedMemoryWeightTransferEngine(ReloadingEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """The receiving side, in a vLLM worker."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Refuse, before anything is sampled, a model that could not take new weights."""
        check_experts(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        self.load(_tensors(update_info.files))


def load_files(worker: Any, files: list[str]) -> None:
    """Load the files of a checkpoint into a vLLM worker, whatever transport its engine was started with."""
    config = WeightTransferConfig(backend=BACKEND)
    model = worker.model_runner.get_model()
    engine = SharedMemoryWeightTransferEngine(config, worker.vllm_config, worker.device, model)
    with set_current_vllm_config(worker.vllm_config):
        engine.start_weight_update()
        engine.update_weights({"files": files})
        engine.finish_weight_update()
    worker.model_runner.reset_lora_state()  # as after an update of vLLM's own


def _tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


register(BACKEND, SharedMemoryWeightTransferEngine)
