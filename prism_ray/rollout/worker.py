"""The actor around one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from prism_ray.config.rollout import RolloutSettings
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.rollout.partial import UNFINISHED, Piece
from prism_ray.rollout.sampling import EngineFailed, Garbage, Request
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP
from prism_ray.weights.transports import Offer, Superseded, merged

if TYPE_CHECKING:
    from prism_ray.rollout.engine import Engine

CONCURRENCY_GROUPS = {"control": 8, "generate": 1 << 14} | HEALTH_GROUP
"""Control calls never queue behind generations; how many of these run at once is the engine's own business."""


class EngineWorker:
    """Runs an engine. `ValueError` means that the request was wrong, anything else that the engine is of no more use
    (`EngineFailed`)."""

    def __init__(self, name: str, folder: Path, settings: RolloutSettings, seed: int):
        self._name, self._folder, self._settings, self._seed = name, folder, settings, seed
        self._engine: Engine

    @ray.method(concurrency_group="generate")
    async def start(self, version: int) -> None:
        """Start the engine on its checkpoint, whose weights count as `version`."""
        from prism_ray.rollout.engine import Engine  # vLLM takes seconds to import, and belongs in this process only

        # Ray gives every concurrency group an event loop of its own; the engine lives on this one.
        self._loop = asyncio.get_running_loop()
        self._engine = await self._guarded(Engine.start(self._folder, self._settings, self._seed, version))

    @ray.method(concurrency_group="generate")
    async def generate(
        self, prompt: Prompt, request: Request, so_far: Group | Sequence[Rollout]
    ) -> tuple[Group, dict[str, Any]]:
        """Sample a group, going on from what is known of it; returns it and what its ticket needs to know of it."""
        began = time.monotonic()
        known = so_far.rollouts if isinstance(so_far, Group) else so_far
        rollouts = await self._guarded(self._engine.generate(prompt, request, known))
        group = Group(request.group_id, prompt, tuple(rollouts))
        lengths = [len(r.token_ids) for r in rollouts]
        stats = {
            "rollout/seconds": time.monotonic() - began,
            "rollout/response_tokens": sum(r.sampled for r in rollouts) / len(rollouts),
            "rollout/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
            "rollout/mixed_share": sum(len(set(r.versions.tolist())) > 1 for r in rollouts) / len(rollouts),
        }
        total = sum(lengths) + len(rollouts[0].prompt_token_ids)  # a learner computes the common prompt once
        meta = {"oldest_version": group.oldest_version, "tokens": sum(lengths), "total_tokens": total, "stats": stats}
        return group, meta | {"finished": all(r.finish_reason != UNFINISHED for r in rollouts)}

    @ray.method(concurrency_group="control")
    async def progress(self) -> tuple[dict[int, int], dict[int, list[Piece]]]:
        """For every group under way, by its key: the tokens that may still come, and what is new of it."""
        news = await self._on_engine_loop(_now(self._engine.progress))
        return {k: remaining for k, (remaining, _) in news.items()}, {k: new for k, (_, new) in news.items()}

    @ray.method(concurrency_group="control")
    async def end_all(self, before: int) -> None:
        """End all groups asked for in eras before `before`; their calls return what they have."""
        await self._on_engine_loop(self._engine.end_all(before))

    @ray.method(concurrency_group="control")
    async def update(self, weights: dict[str, Any] | Offer, version: int) -> dict[str, float]:
        """Take a learner's weights, or fetch those it offers, as `version`; returns metrics."""
        if isinstance(weights, Offer):
            return await self._on_engine_loop(self._engine.receive(LearnerLink(weights, self._name), version))
        return await self._on_engine_loop(self._engine.update(weights, version))

    @ray.method(concurrency_group="control")
    async def load(self, folder: Path, version: int) -> dict[str, float]:
        """Take the weights of a checkpoint folder as `version`; returns metrics."""
        return await self._on_engine_loop(self._engine.load(folder, version))

    @ray.method(concurrency_group="control")
    async def sleep(self) -> None:
        """Give the GPU's memory back until new weights come."""
        await self._on_engine_loop(self._engine.sleep())

    @ray.method(concurrency_group="control")
    async def health(self) -> dict[str, int]:
        """Raises `EngineFailed` if the engine cannot work any more."""
        return await self._on_engine_loop(self._engine.health())

    @ray.method(concurrency_group=HEALTH)
    async def alive(self) -> None:
        """Answers while the engine works; see `Engine.alive`."""
        await self._on_engine_loop(self._engine.alive())

    @ray.method(concurrency_group="control")
    async def stop(self) -> None:
        """End the engine's processes."""
        await asyncio.to_thread(self._engine.stop)

    async def _on_engine_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._guarded(work), self._loop))

    async def _guarded(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await work
        except (ValueError, FileNotFoundError, Superseded):
            raise
        except Garbage as error:
            raise Garbage(f"{self._name} returned garbage: {error}") from None
        except Exception as error:  # vLLM's own errors do not all survive pickling, and callers need the name
            raise EngineFailed(f"{self._name} failed: {type(error).__name__}: {error}") from None


class LearnerLink:
    """Fulfils `weights.transports.Link`: asks the learner's ranks of an offer, in the name of an engine."""

    def __init__(self, offer: Offer, name: str):
        self._offer, self._name = offer, name
        self.learner = offer.learner

    async def prepare(self, workers: int) -> dict[str, Any]:
        first, *_ = await self._all("link_prepare", workers)
        return first

    async def meet(self) -> None:
        await self._all("link_meet")

    async def updates(self) -> list[dict[str, Any]]:
        return merged(await self._all("link_updates", self._offer.number))

    async def send(self) -> None:
        await self._all("link_send")

    async def confirm(self) -> None:
        await self._all("link_confirm", self._offer.number)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(rank, method).remote(self._name, *args) for rank in self._offer.ranks]
        return list(await asyncio.gather(*(self._answered(call) for call in calls)))

    async def _answered(self, call: Any) -> Any:
        try:
            return await call
        except RayActorError as error:  # not this engine's fault, and it can take another learner's weights
            raise Superseded(f"the learner died while {self._name} was to fetch its weights") from error
        except RayTaskError as error:
            raise error.cause from None


async def _now(work: Any) -> Any:
    return work()


ENGINE_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=CONCURRENCY_GROUPS)(EngineWorker)
