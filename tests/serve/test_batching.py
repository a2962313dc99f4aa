"""The queue in front of the discriminator: what goes together, what is turned away, what is never computed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from prism_ray.endpoint.wire import EndpointError
from prism_ray.serve.batching import Batcher

FAR = 1e9
"""A deadline (of `time.monotonic`) that does not pass."""


class Worker:
    """Doubles numbers, and shows in which batches; while `gate` is shut it computes nothing."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        assert self.gate.wait(30)
        self.batches.append(list(jobs))
        if 13 in jobs:
            raise ArithmeticError("13")
        return [2 * job for job in jobs]


async def _busy(batcher: Batcher, worker: Worker) -> asyncio.Task:
    """A job that is being computed, so that those that follow wait."""
    worker.gate.clear()
    first = asyncio.create_task(batcher.submit(0, 1, FAR))
    while batcher.waiting_tokens:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return first


def _run(scenario):
    worker = Worker()
    batcher: Batcher[int, int] = Batcher(worker, 10, 30)

    async def whole():
        try:
            return await scenario(batcher, worker)
        finally:
            worker.gate.set()
            await batcher.close()

    return asyncio.run(whole()), worker, batcher


def test_what_waits_is_batched_in_order_up_to_the_budget():
    async def scenario(batcher, worker):
        await _busy(batcher, worker)
        costs = {1: 4, 2: 4, 3: 4, 4: 25, 5: 1}
        waiting = [asyncio.create_task(batcher.submit(job, cost, FAR)) for job, cost in costs.items() if job < 4]
        await asyncio.sleep(0)
        worker.gate.set()
        first = await asyncio.gather(*waiting)
        late = [batcher.submit(job, cost, FAR) for job, cost in costs.items() if job >= 4]
        return first + await asyncio.gather(*late)

    results, worker, batcher = _run(scenario)
    assert results == [2, 4, 6, 8, 10]
    assert worker.batches == [[0], [1, 2], [3], [4], [5]], "a job above the budget goes alone"
    assert batcher.waiting_tokens == 0 and batcher.tokens_per_s


def test_jobs_of_two_kinds_are_never_in_one_batch():
    async def scenario(batcher, worker):
        await _busy(batcher, worker)
        kinds = [asyncio.create_task(batcher.submit(job, 1, FAR, kind=kind)) for job, kind in ((1, "a"), (2, "b"))]
        await asyncio.sleep(0)
        worker.gate.set()
        return await asyncio.gather(*kinds)

    results, worker, _ = _run(scenario)
    assert results == [2, 4] and worker.batches == [[0], [1], [2]]


def test_beyond_the_bound_jobs_are_turned_away_at_once_and_the_others_answered():
    async def scenario(batcher, worker):
        await _busy(batcher, worker)
        waiting = [asyncio.create_task(batcher.submit(job, 10, FAR)) for job in (1, 2, 3, 4, 5)]
        await asyncio.sleep(0)
        turned_away = [task for task in waiting if task.done()]
        assert batcher.waiting_tokens == 30
        worker.gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        return turned_away, results

    (turned_away, results), *_ = _run(scenario)
    assert len(turned_away) == 2 and results[:3] == [2, 4, 6]
    for error in results[3:]:
        assert isinstance(error, EndpointError)
        assert (error.status, error.code) == (503, "overloaded") and error.retry_after and error.retry_after >= 1


def test_a_job_that_would_be_late_by_the_rate_is_turned_away_at_once():
    async def scenario(batcher, worker):
        await _busy(batcher, worker)
        batcher.tokens_per_s = 10.0
        first = asyncio.create_task(batcher.submit(1, 20, FAR))
        await asyncio.sleep(0)
        with pytest.raises(EndpointError, match="for some 2.0 s") as caught:
            await batcher.submit(2, 1, time.monotonic() + 1.5)
        patient = asyncio.create_task(batcher.submit(3, 1, time.monotonic() + 60))
        await asyncio.sleep(0)
        worker.gate.set()
        return caught.value, await first, await patient

    (error, *results), worker, _ = _run(scenario)
    assert error.code == "overloaded" and results == [2, 6] and 2 not in sum(worker.batches, [])


def test_a_job_larger_than_the_bound_is_taken_when_nothing_waits():
    results, *_ = _run(lambda batcher, worker: batcher.submit(1, 1000, FAR))
    assert results == 2


def test_how_long_to_wait_follows_the_rate():
    batcher: Batcher[int, int] = Batcher(Worker(), 10, 1000)
    batcher.waiting_tokens = 1000
    assert batcher.retry_after() == 1.0, "nothing is known yet"
    batcher.tokens_per_s = 100.0
    assert batcher.retry_after() == 5.0
    batcher.tokens_per_s = 0.1
    assert batcher.retry_after() == 60.0


def test_what_nobody_waits_for_is_never_computed():
    async def scenario(batcher, worker):
        first = await _busy(batcher, worker)
        gone = asyncio.create_task(batcher.submit(1, 1, FAR))
        late = asyncio.create_task(batcher.submit(2, 1, time.monotonic()))
        kept = asyncio.create_task(batcher.submit(3, 1, FAR))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        worker.gate.set()
        return await asyncio.gather(first, gone, late, kept, return_exceptions=True)

    (first, gone, late, kept), worker, batcher = _run(scenario)
    assert (first, kept) == (0, 6) and worker.batches == [[0], [3]] and batcher.skipped == 2
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(late, EndpointError) and (late.status, late.code) == (503, "deadline")


def test_a_job_that_fails_takes_no_other_with_it():
    async def scenario(batcher, worker):
        await _busy(batcher, worker)
        waiting = [asyncio.create_task(batcher.submit(job, 1, FAR)) for job in (1, 13, 2)]
        await asyncio.sleep(0)
        worker.gate.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    (one, thirteen, two), worker, _ = _run(scenario)
    assert (one, two) == (2, 4) and isinstance(thirteen, ArithmeticError)
    assert worker.batches == [[0], [1, 13, 2], [1], [13], [2]]
    with pytest.raises(ArithmeticError):
        _run(lambda batcher, worker: batcher.submit(13, 1, FAR))
