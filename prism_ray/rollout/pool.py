"""The pool of engines: sends groups to the least loaded, gives all of them new weights, replaces those that are lost.

An engine is lost when its actor or vLLM's process dies or stops answering, when it fails, returns garbage, or exceeds
the deadline of a call. Its groups go to others, each once, with what is known of them (`rollout.partial`); a successor
gets work once it holds the weights that the others hold.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from prism_ray.config.rollout import RolloutSettings
from prism_ray.models.tokens import writer_of
from prism_ray.records import Group, Prompt
from prism_ray.rollout.dispatch import Job, Queue
from prism_ray.rollout.groups import OF_NO_MORE_USE, Dispatching
from prism_ray.rollout.life import (
    PoolEngine,
    RestartBudget,
    Throughput,
    Weights,
    catch_up,
    hand_over,
    set_within,
)
from prism_ray.rollout.process import environment
from prism_ray.rollout.sampling import EngineFailed, Sampling, Turn
from prism_ray.rollout.worker import ENGINE_ACTOR
from prism_ray.runtime.placement import ANYWHERE, Places
from prism_ray.runtime.protocols import Ticket
from prism_ray.runtime.supervision import Watched, fetch
from prism_ray.weights.files import remove_orphans

log = logging.getLogger(__name__)


class RolloutPool(Dispatching):
    """Fulfils `runtime.protocols.Rollouts`. Make one with `create`; it serves all stages of a run, see `load`."""

    def __init__(self, folder: Path, settings: RolloutSettings, version: int, places: Places = ANYWHERE):
        self._folder, self.settings = folder, settings
        self._places, self._awake = places, asyncio.Event()
        self._awake.set()
        self.max_response_tokens: int | None = None
        """Where `generate` cuts a response in the present phase; None: where the settings say."""
        self._weights = Weights(version)
        self._spreading = asyncio.Lock()
        self._wanted = settings.engines
        self._ready: dict[int, PoolEngine] = {}
        self._budget = RestartBudget(settings.max_restarts, settings.restart_window_s)
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._failure: Exception | None = None
        self._queue = Queue(2 * settings.max_concurrent)
        self._jobs: set[Job] = set()
        self._keys, self._era = itertools.count(), 0
        self._changed = asyncio.Event()
        self._throughput = Throughput()

    @classmethod
    async def create(
        cls, folder: str | Path, settings: RolloutSettings, version: int = 0, places: Places = ANYWHERE
    ) -> RolloutPool:
        """Start all engines, at their `places`, on the checkpoint in `folder`, whose weights count as `version`."""
        pool = cls(Path(folder).absolute(), settings, version, places)
        try:
            await pool.resize(settings.engines)
        except BaseException:
            await pool.shutdown()
            raise
        return pool

    @property
    def era(self) -> int:
        """How often everything in flight was abandoned because the policy went back to an older version."""
        return self._era

    @property
    def sampling(self) -> Sampling:
        """How groups are sampled in the present phase."""
        s = self.settings
        return Sampling(s.group_size, s.temperature, self.max_response_tokens or s.max_response_tokens)

    async def generate(self, ticket: Ticket, sampling: Sampling | None = None, turn: Turn | None = None) -> Ticket:
        """Sample the prompt's group; the returned ticket refers to a `Group` without verdicts.

        If its engine is lost meanwhile, another one samples the rest of it, or all of it (`rollout.partial`). The
        ticket's stats count that. `turn` is what its rollouts go on from in a later turn of their episodes; Abandoned
        if the policy that sampled that was taken back.
        """
        group, meta = await self._sampled(ticket.ref, ticket.id, sampling or self.sampling, turn)
        facts = {name: meta[name] for name in ("oldest_version", "tokens", "total_tokens")}
        return replace(ticket, ref=group, stats=ticket.stats | meta["stats"], **facts)

    async def sample(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        temperature: float = 1.0,
        greedy: bool = False,
        max_tokens: int | None = None,
    ) -> list[Group]:
        """Sample `n` responses to each prompt, for evaluation; groups in the order of the prompts."""
        sampling = Sampling(n, 0.0 if greedy else temperature, max_tokens or self.settings.max_response_tokens)

        async def one(index: int, prompt: Prompt) -> Group:
            group, _ = await self._sampled(prompt, index, sampling)
            return await fetch(group, f"the rollouts of prompt {index}")

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        """Give every engine the weights of `version`, a reference to (or a) dict of arrays by Hugging Face name, or an
        `Offer` of those that a learner has set aside.

        Engines take them between two decoding steps and go on. Returns once all that are alive hold them; one that is
        being replaced gets them before it gets work. Returns metrics.

        A version older than the engines' (the learner was rebuilt from a checkpoint) abandons everything in flight:
        all groups are sampled anew under these weights, because the numbers of the versions after it will be given
        again to other weights.
        """
        if not isinstance(weights, ray.ObjectRef):
            weights = ray.put(weights)
        return await self._spread(Weights(version, arrays=weights))

    async def load(self, folder: str | Path, version: int) -> dict[str, float]:
        """Like `publish`, from a checkpoint folder of the same architecture: how another stage takes over the pool."""
        folder = Path(folder).absolute()
        metrics = await self._spread(Weights(version, folder=folder))
        if writer_of(folder):
            self._folder = folder  # whoever takes a lost engine's place gets its chat template, too
        return metrics

    async def sleep(self) -> None:
        """Let all engines, which must have nothing to do, give the memory of their GPUs back until they are given new
        weights; one that is lost meanwhile is started again only then."""
        self._awake.clear()
        limit = self.settings.control_timeout_s
        await asyncio.gather(*(engine.sleep(limit, self._bury) for engine in list(self._ready.values())))

    async def resize(self, engines: int) -> None:
        """Have so many engines, while the others go on: what a reload with another `rollout.engines` calls.

        Returns once new engines hold the current weights and have work, and removed ones have handed back what they
        had not finished. Raises if a new one does not start; those that did stay.
        """
        if engines < 1:
            raise ValueError(f"rollout.engines is {engines}; a pool needs at least one")
        self._wanted = engines
        self.settings = self.settings.model_copy(update={"engines": engines})
        await asyncio.gather(*(self._give_up(i) for i in list(self._restarting) if i >= engines))
        missing = [i for i in range(engines) if i not in self._ready and i not in self._restarting]
        surplus = [self._ready.pop(i) for i in list(self._ready) if i >= engines]
        starts = [asyncio.create_task(self._start(i)) for i in missing]
        try:
            await asyncio.gather(*starts, *(self._dismiss(engine) for engine in surplus))
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise

    async def health(self) -> dict[str, dict[str, int]]:
        """What every living engine says of itself; raises if one does not answer."""
        engines, limit = list(self._ready.values()), self.settings.control_timeout_s
        answers = (e.watched.answer(e.watched.actor.health.remote(), "say how it is", limit) for e in engines)
        said = await asyncio.gather(*answers)
        return {engine.watched.name: words for engine, words in zip(engines, said, strict=True)}

    async def shutdown(self) -> None:
        """End all engines; whoever still waits for them is told so."""
        self._fail(EngineFailed("the rollout pool was shut down"))
        restarting = list(self._restarting.values())
        for task in restarting:
            task.cancel()
        await asyncio.gather(*restarting, return_exceptions=True)
        engines = list(self._ready.values())
        self._ready.clear()
        await asyncio.gather(*(self._end(engine) for engine in engines))
        remove_orphans()

    # Weights

    async def _spread(self, weights: Weights) -> dict[str, float]:
        self._awake.set()
        async with self._spreading:
            began, before, self._weights = time.monotonic(), self._weights, weights
            if weights.version < before.version:
                self._abandon(weights.version)
            try:
                answers = await asyncio.gather(*(self._give(engine, weights) for engine in list(self._ready.values())))
            except ValueError:  # they do not fit the policy, and no engine took them
                self._weights = before
                self._open()
                raise
            if not any(answers):
                await self._any_engine()  # all died: whichever comes back first holds these weights
        return self._throughput.metrics(self._wanted) | {
            "rollout/engines": float(len(self._ready)),
            "rollout/waiting_groups": float(len(self._queue)),
            "weights/publish_s": time.monotonic() - began,
            "weights/paused_s": max((a["paused_s"] for a in answers if a), default=0.0),
        }

    def _abandon(self, version: int) -> None:
        """Begin a new era: no engine gets work before it holds the new weights, no older answer counts."""
        self._era += 1
        for job in self._jobs:
            job.forget(self._era)
        for engine in self._ready.values():
            engine.open = False
        if self._jobs:
            log.warning("the policy went back to version %d: %d groups are sampled anew", version, len(self._jobs))

    def _open(self) -> None:
        for engine in self._ready.values():
            engine.open = True
        self._dispatch()

    async def _give(self, engine: PoolEngine, weights: Weights) -> dict[str, float] | None:
        """The engine's metrics, or None if it died (it is then replaced, and raises if it may not be)."""
        try:
            if not engine.open:
                await self._end_jobs(engine, self._era)
            metrics = await hand_over(engine.watched, weights, self.settings.control_timeout_s)
        except OF_NO_MORE_USE as error:
            self._bury(engine, error)
            if self._failure:
                raise self._failure from error
            return None
        engine.open = True
        self._dispatch()
        return metrics

    async def _end_jobs(self, engine: PoolEngine, before: int) -> None:
        call = engine.watched.actor.end_all.remote(before)
        await engine.watched.answer(call, "hand back its groups", self.settings.control_timeout_s)

    async def _any_engine(self) -> None:
        limit = self.settings.start_timeout_s
        while not self._ready and not self._failure:
            self._changed.clear()
            if not await set_within(self._changed, limit):
                raise TimeoutError(f"waited {limit:g} s for any of {self._wanted} rollout engines")
        if self._failure:
            raise self._failure

    # Life and death

    async def _start(self, index: int) -> None:
        """Start engine `index` and admit it once it holds the weights that the others hold."""
        s = self.settings
        name = f"rollout engine {index}"
        options: dict[str, Any] = {"num_cpus": s.cpus_per_engine, "num_gpus": s.gpus_per_engine}
        options |= {"runtime_env": {"env_vars": environment(s)}} | await self._places.take(index)
        actor = ENGINE_ACTOR.options(**options).remote(name, self._folder, s, s.seed + index)
        watched = Watched(name, actor, s.heartbeat_s)
        try:
            held = self._weights
            await watched.answer(actor.start.remote(held.version), "start", s.start_timeout_s)
            watched.begin()
            await catch_up(watched, held, lambda: self._weights, s.control_timeout_s)
            if self._failure:
                raise self._failure
        except BaseException:
            watched.close()
            ray.kill(actor)
            raise
        engine = PoolEngine(index=index, watched=watched)
        engine.guard(self._bury)
        if s.partial == "continue":
            engine.follow(s.progress_s, s.heartbeat_s)
        self._ready[index] = engine
        self._changed.set()
        self._dispatch()

    def _bury(self, engine: PoolEngine, error: Exception) -> None:
        """Take a lost engine out and start its successor, if it may have one; later reports of a loss do nothing."""
        if self._ready.get(engine.index) is not engine:
            return
        del self._ready[engine.index]
        engine.close()
        ray.kill(engine.watched.actor)
        self._replace(engine.index, error, len(engine.jobs))

    def _replace(self, index: int, error: Exception, groups: int) -> None:
        lost = f"{error}; {groups} groups go elsewhere" if groups else str(error)
        if times := self._budget.spend(index):
            log.warning("%s; restart %d of %d", lost, times, self.settings.max_restarts)
            self._restarting[index] = asyncio.create_task(self._restart(index))
            return
        budget = f"rollout engine {index} is not restarted again (rollout.max_restarts = {self.settings.max_restarts})"
        if self._ready or self._restarting:
            log.warning("%s; %s; %d engines go on", lost, budget, len(self._ready))
            return
        self._fail(EngineFailed(f"{budget}: {error}"))

    async def _restart(self, index: int) -> None:
        began = time.monotonic()
        failure: Exception | None = None
        try:
            await self._awake.wait()
            await self._start(index)
            taken, version = time.monotonic() - began, self._weights.version
            log.warning("rollout engine %d is back after %.0f s with the weights of version %d", index, taken, version)
        except Exception as error:  # whatever it is, whoever waits for an engine must hear of it
            failure = error
        finally:
            del self._restarting[index]
        if failure is not None:
            self._replace(index, failure, 0)

    async def _give_up(self, index: int) -> None:
        """End the start of a successor that is no longer wanted."""
        while restart := self._restarting.get(index):
            restart.cancel()
            await asyncio.wait({restart})
        if index not in self._ready:
            self._places.leave(index)

    async def _dismiss(self, engine: PoolEngine) -> None:
        """End an engine that was removed, once it has handed back what it had."""
        try:
            await self._end_jobs(engine, sys.maxsize)
            if engine.tasks:
                await asyncio.wait(engine.tasks, timeout=self.settings.control_timeout_s)
        except OF_NO_MORE_USE as error:
            log.warning("%s while it was removed; what it had goes elsewhere", error)
        await self._end(engine)
        self._places.leave(engine.index)

    async def _end(self, engine: PoolEngine) -> None:
        engine.close()
        stop, limit = engine.watched.actor.stop.remote(), self.settings.control_timeout_s
        await asyncio.gather(engine.watched.answer(stop, "stop", limit), return_exceptions=True)
        ray.kill(engine.watched.actor)

    def _fail(self, failure: Exception) -> None:
        """The first failure is what everybody who waits is told."""
        self._failure = self._failure or failure
        self._queue.fail(self._failure)
        self._changed.set()
