"""A served discriminator as the judge of a phase (`judge: serve`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from prism_ray.config.run import RunSettings
from prism_ray.discriminator.served.judging import check_model
from prism_ray.discriminator.served.pool import ServedPool
from prism_ray.endpoint.client import Client
from prism_ray.endpoint.wire import EndpointError

_CHECK_S = 20.0
"""Seconds in which the endpoint must answer before a run starts; later it may be away for longer."""
_TOKEN_PIXELS = 32**2
"""Pixels of an image that a token of a prompt stands for (Qwen3-VL): images are sent as large as the policy sees them.
"""


async def served_judge(settings: RunSettings) -> ServedPool:
    """The judge that `served` names."""
    return await ServedPool.start(settings.served, settings.discriminator.views, _token(settings))


def check_served(settings: RunSettings) -> None:
    """Ask the endpoint what it serves, if a phase needs it; ValueError with a sentence where it is of no use."""
    if "serve" not in (settings.align.judge, settings.rlvr.judge):
        return
    try:
        with Client(settings.served.url, _token(settings), patience_s=_CHECK_S) as client:
            model = client.model()
    except EndpointError as error:
        raise ValueError(f"served.url: {settings.served.url} cannot be asked: {error}") from None
    check_model(model, settings.served, settings.discriminator.views)
    _check_limits(model.limits, settings)


def _check_limits(limits: Mapping[str, float], settings: RunSettings) -> None:
    """Refuse an endpoint that would refuse prompts of this run, which only their images and their length decide."""
    url, rollout = settings.served.url, settings.rollout
    longest, limit = rollout.max_prompt_tokens, limits.get("prompt_tokens", math.inf)
    length = f"{longest} tokens (rollout.max_model_len less rollout.max_response_tokens)"
    if longest > limit:
        raise ValueError(
            f"{url} takes prompts of {limit:.0f} tokens (its limits.prompt_tokens) but this run's have up to {length}; "
            "raise the one, or lower the other"
        )
    if not settings.served.images or not rollout.max_images:
        return
    if rollout.max_images > (limit := limits.get("images", math.inf)):
        raise ValueError(
            f"{url} takes {limit:.0f} images a prompt (its limits.images) but rollout.max_images is "
            f"{rollout.max_images}; raise the one, or lower the other"
        )
    if longest * _TOKEN_PIXELS > (limit := limits.get("image_pixels", math.inf)):
        raise ValueError(
            f"{url} takes images of {limit:.0f} pixels (its limits.image_pixels) but prompts of {length} may have up "
            f"to {longest * _TOKEN_PIXELS}; raise the one, or lower the other"
        )


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
