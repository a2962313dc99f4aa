"""`VerifierPool`: fulfils the loop's `Judge` with a Gymnasium environment (contract: `verify/environment.py`).

Groups are judged in actors, one at a time in each. An actor that dies, hangs or takes too long is replaced, and its
group judged again, once: response by response now, so that only the response that did it is worth 0. Actors and not
tasks, because a burst of tasks makes Ray start (and later stop) a process for each, which costs more than the judging.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, cast

import ray

from prism_ray.config.verify import VerifySettings
from prism_ray.records import Group, Ratios, Ticket, Verdict
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP, Lost, Watched
from prism_ray.verify.judging import (
    BrokenEnvironment,
    judge_group,
    judge_text,
    make_environment,
    refused,
    stats_of,
)

__all__ = ["BrokenEnvironment", "VerifierPool", "make_environment"]

_ATTEMPTS = 3
"""How often a process is started, or asked for what no response can hinder, before the failure is the cluster's."""

logger = logging.getLogger(__name__)


class _Verifier:
    """The actor: one environment."""

    def __init__(self, environment: str, options: dict[str, Any]) -> None:
        self._environment = make_environment(environment, options)

    def ready(self) -> None:
        """Answers once the process is up, which the time limit of a group does not count."""

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        """Answers while the actor judges."""

    @ray.method(num_returns=2)
    def judge(self, group: Group) -> tuple[Group, dict[str, float]]:
        judged = judge_group(group, self._environment)
        return judged, stats_of(judged)

    def size(self, group: Group) -> int:
        return len(group.rollouts)

    def judge_one(self, group: Group, index: int) -> Verdict:
        return judge_text(group.rollouts[index].text, group.prompt, self._environment)

    @ray.method(num_returns=2)
    def collect(self, group: Group, verdicts: list[Verdict]) -> tuple[Group, dict[str, float]]:
        judged = group.judged(verdicts)
        return judged, stats_of(judged)


_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(_Verifier)


@dataclass(eq=False)
class _Desk:
    """A place where groups are judged, the actor that sits there now, and whether that is known to be up."""

    name: str
    watched: Watched
    up: bool = False


class VerifierPool:
    """Judges groups with the environment named in the settings; an environment that cannot be made fails here."""

    def __init__(self, settings: VerifySettings) -> None:
        make_environment(settings.environment, settings.options).close()
        self._settings = settings
        self._numbers = count()
        self._wanted = settings.workers
        self._idle: asyncio.Queue[_Desk] = asyncio.Queue()
        self._desks: set[_Desk] = set()
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
            return await self._judge(desk, ticket)
        except asyncio.CancelledError:
            self._seat(desk)  # whoever sits there still judges what nobody waits for
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

    async def _judge(self, desk: _Desk, ticket: Ticket) -> Ticket:
        what, limit = f"judge group {ticket.id}", self._settings.timeout_s
        try:
            return _judged(ticket, *await self._ask(desk, what, limit, "judge", ticket.ref))
        except (Lost, TimeoutError) as error:
            logger.warning("%s; it is replaced, and the group judged again response by response", error)
            self._seat(desk)
        _, size = await self._surely(desk, what, "size", ticket.ref)
        verdicts = [await self._one(desk, ticket, index) for index in range(size)]
        return _judged(ticket, *await self._surely(desk, what, "collect", ticket.ref, verdicts))

    async def _one(self, desk: _Desk, ticket: Ticket, index: int) -> Verdict:
        """The verdict on one response; where that cannot be had, the response is worth 0."""
        what, limit = f"judge response {index} of group {ticket.id}", self._settings.timeout_s
        try:
            _, verdict = await self._ask(desk, what, limit, "judge_one", ticket.ref, index)
            return verdict
        except TimeoutError:
            reason = f"verifier took longer than {limit:g} s"
        except Lost as error:
            reason = f"verifier crashed: {error}"
        logger.warning("%s (response %d of group %d, which is worth 0)", reason, index, ticket.id)
        self._seat(desk)
        return refused(reason)

    async def _surely(self, desk: _Desk, what: str, method: str, *arguments: Any) -> tuple[list[Any], Any]:
        """`_ask` for what depends on no response, again from another process where one is lost."""
        limit = self._settings.start_timeout_s
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._ask(desk, what, limit, method, *arguments)
            except Lost as error:
                logger.warning("%s; it is replaced", error)
                self._seat(desk)
        return await self._ask(desk, what, limit, method, *arguments)

    async def _ask(self, desk: _Desk, what: str, limit_s: float, method: str, *arguments: Any) -> tuple[list[Any], Any]:
        """References to what a method returns but for the last, and the value of the last."""
        watched = await self._up(desk)
        returned = getattr(watched.actor, method).remote(*arguments)
        *kept, last = returned if isinstance(returned, list) else [returned]
        return kept, await watched.answer(last, what, limit_s)

    async def _up(self, desk: _Desk) -> Watched:
        """Who sits at the desk, up and not known to be lost; RuntimeError where nobody can be seated."""
        for _ in range(_ATTEMPTS):
            if desk.watched.is_lost:  # while it had nothing to do
                logger.warning("%s; it is replaced", desk.watched.loss)
                self._seat(desk)
            if desk.up:
                return desk.watched
            limit, actor = self._settings.start_timeout_s, desk.watched.actor
            try:
                await desk.watched.answer(actor.ready.remote(), "start", limit)
            except Lost as error:
                logger.warning("%s; it is replaced", error)
                self._seat(desk)
                continue
            except TimeoutError:
                self._seat(desk)
                raise RuntimeError(
                    f"waited {limit:g} s for a verifier process; has the cluster verify.worker_cpus?"
                ) from None
            desk.watched.begin()
            desk.up = True
            return desk.watched
        raise RuntimeError(f"{desk.name} died {_ATTEMPTS} times while it was to start; its worker's log says why")

    def _grow(self) -> None:
        while len(self._desks) < self._wanted:
            name = f"verifier {next(self._numbers)}"
            desk = _Desk(name, self._started(name))
            self._desks.add(desk)
            self._idle.put_nowait(desk)

    def _started(self, name: str) -> Watched:
        s = self._settings
        actor = _ACTOR.options(num_cpus=s.worker_cpus).remote(s.environment, s.options)
        return Watched(name, actor, s.heartbeat_s)

    def _seat(self, desk: _Desk) -> None:
        """Somebody else at the desk."""
        self._end(desk)
        desk.watched, desk.up = self._started(desk.name), False

    def _release(self, desk: _Desk) -> None:
        if len(self._desks) > self._wanted:
            self._retire(desk)
        elif desk in self._desks:
            self._idle.put_nowait(desk)

    def _retire(self, desk: _Desk) -> None:
        self._desks.discard(desk)
        self._end(desk)

    def _end(self, desk: _Desk) -> None:
        desk.watched.close()
        ray.kill(desk.watched.actor)


def _judged(ticket: Ticket, refs: list[Any], stats: dict[str, float]) -> Ticket:
    return replace(ticket, ref=refs[0], stats=ticket.stats | stats)
