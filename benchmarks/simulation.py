"""Simulated engines, judge and learner for the real loop, in virtual time: what benchmarks of the loop itself run on.

Nothing here computes a token. The `Loop` with its gate and its buffer is the very one that trains; the rooms around it
are simulated, and asyncio's clock jumps to the next event instead of waiting for it.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from prism_ray.config.runtime import LoopSettings
from prism_ray.runtime.loop import Loop, LoopState
from prism_ray.runtime.protocols import Ratios, Ticket

T = TypeVar("T")


class _Skipping(selectors.DefaultSelector):
    """Where asyncio would wait for the next timer, the clock is set forward instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that no timer will bring about")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while code runs and jumps over every wait."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(main)


def now() -> float:
    """Virtual seconds since the simulation began."""
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Speeds:
    """How fast the simulated hardware is. A decoding step of n sequences takes `step_s + n * sequence_s`."""

    step_s: float
    sequence_s: float
    slots: int
    """Sequences an engine decodes together; more wait in its queue."""
    learner_tokens_per_s: float
    """Response tokens that the whole learner trains on in a second."""
    publish_s: float
    """How long the engines stand still to take new weights."""


@dataclass(order=True)
class _Sequence:
    """A response under way: it ends once the engine has made `end` decoding steps."""

    end: float
    group: _Group = field(compare=False)


@dataclass(eq=False)
class _Group:
    lengths: Sequence[int]
    done: asyncio.Future[None]
    left: int
    oldest_version: int = -1


class Engine:
    """One simulated engine with continuous batching: all its sequences advance a token in each decoding step."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds, self.version, self.outstanding = speeds, 0, 0
        self.busy_s = 0.0
        self._running: list[_Sequence] = []
        self._queue: deque[tuple[int, _Group]] = deque()
        self._steps = self._since = 0.0
        self._paused_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def sample(self, lengths: Sequence[int]) -> int:
        """Decode a group with responses of these lengths; returns the version of its oldest token."""
        group = _Group(lengths, asyncio.get_running_loop().create_future(), len(lengths))
        self.outstanding += len(lengths)
        self._advance()
        self._queue.extend((length, group) for length in lengths)
        self._plan()
        await group.done
        self.outstanding -= len(lengths)
        return group.oldest_version

    def pause(self, seconds: float, version: int) -> None:
        """Stand still to take new weights, then go on with every sequence under them."""
        self._advance()
        self._paused_until = self._since = now() + seconds
        self.version = version
        self._plan()

    @property
    def _step_s(self) -> float:
        return self.speeds.step_s + self.speeds.sequence_s * len(self._running)

    def _advance(self) -> None:
        """Decode up to this moment."""
        moment = now()
        if moment > self._since:
            if self._running:
                self._steps += (moment - self._since) / self._step_s
                self.busy_s += moment - self._since
            self._since = moment

    def _plan(self) -> None:
        """Fill the free slots from the queue, and wake up when the next sequence ends."""
        while self._queue and len(self._running) < self.speeds.slots:
            length, group = self._queue.popleft()
            if group.oldest_version < 0:
                group.oldest_version = self.version
            heapq.heappush(self._running, _Sequence(self._steps + length, group))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            wait = max(0.0, self._running[0].end - self._steps) * self._step_s
            start = max(now(), self._paused_until)
            self._timer = asyncio.get_running_loop().call_at(start + wait, self._end_sequences)

    def _end_sequences(self) -> None:
        self._advance()
        while self._running and self._running[0].end <= self._steps + 1e-6:
            group = heapq.heappop(self._running).group
            group.left -= 1
            if not group.left:
                group.done.set_result(None)
        self._plan()


class System:
    """All rooms of the loop's protocols in one: prompts, rollouts, judge, learner and keeper.

    `lengths(position)` are the response lengths of a prompt's group. Judge and journal take no time; the judge is a
    verifier, which does not change.
    """

    version, wants_ratios = 0, False

    def __init__(self, engines: int, speeds: Speeds, lengths: Callable[[int], Sequence[int]]) -> None:
        self.speeds, self.lengths = speeds, lengths
        self.engines = [Engine(speeds) for _ in range(engines)]
        self.position = self.trained_version = 0
        self.updates: list[Update] = []

    async def take(self) -> tuple[str, int, Any]:
        self.position += 1
        return str(self.position - 1), self.position - 1, None

    async def generate(self, ticket: Ticket) -> Ticket:
        """Dispatch as the pool does: the whole group to the engine with the fewest responses outstanding, for nobody
        knows how long they will be."""
        lengths = self.lengths(ticket.position)
        engine = min(self.engines, key=lambda e: e.outstanding)
        oldest = await engine.sample(lengths)
        return replace(ticket, oldest_version=oldest, tokens=sum(lengths))

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        for engine in self.engines:
            engine.pause(self.speeds.publish_s, version)
        await asyncio.sleep(self.speeds.publish_s)
        return {}

    async def judge(self, ticket: Ticket) -> Ticket:
        return ticket

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        return {}

    def ratios(self) -> Ratios:
        return {}

    async def update(self, tickets: list[Ticket], version: int) -> dict[str, float]:
        tokens = sum(t.tokens for t in tickets)
        began = now()
        await asyncio.sleep(tokens / self.speeds.learner_tokens_per_s)
        self.trained_version = version + 1
        ages = tuple(version - t.oldest_version for t in tickets)
        self.updates.append(Update(began, now(), tokens, ages, sum(e.busy_s for e in self.engines)))
        return {}

    async def weights(self) -> int:
        return self.trained_version

    async def append(self, ticket: Ticket) -> None:
        pass

    async def train(self, updates: int, settings: LoopSettings) -> None:
        """Run the real loop on this system."""
        await Loop(self, self, self, self, self, settings, _nothing).run(updates, LoopState())


@dataclass(frozen=True)
class Update:
    """One update of the simulated learner: when it was (virtual seconds), what it trained on, how old that was, and how
    long all engines together had been decoding until then."""

    began: float
    ended: float
    tokens: int
    ages: tuple[int, ...]
    engines_busy_s: float


def _nothing(state: LoopState, metrics: dict[str, float]) -> Awaitable[None]:
    return asyncio.sleep(0)
