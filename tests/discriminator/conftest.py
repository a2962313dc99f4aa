"""What the discriminator's tests share: an untrained tiny Qwen3-VL and groups of hand-written responses."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import OptimiserSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.discriminator.model import Discriminator, build_discriminator
from prism_ray.discriminator.trainer import DiscriminatorTrainer
from prism_ray.learner.engine import init_process_group
from prism_ray.models.encode import Encoder
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.response import render

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "max", "count"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("discriminator_tiny")
    sizes = TinyModelSettings(hidden_size=64, layers=2, heads=2, key_value_heads=1, mlp_size=96, vision_mlp_size=64)
    build_tiny(folder, WORDS, sizes, seed=0)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_folder) -> Encoder:
    return Encoder(tiny_folder, max_prompt_tokens=128)


@pytest.fixture
def settings() -> DiscriminatorSettings:
    return DiscriminatorSettings(
        max_segment_tokens=24, micro_batch_tokens=512, optimiser=OptimiserSettings(lr=3e-3, zero_stage=0)
    )


@pytest.fixture
def in_context() -> Callable[..., DiscriminatorSettings]:
    """Settings whose views are judged in this context."""

    def make(settings: DiscriminatorSettings, context: str) -> DiscriminatorSettings:
        views = tuple(view.model_copy(update={"context": context}) for view in settings.views)
        return settings.model_copy(update={"views": views})

    return make


@pytest.fixture
def build(tiny_folder, settings) -> Callable[..., Discriminator]:
    """A fresh discriminator; keyword arguments change its settings."""

    def make(**changes) -> Discriminator:
        return build_discriminator(tiny_folder, settings.model_copy(update=changes), seed=0).eval()

    return make


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., Prompt]:
    """A prompt about one random image; the reference is a response text."""

    def make(seed: int, reference: str, question: str = " count red") -> Prompt:
        pixels = np.random.default_rng(seed).integers(0, 255, (32, 64, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        messages = ({"role": "user", "content": f"<image>{question}"},)
        return Prompt(f"prompt-{seed}", messages, (data.getvalue(),), reference)

    return make


@pytest.fixture(scope="session")
def group_of(prompt_of) -> Callable[..., Group]:
    """A group: the seed of its image, the reference's text, the rollouts' texts."""

    def make(seed: int, reference: str, *texts: str) -> Group:
        prompt = prompt_of(seed, reference)
        return Group(seed, prompt, tuple(_rollout(prompt.id, i, text) for i, text in enumerate(texts)))

    return make


@pytest.fixture(scope="session")
def response() -> Callable[..., str]:
    """A response from its three parts."""

    def make(caption: str = " red one", think: str = " count one", answer: str = " one") -> str:
        return render(caption, think, answer)

    return make


@pytest.fixture(scope="session")
def process_group():
    """A process group of one for the whole session: DeepSpeed remembers the first one it has met."""
    started = not torch.distributed.is_initialized()
    if started:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        init_process_group(0, 1, "127.0.0.1", port, timeout_s=60)
    yield
    if started:
        torch.distributed.destroy_process_group()


@pytest.fixture
def train(build, encoder, process_group) -> Callable[..., DiscriminatorTrainer]:
    """A trainer of a fresh discriminator; keyword arguments change its settings."""

    def make(**changes) -> DiscriminatorTrainer:
        model = build(**changes)
        return DiscriminatorTrainer(model, encoder, model.settings)

    return make


@pytest.fixture
def groups(group_of, response):
    """Four prompts whose reference names another thing than the rollouts; some rollouts repeat it, some are broken."""

    def make(count: int = 4):
        made = []
        for seed in range(count):
            reference = response(" red one two", " max one", " one")
            texts = [response(" blue three", " max three", " three"), "broken", reference, response(" green", " two")]
            made.append(group_of(seed, reference, *texts))
        return made

    return make


def _rollout(prompt_id: str, index: int, text: str) -> Rollout:
    none = np.zeros(0, np.int32)
    return Rollout(prompt_id, index, none, none, np.zeros(0, np.float32), none, text, "stop")
