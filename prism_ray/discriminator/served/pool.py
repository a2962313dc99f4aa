"""`ServedPool`: fulfils the loop's `Judge` with a discriminator behind an endpoint.

One actor asks, so that groups do not pass through the coordinator. It knows nothing that could be lost: Ray starts it
again where it dies, and asks it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError

from prism_ray.config.served import ServedSettings
from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.segments import without_images
from prism_ray.discriminator.served.judging import check_model, judged_group, not_taken
from prism_ray.endpoint.client import AsyncClient
from prism_ray.endpoint.wire import SCORE, EndpointError, ModelAnswer, ScoreAnswer, body_of
from prism_ray.records import Group, Prompt, Ratios, Ticket

_RESTARTS = 5


class _Asker:
    """The actor."""

    def __init__(self, settings: ServedSettings, token: str) -> None:
        self._settings = settings
        self._client = AsyncClient(
            settings.url, token, settings.timeout_s, settings.patience_s, connections=settings.concurrency
        )

    async def model(self) -> ModelAnswer:
        return await self._client.model()

    @ray.method(num_returns=2)
    async def judge(self, group: Group, model: ModelAnswer) -> tuple[Group, dict[str, float]]:
        prompt = group.prompt if self._settings.images else without_images(group.prompt)
        size = int(model.limits.get("responses", len(group.rollouts)))
        texts = [rollout.text for rollout in group.rollouts]
        refused = not_taken(texts, model)
        texts = ["" if index in refused else text for index, text in enumerate(texts)]
        answers = [await self._ask(prompt, texts[first : first + size]) for first in range(0, len(texts), size)]
        results = [r for answer in answers for r in answer.results]
        results = [refused.get(index, result) for index, result in enumerate(results)]
        return judged_group(group, answers[0].model_copy(update={"results": results}), model)

    async def _ask(self, prompt: Prompt, texts: list[str]) -> ScoreAnswer:
        try:
            return await self._client.ask(ScoreAnswer, SCORE, body_of(prompt, texts, self._settings.timeout_s))
        except EndpointError as error:
            if error.status != 422:
                raise
            raise EndpointError(422, error.code, f"prompt {prompt.id}: {error.message}") from None


_ACTOR: Any = cast(Any, ray.remote)(_Asker)


class ServedPool:
    """Judges groups by a served discriminator, whose version is 0 to the loop: it does not change."""

    def __init__(self, asker: Any, model: ModelAnswer) -> None:
        """Use `start`."""
        self._asker, self.model = asker, model

    @classmethod
    async def start(cls, settings: ServedSettings, views: Sequence[ViewSettings], token: str) -> ServedPool:
        """Start asking. EndpointError where the endpoint cannot be asked, OtherJudge where it judges something else."""
        options = {"num_cpus": 0, "max_concurrency": settings.concurrency}
        asker = _ACTOR.options(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **options).remote(settings, token)
        try:
            model = await _plainly(asker.model.remote())
            check_model(model, settings, views)
        except BaseException:
            ray.kill(asker)
            raise
        return cls(asker, model)

    @property
    def version(self) -> int:
        """It has one version."""
        return 0

    @property
    def wants_ratios(self) -> bool:
        """It does not learn."""
        return False

    async def judge(self, ticket: Ticket) -> Ticket:
        """The ticket of the same group with verdicts; its stats gain the group's gap and pair accuracy per view."""
        group, stats = self._asker.judge.remote(ticket.ref, self.model)
        return replace(ticket, ref=group, judge_version=0, stats=ticket.stats | await _plainly(stats))

    async def learn(self, tickets: list[Ticket], version: int, ratios: Ratios | None = None) -> dict[str, float]:
        """Nothing: it is frozen."""
        return {}

    def shutdown(self) -> None:
        """End the actor."""
        ray.kill(self._asker)


async def _plainly(call: Any) -> Any:
    """The value of a call, or what it raised, without Ray's wrapping."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause from None
