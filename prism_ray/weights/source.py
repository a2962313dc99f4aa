"""The trainer's weights as vLLM's own trainer-side engines (`nccl`, `ipc`) want them: declared first, then streamed.

Those engines are called on every rank. Rank 0 sends; the others only iterate the source, because whole weights are put
together by all of them (ZeRO-3). The engines do that themselves, so nobody else has to drain a source.

Experts go as checkpoint files hold them: one tensor for all experts of a layer, transposed. vLLM's Qwen3-VL-MoE always
transposes such a tensor back, at the first load and at every update alike. It also takes a name for every expert and
projection, which its examples advise because it needs no knowledge of the layout; that would be 3 x experts tensors a
layer instead of 2, under names that no checkpoint of this model has and transformers cannot read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from prism_ray.models.load import HEAD, as_filed, filed_shape
from prism_ray.weights.files import Shapes, check_complete


class Trainer(Protocol):
    """Who has the weights: `learner.engine.TrainEngine`, or anything that can stream them."""

    def weight_shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every weight, in the order of `stream_weights` and without communication."""
        ...

    def stream_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, whole. Every rank iterates; a tensor may be gone after the next."""
        ...


class TrainerWeights(WeightSource):
    """The weights of `trainer` for an engine that started from a checkpoint with `shapes` (`files.shapes_in`).

    `dtype` is the type they are sent in, if not their own: bfloat16 halves the bytes of a policy trained in float32.
    A tied output layer is left out. The order is the trainer's: by layers, because vLLM holds back what it has of a
    layer until all of it is there.

    Raises ValueError for a tensor that the engine does not expect, or that is missing or misshapen: on construction if
    the trainer declares it so, during iteration if it streams other than it declared. All ranks raise alike, so that
    none waits for another.
    """

    def __init__(self, trainer: Trainer, shapes: Shapes, dtype: torch.dtype | None = None) -> None:
        self._trainer, self._dtype = trainer, dtype
        self._unsent = {HEAD} - shapes.keys()
        self._declared = [
            (name, tuple(shape), own)
            for name, (shape, own) in trainer.weight_shapes().items()
            if name not in self._unsent
        ]
        check_complete({meta.name: meta.shape for meta in self.metadata()}, shapes, "weights of the trainer")

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of everything that iterating will yield, in its order; no communication."""
        return [ParamMeta(name, self._dtype or own, filed_shape(name, shape)) for name, shape, own in self._declared]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh pass over the weights as they are now. Every rank must iterate to the end.

        What it yields are copies, on the trainer's device: engines gather several tensors before they send them.
        """
        streamed = (pair for pair in self._trainer.stream_weights() if pair[0] not in self._unsent)
        for declared, pair in itertools.zip_longest(self._declared, streamed):
            given = pair and (pair[0], tuple(pair[1].shape), pair[1].dtype)
            if given != declared:
                raise ValueError(
                    f"weights of the trainer: {_named(given)} came where {_named(declared)} was declared; "
                    "stream_weights and weight_shapes must agree"
                )
            name, weight = pair
            dtype = self._dtype or weight.dtype
            filed = as_filed(name, weight.detach())
            yield name, filed.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _named(tensor: tuple[str, tuple[int, ...], torch.dtype] | None) -> str:
    return "no tensor" if tensor is None else f"tensor {tensor[0]} {list(tensor[1])} {tensor[2]}"
