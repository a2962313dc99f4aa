"""What jobs have in common that judge rollouts: what their prompts must have, what shapes their verdicts, and, where
they go through a corpus once, batches of prompts and an end that saves the state."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from prism_ray.config.corpora import CorporaSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.verify import VerifySettings
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.stream import PromptStream
from prism_ray.models.ahead import TokenCounter
from prism_ray.records import Prompt
from prism_ray.verify.answer import TRUTH, AnswerEnvironment
from prism_ray.verify.judging import truth_refusal

JudgedBy = Literal["truth", "verifier"]
"""What says whether answers are right: the function `evaluate.truth`, or `verify.environment`."""

CLEANING_S = 30.0
"""Longest wait for engines to end after a signal; what is not noted by then is done again."""


def needs_of(tokens: TokenCounter, rollout: RolloutSettings, corpora: CorporaSettings) -> Requirements:
    """What every prompt must have that is sampled; `tokens` are of the policy that samples."""
    return Requirements(
        max_image_pixels=corpora.max_image_pixels,
        max_images=rollout.max_images,
        tokenise=tokens,
        max_prompt_tokens=rollout.max_prompt_tokens,
        data_sources=tuple(corpora.data_sources),
        fit=tokens.fitted,
    )


def refusal_of(by: JudgedBy, truth: str, verify: VerifySettings) -> Callable[[Prompt], str] | None:
    """What says why a prompt's ground truth cannot be used by the function `truth` or by the verifier ("" if it can);
    None where they are a user's own, or the testbed's."""
    if by == "verifier":
        return truth_refusal(verify.environment, verify.options)
    return AnswerEnvironment.refusal if truth == TRUTH else None


def verdicts_of(verify: VerifySettings) -> list[Any]:
    """The settings that shape verdicts, not how fast they come."""
    turns = [verify.max_turns] if verify.max_turns > 1 else []
    return [verify.environment, verify.options, *turns]


def made_alike(stamp: Path, made_with: Mapping[str, Any]) -> str:
    """Note in `stamp` what the contents of its folder are made with; "" unless they were begun with something else,
    whose names are returned (nothing is noted then)."""
    if stamp.exists() and (before := json.loads(stamp.read_text())) != made_with:
        return ", ".join(name for name in made_with if before.get(name) != made_with[name])
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(made_with))
    return ""


async def until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work came to its end before Ctrl-C or SIGTERM, which cancel it."""
    task, loop, stopped = asyncio.create_task(work), asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait({task}, timeout=CLEANING_S)
        return False
    finally:
        stopping.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def next_batch(stream: PromptStream, size: int, wanted: int) -> tuple[list[tuple[int, Any]], bool]:
    """Positions below `wanted` of the next prompts with references to them, and whether they are the last."""
    batch: list[tuple[int, Any]] = []
    while len(batch) < size:
        _, position, ref = await stream.take()
        if position >= wanted:
            return batch, True
        batch.append((position, ref))
    return batch, False
