"""Supervised training on Ray Train: the phases of the base model, SFT, and SFT on references.

One TorchTrainer run goes through any number of phases, so its start-up is paid once. DeepSpeed trains, Ray Data reads
and tokenises ahead, Ray Train keeps the checkpoints and starts killed workers again, which go on at the very row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import train
from ray.train import torch as ray_torch

from prism_ray.config.corpora import CorporaSettings
from prism_ray.config.learner import OptimiserSettings
from prism_ray.config.supervised import SupervisedSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.corpora.files import Source, absolute
from prism_ray.corpora.quarantine import Quarantine
from prism_ray.corpora.reader import CorpusError, RowOrder, find_fragments
from prism_ray.stages.supervised_data import Course, Job
from prism_ray.stages.supervised_entry import Inbox, Losses, ask_inbox, train_rank
from prism_ray.stages.supervised_tasks import CellTask, ResponseTask

log = logging.getLogger(__name__)

OnMetrics = Callable[[str, int, dict[str, float]], None]
"""Called with the phase's name, its step (from 1) and the metrics."""


POLL_S = 0.3
"""Seconds between looks at the ranks' messages."""


@dataclass(frozen=True)
class Phase:
    """One phase: `responses` learns the references of `corpora`, `cells` is the testbed's vision pre-training."""

    name: str
    corpora: tuple[Source, ...]
    settings: SupervisedSettings
    task: Literal["responses", "cells"] = "responses"


@dataclass(frozen=True)
class Supervised:
    """What came of a run: optimiser steps of all phases, seconds, and the lines on quarantined rows."""

    steps: int
    seconds: float
    quarantined: tuple[str, ...]


def train_supervised(
    name: str,
    checkpoint_in: Path,
    phases: Sequence[Phase],
    out_folder: Path,
    state_folder: Path,
    settings: TrainerSettings,
    corpora: CorporaSettings,
    seed: int,
    on_metrics: OnMetrics | None = None,
    quarantine: Path | None = None,
    attend: Callable[[], None] | None = None,
    grace_s: float = math.inf,
) -> Supervised:
    """Train `checkpoint_in` through `phases` and write the Hugging Face folder `out_folder`.

    Checkpoints live in `state_folder` (on storage all nodes see) until the end: the same call after an interruption
    goes on from the last, a call with other settings or inputs starts anew. `on_metrics` is called in this thread;
    what it raises ends the run after a checkpoint; so does what `attend` raises, which is called a few times a second.
    Ranks that have not saved within `grace_s` are left to whoever ends their cluster.

    Raises `CorpusError` (before any worker starts where that is possible) for files that cannot be read and for corpora
    with too many bad rows, `ValueError` for settings that do not fit together, and Ray Train's `TrainingFailedError`
    when workers died too often.
    """
    started = time.monotonic()
    courses = tuple(_course(phase, str(checkpoint_in.resolve()), settings, corpora, seed) for phase in phases)
    bad = [Quarantine(course.name, course.order.about, corpora.max_bad_share) for course in courses]
    optimisers = tuple(_optimiser(phase.settings, settings) for phase in phases)
    inbox: Any = ray.remote(Inbox).options(num_cpus=0, max_restarts=3, max_task_retries=3).remote()
    out = str(out_folder.resolve())
    job = Job(str(checkpoint_in.resolve()), out, courses, optimisers, settings, corpora)
    run_name = f"{name}-{_fingerprint(job, phases)}"
    try:
        desk = _Desk(courses, bad, on_metrics, attend)
        _fit(_trainer(job, inbox, run_name, state_folder.resolve()), inbox, desk, grace_s)
    finally:
        ray.kill(inbox)
        if quarantine is not None:
            for one in bad:
                one.write(quarantine)
    if not (out_folder / "config.json").exists():
        raise CorpusError(f"{name}: the ranks ended without a checkpoint; too many rows are unusable, see {quarantine}")
    shutil.rmtree(state_folder / run_name, ignore_errors=True)
    lines = tuple(one.summary() for one in bad if len(one))
    return Supervised(sum(course.steps for course in courses), time.monotonic() - started, lines)


