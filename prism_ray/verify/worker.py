"""The processes in which environments judge, and the desk at which one of them sits.

A process that dies, hangs or takes too long is replaced, and what it was asked is asked again, once: response by
response now, so that only the response that did it is worth 0. Actors and not tasks, because a burst of tasks makes Ray
start (and later stop) a process for each, which costs more than the judging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray

from prism_ray.config.verify import VerifySettings
from prism_ray.records import Group, Verdict
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP, Lost, Watched
from prism_ray.verify.episode import Limits, Step, Table
from prism_ray.verify.judging import judge_group, judge_text, make_environment, refused, stats_of

_ATTEMPTS = 3
"""How often a process is started, or asked for what no response can hinder, before the failure is the cluster's."""

logger = logging.getLogger(__name__)


class _Verifier:
    """The actor: one environment, which judges groups of single responses.

    `all`, `size`, `one` and `collect` are what `Desk.each` asks; but for the last, what they return stays where it is.
    """

    def __init__(self, environment: str, options: dict[str, Any]) -> None:
        self._environment = make_environment(environment, options)

    def ready(self) -> None:
        """Answers once the process is up, which the time limit of a group does not count."""

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        """Answers while the actor judges."""

    @ray.method(num_returns=2)
    def all(self, group: Group) -> tuple[Group, dict[str, float]]:
        judged = judge_group(group, self._environment)
        return judged, stats_of(judged)

    def size(self, group: Group) -> int:
        return len(group.rollouts)

    def one(self, index: int, group: Group) -> Verdict:
        return judge_text(group.rollouts[index].text, group.prompt, self._environment)

    @ray.method(num_returns=2)
    def collect(self, group: Group, *verdicts: Verdict) -> tuple[Group, dict[str, float]]:
        judged = group.judged(verdicts)
        return judged, stats_of(judged)


class _Players:
    """The actor: environments that play the episodes of several groups. As `_Verifier`, a turn at a time."""

    def __init__(self, environment: str, options: dict[str, Any], folder: Path, limits: Limits) -> None:
        from prism_ray.models.encode import Encoder  # takes seconds to import, and is of no use to a `_Verifier`

        encoder = Encoder(folder, limits.max_prompt_tokens)
        self._table = Table(lambda: make_environment(environment, options), encoder, limits)

    def ready(self) -> None:
        """Answers once the process is up."""

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> None:
        """Answers while the actor works."""

    @ray.method(num_returns=3)
    def all(self, group: Group, verdicts: list[Verdict | None]) -> tuple[Group, list[Verdict | None], dict[str, Any]]:
        return self._table.turn(group, verdicts)

    def size(self, group: Group, verdicts: list[Verdict | None]) -> int:
        return len(group.rollouts)

    @ray.method(num_returns=2)
    def one(self, index: int, group: Group, verdicts: list[Verdict | None]) -> tuple[Step, None]:
        return self._table.step(group, verdicts, index), None

    @ray.method(num_returns=3)
    def collect(
        self, group: Group, verdicts: list[Verdict | None], *steps: Step | Verdict
    ) -> tuple[Group, list[Verdict | None], dict[str, Any]]:
        whole = [(r, s) if isinstance(s, Verdict) else s for r, s in zip(group.rollouts, steps, strict=True)]
        return self._table.collect(group, whole)


_VERIFIER: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(_Verifier)
_PLAYERS: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(_Players)


def verifier_desk(name: str, settings: VerifySettings) -> Desk:
    """A desk at which single responses are judged."""
    return Desk(name, settings, lambda: _placed(_VERIFIER, settings).remote(settings.environment, settings.options))


def players_desk(name: str, settings: VerifySettings, folder: Path, limits: Limits) -> Desk:
    """A desk at which episodes of the policy in `folder` are played."""
    arguments = settings.environment, settings.options, folder, limits
    return Desk(name, settings, lambda: _placed(_PLAYERS, settings).remote(*arguments))


