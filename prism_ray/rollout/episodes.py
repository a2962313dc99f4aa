"""`EpisodePool`: rollouts of several turns, sampled by the engines, answered and judged by environments.

Fulfils the loop's `Rollouts`, and its `Judge` as well: the environments give their verdicts as the episodes go, so that
a group comes judged out of its generation. A group's rollouts take their turns together: those that go on are one
request to an engine, which goes on from the tokens of the turns before, and one question to the process that holds
their environments. Only references pass through here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_ray.config.verify import VerifySettings
from prism_ray.records import Group, Prompt, Ratios, Ticket
from prism_ray.rollout.pool import RolloutPool
from prism_ray.rollout.sampling import Abandoned, Sampling, Turn
from prism_ray.verify.episode import Limits
from prism_ray.verify.judging import make_environment
from prism_ray.verify.worker import Desk, players_desk

log = logging.getLogger(__name__)

_ADDED = ("rollout/seconds", "rollout/losses", "rollout/kept_tokens", "rollout/lost_tokens", "rollout/refused")
"""Stats of a ticket that count up over the turns; of the others the last turn's are those of the whole."""


class EpisodePool:
    """Plays episodes of the policy whose tokenizer is in `folder`; an environment that cannot be made fails here.

    It begins with `over`, which says what samples them.
    """

    def __init__(self, settings: VerifySettings, folder: Path) -> None:
        make_environment(settings.environment, settings.options).close()
        self._settings, self._folder = settings, Path(folder).absolute()
        self._engines: RolloutPool
        self._desks: list[Desk] = []

    def over(self, engines: RolloutPool) -> EpisodePool:
        """This pool, with these engines, and their limits of the present phase."""
        settings, rollout = self._settings, engines.settings
        most = engines.sampling.max_tokens
        limits = Limits(settings.max_turns, rollout.max_prompt_tokens, most, rollout.max_images)
        self.shutdown()
        self._engines = engines
        names = (f"verifier {number}" for number in range(settings.workers))
        self._desks = [players_desk(name, settings, self._folder, limits) for name in names]
        self._busy = [asyncio.Lock() for _ in self._desks]
        return self

    @property
    def version(self) -> int:
        """Rules have one version."""
        return 0

    @property
    def wants_ratios(self) -> bool:
        """Rules do not learn."""
        return False

    async def generate(self, ticket: Ticket, sampling: Sampling | None = None) -> Ticket:
        """Play the group's episodes; the returned ticket refers to a judged `Group`.

        BrokenEnvironment where the environment breaks its contract, RuntimeError where no process can be started.
        """
        while True:
            try:
                return await self._play(ticket, sampling or self._engines.sampling)
            except Abandoned as error:
                log.warning("%s; its episodes begin anew", error)

    async def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Episodes on each prompt, for evaluation; judged groups in the order of the prompts."""

        async def one(index: int, prompt: Prompt) -> Group:
            return await (await self.generate(Ticket(index, prompt.id, index, prompt), sampling)).ref

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    async def publish(self, weights: Any, version: int) -> dict[str, float]:
        """Give the engines new weights; episodes under way go on under them."""
        return await self._engines.publish(weights, version)

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket as it is: its group was judged as it was played."""
        return ticket

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        """Nothing: rules do not learn."""
        return {}

    def shutdown(self) -> None:
        """End the environments' processes; the engines are not touched."""
        for desk in self._desks:
            desk.end()
        self._desks = []

    async def _play(self, ticket: Ticket, sampling: Sampling) -> Ticket:
        desk = ticket.id % len(self._desks)  # its environments live there from turn to turn
        era, turn = self._engines.era, None
        verdicts: Any = []
        stats = dict.fromkeys(_ADDED, 0.0)
        while True:
            sampled = await self._engines.generate(ticket, sampling, turn)
            stats = sampled.stats | {name: stats[name] + sampled.stats[name] for name in _ADDED}
            (group, verdicts), told = await self._answered(desk, sampled, verdicts)
            if not told["open"]:
                return replace(sampled, ref=group, stats=ticket.stats | stats | told["stats"])
            turn = Turn(group, told["tokens"], era)

    async def _answered(self, number: int, ticket: Ticket, verdicts: Any) -> tuple[list[Any], dict[str, Any]]:
        desk = self._desks[number]
        async with self._busy[number]:
            try:
                return await desk.each(ticket.id, ticket.ref, verdicts)
            except asyncio.CancelledError:
                desk.seat()  # whoever sits there still works for somebody who has gone
                raise
