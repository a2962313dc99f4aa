"""An actor that dies or hangs is noticed by whoever waits for it, and by nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import ray

from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP, Lost, Watched, blocking_answer, fetch


class Worker:
    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> int:
        return os.getpid()

    def add(self, a: int, b: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        return a + b

    def refuse(self) -> None:
        raise ValueError("the number is odd")


ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(Worker)


@contextlib.asynccontextmanager
async def watched_worker() -> AsyncIterator[tuple[Watched, int]]:
    """A worker under watch, and its process."""
    actor = ACTOR.options(num_cpus=0).remote()
    pid = await actor.alive.remote()
    watched = Watched("worker 0", actor, heartbeat_s=0.6)
    watched.begin()
    try:
        yield watched, pid
    finally:
        watched.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        ray.kill(actor)


def test_an_answer_comes_through_even_while_pings_go_on(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            assert await watched.answer(watched.actor.add.remote(1, 2, seconds=2.0), "add", 20) == 3
            assert not watched.is_lost

    asyncio.run(drive())


def test_the_actors_own_error_comes_as_it_is(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            with pytest.raises(ValueError, match="the number is odd"):
                await watched.answer(watched.actor.refuse.remote(), "refuse", 20)
            assert not watched.is_lost

    asyncio.run(drive())


def test_a_slow_actor_that_lives_is_a_timeout_and_not_lost(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            with pytest.raises(TimeoutError, match=r"waited 0\.2 s for worker 0 to add"):
                await watched.answer(watched.actor.add.remote(1, 2, seconds=2.0), "add", 0.2)
            assert not watched.is_lost

    asyncio.run(drive())


def test_a_killed_actor_is_lost_to_every_waiter(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            waits = [
                asyncio.create_task(watched.answer(watched.actor.add.remote(1, 2, 60.0), "add", 60)) for _ in range(3)
            ]
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            for error in await asyncio.gather(*waits, return_exceptions=True):
                assert isinstance(error, Lost) and "worker 0 died while it was to add" in str(error)
            assert watched.is_lost

    asyncio.run(drive())


def test_a_stopped_actor_is_lost_after_the_heartbeat(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            waiting = asyncio.create_task(watched.answer(watched.actor.add.remote(1, 2, 0.5), "add", 60))
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(Lost, match=r"worker 0 has not answered for 0\.6 s while it was to add"):
                await asyncio.wait_for(waiting, 20)

    asyncio.run(drive())


def test_a_call_to_an_actor_already_lost_fails_at_once(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(Lost):
                await watched.answer(watched.actor.add.remote(1, 2), "add", 60)
            with pytest.raises(Lost, match="to add once more"):
                await watched.answer(watched.actor.add.remote(1, 2), "add once more", 60)

    asyncio.run(drive())


def test_a_reference_is_waited_for_so_long_and_then_named(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            assert await fetch(watched.actor.add.remote(1, 2), "a sum", 20) == 3
            with pytest.raises(ValueError, match="the number is odd"):
                await fetch(watched.actor.refuse.remote(), "a sum", 20)
            late = watched.actor.add.remote(1, 2, seconds=2.0)
            with pytest.raises(TimeoutError, match=r"waited 0\.2 s for a sum; look into the log"):
                await fetch(late, "a sum", 0.2)
            assert await fetch(late, "a sum", 20) == 3, "giving up has ended it for others too"

    asyncio.run(drive())


def test_without_an_event_loop_a_wait_ends_with_the_actors_name_too(cluster):
    actor = ACTOR.options(num_cpus=0).remote()
    pid = ray.get(actor.alive.remote())
    try:
        assert blocking_answer(actor.add.remote(1, 2), "worker 0", "add", 20) == 3
        with pytest.raises(ValueError, match="the number is odd"):
            blocking_answer(actor.refuse.remote(), "worker 0", "refuse", 20)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"waited 0\.5 s for worker 0 to add"):
            blocking_answer(actor.add.remote(1, 2), "worker 0", "add", 0.5)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Lost, match="worker 0 died while it was to add"):
            blocking_answer(actor.add.remote(1, 2), "worker 0", "add", 20)
    finally:
        ray.kill(actor)


def test_ending_a_wait_leaves_no_task_behind(cluster):
    async def drive() -> None:
        async with watched_worker() as (watched, pid):
            waiting = asyncio.create_task(watched.answer(watched.actor.add.remote(1, 2, 1.0), "add", 60))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            watched.close()
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(drive())
