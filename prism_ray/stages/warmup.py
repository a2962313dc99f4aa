"""Discriminator warm-up: pairs of references and SFT rollouts until the judge is worth following."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prism_ray.corpora.census import key_of
from prism_ray.corpora.files import CorpusError, Source
from prism_ray.corpora.rows import STUDENT
from prism_ray.corpora.stream import PromptStream
from prism_ray.discriminator.model import create_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.discriminator.probes import Examination
from prism_ray.discriminator.start import judge_start
from prism_ray.records import Group, Prompt, Rollout
from prism_ray.report.progress import Progress
from prism_ray.runtime.supervision import fetch
from prism_ray.stages.evaluate import load_truth
from prism_ray.stages.pipeline import Outcome
from prism_ray.stages.session import Session

log = logging.getLogger(__name__)


MEASURE_EVERY = 2
"""Warm-up steps between two looks at the held-out pairs; a look costs a third of a step."""

WORST_FILE = "worst_pairs.jsonl"
"""In the stage's folder: of each view the held-out pairs it is most wrong about, the worst first."""

WORST_PAIRS = 10
"""How many of them per view: as many as a person looks at."""


class WeakDiscriminator(RuntimeError):
    """The warmed-up discriminator does not tell references from rollouts well enough to train a policy on."""


class Sampler(Protocol):
    """Where the rollouts of warm-up come from: engines, or pairs that were written before."""

    async def sample(self, prompts: list[Prompt], count: int, /) -> list[Group]: ...


class WrittenPairs:
    """The student's side of `data.warmup`'s rows, as if it had just been sampled: one rollout a row."""

    async def sample(self, prompts: list[Prompt], count: int, /) -> list[Group]:
        return [Group(number, prompt, (self._rollout(prompt),)) for number, prompt in enumerate(prompts)]

    def _rollout(self, prompt: Prompt) -> Rollout:
        none = np.zeros(0, np.int32)
        return Rollout(prompt.id, 0, none, none, np.zeros(0, np.float32), none, prompt.extra[STUDENT], "stop")


async def run_warmup(
    session: Session, name: str, policy: Path, corpus: Sequence[Source], written: bool = False
) -> Outcome:
    """Make the policy (or `discriminator.policy`) a discriminator, train it on the policy's rollouts, or on the pairs
    that the corpus consists of (`written`), and export it.

    Stops early once every view's held-out pair accuracy has reached the target. What it has become is then examined on
    the held-out pairs (calibration, shortcuts, the worst pairs). Raises WeakDiscriminator where a view has not reached
    the target: its noise would be normalised to full-size policy updates.
    """
    settings = session.settings
    initial = session.stage_folder(name) / "upcycled"
    start = await asyncio.to_thread(judge_start, policy, settings.discriminator.policy)
    await asyncio.to_thread(create_discriminator, start, initial, settings.discriminator, settings.seed)
    places = await session.judge_places()
    starting = DiscriminatorPool.start(
        initial,
        settings.discriminator,
        settings.rollout.max_prompt_tokens,
        seed=settings.seed,
        truth=load_truth(settings.evaluate.truth),
        places=places,
    )
    engines: Sampler = WrittenPairs()
    if written:
        judge = await starting
    else:
        engines, judge = await asyncio.gather(session.engines(policy), starting)
    stream = PromptStream(
        corpus,
        replace(session.requirements(policy, reference=True), student=written, unique=not written),
        settings.corpora,
        settings.seed,
        quarantine=session.quarantine,
    )
    try:
        if stream.order.first(settings.warmup.held_out_prompts + 1) <= settings.warmup.held_out_prompts:
            raise CorpusError(
                f"warmup.held_out_prompts is {settings.warmup.held_out_prompts} but the corpus has only {stream.rows} "
                "prompts; lower it, so that some are left to train on"
            )
        steps = await _train(session, name, engines, judge, stream)
        await judge.export(session.checkpoint(name))
    finally:
        stream.shutdown()
        judge.shutdown()
        session.leave_places()
    return Outcome(steps, session.checkpoint(name))


