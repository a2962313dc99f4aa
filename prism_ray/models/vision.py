"""Qwen3-VL's vision tower, batched over images.

Hugging Face attends image by image in a Python loop and embeds patches with a 3-D convolution; where all images of a
batch have the same grid, both are plain batched matrix products here, with the same result.

Whatever the images, the tower's parameters are touched in the same order and equally often. Under ZeRO-3 each touch is
a collective, and ranks whose images differ would otherwise wait for different parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids


def encode_images(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Visual tokens of a batch of images.

    `visual` is the vision model of Qwen3-VL (dense or MoE), `pixel_values` [patches, 1536] the images' patches one
    image after another, `grid_thw` [images, 3] their grids. Returns the merged tokens [tokens, hidden] in the order of
    the images, and the same for each deepstack level.
    """
    grids = [tuple(grid) for grid in grid_thw.tolist()]
    projection = visual.patch_embed.proj
    weight = projection.weight.reshape(projection.weight.shape[0], -1)
    hidden_PD = F.linear(pixel_values.to(weight.dtype), weight, projection.bias)
    positions_PD, cos_PE, sin_PE = _positions(visual, grids)
    hidden_PD = hidden_PD + positions_PD.to(hidden_PD.dtype)
    seen = [h * w for t, h, w in grids for _ in range(t)]  # patches see those of their own frame
    deepstack = []
    for index, block in enumerate(visual.blocks):
        if block.gradient_checkpointing and block.training:
            hidden_PD = checkpoint(_block, block, hidden_PD, cos_PE, sin_PE, seen, use_reentrant=False)
        else:
            hidden_PD = _block(block, hidden_PD, cos_PE, sin_PE, seen)
        if index in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
            deepstack.append(merger(hidden_PD))
    return visual.merger(hidden_PD), deepstack


def _block(block: Any, hidden_PD: Tensor, cos_PE: Tensor, sin_PE: Tensor, seen: list[int]) -> Tensor:
    hidden_PD = hidden_PD + _attend(block.attn, block.norm1(hidden_PD), cos_PE, sin_PE, seen)
    return hidden_PD + block.mlp(block.norm2(hidden_PD))


def _positions(visual: Any, grids: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Position embeddings [patches, hidden] and rotary cosines and sines [patches, head_dim] of all images.

    Each distinct grid is worked out once, all of them with one look-up.
    """
    device = visual.pos_embed.weight.device
    sizes = {grid: torch.tensor([grid], device=device) for grid in grids}
    options = {
        "num_grid_per_side": visual.num_grid_per_side,
        "mode": visual.interpolation_mode,
        "align_corners": visual.interpolation_align_corners,
        "spatial_merge_size": visual.spatial_merge_size,
    }
    corners = [get_vision_interpolation_indices_and_weights(size, **options) for size in sizes.values()]
    indices, weights = (torch.cat(parts) for parts in zip(*corners, strict=True))
    embeddings = (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    places = torch.cat([get_vision_position_ids(size, visual.spatial_merge_size) for size in sizes.values()])
    cos, sin = visual.rotary_pos_emb(embeddings, places)
    lengths = [len(part) for part, _ in corners]
    by_grid = [dict(zip(sizes, x.split(lengths), strict=True)) for x in (embeddings, cos, sin)]
    embeddings, cos, sin = (torch.cat([of[grid] for grid in grids]) for of in by_grid)
    return embeddings, cos, sin


def _attend(attention: Any, hidden_PD: Tensor, cos_PE: Tensor, sin_PE: Tensor, seen: list[int]) -> Tensor:
    """Attention within each of the frames, which have `seen` patches; frames of one size are a single batch."""
    heads = attention.num_heads
    query, key, value = attention.qkv(hidden_PD).view(len(hidden_PD), 3, heads, -1).permute(1, 2, 0, 3)  # [heads, P, E]
    query, key = _rotate(query, cos_PE, sin_PE), _rotate(key, cos_PE, sin_PE)
    if len(set(seen)) == 1:
        q, k, v = (x.unflatten(1, (len(seen), seen[0])).transpose(0, 1) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1, 2)
    else:
        parts = zip(*(x.split(seen, dim=1) for x in (query, key, value)), strict=True)
        mixed = torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in parts], dim=1)
    return attention.proj(mixed.transpose(0, 1).flatten(1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, computed in float32 as Hugging Face does."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)
