"""Causal attention in which the samples of a packed row do not see each other, registered with transformers.

Hugging Face's `sdpa` expresses packing as a mask of [S, S]; here attention runs within each sample, so that neither a
mask nor a score between two samples is ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "prism_packed"
"""Name of the attention implementation, as `attn_implementation` takes it."""

IMPLEMENTATION = {"": "sdpa", "text_config": PACKED, "vision_config": "sdpa"}
"""The choice for a Qwen3-VL(-MoE) model: the vision tower attends within images by itself."""


@dataclass(frozen=True, eq=False)
class Segments:
    """How a packed row is made up: the samples' lengths in order, and int32 [B + 1] offsets of their first tokens."""

    lengths: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Samples of these lengths, one after another."""
        return cls(tuple(lengths), torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))

    def to(self, device: torch.device | str) -> Segments:
        return replace(self, offsets=self.offsets.to(device, non_blocking=True))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: query [1, H, S, D], key and value [1, H', S, D] (H' divides H).

    Returns [1, S, H, D]. Without `segments` it is transformers' `sdpa` in everything, masks included.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    if attention_mask is not None:
        raise ValueError("a packed row takes no attention_mask; its segments say who sees whom")
    if _has_varlen_kernel(query):
        return _varlen(query, key, value, segments, scaling), None
    lengths = list(segments.lengths)
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    mixed = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped) for q, k, v in parts
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def uses_packed(language_model: Any) -> bool:
    """Whether this text model attends by `packed_attention`."""
    return language_model.config._attn_implementation == PACKED


def _has_varlen_kernel(query: Tensor) -> bool:
    """Whether PyTorch's variable-length flash attention takes such a query."""
    flash = query.is_cuda and torch.backends.cuda.is_flash_attention_available()
    return flash and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(segments.lengths)
    query_SHD, key_SHD, value_SHD = (x[0].transpose(0, 1) for x in (query, key, value))
    mixed_SHD = varlen_attn(
        query_SHD,
        key_SHD,
        value_SHD,
        segments.offsets,
        segments.offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # to the left without end, to the right not at all: causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed_SHD, Tensor)
    return mixed_SHD[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
