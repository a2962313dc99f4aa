"""Evaluation of every checkpoint of a run on held-out prompts: sampled and greedy, by the run's own engines."""

from __future__ import annotations

import base64
import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_ray.corpora.stream import PromptStream
from prism_ray.records import Group, Prompt
from prism_ray.report.evaluation import accuracy, evaluation_metrics
from prism_ray.report.progress import Progress
from prism_ray.runtime.supervision import fetch
from prism_ray.stages.pipeline import Outcome
from prism_ray.stages.session import Session

log = logging.getLogger(__name__)

LABELS = {
    "base": "base",
    "sft": "sft",
    "align": "prism",
    "rlvr": "prism+grpo",
    "rlvr-sft": "sft+grpo",
    "rlvr-references": "sft+references+grpo",
}
"""Which stage's checkpoint is evaluated under which label of the summary."""

UNSEEN = "evaluate_unseen"
"""Corpus of a question family that no training split contains (the testbed has one): greedy accuracy there says whether
a gain is skill or habit."""


async def run_evaluate(session: Session, stages: Sequence[str]) -> Outcome:
    """Evaluate these stages' checkpoints; the numbers go to the summary, samples to `samples.jsonl`."""
    truth = load_truth(session.settings.evaluate.truth)
    prompts = await _held_out(session, session.checkpoint(stages[0]), "evaluate")
    unseen = await _held_out(session, session.checkpoint(stages[0]), UNSEEN) if UNSEEN in session.corpora else []
    samples: list[dict[str, Any]] = []
    with Progress("evaluate", len(stages)) as progress:
        for number, stage in enumerate(stages, start=1):
            session.check_stop()
            engines = await session.engines(session.checkpoint(stage))
            sampled = await engines.sample(prompts, 1, temperature=session.settings.evaluate.temperature)
            greedy = await engines.sample(prompts, 1, greedy=True)
            metrics = evaluation_metrics(sampled, greedy, truth)
            if unseen:
                metrics["accuracy_unseen"] = accuracy(await engines.sample(unseen, 1, greedy=True), truth)
            session.summary.evaluation(LABELS[stage], metrics)
            session.metrics.evaluated(LABELS[stage], metrics)
            samples += _samples(LABELS[stage], sampled[: session.settings.evaluate.samples_in_report], truth)
            progress.update(
                number, accuracy=metrics["accuracy"]["mean"], accuracy_greedy=metrics["accuracy_greedy"]["mean"]
            )
            log.info("%s: %s", LABELS[stage], json.dumps(metrics))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (session.folder / "samples.jsonl").write_text(lines)
    return Outcome(0, None)


def load_truth(name: str) -> Callable[[str, Prompt], Mapping[str, float]]:
    """The truth function `module:function` of a task, as a function of a response's text and its prompt.

    Raises ValueError with a sentence where there is none of that name.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"evaluate.truth: {name} cannot be loaded ({error}); name it as module:function") from error

    return found


async def _held_out(session: Session, policy: Path, corpus: str) -> list[Prompt]:
    settings = session.settings
    stream = PromptStream(
        session.corpora[corpus],
        session.requirements(policy, judged_by="truth"),
        settings.corpora,
        settings.seed,
        quarantine=session.quarantine,
    )
    try:
        count = stream.order.first(settings.evaluate.prompts)
        taken = [await stream.take() for _ in range(count)]
        first_epoch = [one for one in taken if stream.order.first(one[1] + 1) > one[1]]
        return [await fetch(ref, f"prompt {name}") for name, _, ref in first_epoch]
    finally:
        stream.shutdown()


def _samples(label: str, groups: Sequence[Group], truth: Callable[..., Mapping[str, float]]) -> list[dict[str, Any]]:
    """What the report shows of some responses."""
    return [
        {
            "label": label,
            "image": base64.b64encode(group.prompt.images[0]).decode() if group.prompt.images else "",
            "question": group.prompt.messages[-1]["content"],
            "response": group.rollouts[0].text,
            "truth": dict(truth(group.rollouts[0].text, group.prompt)),
            "ground_truth": group.prompt.ground_truth,
        }
        for group in groups
    ]
