"""`VerifierPool`: fulfils the loop's `Judge` with a Gymnasium environment (contract: `verify/environment.py`).

Groups are judged in actors, one at a time in each (`verify/worker.py`).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count

from prism_ray.config.verify import VerifySettings
from prism_ray.records import Ratios, Ticket
from prism_ray.verify.judging import BrokenEnvironment, make_environment
from prism_ray.verify.worker import Desk, verifier_desk

__all__ = ["BrokenEnvironment", "VerifierPool", "make_environment"]


class VerifierPool:
    """Judges groups with the environment named in the settings; an environment that cannot be made fails here."""

    def __init__(self, settings: VerifySettings) -> None:
        make_environment(settings.environment, settings.options).close()
        self._settings = settings
        self._numbers = count()
        self._wanted = settings.workers
        self._idle: asyncio.Queue[Desk] = asyncio.Queue()
        self._desks: set[Desk] = set()
        self._grow()

    @property
    def version(self) -> int:
        """Rules have one version."""
        return 0

    @property
    def wants_ratios(self) -> bool:
        """Rules do not learn."""
        return False

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket with `ref` to the judged group and the means of the reward and its parts as stats.

        Verdicts that the group has already are replaced. BrokenEnvironment where the environment breaks its contract,
        RuntimeError where no process can be started.
        """
        desk = await self._idle.get()
        try:
            refs, stats = await desk.each(ticket.id, ticket.ref)
            return replace(ticket, ref=refs[0], stats=ticket.stats | stats)
        except asyncio.CancelledError:
            desk.seat()  # whoever sits there still judges what nobody waits for
            raise
        finally:
            self._release(desk)

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        """Nothing: rules do not learn."""
        return {}

    async def resize(self, workers: int) -> None:
        """Judge in so many processes from now on; one that is judging ends when its group is done."""
        if workers < 1:
            raise ValueError(f"workers: a pool of {workers} verifiers judges nothing; 1 is the least")
        self._wanted = workers
        self._grow()
        while len(self._desks) > workers and not self._idle.empty():
            self._retire(self._idle.get_nowait())

    def shutdown(self) -> None:
        """End the actors."""
        for desk in list(self._desks):
            self._retire(desk)

    def _grow(self) -> None:
        while len(self._desks) < self._wanted:
            desk = verifier_desk(f"verifier {next(self._numbers)}", self._settings)
            self._desks.add(desk)
            self._idle.put_nowait(desk)

    def _release(self, desk: Desk) -> None:
        if len(self._desks) > self._wanted:
            self._retire(desk)
        elif desk in self._desks:
            self._idle.put_nowait(desk)

    def _retire(self, desk: Desk) -> None:
        self._desks.discard(desk)
        desk.end()
