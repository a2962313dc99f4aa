"""Sparse upcycling: what is copied, what is noise, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism_ray.models.batch import Sample, collate
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import load_policy
from prism_ray.models.upcycle import upcycle


@pytest.fixture(scope="module")
def dense(tiny_folder):
    return load_policy(tiny_folder).eval()


def test_without_noise_the_mixture_equals_the_dense_model(dense, encoder, prompt_of, response):
    moe = upcycle(dense, experts=4, top_k=2, expert_noise=0.0, router_init=0.5, seed=0)
    prompts = [encoder.prompt(prompt_of(seed, response())) for seed in range(2)]
    texts = (response(), response(think=" max two three"))
    batch = collate([Sample(p, torch.tensor(encoder.response(t))) for p, t in zip(prompts, texts, strict=True)])
    with torch.no_grad():
        real = batch.real_mask_BT
        old, new = (m.lm_head(final_hidden(m, batch))[real] for m in (dense, moe))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_everything_but_the_mlps_is_copied_and_the_head_stays_tied(dense):
    moe = upcycle(dense, experts=3, top_k=1, expert_noise=0.1, router_init=0.02, seed=0)
    new = moe.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".language_model.layers." in name and ".mlp." in name:
            assert name not in new
        else:
            torch.testing.assert_close(new[name], tensor, rtol=0, atol=0)
    assert moe.lm_head.weight is moe.get_input_embeddings().weight


def test_experts_are_noisy_copies_and_the_router_is_small(dense):
    moe = upcycle(dense, experts=4, top_k=2, expert_noise=0.01, router_init=0.02, seed=0)
    mlp, source = moe.model.language_model.layers[0].mlp, dense.model.language_model.layers[0].mlp
    gate_up = torch.cat([source.gate_proj.weight, source.up_proj.weight])
    noise = mlp.experts.gate_up_proj - gate_up
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)
    assert (mlp.experts.down_proj - source.down_proj.weight).std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(noise[0], noise[1])
    assert mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_upcycling_is_deterministic_and_leaves_the_global_random_state_alone(dense):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (upcycle(dense, 2, 1, 0.01, 0.02, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    assert torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name])


def test_more_active_experts_than_experts_are_refused(dense):
    with pytest.raises(ValueError, match="top_k is 3"):
        upcycle(dense, experts=2, top_k=3, expert_noise=0.0, router_init=0.0, seed=0)


def test_a_mixture_cannot_be_upcycled_again(dense):
    mixture: Any = upcycle(dense, 2, 1, 0.0, 0.0, 0)
    with pytest.raises(ValueError, match="Qwen3VLMoe"):
        upcycle(mixture, 2, 1, 0.0, 0.0, 0)
