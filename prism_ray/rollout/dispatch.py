"""Which group goes to which engine: a queue in front of all of them, least outstanding tokens first.

Groups wait here and not in the engines, so that one that joins takes over waiting work at once, and one that is slow
holds up nothing but what it has. Plain bookkeeping: no Ray, nothing to wait for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prism_ray.rollout.sampling import Abandoned, Request, Sampling, Turn

LOSSES, KEPT, LOST, REFUSED = "rollout/losses", "rollout/kept_tokens", "rollout/lost_tokens", "rollout/refused"


@dataclass(eq=False)
class Job:
    """One group until it is sampled. `prompt` is a `Prompt` or a reference to one.

    `so_far` is what its rollouts go on from: rollouts, or a reference to a group of them. That is `given` by whoever
    asked (the turns before this one of an episode, of `given_tokens` tokens), or what an engine that is gone had done.
    `counts` goes into the ticket's stats: engines lost, tokens kept and lost by that, groups refused as garbage.
    """

    key: int
    group_id: int
    prompt: Any
    sampling: Sampling
    era: int
    done: asyncio.Future[tuple[Any, dict[str, Any]]]
    given: Any = ()
    given_tokens: int = 0
    so_far: Any = ()
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys((LOSSES, KEPT, LOST, REFUSED), 0.0))
    outstanding: int = 0
    """Tokens its engine may still have to produce for it."""

    @property
    def request(self) -> Request:
        return Request(self.key, self.group_id, self.era, self.sampling)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def forget(self, era: int) -> None:
        """Begin again, perhaps in a new era, in which what another one gave is worth nothing."""
        if self.given_tokens and era != self.era:
            self.fail(self._abandoned())
        self.era, self.so_far = era, self.given
        self.counts[KEPT] = 0.0

    def go_on_from(self, turn: Turn) -> None:
        """Let it be a later turn of its rollouts' episodes; Abandoned if that belongs to an older era."""
        if turn.era != self.era:
            raise self._abandoned()
        self.given = self.so_far = turn.so_far
        self.given_tokens = turn.tokens

    def _abandoned(self) -> Abandoned:
        return Abandoned(f"group {self.group_id} would go on from what a policy sampled that has been taken back")


@dataclass(eq=False)
class Load:
    """What one engine has to do. Closed, it gets nothing more; what it has stays."""

    open: bool = True
    outstanding: int = 0
    sequences: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)

    def told_of(self, key: int, remaining: int) -> None:
        """The engine says how many tokens it may still have to produce for a job."""
        if job := self.jobs.get(key):
            self.outstanding += remaining - job.outstanding
            job.outstanding = remaining

    def leave(self, job: Job) -> None:
        """The job is done here, one way or another."""
        del self.jobs[job.key]
        self.outstanding -= job.outstanding
        self.sequences -= job.sampling.n

    def _join(self, job: Job) -> None:
        self.jobs[job.key] = job
        job.outstanding = job.sampling.n * job.sampling.max_tokens
        self.outstanding += job.outstanding
        self.sequences += job.sampling.n


L = TypeVar("L", bound=Load)


class Queue:
    """Jobs that wait for an engine. `places`: sequences that one engine takes in before others wait here."""

    def __init__(self, places: int):
        self._places = places
        self._waiting: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._waiting)

    def put(self, job: Job, first: bool = False) -> None:
        """Let the job wait; one that lost its engine goes `first`, others wait for what it belongs to."""
        self._waiting.appendleft(job) if first else self._waiting.append(job)

    def discard(self, job: Job) -> None:
        """Whoever wanted it has gone."""
        if job in self._waiting:
            self._waiting.remove(job)

    def fail(self, error: Exception) -> None:
        """End all waiting."""
        while self._waiting:
            self._waiting.popleft().fail(error)

    def assign(self, engines: Collection[L]) -> Iterator[tuple[Job, L]]:
        """Jobs that can begin now, each with its engine: the open one with the least outstanding tokens.

        An engine with nothing to do takes any job; otherwise the job must fit into its places.
        """
        while self._waiting:
            n = self._waiting[0].sampling.n
            free = (e for e in engines if e.open and (not e.jobs or e.sequences + n <= self._places))
            engine = min(free, key=lambda e: e.outstanding, default=None)
            if engine is None:
                return
            job = self._waiting.popleft()
            if not job.done.done():
                engine._join(job)
                yield job, engine
