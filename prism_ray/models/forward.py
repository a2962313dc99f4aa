"""The forward pass up to the final hidden states: images once, whole batch at once, dense and mixture-of-experts.

The sub-modules of the Hugging Face model are called as they are (so ZeRO hooks, gradient checkpointing and attention
kernels work); only what lies between them is ours: where visual features go, and which positions tokens have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prism_ray.models.attention import uses_packed
from prism_ray.models.batch import Batch
from prism_ray.models.routing import ROUTER_SHIFT
from prism_ray.models.vision import encode_images


def final_hidden(
    model: Any, batch: Batch, router_logits: list[Tensor] | None = None, router_shift_ND: Tensor | None = None
) -> Tensor:
    """Final hidden states (after the last norm) of a Qwen3-VL(-MoE) ForConditionalGeneration model.

    They are [B, T, D], or [1, S, D] of a packed batch. For a mixture of experts, each layer's router logits
    [tokens, experts] are appended to `router_logits` if a list is given; padded tokens are among them
    (`batch.real_mask_BT` tells). `router_shift_ND` is added, token by token, to what every router reads
    (`models/routing.py`). A batch without images still runs the vision tower, on a blank patch with weight
    0: ranks whose batches differ in that would otherwise gather or reduce different parameters and hang or abort.
    """
    inner = model.model
    embeds_BTD = inner.get_input_embeddings()(batch.input_ids_BT)
    options = _seen(inner.language_model, batch)
    if len(batch.grid_thw):
        merged_ND, deepstack = encode_images(inner.visual, batch.pixel_values, batch.grid_thw)
        embeds_BTD = _put(embeds_BTD, batch.visual_positions_V, merged_ND[batch.visual_sources_V])
        mask = torch.zeros(embeds_BTD.shape[:2].numel(), dtype=torch.bool, device=embeds_BTD.device)
        mask[batch.visual_positions_V] = True
        options["visual_pos_masks"] = mask.view(embeds_BTD.shape[:2])
        options["deepstack_visual_embeds"] = [feature[batch.visual_sources_V] for feature in deepstack]
    else:
        embeds_BTD = embeds_BTD + _blank_image(inner.visual, batch.pixel_values)
    if router_logits is not None:
        options["output_router_logits"] = True
    if router_shift_ND is not None:
        options[ROUTER_SHIFT] = router_shift_ND
    output = inner.language_model(inputs_embeds=embeds_BTD, use_cache=False, **options)
    if router_logits is not None:
        router_logits.extend(output.router_logits)
    return output.last_hidden_state


def _seen(language_model: Any, batch: Batch) -> dict[str, Any]:
    """The positions of the tokens, and what keeps packed samples from seeing each other.

    That is `segments` for our own attention; every other implementation is given a mask of [S, S].
    """
    options: dict[str, Any] = {"position_ids": batch.position_ids_3BT, "attention_mask": None}
    if batch.segments is None:
        return options
    if uses_packed(language_model):
        return options | {"segments": batch.segments}
    hidden_SS = ~batch.segments.mask()
    dtype = language_model.dtype
    lowest = torch.finfo(dtype).min
    return options | {"attention_mask": hidden_SS.to(dtype).masked_fill(hidden_SS, lowest)[None, None]}


def _put(embeds_BTD: Tensor, positions_V: Tensor, features_VD: Tensor) -> Tensor:
    """The embeddings with the features at these flat positions; positions are distinct."""
    flat = embeds_BTD.flatten(0, 1)
    return flat.index_copy(0, positions_V, features_VD.to(flat.dtype)).view_as(embeds_BTD)


def _blank_image(visual: Any, pixel_values: Tensor) -> Tensor:
    """Zero, through every parameter of the vision tower."""
    merge = visual.spatial_merge_size
    pixels = pixel_values.new_zeros(merge * merge, pixel_values.shape[1])
    grid = torch.tensor([[1, merge, merge]], device=pixel_values.device)
    merged, deepstack = encode_images(visual, pixels, grid)
    return 0.0 * (merged.sum() + sum(feature.sum() for feature in deepstack))
