"""A mixture-of-experts policy takes live weights too: the expert layout of checkpoints, and experts packed anew."""

import numpy as np
import pytest
import ray
import torch
from transformers import AutoConfig, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from prism_ray.models.load import save_policy
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime.protocols import Ticket


@pytest.fixture(scope="module")
def mixture(folder, tmp_path_factory):
    """A random mixture like the dense policy; vLLM's CPU kernel pads experts of size 48, and cannot reload those."""
    dense = AutoConfig.from_pretrained(folder).to_dict()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    text = dense["text_config"] | experts | {"decoder_sparse_step": 1, "model_type": "qwen3_vl_moe_text"}
    vision = dense["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    ids = {n: dense[n] for n in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.1)
    target = tmp_path_factory.mktemp("mixture")
    save_policy(model, target, like=folder)
    return target


def test_log_probs_of_a_mixture_are_the_learners_before_and_after_updates(
    cluster, run, mixture, settings, ask, make_reference
):
    reference = make_reference(mixture)
    pool = run(RolloutPool.create(mixture, settings))
    try:
        for version in range(3):
            weights = reference.changed(seed=version) if version else reference.weights
            if version:
                run(pool.publish(weights, version))
            prompt = ask("p", seed=version)
            done = run(pool.generate(Ticket(0, "p", 0, prompt)))
            for r in ray.get(done.ref).rollouts:
                np.testing.assert_allclose(r.logp, reference.logp(r, prompt, weights), atol=1e-4, rtol=0)
    finally:
        run(pool.shutdown())
