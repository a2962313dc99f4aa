"""Ray Serve around it: an ingress that reads requests, scorers that hold the discriminator, and the application.

Serve config files name `prism_ray.serve.deployment:build`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from prism_ray.config.load import settings_of
from prism_ray.config.serve import ServeSettings
from prism_ray.endpoint.wire import EndpointError, ModelAnswer, ScoreAnswer
from prism_ray.serve.app import create_app
from prism_ray.serve.auth import load_digests
from prism_ray.serve.batching import too_late
from prism_ray.serve.intake import Query
from prism_ray.serve.service import Service

log = logging.getLogger("ray.serve")

SCORER, INGRESS = "Scorer", "Ingress"
_ATTEMPTS = 2
"""How often a query is given to a scorer; one that died on the way did not answer, and scoring twice harms nobody."""
_SPARE_REQUESTS = 128
_GRACE_S = 2.0
"""Seconds that an answer may take back from the scorer, which keeps the deadline itself."""


class Scorer:
    """A replica that holds the discriminator. `user_config` is `{checkpoint: folder}`."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.replicas.threads)
        self._service = Service(settings)
        self._loading: set[asyncio.Task[None]] = set()
        self._loaded = False

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the discriminator in `user_config["checkpoint"]`; but for the first, which a replica cannot do without,
        it is loaded beside the one that is served."""
        checkpoint = user_config.get("checkpoint")
        if not checkpoint:
            raise ValueError("the Scorer's user_config names no checkpoint; give {checkpoint: folder}")
        if not self._loaded:
            await self._service.load(checkpoint)
            self._loaded = True
            return
        # Serve waits for this method with the replica taken out of its routes: not for loading a model.
        task = asyncio.create_task(self._service.load(checkpoint))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    async def score(self, query: Query, time_left_s: float) -> ScoreAnswer:
        return await self._service.score(query, time_left_s)

    async def describe(self) -> ModelAnswer:
        return await self._service.describe()


class ScorerHandle:
    """The scorers as the ingress asks them, whatever becomes of one of them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def score(self, query: Query, time_left_s: float) -> ScoreAnswer:
        return await self._ask(time_left_s, "score", query, time_left_s)

    async def describe(self) -> ModelAnswer:
        return await self._ask(_GRACE_S, "describe")

    async def _ask(self, time_left_s: float, method: str, *arguments: Any) -> Any:
        deadline = asyncio.get_running_loop().time() + time_left_s + _GRACE_S
        for attempt in range(_ATTEMPTS):
            try:
                async with asyncio.timeout_at(deadline):
                    return await getattr(self._handle, method).remote(*arguments)
            except TimeoutError:
                raise too_late() from None
            except BackPressureError:
                raise EndpointError(503, "overloaded", "too many requests wait; ask again later", 1.0) from None
            except RayTaskError as error:
                if isinstance(error.cause, EndpointError):
                    raise error.cause from None
                raise
            except (RayActorError, DeploymentUnavailableError) as error:
                log.warning("a scorer was lost while it was to %s: %s", method, error)
                if attempt + 1 == _ATTEMPTS:
                    raise EndpointError(503, "unavailable", "no scorer answered; ask again later", 5.0) from None
        raise AssertionError


class Ingress:
    """A replica that reads requests."""

    def __init__(self, settings: ServeSettings, scorer: DeploymentHandle) -> None:
        # The tokens of this process, not of who deploys: a secret is given to the pods that need it.
        self._settings, self._digests = settings, load_digests(settings.tokens)
        self._scorer = ScorerHandle(scorer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings, self._digests, self._scorer)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of these `ServeSettings`, for `serve.run`, `serve build` and `serve deploy`."""
    return application(settings_of(ServeSettings, args))


def application(settings: ServeSettings) -> serve.Application:
    """The application of these settings. Without a checkpoint the config file's `user_config` must name one."""
    replicas, queue = settings.replicas, settings.queue
    # A link stays one: what it points to may change while it is watched.
    user_config = {"checkpoint": str(settings.checkpoint.absolute()) if settings.checkpoint else ""}
    own = settings.model_copy(update={"checkpoint": None})  # what Scorer is made with must not change with it
    scorer = serve.deployment(
        Scorer,
        name=SCORER,
        user_config=user_config,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=queue.requests,
        max_queued_requests=queue.requests,
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.target_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        },
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=replicas.ingresses,
        ray_actor_options={"num_cpus": 0},
        # More than all scorers take, so that it is the ingress that turns requests away, with a sentence.
        max_ongoing_requests=(replicas.most + 1) * queue.requests + _SPARE_REQUESTS,
        max_queued_requests=_SPARE_REQUESTS,  # for an avalanche, Serve's proxy itself
        backpressure_config=BackpressureConfig(retry_after_s=1),
    )
    return ingress.bind(own, scorer.bind(own))
