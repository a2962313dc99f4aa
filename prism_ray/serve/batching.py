"""Requests that wait are scored together, as many as a token budget holds; how many may wait is bounded.

While one batch is computed the next collects, so that nothing waits for company and a busy server batches by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prism_ray.endpoint.wire import EndpointError

J = TypeVar("J")
R = TypeVar("R")

log = logging.getLogger(__name__)

_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0
_MEMORY = 0.8  # weight of what was known of the rate before a batch


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[J, R]):
    job: J
    kind: Any
    cost: int
    deadline: float
    answer: asyncio.Future[R]


class Batcher(Generic[J, R]):
    """Computes jobs in batches, one batch at a time, in a thread of its own. Use it from one event loop."""

    def __init__(self, work: Callable[[Sequence[J]], Sequence[R]], budget: int, most_waiting: int) -> None:
        """`work` gives a result for each job of a batch, of at most `budget` tokens (or one larger job); up to
        `most_waiting` tokens may wait."""
        self._work, self._budget, self._most = work, budget, most_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._queue: deque[_Waiting[J, R]] = deque()
        self._running: asyncio.Task[None] | None = None
        self.waiting_tokens = 0
        self.tokens_per_s: float | None = None
        self.batches = self.skipped = 0

    async def submit(self, job: J, cost: int, deadline: float, kind: Any = None) -> R:
        """The job's result. Jobs of different `kind` are never in one batch. `deadline` is a time of `time.monotonic`
        after which the result is of no use.

        EndpointError 503: `overloaded` if too much waits, `deadline` if it has passed; else what `work` raised for it.
        """
        self.admit(cost, deadline)
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(job, kind, cost, deadline, answer))
        self.waiting_tokens += cost
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    def admit(self, cost: int, deadline: float) -> None:
        """Raise EndpointError 503 where a job of at least this cost would be one too many, or late: nothing need be
        done for it then. A job for which nothing waits is never refused."""
        if not self._queue:
            return
        if self.waiting_tokens + cost > self._most:
            what = f"{self.waiting_tokens} tokens wait to be scored, and at most {self._most} may"
        elif self.tokens_per_s and time.monotonic() + (late := self.waiting_tokens / self.tokens_per_s) > deadline:
            what = f"{self.waiting_tokens} tokens wait to be scored, for some {late:.1f} s, longer than this may take"
        else:
            return
        raise EndpointError(503, "overloaded", f"{what}; ask again later", self.retry_after(cost))

    def retry_after(self, cost: int = 0) -> float:
        """Seconds after which there should be room again for a job of this cost."""
        if not self.tokens_per_s:
            return _LEAST_RETRY_S
        over = self.waiting_tokens + cost - self._most / 2  # half empty, so that those who return do not collide
        return float(min(_MOST_RETRY_S, max(_LEAST_RETRY_S, math.ceil(over / self.tokens_per_s))))

    async def close(self) -> None:
        """Compute what waits, then end the thread."""
        if self._running is not None:
            await asyncio.wait({self._running})
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            await self._compute(batch)
            self._note(sum(w.cost for w in batch), time.monotonic() - began)

    def _next(self) -> list[_Waiting[J, R]]:
        batch: list[_Waiting[J, R]] = []
        tokens = 0
        while self._queue:
            first = self._queue[0]
            if first.answer.done() or first.deadline <= time.monotonic():
                self._skip(self._pop())
                continue
            if batch and (tokens + first.cost > self._budget or first.kind is not batch[0].kind):
                break
            batch.append(self._pop())
            tokens += first.cost
        return batch

    def _pop(self) -> _Waiting[J, R]:
        first = self._queue.popleft()
        self.waiting_tokens -= first.cost
        return first

    def _skip(self, waiting: _Waiting[J, R]) -> None:
        """Nobody waits for it any more: the caller hung up, or its time is over."""
        self.skipped += 1
        if not waiting.answer.done():
            waiting.answer.set_exception(too_late())

    async def _compute(self, batch: Sequence[_Waiting[J, R]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._work, [w.job for w in batch])
        except Exception as error:
            if len(batch) > 1:  # one of them is to blame, and only that one shall fail
                log.warning("a batch of %d requests failed (%s); each is computed alone", len(batch), error)
                for waiting in batch:
                    await self._compute([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(result)

    def _note(self, tokens: int, seconds: float) -> None:
        self.batches += 1
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_s = rate if self.tokens_per_s is None else _MEMORY * self.tokens_per_s + (1 - _MEMORY) * rate


def too_late() -> EndpointError:
    """A request whose time is over."""
    return EndpointError(503, "deadline", "there was no answer within the time that the request allows", 1.0)
