"""vLLM weight-transfer backend: new weights reach an engine's workers as safetensors files, best in shared memory.

Importing this module registers the backend with vLLM's factory; `rollout/engine.py` names a class that imports it as
the engine's worker extension, so that spawned workers have it too. vLLM's own layerwise reload does the loading:
weights are prepacked on the CPU backend, padded or quantised on others, and cannot be copied in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "prism_ray_shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on before the first update."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """`files`: safetensors files that every worker can read; whoever wrote them removes them afterwards."""

    files: list[str] = field(default_factory=list)


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """The receiving side, in a vLLM worker."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Refuse, before anything is sampled, a model that could not take new weights."""
        check_experts(self.model)

    def start_weight_update(self) -> None:
        self._loaded: set[str] = set()
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        with torch.no_grad():
            model: Any = self.model
            self._loaded |= model.load_weights(_tensors(update_info.files))

    def finish_weight_update(self) -> None:
        """Process what was loaded. A parameter that received nothing is an error: it would silently stay old."""
        finalize_layerwise_reload(self.model, self.model_config)
        _refresh_tied_heads(self.model)
        if self.device.type == "cpu":
            _repack_experts(self.model)
        if missing := sorted(self._expected - self._loaded):
            raise RuntimeError(f"weight update: {len(missing)} parameters received no values, {missing[0]} among them")

    def shutdown(self) -> None:
        pass


def check_experts(model: torch.nn.Module) -> None:
    """Raise ValueError if vLLM's CPU kernel pads the experts: an update then fails half-way, at tensors of the wrong
    size, and leaves mixed weights."""
    for module in model.modules():
        experts = getattr(getattr(getattr(module, "quant_method", None), "moe_kernel", None), "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            rows = experts.moe_config.intermediate_size_per_partition
            padded = experts._padded_intermediate_size(experts.moe_config)
            if rows != padded:
                raise ValueError(
                    f"the policy's experts have moe_intermediate_size {rows}, which vLLM's CPU kernel pads to {padded} "
                    f"so that they cannot take new weights; make it a multiple of {experts._intermediate_alignment()}"
                )


def _tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _refresh_tied_heads(model: torch.nn.Module) -> None:
    """Prepack every embedding again.

    The CPU backend keeps a packed copy of an output layer's weight. When that layer is tied to the embedding, the
    reload renews only the embedding's, and the output layer would go on with the old one.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)


def _repack_experts(model: torch.nn.Module) -> None:
    """Prepack the experts of every mixture, which the CPU backend does at the first load only.

    Without this its kernel reads the new weights as if they were packed, and computes noise.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def _register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:  # imported again by name in the same process
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)


_register()
