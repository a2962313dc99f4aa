"""Where judged groups wait for the learner, and what decides which of them make the next batch.

Complete groups train as they come, oldest first, with one exception that makes the staleness bound strict. A group
submitted at version s must train at version `s + max_staleness` at the latest (its deadline). A batch is held back
while training it without the unfinished groups would leave more groups due by some deadline than the batches until
then can hold (the feasibility condition of earliest-deadline-first scheduling). The gate keeps the whole set feasible,
so waiting always helps, and a straggler delays a batch only when the bound is really at stake. A group that is dropped
leaves the set, and the one that takes its place has a later deadline: the set stays feasible.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from prism_ray.runtime.idle import Idle
from prism_ray.runtime.protocols import Ticket


class StallError(TimeoutError):
    """The learner waited too long for a batch; the message says which groups were where."""


GENERATION, VERDICT, JOURNAL = "generation", "verdict", "journal"
"""What a group in flight waits for."""


@dataclass(frozen=True)
class _Waiting:
    version: int
    """Learner version when the group was submitted."""
    phase: str


class Buffer:
    """Groups in flight and groups ready, with the rule above. Not thread-safe: one asyncio loop owns it."""

    def __init__(self, groups_per_step: int, max_staleness: int):
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.idle = Idle()
        """By phase: how many groups are in it, and how long none was."""
        self._flying: dict[int, _Waiting] = {}
        self._ready: dict[int, tuple[int, Ticket]] = {}
        # How many of them were submitted at each version: there are as many versions as the bound allows, however many
        # groups, and `ready_for` is asked at every event.
        self._flying_from: Counter[int] = Counter()
        self._ready_from: Counter[int] = Counter()
        self._changed = asyncio.Event()

    def start(self, ticket_id: int, version: int) -> None:
        """A group has been submitted at this learner version."""
        if ticket_id in self._flying or ticket_id in self._ready:
            raise ValueError(f"group {ticket_id} was submitted twice")
        self._flying[ticket_id] = _Waiting(version, GENERATION)
        self.idle.enter(GENERATION)
        self._flying_from[version] += 1

    def moved(self, ticket_id: int, phase: str) -> None:
        """The group now waits for something else."""
        before = self._flying[ticket_id]
        self._flying[ticket_id] = _Waiting(before.version, phase)
        self.idle.leave(before.phase)
        self.idle.enter(phase)

    def waiting_for(self, phase: str) -> int:
        """How many groups wait for that."""
        return self.idle.count(phase)

    def add(self, ticket: Ticket) -> None:
        """The group is judged and in the journal: it may train."""
        waiting = self._land(ticket.id)
        self._ready[ticket.id] = (waiting.version, ticket)
        self._ready_from[waiting.version] += 1
        self._changed.set()

    def drop(self, ticket_id: int) -> None:
        """The group will not train; nothing waits for it any more."""
        self._land(ticket_id)
        self._changed.set()

    def _land(self, ticket_id: int) -> _Waiting:
        waiting = self._flying.pop(ticket_id)
        self.idle.leave(waiting.phase)
        _take_one(self._flying_from, waiting.version)
        return waiting

    def ready_for(self, version: int) -> bool:
        """Whether the batch of this version may train now under the rule above."""
        if len(self._ready) < self.groups_per_step:
            return False
        if not self._flying:
            return True
        due, batch = 0, self.groups_per_step
        for submitted in sorted(self._flying_from.keys() | self._ready_from.keys()):
            ready = self._ready_from[submitted]
            training = min(batch, ready)
            batch -= training
            due += self._flying_from[submitted] + ready - training
            if due and due > (submitted + self.max_staleness - version) * self.groups_per_step:
                return False
        return True

    def _oldest(self) -> list[int]:
        """Ids of the ready groups that would make the next batch: first by version, then by number."""
        return sorted(self._ready, key=lambda i: (self._ready[i][0], i))[: self.groups_per_step]

    async def take(self, version: int, timeout_s: float) -> list[Ticket]:
        """Wait for the batch of this version and remove it: the groups submitted first, by version and number.

        Raises StallError after `timeout_s` in which no group arrived or was dropped.
        """
        while not self.ready_for(version):
            self._changed.clear()
            try:
                # Not asyncio.wait_for, which can swallow the cancellation by which a failed task ends the loop.
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                raise StallError(self._describe_stall(version, timeout_s)) from None
        taken = [self._ready.pop(i) for i in self._oldest()]
        for submitted, _ in taken:
            _take_one(self._ready_from, submitted)
        return [ticket for _, ticket in taken]

    def _describe_stall(self, version: int, timeout_s: float) -> str:
        where: dict[str, list[int]] = {}
        for ticket_id, waiting in self._flying.items():
            where.setdefault(waiting.phase, []).append(ticket_id)
        flying = "; ".join(f"waiting for {phase}: groups {ids[:8]}" for phase, ids in where.items()) or "none in flight"
        return (
            f"update {version + 1} waited {timeout_s:.0f} s without a new group; it needs {self.groups_per_step} and "
            f"has {len(self._ready)} ({flying}). Look at that room's log, or raise this stage's loop.stall_timeout_s"
        )

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    @property
    def ready(self) -> int:
        return len(self._ready)


def _take_one(counts: Counter[int], version: int) -> None:
    """Count one less, and forget a version that nothing is left of."""
    counts[version] -= 1
    if not counts[version]:
        del counts[version]
