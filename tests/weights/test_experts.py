"""Experts of a size that vLLM's CPU kernel pads cannot take new weights: refused at the start."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from prism_ray.weights.reload import check_experts


def mixture(rows):
    """A module with vLLM's own kernel object for experts of so many rows, as its layers hold it."""
    experts = object.__new__(CPUUnquantizedExperts)
    experts.moe_config = SimpleNamespace(intermediate_size_per_partition=rows, activation=MoEActivation.SILU)
    layer = torch.nn.Module()
    layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts))
    return torch.nn.Sequential(torch.nn.Linear(2, 2), layer)


def test_padded_experts_are_refused_with_the_size_to_choose():
    with pytest.raises(ValueError, match="moe_intermediate_size 48.*pads to 64.*a multiple of 32"):
        check_experts(mixture(48))


def test_experts_that_fit_are_accepted():
    check_experts(mixture(64))
    check_experts(torch.nn.Linear(2, 2))
