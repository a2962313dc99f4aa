"""Causal attention in which the samples of a packed row do not see each other, registered with transformers.

Hugging Face's `sdpa` expresses packing as a mask of [S, S]; here attention runs within pieces, those of similar length
together, so that a score between two samples is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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

_PADDING = 1.25
"""Pieces are computed together if none is longer than the shortest of them times this (measured on a CPU)."""

_SCORES = 2**24
"""Scores of one head that are computed together: bounds the memory of a mask and of gathered keys."""


@dataclass(frozen=True, eq=False)
class Together:
    """N pieces that are computed at once, padded on the right to Q queries and K keys.

    `queries_NQ` and `keys_NK` are positions in the row, padded with each piece's first; `mask_N1QK` (bool) says which
    keys a query sees, and is None where that is causal attention, keys and queries being the same.
    """

    queries_NQ: Tensor
    keys_NK: Tensor
    mask_N1QK: Tensor | None


@dataclass(frozen=True, eq=False)
class Segments:
    """How a row is made up: pieces one after another, each of which goes on from a prefix that stands elsewhere in it.

    `lengths` are the pieces' tokens (at least one); `prefixes` the positions in the row, int64 [P], that a piece sees
    before its own tokens (P = 0 where a piece begins a sample). A piece sees its whole prefix, and itself causally.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[Tensor, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Pieces of these lengths, none of which has a prefix."""
        return cls(tuple(lengths), tuple(torch.zeros(0, dtype=torch.int64) for _ in lengths))

    def to(self, device: torch.device | str) -> Segments:
        return replace(self, device=torch.device(device))

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [N + 1]: where the pieces begin and the row ends."""
        return self._offsets(self.lengths)

    @cached_property
    def key_offsets(self) -> Tensor:
        """int32 [N + 1]: where the keys of each piece begin if those of all are laid one after another."""
        return self._offsets([len(keys) for keys in self._keys])

    @cached_property
    def keys(self) -> Tensor | None:
        """int64: positions of all pieces' keys, prefix and own; None where they are the row itself."""
        return torch.cat(self._keys).to(self.device) if any(len(p) for p in self.prefixes) else None

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys that a piece has."""
        return max(self.lengths), max(len(keys) for keys in self._keys)

    @cached_property
    def together(self) -> list[Together]:
        """The pieces, those of similar length together."""
        return [self._padded(members) for members in self._members]

    @cached_property
    def places(self) -> Tensor:
        """int64 [S]: where each position of the row is among the queries of `together`, one after another."""
        places, first = torch.empty(sum(self.lengths), dtype=torch.int64), 0
        for members in self._members:
            width = max(self.lengths[i] for i in members)
            for i in members:
                places[self._own[i]] = torch.arange(first, first + self.lengths[i])
                first += width
        return places.to(self.device)

    def mask(self) -> Tensor:
        """bool [S, S]: which positions (columns) a position (rows) sees, for implementations that need it whole."""
        mask_SS = torch.zeros(2 * (sum(self.lengths),), dtype=torch.bool)
        for prefix, own in zip(self.prefixes, self._own, strict=True):
            mask_SS[own[:, None], prefix] = True
            mask_SS[own[:, None], own] = own <= own[:, None]
        return mask_SS.to(self.device)

    @cached_property
    def _own(self) -> tuple[Tensor, ...]:
        """Positions of the pieces' own tokens."""
        return torch.arange(sum(self.lengths)).split(list(self.lengths))

    @cached_property
    def _keys(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(self.prefixes, self._own, strict=True)]

    @cached_property
    def _members(self) -> list[list[int]]:
        """Pieces that are computed together: with a prefix or without, of similar length, of bounded size."""
        groups: list[list[int]] = []
        for i in sorted(range(len(self.lengths)), key=lambda i: (len(self.prefixes[i]) > 0, self.lengths[i])):
            first = groups[-1][0] if groups else None
            if first is not None and self._alike(first, i) and self._scores([*groups[-1], i]) <= _SCORES:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _alike(self, shorter: int, longer: int) -> bool:
        similar = self.lengths[longer] <= _PADDING * self.lengths[shorter]
        return similar and (len(self.prefixes[shorter]) > 0) == (len(self.prefixes[longer]) > 0)

    def _scores(self, members: list[int]) -> int:
        return len(members) * max(self.lengths[i] for i in members) * max(len(self._keys[i]) for i in members)

    def _padded(self, members: list[int]) -> Together:
        queries_NQ = _side_by_side([self._own[i] for i in members])
        keys_NK = _side_by_side([self._keys[i] for i in members])
        if not len(self.prefixes[members[0]]):
            return Together(queries_NQ.to(self.device), keys_NK.to(self.device), None)
        last_N = torch.tensor([len(self.prefixes[i]) for i in members])
        last_NQ = last_N[:, None] + torch.arange(queries_NQ.shape[1])  # the last key that each query sees
        mask_N1QK = torch.arange(keys_NK.shape[1]) <= last_NQ[:, None, :, None]
        return Together(*(x.to(self.device) for x in (queries_NQ, keys_NK, mask_N1QK)))

    def _offsets(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)


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
    query_SHD, key_SHD, value_SHD = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    mixed = []
    for some in segments.together:
        mixed_NHQD = F.scaled_dot_product_attention(
            _gather(query_SHD, some.queries_NQ),
            _gather(key_SHD, some.keys_NK),
            _gather(value_SHD, some.keys_NK),
            attn_mask=some.mask_N1QK,
            is_causal=some.mask_N1QK is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        mixed.append(mixed_NHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed).index_select(0, segments.places)[None], None


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Padded with each row's own first, which all its queries see: what is not finite elsewhere stays there, though a
    key of weight 0 is multiplied in."""
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat((row, row[:1].expand(width - len(row)))) for row in rows])


def _gather(x_SHD: Tensor, positions_NQ: Tensor) -> Tensor:
    """[N, H, Q, D] of these positions."""
    return x_SHD.index_select(0, positions_NQ.flatten()).unflatten(0, positions_NQ.shape).transpose(1, 2)


def uses_packed(language_model: Any) -> bool:
    """Whether this text model attends by `packed_attention`."""
    return language_model.config._attn_implementation == PACKED


def _has_varlen_kernel(query: Tensor) -> bool:
    """Whether PyTorch's variable-length flash attention takes such a query."""
    flash = query.is_cuda and torch.backends.cuda.is_flash_attention_available()
    return flash and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """The kernel aligns causality at the lower right: the last query of a piece sees its last key, as ours must."""
    from torch.nn.attention.varlen import varlen_attn

    query_SHD, key_KHD, value_KHD = (x[0].transpose(0, 1) for x in (query, key, value))
    if segments.keys is not None:
        key_KHD, value_KHD = (x.index_select(0, segments.keys) for x in (key_KHD, value_KHD))
    mixed_SHD = varlen_attn(
        query_SHD,
        key_KHD,
        value_KHD,
        segments.offsets,
        segments.key_offsets,
        *segments.longest,
        scale=scaling,
        window_size=(-1, 0),  # to the left without end, to the right not at all: causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed_SHD, Tensor)
    return mixed_SHD[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
