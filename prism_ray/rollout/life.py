"""What the pool knows of one engine while it lives: its load, its watch, and what it has told of unfinished groups."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_ray.records import Group, Rollout
from prism_ray.rollout.dispatch import Job, Load
from prism_ray.rollout.partial import Piece, assembled
from prism_ray.rollout.sampling import EngineFailed
from prism_ray.runtime.supervision import Lost, Watched
from prism_ray.weights.transports import Superseded


@dataclass(frozen=True)
class Weights:
    """What every engine must hold: a reference to arrays or a checkpoint folder (or None: what it was started with)."""

    version: int
    arrays: Any = None
    folder: Path | None = None


async def hand_over(watched: Watched, weights: Weights, limit_s: float) -> dict[str, float]:
    """Give an engine weights; returns its metrics."""
    if weights.folder is not None:
        call = watched.actor.load.remote(weights.folder, weights.version)
    else:
        call = watched.actor.update.remote(weights.arrays, weights.version)
    return await watched.answer(call, f"take weights {weights.version}", limit_s)


async def catch_up(watched: Watched, started: Weights, latest: Callable[[], Weights], limit_s: float) -> None:
    """Give an engine that was started as `started` what the others hold, whatever is published meanwhile.

    A learner that sets new weights aside is about to publish them: an offer that they have replaced is waited out.
    """
    held = started if started.arrays is None and started.folder is None else None
    while held is not (wanted := latest()):
        try:
            await hand_over(watched, wanted, limit_s)
            held = wanted
        except Superseded:
            deadline = time.monotonic() + limit_s
            while wanted is latest():
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)


class RestartBudget:
    """How often each engine may be replaced within a window; older replacements are forgotten."""

    def __init__(self, limit: int, window_s: float):
        self._limit, self._window_s = limit, window_s
        self._spent: dict[int, list[float]] = {}

    def spend(self, index: int) -> int:
        """Which replacement within the window this one is; 0 if there may be none."""
        now = time.monotonic()
        recent = [then for then in self._spent.get(index, []) if now - then < self._window_s]
        if len(recent) >= self._limit:
            return 0
        self._spent[index] = [*recent, now]
        return len(recent) + 1


class Throughput:
    """Tokens that each engine has sampled since they were last told."""

    def __init__(self) -> None:
        self._tokens: Counter[int] = Counter()
        self._since = time.monotonic()

    def add(self, index: int, tokens: int) -> None:
        self._tokens[index] += tokens

    def metrics(self, engines: int) -> dict[str, float]:
        """Tokens per second of all engines and of each of so many; the count begins anew."""
        now = time.monotonic()
        elapsed, self._since = max(now - self._since, 1e-9), now
        each = {f"rollout/engine_tokens_per_second/{i}": self._tokens[i] / elapsed for i in range(engines)}
        total, self._tokens = self._tokens.total() / elapsed, Counter()
        return each | {"rollout/tokens_per_second": total}


@dataclass(eq=False, kw_only=True)
class PoolEngine(Load):
    """One life of an engine.

    `news` are references to what it told of unfinished groups, which nobody reads unless it is lost: the coordinator
    moves references, not bytes. `told` counts them; `first` is that count when a group came.
    """

    index: int
    watched: Watched
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    told: int = 0
    news: deque[tuple[int, Any]] = field(default_factory=deque)
    first: dict[int, int] = field(default_factory=dict)
    _guarding: asyncio.Task[None] | None = None
    _following: asyncio.Task[None] | None = None
    _read: asyncio.Task[list[tuple[int, dict[int, list[Piece]]]]] | None = None

    def guard(self, lost: Callable[[PoolEngine, Exception], None]) -> None:
        """Tell `lost` when the engine is, even if it has nothing to do."""
        self._guarding = asyncio.create_task(self._guard(lost))

    def follow(self, every_s: float, limit_s: float) -> None:
        """Ask for news from now on."""
        self._limit_s = limit_s
        self._following = asyncio.create_task(self._follow(every_s))

    async def sleep(self, limit_s: float, lost: Callable[[PoolEngine, Exception], None]) -> None:
        """Give the GPU's memory back; `lost` is told if the engine is of no more use."""
        try:
            await self.watched.answer(self.watched.actor.sleep.remote(), "go to sleep", limit_s)
        except (Lost, EngineFailed, TimeoutError) as error:
            lost(self, error)

    def leave(self, job: Job) -> None:
        super().leave(job)
        self.first.pop(job.key, None)

    def close(self) -> None:
        """No more questions and pings; the actor itself is not touched."""
        for task in (self._guarding, self._following):
            if task is not None:
                task.cancel()
        self.watched.close()

    async def known(self, job: Job) -> tuple[Rollout, ...]:
        """What is known of the rollouts of a job this engine had, though it is gone."""
        if self._read is None:
            self._read = asyncio.create_task(self._read_news())
        news = await self._read
        so_far: Group | Sequence[Rollout] = job.so_far
        if not isinstance(so_far, tuple):  # a reference
            so_far = await fetched(so_far, self._limit_s, ())
        begun = so_far.rollouts if isinstance(so_far, Group) else so_far
        first = self.first[job.key]
        pieces = [piece for number, told in news if number >= first for piece in told.get(job.key, ())]
        return assembled("", begun, pieces)

    async def _guard(self, lost: Callable[[PoolEngine, Exception], None]) -> None:
        try:
            await self.watched.answer(asyncio.Event().wait(), "go on working", math.inf)
        except Lost as error:
            lost(self, error)

    async def _follow(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            if not self.jobs:
                self.news.clear()
                continue
            remaining, news = self.watched.actor.progress.options(num_returns=2).remote()
            self.news.append((self.told, news))
            self.told += 1
            with contextlib.suppress(TimeoutError):
                try:
                    answer = await self.watched.answer(remaining, "tell its progress", self._limit_s)
                except Lost:
                    return  # whoever waits for its groups says so
                for key, tokens in answer.items():
                    self.told_of(key, tokens)
            oldest = min(self.first.values(), default=self.told)
            while self.news and self.news[0][0] < oldest:
                self.news.popleft()

    async def _read_news(self) -> list[tuple[int, dict[int, list[Piece]]]]:
        return [(number, await fetched(reference, self._limit_s, {})) for number, reference in self.news]


async def fetched(reference: Any, limit_s: float, otherwise: Any = None) -> Any:
    """What a reference stands for; `otherwise` if it went down with its node, or was never told."""
    try:
        return await asyncio.wait_for(reference, limit_s)
    except Exception:
        return otherwise


async def set_within(event: asyncio.Event, limit_s: float) -> bool:
    """Whether the event came in time."""
    try:
        await asyncio.wait_for(event.wait(), limit_s)
    except TimeoutError:
        return False
    return True