async def _train(session: Session, name: str, engines: Sampler, judge: DiscriminatorPool, stream: PromptStream) -> int:
    """Steps until the target is reached; the next batch is sampled while the judge learns from this one."""
    settings = session.settings.warmup
    views = [view.name for view in session.settings.discriminator.views if view.weight]  # those that move the policy
    held_out = await _sample(engines, stream, settings.held_out_prompts, settings.rollouts, set())
    reserved = {_question(group.prompt) for group in held_out}
    accuracy: dict[str, float] = {}
    coming = asyncio.create_task(_sample(engines, stream, settings.prompts_per_step, settings.rollouts, reserved))
    step = 0
    with Progress(name, settings.max_steps) as progress, _cancelled_at_the_end(lambda: coming):
        while step < settings.max_steps:
            session.check_stop()
            batch = await coming
            if step + 1 < settings.max_steps:
                coming = asyncio.create_task(
                    _sample(engines, stream, settings.prompts_per_step, settings.rollouts, reserved)
                )
            metrics = await judge.warm_up(batch)
            step += 1
            measured = step % MEASURE_EVERY == 0 or step in (settings.min_steps, settings.max_steps)
            if measured:
                accuracy = await judge.measure(held_out)
                metrics |= {f"{key}_held_out": value for key, value in accuracy.items()}
            session.metrics.write(name, step, metrics)
            progress.update(step, **metrics)
            if measured and step >= settings.min_steps and _weakest(accuracy, views) >= settings.target_accuracy:
                break
    _report(session, name, step, await judge.examine(held_out, WORST_PAIRS))
    if _weakest(accuracy, views) < settings.target_accuracy:
        raise WeakDiscriminator(
            f"after {step} warm-up steps the held-out pair accuracy is "
            + ", ".join(f"{accuracy.get(_accuracy_of(view), 0.0):.2f} ({view})" for view in views)
            + f", below warmup.target_accuracy {settings.target_accuracy}; raise warmup.max_steps, check the "
            "references, or lower the target knowingly"
        )
    return step


def _report(session: Session, name: str, step: int, examination: Examination) -> None:
    """Note what the examination found: metrics, a line per view and the warnings in the log, the worst pairs."""
    metrics = examination.metrics
    session.metrics.write(name, step, {k if "/probe/" in k else f"{k}_held_out": v for k, v in metrics.items()})
    for view in session.settings.discriminator.view_names:
        if (accuracy := metrics.get(_accuracy_of(view))) is not None:
            error = metrics[f"discriminator/calibration_error/{view}"]
            log.info(
                "%s: %s pairs are ordered rightly in %.3f of the cases, calibration error %.3f",
                name, view, accuracy, error,
            )  # fmt: skip
    for sentence in examination.warnings:
        log.warning("%s: %s", name, sentence)
    lines = "".join(json.dumps(row) + "\n" for row in examination.worst)
    (session.stage_folder(name) / WORST_FILE).write_text(lines)


@contextmanager
def _cancelled_at_the_end(task: Callable[[], asyncio.Task[Any]]) -> Iterator[None]:
    try:
        yield
    finally:
        task().cancel()


async def _sample(engines: Sampler, stream: PromptStream, count: int, rollouts: int, reserved: set[int]) -> list[Group]:
    """Rollouts of the next `count` prompts of the stream whose question is not reserved."""
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompt_id, _, ref = await stream.take()
        prompt: Prompt = await fetch(ref, f"prompt {prompt_id}")
        if _question(prompt) not in reserved:
            prompts.append(prompt)
    return await engines.sample(prompts, rollouts)


def _question(prompt: Prompt) -> int:
    """What is asked, whatever the row is called: several pairs are of one question."""
    return key_of(prompt)


def _accuracy_of(view: str) -> str:
    return f"discriminator/pair_accuracy/{view}"


def _weakest(accuracy: dict[str, float], views: Sequence[str]) -> float:
    """The lowest accuracy of a view; 0 for a view without pairs (no valid rollout, or all identical to references)."""
    return min(accuracy.get(_accuracy_of(view), 0.0) for view in views)
