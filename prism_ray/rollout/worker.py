"""The actor around one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import ray

from prism_ray.config.rollout import RolloutSettings
from prism_ray.records import Group, Prompt
from prism_ray.rollout.sampling import EngineFailed, Sampling

CONCURRENCY_GROUPS = {"control": 8, "generate": 1 << 14}
"""Control calls never queue behind generations; how many of these run at once is the engine's own business."""


class EngineWorker:
    """Runs an engine. `ValueError` means that the request was wrong, anything else that the engine is of no more use
    (`EngineFailed`)."""

    def __init__(self, name: str, folder: Path, settings: RolloutSettings, seed: int):
        self._name, self._folder, self._settings, self._seed = name, folder, settings, seed

    @ray.method(concurrency_group="generate")
    async def start(self, version: int) -> None:
        """Start the engine on its checkpoint, whose weights count as `version`."""
        from prism_ray.rollout.engine import Engine  # vLLM takes seconds to import, and belongs in this process only

        # Ray gives every concurrency group an event loop of its own; the engine lives on this one.
        self._loop = asyncio.get_running_loop()
        self._engine = await self._guarded(Engine.start(self._folder, self._settings, self._seed, version))

    @ray.method(concurrency_group="generate")
    async def generate(self, prompt: Prompt, group_id: int, sampling: Sampling) -> tuple[Group, dict[str, Any]]:
        """Sample a group; returns it and what its ticket needs to know of it."""
        began = time.monotonic()
        rollouts = await self._guarded(self._engine.generate(prompt, sampling))
        group = Group(group_id, prompt, tuple(rollouts))
        lengths = [len(r.token_ids) for r in rollouts]
        stats = {
            "rollout/seconds": time.monotonic() - began,
            "rollout/response_tokens": sum(lengths) / len(lengths),
            "rollout/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
            "rollout/mixed_share": sum(len(set(r.versions.tolist())) > 1 for r in rollouts) / len(rollouts),
        }
        total = sum(lengths) + len(rollouts[0].prompt_token_ids)  # a learner computes the common prompt once
        meta = {"oldest_version": group.oldest_version, "tokens": sum(lengths), "total_tokens": total, "stats": stats}
        return group, meta

    @ray.method(concurrency_group="control")
    async def update(self, weights: dict[str, Any], version: int) -> dict[str, float]:
        """Take a learner's weights as `version`; returns metrics."""
        return await self._on_engine_loop(self._engine.update(weights, version))

    @ray.method(concurrency_group="control")
    async def load(self, folder: Path, version: int) -> dict[str, float]:
        """Take the weights of a checkpoint folder as `version`; returns metrics."""
        return await self._on_engine_loop(self._engine.load(folder, version))

    @ray.method(concurrency_group="control")
    async def health(self) -> dict[str, int]:
        """Raises `EngineFailed` if the engine cannot work any more."""
        return await self._on_engine_loop(self._engine.health())

    @ray.method(concurrency_group="control")
    async def stop(self) -> None:
        """End the engine's processes."""
        await asyncio.to_thread(self._engine.stop)

    async def _on_engine_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._guarded(work), self._loop))

    async def _guarded(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await work
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:  # vLLM's own errors do not all survive pickling, and callers need the name
            raise EngineFailed(f"{self._name} failed: {type(error).__name__}: {error}") from None


ENGINE_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=CONCURRENCY_GROUPS)(EngineWorker)
