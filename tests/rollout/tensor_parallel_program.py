"""Run by test_tensor_parallel.py in a process of its own: an engine over two pretended GPUs of one node, on the CPU.

Prints one JSON object, which the test looks at."""

import asyncio
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.cluster_utils import Cluster

from prism_ray.config.models import TinyModelSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.tiny import build_tiny
from prism_ray.planning.layout import engines
from prism_ray.records import Prompt
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime.placement import EnginePlaces, Placement
from prism_ray.testbed.words import vocabulary

SETTINGS = RolloutSettings(
    gpus_per_engine=2, group_size=4, max_response_tokens=24, max_model_len=320, kv_cache_gb=0.1, start_timeout_s=500
)
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}


def prompt() -> Prompt:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Prompt("p", ({"role": "user", "content": "<image> max of red green blue"},), (data.getvalue(),))


def largest_gap(model: Any, encoder: Encoder, asked: Prompt, rollouts: Any) -> float:
    """Between the engine's log-probs and the model's own."""
    gaps = []
    for rollout in rollouts:
        sample = Sample(encoder.prompt(asked), torch.tensor(rollout.token_ids, dtype=torch.int64))
        with torch.no_grad():
            logp_BR, _ = response_logprobs(model, collate([sample]), banned_ids=encoder.banned_ids)
        gaps.append(float((logp_BR[0] - torch.tensor(rollout.logp)).abs().max()))
    return max(gaps)


async def sample(folder: Path) -> dict[str, Any]:
    placement = Placement(ClusterSettings(pending_timeout_s=30))
    places = EnginePlaces(placement, engines(SETTINGS), False, SETTINGS)
    pool = await RolloutPool.create(folder, SETTINGS, places=places)
    try:
        encoder, model, asked = Encoder(folder, 256), load_policy(folder).eval(), prompt()
        (group,) = await pool.sample([asked], 4)
        found = {"gap": largest_gap(model, encoder, asked, group.rollouts)}
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * weight.std().clamp(min=0.1) * torch.randn_like(weight))
        weights = {n: w.numpy() for n, w in model.state_dict().items() if n != "lm_head.weight"}
        await pool.publish(weights, 1)
        (group,) = await pool.sample([asked], 4)
        versions = sorted({int(v) for r in group.rollouts for v in r.versions})
        return found | {"gap after": largest_gap(model, encoder, asked, group.rollouts), "versions": versions}
    finally:
        await pool.shutdown()
        placement.release()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    build_tiny(folder, vocabulary(), TinyModelSettings(embedding_std=0.1), seed=0)
    memory: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1} | memory)
    cluster.add_node(num_cpus=2, num_gpus=2, **memory)  # the head's GPU and one of these would not do
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": ON_CPU})
    found = asyncio.run(sample(folder))
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