def _placed(actor: Any, settings: VerifySettings) -> Any:
    return actor.options(num_cpus=settings.worker_cpus)


class Desk:
    """A place where groups are judged, the actor that sits there now, and whether that is known to be up."""

    def __init__(self, name: str, settings: VerifySettings, actor: Callable[[], Any]) -> None:
        self.name, self._settings, self._actor = name, settings, actor
        self.watched, self._is_up = self._started(), False

    async def each(self, group: int, *arguments: Any) -> tuple[list[Any], Any]:
        """References to what the actor returns for all responses of a group but for the last, and the value of that.

        The first of the arguments refers to the group. A response that cannot be judged is worth 0. RuntimeError where
        no process can be started; what the method raises is raised.
        """
        what, limit = f"judge group {group}", self._settings.timeout_s
        try:
            return await self._ask(what, limit, "all", *arguments)
        except (Lost, TimeoutError) as error:
            logger.warning("%s; it is replaced, and the group judged again response by response", error)
            self.seat()
        _, size = await self._surely(what, "size", *arguments)
        steps = [await self._one(group, index, *arguments) for index in range(size)]
        return await self._surely(what, "collect", *arguments, *steps)

    def seat(self) -> None:
        """Somebody else at the desk."""
        self.end()
        self.watched, self._is_up = self._started(), False

    def end(self) -> None:
        """Nobody at the desk any more."""
        self.watched.close()
        ray.kill(self.watched.actor)

    async def _one(self, group: int, index: int, *arguments: Any) -> Any:
        """What comes of one response; where that cannot be had, the verdict that it is worth 0."""
        what, limit = f"judge response {index} of group {group}", self._settings.timeout_s
        try:
            kept, verdict = await self._ask(what, limit, "one", index, *arguments)
            return kept[0] if kept else verdict
        except TimeoutError:
            reason = f"verifier took longer than {limit:g} s"
        except Lost as error:
            reason = f"verifier crashed: {error}"
        logger.warning("%s (response %d of group %d, which is worth 0)", reason, index, group)
        self.seat()
        return refused(reason)

    async def _surely(self, what: str, method: str, *arguments: Any) -> tuple[list[Any], Any]:
        """`_ask` for what depends on no response, again from another process where one is lost."""
        limit = self._settings.start_timeout_s
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._ask(what, limit, method, *arguments)
            except Lost as error:
                logger.warning("%s; it is replaced", error)
                self.seat()
        return await self._ask(what, limit, method, *arguments)

    async def _ask(self, what: str, limit_s: float, method: str, *arguments: Any) -> tuple[list[Any], Any]:
        watched = await self._up()
        returned = getattr(watched.actor, method).remote(*arguments)
        *kept, last = returned if isinstance(returned, list) else [returned]
        return kept, await watched.answer(last, what, limit_s)

    async def _up(self) -> Watched:
        """Who sits at the desk, up and not known to be lost; RuntimeError where nobody can be seated."""
        for _ in range(_ATTEMPTS):
            if self.watched.is_lost:  # while it had nothing to do
                logger.warning("%s; it is replaced", self.watched.loss)
                self.seat()
            if self._is_up:
                return self.watched
            limit, actor = self._settings.start_timeout_s, self.watched.actor
            try:
                await self.watched.answer(actor.ready.remote(), "start", limit)
            except Lost as error:
                logger.warning("%s; it is replaced", error)
                self.seat()
                continue
            except TimeoutError:
                self.seat()
                raise RuntimeError(
                    f"waited {limit:g} s for a verifier process; has the cluster verify.worker_cpus?"
                ) from None
            self.watched.begin()
            self._is_up = True
            return self.watched
        raise RuntimeError(f"{self.name} died {_ATTEMPTS} times while it was to start; its worker's log says why")

    def _started(self) -> Watched:
        return Watched(self.name, self._actor(), self._settings.heartbeat_s)
