"""Sparse upcycling: a dense Qwen3-VL becomes a Qwen3-VL-MoE in which every MLP is a mixture of copies of itself.

Attention, vision tower, norms and embeddings are copied; an expert is the dense MLP plus Gaussian noise; the router
starts near uniform. Without noise the mixture computes exactly what the dense model did, because
routing weights are normalised to one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)


def upcycle(
    dense: Qwen3VLForConditionalGeneration,
    experts: int,
    top_k: int,
    expert_noise: float,
    router_init: float,
    seed: int,
) -> Qwen3VLMoeForConditionalGeneration:
    """A mixture of `experts` copies of `dense`, `top_k` of them active per token, in the dense model's dtype.

    `expert_noise` and `router_init` are standard deviations, both absolute. Deterministic in `seed`. Raises
    ValueError if `top_k` exceeds `experts` or the model is no dense Qwen3-VL.
    """
    if not isinstance(dense, Qwen3VLForConditionalGeneration):
        raise ValueError(f"upcycling starts from a dense Qwen3-VL, not from a {type(dense).__name__}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} but must lie between 1 and experts = {experts}")
    config = moe_config(dense, experts, top_k)
    with torch.device("meta"):
        moe = Qwen3VLMoeForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    state = dict(_moe_tensors(dense.state_dict().items(), experts, expert_noise, generator))
    reference = next(dense.parameters())
    text: Any = config.text_config
    for layer in range(text.num_hidden_layers):
        noise = torch.randn(experts, text.hidden_size, generator=generator) * router_init
        state[f"model.language_model.layers.{layer}.mlp.gate.weight"] = noise.to(reference)
    moe.load_state_dict(state, strict=True, assign=True)
    _copy_buffers(dense, moe)
    moe.tie_weights()
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe.train(dense.training)


def moe_config(dense: PreTrainedModel, experts: int, top_k: int) -> Qwen3VLMoeConfig:
    """The mixture's configuration: the dense one with every MLP sparse and no shared expert."""
    source = dense.config.to_dict()
    text = _without_identity(source["text_config"])
    text |= {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": text["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,  # transformers always normalises; vLLM asks for the key
    }
    top = {k: v for k, v in _without_identity(source).items() if k not in ("text_config", "vision_config")}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_without_identity(source["vision_config"]), **top)
    config._attn_implementation = dense.config._attn_implementation
    return config


def _moe_tensors(
    state: Iterable[tuple[str, Tensor]], experts: int, noise: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    gates: dict[str, Tensor] = {}
    for name, tensor in state:
        if ".language_model.layers." not in name or ".mlp." not in name:
            yield name, tensor.detach().clone()
            continue
        prefix, projection = name.split(".mlp.")
        if projection == "down_proj.weight":
            yield f"{prefix}.mlp.experts.down_proj", _spread(tensor, experts, noise, generator)
        elif prefix not in gates:  # gate_proj and up_proj share one tensor; whichever comes first waits
            gates[prefix] = tensor
        else:
            pair = (gates.pop(prefix), tensor) if projection == "up_proj.weight" else (tensor, gates.pop(prefix))
            yield f"{prefix}.mlp.experts.gate_up_proj", _spread(torch.cat(pair), experts, noise, generator)


def _spread(weight: Tensor, experts: int, noise: float, generator: torch.Generator) -> Tensor:
    copies = weight.detach().expand(experts, *weight.shape).clone()
    if noise:
        copies += noise * torch.randn(copies.shape, generator=generator).to(copies)
    return copies


def _copy_buffers(dense: PreTrainedModel, moe: PreTrainedModel) -> None:
    """Non-persistent buffers (rotary frequencies) are in no state dict; the two models' agree by construction."""
    for name, buffer in dense.named_buffers():
        owner, _, leaf = name.rpartition(".")
        moe.get_submodule(owner).register_buffer(leaf, buffer.detach().clone(), persistent=False)


def _without_identity(config: dict) -> dict:
    drop = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype")
    return {k: v for k, v in config.items() if k not in drop}
