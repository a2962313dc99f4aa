"""New weights into a running vLLM model: its own layerwise reload, and what that leaves undone on the CPU backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

I = TypeVar("I", bound=WeightTransferInitInfo)  # noqa: E741
U = TypeVar("U", bound=WeightTransferUpdateInfo)


class ReloadingEngine(WeightTransferEngine[I, U]):
    """The receiving side of our own backends, in a vLLM worker: they differ in where the weights come from.

    vLLM's own layerwise reload does the loading: weights are prepacked on the CPU backend, padded or quantised on
    others, and cannot be copied in place.
    """

    def start_weight_update(self) -> None:
        self._loaded: set[str] = set()
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take some of the weights, by the names that checkpoint files have."""
        with torch.no_grad():
            model: Any = self.model
            self._loaded |= model.load_weights(weights)

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


def register(backend: str, engine: type[WeightTransferEngine[Any, Any]]) -> None:
    """Make a backend known to vLLM; again (imported by another name in the same process) does nothing."""
    if backend not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(backend, engine)


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