def _course(phase: Phase, model: str, settings: TrainerSettings, corpora: CorporaSettings, seed: int) -> Course:
    if phase.settings.batch % settings.ranks:
        raise ValueError(
            f"{phase.name}: a batch of {phase.settings.batch} cannot be dealt to {settings.ranks} ranks equally; "
            "make batch a multiple of trainer.ranks"
        )
    if phase.task == "cells":
        task: Any = CellTask(model, corpora.max_image_pixels)
    else:
        limits = (settings.max_prompt_tokens, settings.max_response_tokens, corpora.max_image_pixels)
        task = ResponseTask(model, *limits)
    fragments = find_fragments([absolute(c) for c in phase.corpora], task.required, corpora)
    order = RowOrder(fragments, seed)
    return Course(phase.name, task, order, phase.settings.steps, phase.settings.batch)


def _optimiser(phase: SupervisedSettings, settings: TrainerSettings) -> OptimiserSettings:
    return OptimiserSettings(
        lr=phase.lr,
        betas=phase.betas,
        weight_decay=phase.weight_decay,
        grad_clip=phase.grad_clip,
        schedule=phase.schedule,
        warmup_steps=round(phase.warmup_share * phase.steps),
        zero_stage=settings.zero_stage,
        precision=settings.precision,
    )


def _fingerprint(job: Job, phases: Sequence[Phase]) -> str:
    """What the run depends on, as eight characters: checkpoints of another run must not be taken up."""
    fragments = [f for course in job.courses for f in course.order.fragments]
    files = {f.file for f in fragments if "://" not in f.file}
    files |= {str(p) for p in Path(job.checkpoint_in).iterdir()}
    stamps = {file: (os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sorted(files)}
    described = [(p.name, p.task, p.settings.model_dump(mode="json")) for p in phases]
    seeds = [course.order.seed for course in job.courses]
    read_as = sorted({f.source.model_dump_json(exclude_defaults=True) for f in fragments})
    whole = json.dumps([stamps, described, seeds, read_as, job.settings.model_dump(mode="json")])
    return hashlib.sha256(whole.encode()).hexdigest()[:8]


def _trainer(job: Job, inbox: Any, run_name: str, state_folder: Path) -> ray_torch.TorchTrainer:
    s = job.settings
    gpu = s.gpus_per_rank > 0
    resources = {"CPU": s.cpus_per_rank} | ({"GPU": s.gpus_per_rank} if gpu else {})
    return ray_torch.TorchTrainer(
        train_rank,
        train_loop_config={"job": pickle.dumps(job), "inbox": inbox},
        torch_config=ray_torch.TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(s.timeout_s)),
        scaling_config=train.ScalingConfig(num_workers=s.ranks, use_gpu=gpu, resources_per_worker=resources),
        run_config=train.RunConfig(
            name=run_name,
            storage_path=str(state_folder),
            failure_config=train.FailureConfig(max_failures=s.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=[Losses(inbox)],
        ),
    )


class _Desk:
    """Takes the ranks' messages."""

    def __init__(
        self,
        courses: Sequence[Course],
        bad: Sequence[Quarantine],
        on_metrics: OnMetrics | None,
        attend: Callable[[], None] | None,
    ) -> None:
        self._courses = courses
        self._bad = bad
        self._on_metrics = on_metrics
        self._attend = attend
        self.error: BaseException | None = None
        self.since = math.inf
        """When the error came, by the monotonic clock."""

    def attend(self) -> None:
        """Nobody has said anything, perhaps; the driver may still want to stop."""
        try:
            if self._attend is not None:
                self._attend()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error, self.since = error, time.monotonic()

    def take(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        try:
            if kind == "metrics" and self._on_metrics is not None:
                self._on_metrics(self._courses[message[1]].name, message[2], message[3])
            elif kind == "bad":
                self._bad[message[1]].add(message[2])
            elif kind == "broken":
                raise CorpusError(message[1])
            elif kind == "lost":
                lost = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(message[1].items()))
                log.warning(
                    "%s was lost; Ray Train starts the ranks again from their last checkpoint, "
                    "at most trainer.max_failures times",
                    lost,
                )
        except BaseException as error:
            self._fail(error)


def _fit(trainer: ray_torch.TorchTrainer, inbox: Any, desk: _Desk, grace_s: float) -> None:
    """Run the trainer in a thread (it blocks, and would take over Ctrl-C for good) and attend to its messages."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    while True:
        running = thread.is_alive()
        for message in ask_inbox(inbox.take.remote(), "hand them out"):
            desk.take(message)
        desk.attend()
        if desk.error is not None and running:
            ask_inbox(inbox.stop.remote(), "tell them to stop")
        if not running or time.monotonic() - desk.since > grace_s:
            break
        thread.join(timeout=POLL_S)
    if desk.error is not None or failure:
        raise desk.error or failure[0]
