"""Weights from the learner to a vLLM engine through shared memory: seconds and bytes/s against a plain memory copy.

    python benchmarks/weight_sync.py [--quick] [--sizes 1M 10M 100M 200M] [--without-engine 1B] [--updates N]
                                     [--transport gloo]

Every part is the real one: a DeepSpeed learner in a Ray actor puts its weights into the object store (`gather_s`), the
pool hands the reference to a vLLM engine's actor, which writes the file in shared memory (`write_s`, timed alone) and
exchanges the weights between two decoding steps (`paused_s`: what running requests see). `publish_s` is the whole of
the pool's part, `total_s` learner and pool together, as a training step pays for it when nothing overlaps. With another
`--transport` the learner sets a copy aside (`gather_s`; then it could train on) and the engine fetches it. The policies
are randomly initialised Qwen3-VL in float32. `copy_s` copies the same tensors, one by one, to memory that is there
already. Each figure is the fastest of several updates. Sizes `--without-engine` are only written and read back: three
times their bytes of memory are enough for that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import conditions, finish, parse
from safetensors import safe_open

from prism_ray.config.learner import LearnerSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.learner.group import LearnerGroup
from prism_ray.learner.step import Recipe
from prism_ray.models.load import load_policy
from prism_ray.models.tiny import build_tiny
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime import cluster
from prism_ray.testbed.words import vocabulary
from prism_ray.weights.files import SharedFile
from prism_ray.weights.transports import Wire

SIZES = {
    "1M": TinyModelSettings(),
    "10M": TinyModelSettings(hidden_size=320, layers=8, heads=10, key_value_heads=5, mlp_size=960),
    "100M": TinyModelSettings(hidden_size=1024, layers=8, heads=32, key_value_heads=16, mlp_size=3072),
    "200M": TinyModelSettings(hidden_size=1024, layers=16, heads=32, key_value_heads=16, mlp_size=3072),
    "1B": TinyModelSettings(hidden_size=2048, layers=20, heads=64, key_value_heads=32, mlp_size=6144),
}
"""Shapes of about so many parameters."""
RECIPE = Recipe(AdvantageSettings(estimator="grpo"), ObjectiveSettings(), CorrectionSettings())
ROLLOUT = RolloutSettings(kv_cache_gb=0.1, max_concurrent=32, max_batched_tokens=512, cpus_per_engine=0.5)

Arrays = Mapping[str, np.ndarray]


def fastest(repetitions: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def local_parts(weights: Arrays, repetitions: int) -> dict[str, float]:
    """What one process alone takes: a copy of the tensors, writing the shared file, reading it back."""
    place = {name: np.zeros_like(weight) for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    def copy() -> None:
        for name, weight in weights.items():
            np.copyto(place[name], weight)

    def write() -> None:
        with SharedFile() as shared:
            shared.write(weights, shapes, "benchmark weights")

    def read() -> None:
        with safe_open(shared.path, "np") as tensors:
            for name, weight in place.items():
                np.copyto(weight, tensors.get_tensor(name))

    parts = {"copy_s": fastest(repetitions, copy), "write_s": fastest(repetitions, write)}
    with SharedFile() as shared:
        shared.write(weights, shapes, "benchmark weights")
        parts["read_s"] = fastest(repetitions, read)
    return parts


async def through_an_engine(folder: Path, updates: int, settings: RolloutSettings) -> dict[str, float]:
    """Learner to engine."""
    learner = await LearnerGroup.create(
        folder, LearnerSettings(cpus_per_rank=0.5), RECIPE, settings.max_prompt_tokens, wire=Wire.of(settings)
    )
    try:
        pool = await RolloutPool.create(folder, settings)
        try:
            rows = []
            for version in range(1, updates + 2):
                began = time.perf_counter()
                reference = await learner.weights()
                gathered = time.perf_counter()
                metrics = await pool.publish(reference, version)
                ended = time.perf_counter()
                rows.append((gathered - began, ended - gathered, metrics["weights/paused_s"], ended - began))
        finally:
            await pool.shutdown()
    finally:
        learner.shutdown()
    least = np.min(rows[1:], axis=0).tolist()  # the first update warms up
    return dict(zip(("gather_s", "publish_s", "paused_s", "total_s"), least, strict=True))


def figures(parts: Mapping[str, float], weights: Arrays) -> dict[str, float]:
    size = sum(weight.nbytes for weight in weights.values())
    speeds = {f"{name.removesuffix('_s')}_gb_per_s": size / seconds / 1e9 for name, seconds in parts.items()}
    return {"parameters": sum(weight.size for weight in weights.values()), "bytes": size, **parts, **speeds}


def measure(size: str, settings: RolloutSettings | None, updates: int) -> dict[str, float]:
    """Figures of one size; without settings, of what needs no engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny(folder, vocabulary(), SIZES[size], seed=0)
        parts = {} if settings is None else asyncio.run(through_an_engine(folder, updates, settings))
        weights = {n: p.detach().numpy() for n, p in load_policy(folder).named_parameters()}
        return figures(parts | local_parts(weights, updates), weights)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["1M", "10M", "100M", "200M"])
    parser.add_argument("--without-engine", nargs="*", choices=SIZES, default=[])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--transport", choices=["shared_memory", "gloo"], default="shared_memory")
    options = parse(__doc__, parser)
    if options.quick:
        options.sizes, options.without_engine, options.updates = ["1M"], ["10M"], 2
    settings = ROLLOUT.model_copy(update={"weights": options.transport})
    found = {size: measure(size, None, options.updates) for size in options.without_engine}
    most = max((SIZES[size].hidden_size ** 2 * SIZES[size].layers for size in options.sizes), default=0)
    # Room in the object store for the weights on their way and those before them (about 13 numbers of 4 bytes a unit).
    cluster.start(ClusterSettings(object_store_mb=300 + 3 * 13 * 4 * most // 2**20))
    try:
        for size in options.sizes:
            found[size] = measure(size, settings, options.updates)
            print(size, {name: float(f"{value:.3g}") for name, value in found[size].items()}, flush=True)
    finally:
        ray.shutdown()
    ratios = {
        f"{part}_over_copy_{size}": row[f"{part}_s"] / row["copy_s"]
        for size, row in found.items()
        for part in ("total", "publish", "paused", "write")
        if f"{part}_s" in row
    }
    how = {"load": os.getloadavg()[0], "updates": options.updates, "transport": options.transport}
    finish("weight_sync", ratios, found, conditions() | how)


if __name__ == "__main__":
    main()
