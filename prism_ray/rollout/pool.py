"""The pool of engines: sends groups to the least loaded, gives all of them new weights, replaces those that die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from prism_ray.config.rollout import RolloutSettings
from prism_ray.records import Group, Prompt
from prism_ray.rollout.process import environment
from prism_ray.rollout.sampling import EngineFailed, Sampling
from prism_ray.rollout.worker import ENGINE_ACTOR
from prism_ray.runtime.protocols import Ticket

T = TypeVar("T")


@dataclass(eq=False)
class _Engine:
    """One life of an engine. `outstanding`: response tokens it may still have to produce."""

    index: int
    name: str
    actor: ActorHandle
    outstanding: int = 0


@dataclass(frozen=True)
class _Weights:
    """What every engine must hold: a reference to arrays or a checkpoint folder (or None: what it was started with)."""

    version: int
    arrays: Any = None
    folder: Path | None = None


class RolloutPool:
    """Fulfils `runtime.protocols.Rollouts`. Make one with `create`; it serves all stages of a run, see `load`."""

    def __init__(self, folder: Path, settings: RolloutSettings, version: int):
        self._folder, self.settings = folder, settings
        self.max_response_tokens: int | None = None
        """Where `generate` cuts a response in the present phase; None: where the settings say."""
        self._weights = _Weights(version)
        self._ready: dict[int, _Engine] = {}
        self._restarts = dict.fromkeys(range(settings.engines), 0)
        self._restarting: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._changed = asyncio.Condition()
        self._tokens, self._since = 0, time.monotonic()

    @classmethod
    async def create(cls, folder: str | Path, settings: RolloutSettings, version: int = 0) -> RolloutPool:
        """Start all engines on the Hugging Face checkpoint in `folder`, whose weights count as `version`."""
        pool = cls(Path(folder).absolute(), settings, version)
        starts = [asyncio.create_task(pool._start(index)) for index in range(settings.engines)]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await pool.shutdown()
            raise
        return pool

    async def generate(self, ticket: Ticket) -> Ticket:
        """Sample the prompt's group; the returned ticket refers to a `Group` without verdicts.

        An engine that dies meanwhile is replaced and the group sampled once more, from the beginning.
        """
        s = self.settings
        sampling = Sampling(s.group_size, s.temperature, self.max_response_tokens or s.max_response_tokens)
        group, meta = await self._sampled(ticket.ref, ticket.id, sampling)
        return replace(ticket, ref=group, **(meta | {"stats": ticket.stats | meta["stats"]}))

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
        # Twice what is decoded at once keeps the engines busy, and no group waits in a queue until its deadline.
        places = asyncio.Semaphore(max(1, 2 * self.settings.engines * self.settings.max_concurrent // n))

        async def one(index: int, prompt: Prompt) -> Group:
            async with places:
                group, _ = await self._sampled(prompt, index, sampling)
                return await group

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        """Give every engine the weights of `version`, a reference to (or a) dict of arrays by Hugging Face name.

        Engines take them between two decoding steps and go on. Returns once all that are alive hold them; one that is
        being replaced gets them before it gets work. Returns metrics.
        """
        if not isinstance(weights, ray.ObjectRef):
            weights = ray.put(weights)
        return await self._spread(_Weights(version, arrays=weights))

    async def load(self, folder: str | Path, version: int) -> dict[str, float]:
        """Like `publish`, from a checkpoint folder of the same architecture: how another stage takes over the pool."""
        return await self._spread(_Weights(version, folder=Path(folder).absolute()))

    async def health(self) -> dict[str, dict[str, int]]:
        """What every living engine says of itself; raises if one does not answer."""
        engines = list(self._ready.values())
        limit = self.settings.control_timeout_s
        said = await asyncio.gather(*(_within(limit, e.actor.health.remote(), e, "say how it is") for e in engines))
        return {engine.name: words for engine, words in zip(engines, said, strict=True)}

    async def shutdown(self) -> None:
        """End all engines; whoever still waits for them is told so."""
        await self._give_up(EngineFailed("the rollout pool was shut down"))
        for task in list(self._restarting):
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        engines = list(self._ready.values())
        self._ready.clear()
        limit = self.settings.control_timeout_s
        stops = (_within(limit, engine.actor.stop.remote(), engine, "stop") for engine in engines)
        await asyncio.gather(*stops, return_exceptions=True)
        for engine in engines:
            ray.kill(engine.actor)

    # Dispatch

    async def _sampled(self, prompt: Any, group_id: int, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
        """A reference to the group and what its ticket needs."""
        try:
            return await self._attempt(prompt, group_id, sampling)
        except EngineFailed:
            return await self._attempt(prompt, group_id, sampling)

    async def _attempt(self, prompt: Any, group_id: int, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
        engine = await self._least_loaded()
        tokens = sampling.n * sampling.max_tokens
        engine.outstanding += tokens
        try:
            call: Any = engine.actor.generate.options(num_returns=2)
            group, told = call.remote(prompt, group_id, sampling)
            meta = await _within(self.settings.generate_timeout_s, told, engine, f"sample group {group_id}")
        except EngineFailed as error:
            await self._bury(engine, error)
            raise
        finally:
            engine.outstanding -= tokens
        self._tokens += meta["tokens"]
        return group, meta

    async def _least_loaded(self) -> _Engine:
        limit = self.settings.start_timeout_s
        try:
            async with asyncio.timeout(limit), self._changed:
                await self._changed.wait_for(lambda: self._ready or self._failure)
        except TimeoutError:
            raise TimeoutError(f"waited {limit:.0f} s for any of {self.settings.engines} rollout engines") from None
        if self._failure:
            raise self._failure
        return min(self._ready.values(), key=lambda engine: engine.outstanding)

    # Weights

    async def _spread(self, weights: _Weights) -> dict[str, float]:
        began = time.monotonic()
        self._weights = weights
        answers = await asyncio.gather(*(self._give(engine, weights) for engine in list(self._ready.values())))
        if not any(answers):
            await self._least_loaded()  # all died: whichever comes back first holds these weights
        elapsed, self._since = time.monotonic() - self._since, time.monotonic()
        rate, self._tokens = self._tokens / elapsed, 0
        return {
            "rollout/tokens_per_second": rate,
            "weights/publish_s": time.monotonic() - began,
            "weights/paused_s": max((a["paused_s"] for a in answers if a), default=0.0),
        }

    async def _give(self, engine: _Engine, weights: _Weights) -> dict[str, float] | None:
        """The engine's metrics, or None if it died (it is then replaced, and raises if it may not be)."""
        try:
            return await self._hand_over(engine, weights)
        except EngineFailed as error:
            await self._bury(engine, error)
            if self._failure:
                raise self._failure from error
            return None

    async def _hand_over(self, engine: _Engine, weights: _Weights) -> dict[str, float]:
        if weights.folder is not None:
            call = engine.actor.load.remote(weights.folder, weights.version)
        else:
            call = engine.actor.update.remote(weights.arrays, weights.version)
        return await _within(self.settings.control_timeout_s, call, engine, f"take weights {weights.version}")

    # Life and death

    async def _start(self, index: int) -> None:
        """Start engine `index` and admit it once it holds the weights that the others hold."""
        s = self.settings
        name = f"rollout engine {index}"
        options: dict[str, Any] = {
            "num_cpus": s.cpus_per_engine,
            "num_gpus": s.gpus_per_engine,
            "runtime_env": {"env_vars": environment(s)},
        }
        actor = ENGINE_ACTOR.options(**options).remote(name, self._folder, s, s.seed + index)
        engine = _Engine(index, name, actor)
        try:
            held = self._weights
            await _within(s.start_timeout_s, actor.start.remote(held.version), engine, "start")
            if held.arrays is not None or held.folder is not None:
                await self._hand_over(engine, held)
            while held is not self._weights:  # published while it was starting
                held = self._weights
                await self._hand_over(engine, held)
        except BaseException:
            ray.kill(actor)
            raise
        self._ready[index] = engine
        async with self._changed:
            self._changed.notify_all()

    async def _bury(self, engine: _Engine, error: Exception) -> None:
        """Take a dead engine out and start its successor, if it may have one; later reports of a death do nothing."""
        if self._ready.get(engine.index) is not engine:
            return
        del self._ready[engine.index]
        ray.kill(engine.actor)
        await self._replace(engine.index, engine.name, error)

    async def _replace(self, index: int, name: str, error: Exception) -> None:
        if self._restarts[index] >= self.settings.max_restarts:
            times = self._restarts[index]
            await self._give_up(EngineFailed(f"{name} died after {times} restarts (rollout.max_restarts): {error}"))
            return
        self._restarts[index] += 1
        task = asyncio.create_task(self._restart(index, name))
        self._restarting.add(task)
        task.add_done_callback(self._restarting.discard)

    async def _restart(self, index: int, name: str) -> None:
        try:
            await self._start(index)
        except Exception as error:  # whatever it is, whoever waits for an engine must hear of it
            await self._replace(index, name, error)

    async def _give_up(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        async with self._changed:
            self._changed.notify_all()


async def _within(limit: float, answer: Awaitable[T], engine: _Engine, what: str) -> T:
    try:
        return await asyncio.wait_for(answer, limit)
    except TimeoutError:
        raise TimeoutError(f"waited {limit:.0f} s for {engine.name} to {what}") from None
    except RayActorError as error:
        raise EngineFailed(f"{engine.name} died while it was to {what}: {error}") from error
    except RayTaskError as error:
        raise error.cause from None  # the sentence itself, without the actor's traceback around it
