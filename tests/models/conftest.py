"""Tiny models for this room: a dense folder as published ones are, a mixture of experts like it, and prompts."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.load import load_policy, save_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt

WORDS = ["max", "min", "count", "of", "red", "green", "blue", *"ABCDEF", *(str(i) for i in range(20))]

torch.set_num_threads(1)


def picture(seed: int, width: int = 96, height: int = 64) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(name: str, *images: bytes, question: str = " max of red") -> Prompt:
    """A prompt that shows the images and asks the question."""
    content = "<image>" * len(images) + question
    return Prompt(id=name, messages=({"role": "user", "content": content},), images=images)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    build_tiny(folder, WORDS, TinyModelSettings(embedding_std=0.3), seed=0)
    return folder


@pytest.fixture(scope="session")
def moe_folder(dense_folder, tmp_path_factory):
    torch.manual_seed(1)
    dense = AutoConfig.from_pretrained(dense_folder).to_dict()
    text = dense["text_config"] | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "model_type": "qwen3_vl_moe_text",
    }
    vision = dense["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    ids = {n: dense[n] for n in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.1)
    folder = tmp_path_factory.mktemp("moe")
    save_policy(model, folder, like=dense_folder)
    return folder


@pytest.fixture(scope="session", params=["dense", "moe"])
def policy_folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def policy(policy_folder):
    return load_policy(policy_folder)


@pytest.fixture(scope="session")
def prompts():
    """Text only, one image, another size, several images of several sizes."""
    return [
        ask("text"),
        ask("one", picture(0), question=" count of blue"),
        ask("tall", picture(1, 64, 160)),
        ask("many", picture(2), picture(3, 64, 64), picture(4), question=" min of red green blue"),
    ]


@pytest.fixture(name="picture", scope="session")
def _picture():
    return picture


@pytest.fixture(name="ask", scope="session")
def _ask():
    return ask
