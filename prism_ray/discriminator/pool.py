"""The judge of alignment: a pool in front of the discriminator's actor, which fulfils the loop's `Judge` protocol.

The pool moves references and small numbers; groups stay in Ray's object store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.guards import Truth
from prism_ray.discriminator.probes import Examination
from prism_ray.discriminator.worker import DiscriminatorWorker
from prism_ray.records import Group, Ticket

log = logging.getLogger(__name__)

MOST_GROUPS = 16
"""Groups in one call: enough to fill a batch, few enough that the first of them does not wait long for the last."""


class DiscriminatorPool:
    """Judges groups and learns from them; one actor, which trains and scores."""

    NAME = "discriminator-0"

    def __init__(self, worker: Any, settings: DiscriminatorSettings) -> None:
        self.worker = worker
        self.settings = settings
        self._waiting: list[tuple[Ticket, asyncio.Future[Ticket]]] = []
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        folder: str | Path,
        settings: DiscriminatorSettings,
        max_prompt_tokens: int,
        threads: int = 1,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        truth: Truth | None = None,
    ) -> DiscriminatorPool:
        """Start the actor on the warmed-up discriminator in `folder` and wait until it is ready.

        `options` are Ray actor options (num_cpus, num_gpus, scheduling_strategy). Prompts of more than
        `max_prompt_tokens` tokens are refused. `seed` decides which older pairs are replayed; with `truth` the
        metrics say whether scores agree with it.
        """
        actor = DiscriminatorWorker.options(**(options or {}))
        pool = cls(actor.remote(str(folder), settings, max_prompt_tokens, threads, seed, truth), settings)
        await pool._wait(pool.worker.version.remote(), f"load {folder}")
        return pool

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket of the same group with verdicts; its stats gain the group's gap and pair accuracy per view.

        Groups that arrive while the actor is busy go to it together: one large batch costs less than many small ones.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((ticket, future))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST_GROUPS], self._waiting[MOST_GROUPS:]
            try:
                done: list[Any] = await self._judge([ticket for ticket, _ in batch])
            except Exception as error:  # whatever it is, every caller of this batch is to get it
                done = [error] * len(batch)
            for (_, future), result in zip(batch, done, strict=True):
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._serving = None

    async def _judge(self, tickets: list[Ticket]) -> list[Ticket]:
        call = self.worker.judge.options(num_returns=len(tickets) + 1)
        stats, *groups = call.remote(*[t.ref for t in tickets])
        found = await self._wait(stats, f"judge group {', '.join(str(t.id) for t in tickets)}")
        judged = zip(tickets, groups, found, strict=True)
        return [replace(ticket, ref=group, stats={**ticket.stats, **own}) for ticket, group, own in judged]

    async def learn(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        """Train on the groups the policy of `version` is about to learn from; returns metrics, and logs alarms."""
        learning = self.worker.learn.remote(*[t.ref for t in tickets])
        metrics, notices = await self._wait(learning, f"learn beside version {version}")
        for sentence in notices:
            log.warning("policy version %d: %s", version, sentence)
        return metrics

    async def warm_up(self, groups: Sequence[Group]) -> dict[str, float]:
        """One update on these groups before alignment, with the router's load balanced; returns metrics."""
        metrics, _ = await self._wait(self.worker.learn.remote(*groups, warming=True), "warm up")
        return metrics

    async def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Gap and pair accuracy per view over these groups, without learning from them."""
        return await self._wait(self.worker.measure.remote(*groups), f"measure {len(groups)} groups")

    async def examine(self, groups: Sequence[Group], worst: int) -> Examination:
        """Accuracy, calibration and shortcuts over these groups, and the `worst` pairs of each view."""
        call = self.worker.examine.remote(*groups, worst=worst)
        return await self._wait(call, f"examine {len(groups)} groups")

    async def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, version, replay buffer and what the guards know into `folder`, for `load`."""
        await self._wait(self.worker.save.remote(str(folder)), f"save into {folder}")

    async def load(self, folder: str | Path) -> int:
        """Go on from what `save` wrote; returns the discriminator's version."""
        return await self._wait(self.worker.load.remote(str(folder)), f"load {folder}")

    async def export(self, folder: str | Path) -> None:
        """Write the discriminator as a Hugging Face folder."""
        await self._wait(self.worker.export.remote(str(folder)), f"export into {folder}")

    def shutdown(self) -> None:
        """End the actor."""
        ray.kill(self.worker)

    async def _wait(self, ref: Any, what: str) -> Any:
        try:
            return await asyncio.wait_for(_value(ref), self.settings.timeout_s)
        except TimeoutError as error:
            waited = f"waited {self.settings.timeout_s:.0f} s for {self.NAME} to {what}"
            raise TimeoutError(f"{waited}; raise discriminator.timeout_s or look into that actor's log") from error
        except RayActorError as error:
            raise RuntimeError(f"{self.NAME} died while it was to {what}: {error}") from error


async def _value(ref: Any) -> Any:
    return await ref
