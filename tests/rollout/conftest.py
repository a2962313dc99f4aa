"""One engine for the whole room (starting one takes half a minute), and the learner's arithmetic to hold it against."""

import asyncio
import io

import numpy as np
import pytest
import torch
from PIL import Image

from prism_ray.config.models import TinyModelSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Prompt
from prism_ray.rollout.pool import RolloutPool
from prism_ray.testbed.words import vocabulary

torch.set_num_threads(1)

SETTINGS = RolloutSettings(
    group_size=4, max_response_tokens=48, max_model_len=320, kv_cache_gb=0.1, max_images=2, max_restarts=1
)


class Reference:
    """The policy as the learner computes it, from a checkpoint folder."""

    def __init__(self, folder):
        self.folder = folder
        self.encoder = Encoder(folder, SETTINGS.max_prompt_tokens)
        self.model = load_policy(folder).eval()
        self.weights = {n: w.numpy().copy() for n, w in self.model.state_dict().items() if n != "lm_head.weight"}

    def logp(self, rollout, prompt, weights=None, banned=True):
        """Log-probs of the rollout's tokens under `weights` (default: the checkpoint's)."""
        tensors = {n: torch.from_numpy(w) for n, w in (weights or self.weights).items()}
        self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()
        sample = Sample(self.encoder.prompt(prompt), torch.tensor(rollout.token_ids, dtype=torch.int64))
        banned_ids = self.encoder.banned_ids if banned else []
        with torch.no_grad():
            logp_BR, _ = response_logprobs(self.model, collate([sample]), banned_ids=banned_ids)
        return logp_BR[0].numpy()

    def changed(self, seed):
        """Weights in which every tensor is another: embeddings, vision tower, norms and biases included."""
        rng = np.random.default_rng(seed)
        noise = {n: rng.standard_normal(w.shape).astype(np.float32) for n, w in self.weights.items()}
        return {n: w + 0.3 * max(w.std(), 0.1) * noise[n] for n, w in self.weights.items()}


def show(name, seed=None, question=" max of red green blue"):
    """A prompt with a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Prompt(name, ({"role": "user", "content": "<image>" + question},), (buffer.getvalue(),))


@pytest.fixture(scope="session")
def ask():
    return show


@pytest.fixture(scope="session")
def settings():
    return SETTINGS


@pytest.fixture(scope="session")
def run():
    """Runs coroutines, all on one event loop: the pool's tasks live on it between tests."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    build_tiny(folder, vocabulary(), TinyModelSettings(embedding_std=0.1), seed=0)
    return folder


@pytest.fixture(scope="session")
def make_reference():
    return Reference


@pytest.fixture(scope="session")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="session")
def shared_pool(cluster, run, folder):
    pool = run(RolloutPool.create(folder, SETTINGS))
    yield pool
    run(pool.shutdown())


@pytest.fixture
def pool(shared_pool, run, folder):
    """The engine with the checkpoint's weights, as version 0."""
    run(shared_pool.load(folder, 0))
    return shared_pool
