"""Qwen3-VL's vision tower, batched over images.

Hugging Face attends image by image in a Python loop and embeds patches with a 3-D convolution; where all images of a
batch have the same grid, both are plain batched matrix products with the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids


def encode_images(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Visual tokens of a batch of images.

    `visual` is the vision model of Qwen3-VL (dense or MoE), `pixel_values` [patches, 1536] the images' patches one
    image after another, `grid_thw` [images, 3] their grids. Returns the merged tokens [tokens, hidden] in the order of
    the images, and the same for each deepstack level.
    """
    if len(grid_thw) > 1 and bool((grid_thw == grid_thw[0]).all()) and int(grid_thw[0, 0]) == 1:
        return _encode_equal(visual, pixel_values, grid_thw)
    output = visual(pixel_values, grid_thw=grid_thw)
    return output.pooler_output, list(output.deepstack_features)


def _encode_equal(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    images, patches = len(grid_thw), int(grid_thw[0].prod())
    positions, cos, sin = _positions(visual, grid_thw[:1])
    projection = visual.patch_embed.proj
    weight = projection.weight.reshape(projection.weight.shape[0], -1)
    hidden_NPD = F.linear(pixel_values.to(weight.dtype), weight, projection.bias).view(images, patches, -1)
    hidden_NPD = hidden_NPD + positions.to(hidden_NPD.dtype)
    deepstack = []
    for index, block in enumerate(visual.blocks):
        hidden_NPD = hidden_NPD + _attend(block.attn, block.norm1(hidden_NPD), cos, sin)
        hidden_NPD = hidden_NPD + block.mlp(block.norm2(hidden_NPD))
        if index in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
            deepstack.append(merger(hidden_NPD.flatten(0, 1)))
    return visual.merger(hidden_NPD.flatten(0, 1)), deepstack


def _positions(visual: Any, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one grid: its position embeddings [patches, hidden] and rotary cosines and sines [patches, head_dim]."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.spatial_merge_size,
    )
    embeddings = (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(embeddings, get_vision_position_ids(grid, visual.spatial_merge_size))
    return embeddings, cos, sin


def _attend(attention: Any, hidden_NPD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    images, patches, width = hidden_NPD.shape
    heads = attention.num_heads
    query, key, value = attention.qkv(hidden_NPD).view(images, patches, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value)
    return attention.proj(mixed.transpose(1, 2).reshape(images, patches, width))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, computed in float32 as Hugging Face does."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)
