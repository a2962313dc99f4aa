"""A served discriminator as the judge of a phase (`judge: serve`)."""

from __future__ import annotations

import os
from typing import Any

from prism_ray.config.run import RunSettings
from prism_ray.discriminator.served.judging import check_model
from prism_ray.discriminator.served.pool import ServedPool
from prism_ray.endpoint.client import Client
from prism_ray.endpoint.wire import EndpointError

_CHECK_S = 20.0
"""Seconds in which the endpoint must answer before a run starts; later it may be away for longer."""


async def served_judge(settings: RunSettings) -> ServedPool:
    """The judge that `served` names."""
    return await ServedPool.start(settings.served, settings.discriminator.views, _token(settings))


def check_served(settings: RunSettings) -> None:
    """Ask the endpoint what it serves, if a phase needs it; ValueError with a sentence where it is of no use."""
    if "serve" not in (settings.align.judge, settings.rlvr.judge):
        return
    try:
        with Client(settings.served.url, _token(settings), patience_s=_CHECK_S) as client:
            check_model(client.model(), settings.served, settings.discriminator.views)
    except EndpointError as error:
        raise ValueError(f"served.url: {settings.served.url} cannot be asked: {error}") from None


def depends_on(settings: RunSettings) -> dict[str, Any]:
    """What of a served judge shapes what a phase becomes."""
    return {"served": settings.served.model_dump(include={"url", "version"}), "views": settings.discriminator.views}


def columns_for(corpus: str, settings: RunSettings) -> tuple[str, ...]:
    """What RLVR's judge needs of its corpus: the truth, or a reference."""
    if corpus != "rlvr":
        return ()
    return ("reward_model",) if settings.rlvr.judge == "own" else ("teacher_response",)


def _token(settings: RunSettings) -> str:
    return os.environ.get(settings.served.token_variable, "")
