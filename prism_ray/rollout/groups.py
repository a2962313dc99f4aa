"""Groups on their way through the engines: each waits for one, runs on it, and goes on elsewhere where that is lost."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from prism_ray.config.rollout import RolloutSettings
from prism_ray.rollout.dispatch import KEPT, LOSSES, LOST, REFUSED, Job, Queue
from prism_ray.rollout.life import PoolEngine, Throughput, fetched
from prism_ray.rollout.partial import tokens_in
from prism_ray.rollout.sampling import EngineFailed, Garbage, Sampling, Turn
from prism_ray.runtime.supervision import Lost

OF_NO_MORE_USE = (Lost, EngineFailed, TimeoutError)
"""What a call raises when its engine must be replaced; anything else is the request's own fault."""


class Dispatching(ABC):
    """What a pool does with groups. Who starts engines and replaces them is its subclass."""

    settings: RolloutSettings
    _ready: dict[int, PoolEngine]
    _restarting: dict[int, asyncio.Task[None]]
    _wanted: int
    _failure: Exception | None
    _queue: Queue
    _jobs: set[Job]
    _keys: Iterator[int]
    _era: int
    _throughput: Throughput

    @abstractmethod
    def _bury(self, engine: PoolEngine, error: Exception) -> None:
        """Take a lost engine out and start its successor."""

    async def _sampled(self, prompt: Any, group_id: int, sampling: Sampling, turn: Turn | None = None) -> Any:
        """A reference to the group and what its ticket needs."""
        if self._failure:
            raise self._failure
        job = Job(next(self._keys), group_id, prompt, sampling, self._era, asyncio.get_running_loop().create_future())
        if turn is not None:
            job.go_on_from(turn)
        self._jobs.add(job)
        self._queue.put(job)
        self._dispatch()
        limit = self.settings.start_timeout_s
        try:
            while not job.done.done():
                await asyncio.wait({job.done}, timeout=limit)
                if job in self._queue and not self._ready and not self._restarting:
                    raise TimeoutError(f"waited {limit:g} s for any of {self._wanted} rollout engines")
        finally:
            self._queue.discard(job)
            self._jobs.discard(job)
            if not job.done.done():
                job.done.cancel()
        return job.done.result()

    def _dispatch(self) -> None:
        for job, engine in self._queue.assign(self._ready.values()):
            task = asyncio.create_task(self._run(job, engine))
            engine.tasks.add(task)
            task.add_done_callback(engine.tasks.discard)

    async def _run(self, job: Job, engine: PoolEngine) -> None:
        """One group on one engine: its result, or back into the queue with what is known of it."""
        era, engine.first[job.key] = job.era, engine.told
        call: Any = engine.watched.actor.generate.options(num_returns=2)
        group, told = call.remote(job.prompt, job.request, job.so_far)
        what, limit = f"sample group {job.group_id}", self.settings.generate_timeout_s
        again = False
        try:
            meta = await engine.watched.answer(told, what, limit)
        except OF_NO_MORE_USE as error:
            self._bury(engine, error)
            await fetched(group, self.settings.heartbeat_s)  # Ray would report an error that nobody reads
            again = await self._recover(job, engine, era, error)
        except Exception as error:
            await fetched(group, self.settings.heartbeat_s)
            job.fail(error)
        else:
            again = self._unfinished(job, engine.index, era, group, meta)
        engine.leave(job)
        if again:
            self._queue.put(job, first=True)
            if self._failure:
                self._queue.fail(self._failure)
        self._dispatch()

    def _unfinished(self, job: Job, index: int, era: int, group: Any, meta: dict[str, Any]) -> bool:
        """Hand the group to whoever waits for it; whether it must go on elsewhere instead."""
        if era == job.era and meta["finished"]:
            self._throughput.add(index, meta["tokens"] - max(job.given_tokens, int(job.counts[KEPT])))
            if not job.done.done():
                job.done.set_result((group, meta | {"stats": meta["stats"] | job.counts}))
            return False
        if era == job.era and self.settings.partial == "continue":
            job.so_far, job.counts[KEPT] = group, meta["tokens"]  # its engine was removed
        else:
            job.counts[LOST] += meta["tokens"]
        return True

    async def _recover(self, job: Job, engine: PoolEngine, era: int, error: Exception) -> bool:
        """Note what is known of the group; whether it goes on elsewhere, or has been too much for too many engines."""
        garbage = isinstance(error, Garbage)
        job.counts[REFUSED if garbage else LOSSES] += 1
        if job.counts[REFUSED] > 1 or job.counts[LOSSES] > self.settings.max_losses:
            times = f"group {job.group_id} lost its engine {int(job.counts[LOSSES])} times (rollout.max_losses)"
            job.fail(EngineFailed(f"{error}, again" if garbage else f"{times}, the last time because {error}"))
            return False
        if garbage:
            job.forget(job.era)  # what went before may be of the same kind
        elif self.settings.partial == "continue":
            known = await engine.known(job)
            if era == job.era:
                job.so_far, job.counts[KEPT] = known or job.given, tokens_in(known)
            else:
                job.counts[LOST] += tokens_in(known)
        return True
