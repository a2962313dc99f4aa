"""Faster kernels where a GPU and the package are there; nothing depends on them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_PATCHES = {
    "Qwen3VLForConditionalGeneration": "apply_liger_kernel_to_qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "apply_liger_kernel_to_qwen3_vl_moe",
}


def use_liger(model: Any) -> bool:
    """Give the text model's norms Liger's fused kernel; returns whether that was done.

    Only where CUDA answers and `liger-kernel` is installed: its kernels are Triton's and fail on a CPU. Of what Liger
    offers only the norms are taken: its loss would replace our log-probs, and its rotary embedding is patched for the
    whole process, other models included.
    """
    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        return False
    patch = getattr(import_module("liger_kernel.transformers"), _PATCHES[type(model).__name__])
    patch(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=False, model=model)
    return True
