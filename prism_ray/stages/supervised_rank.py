"""What one rank of the supervised trainer does."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray import train

from prism_ray.config.trainer import TrainerSettings
from prism_ray.corpora.reader import reading_error
from prism_ray.learner.engine import TrainEngine
from prism_ray.models.adapters import freeze
from prism_ray.models.load import load_policy, save_weights
from prism_ray.stages.supervised_data import Job, Portion, Shard, overall
from prism_ray.stages.supervised_entry import ask_inbox
from prism_ray.stages.supervised_tasks import Task

ENGINE = "engine"
STATE = "state.json"
LISTEN_S = 1.0
"""Longest time between two questions to the driver whether to stop, where steps are short."""


class Then(Enum):
    """What follows a step: the next, the export at the end, a checkpoint because the driver asked to stop, or nothing
    because the corpus cannot be used."""

    GO_ON = 0
    EXPORT = 1
    SAVE = 2
    END = 3


def starting_policy(folder: str | Path, settings: TrainerSettings) -> Any:
    """The policy in `folder`, ready to train as the settings say."""
    policy = load_policy(folder, getattr(torch, settings.precision))
    if settings.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    freeze(policy, settings.freeze)
    return policy


class Rank:
    """One rank's training state."""

    def __init__(self, job: Job, inbox: Any) -> None:
        context = train.get_context()
        self.job, self.inbox = job, inbox
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(max(1, math.ceil(job.settings.cpus_per_rank)))
        self.policy = starting_policy(job.checkpoint_in, job.settings)
        self.phase, self.step, self.bad = 0, 0, 0
        self.terms = 1.0
        self.stop, self.heard = False, time.monotonic()
        self.engine = self._engine(0)
        self.meter = _Meter()
        self.maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def run(self) -> None:
        """Every remaining step, then the export; or, where all ranks shall stop, a checkpoint."""
        self._restore()
        first = overall(self.job.courses, self.phase, self.step)
        shard = Shard(self.job.courses, self.rank, self.ranks, self.job.settings.micro_batch, self.job.corpora)
        portions = shard.portions(first)
        while (then := self._advance(portions)) is Then.GO_ON:
            pass
        if then is Then.EXPORT:
            self._export()
        elif then is Then.SAVE:
            self._save()

    def _advance(self, portions: Iterator[tuple[int, int, Portion]]) -> Then:
        """One step, if all ranks can make it: the same on all of them."""
        item, error = self._next(portions)
        if item is None and not error:
            return Then.EXPORT
        if item is None:
            self._tell("broken", error)
            item = (self.phase, self.step, Portion([], 0, []))
        phase, step, portion = item
        if portion.bad:
            self._tell("bad", phase, portion.bad)
        if phase != self.phase:
            self._begin(phase)
        self._listen()
        self.terms, bad, broken, stop = self._sum(portion.size, len(portion.bad), float(error != ""), float(self.stop))
        self.bad += int(bad)
        if broken or self.bad > self.job.corpora.max_bad_share * self.job.courses[phase].order.about:
            return Then.END
        if stop:
            return Then.SAVE
        self._train(portion)
        self.step = step + 1
        self._after_step()
        return Then.GO_ON

    def _next(self, portions: Iterator[tuple[int, int, Portion]]) -> tuple[tuple[int, int, Portion] | None, str]:
        """The next portion, None at the end; or the sentence that says why the corpus cannot be read."""
        started = time.perf_counter()
        try:
            return next(portions, None), ""
        except Exception as raised:
            reading = reading_error(raised)
            if reading is None:
                raise
            return None, str(reading)
        finally:
            self.meter.waited += time.perf_counter() - started

    def _sum(self, *values: float) -> list[float]:
        """Sums over the ranks."""
        if self.ranks == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _listen(self) -> None:
        """Ask now and then whether to stop: metrics rows may be minutes apart."""
        if self.rank == 0 and time.monotonic() - self.heard > LISTEN_S:
            self._tell("listening")

    def _tell(self, *message: Any) -> None:
        """A message to the driver; its answer is whether to stop."""
        self.stop = bool(ask_inbox(self.inbox.put.remote(message), "take one"))
        self.heard = time.monotonic()

    def _train(self, portion: Portion) -> None:
        """One optimiser step; the loss is the mean over the terms of the whole batch, over all ranks."""
        task = self.job.courses[self.phase].task
        for batch in self._batches(task, portion.micro):
            loss, sums = self.engine.run(task.loss, batch.to(self.engine.device))
            self.engine.backward(loss / self.terms)
            self.meter.add({"loss": loss} | sums)
        self.meter.step(self.engine.step(), portion)

    def _batches(self, task: Task, micro: list[list[Any]]) -> Iterator[Any]:
        """The micro-batches as tensors, each made (images are decoded only here) while the one before is learned."""
        coming = self.maker.submit(task.collate, micro[0])
        for following in micro[1:]:
            batch, coming = self._waited(coming), self.maker.submit(task.collate, following)
            yield batch
        yield self._waited(coming)

    def _waited(self, coming: Future[Any]) -> Any:
        started = time.perf_counter()
        try:
            return coming.result()
        finally:
            self.meter.waited += time.perf_counter() - started

    def _after_step(self) -> None:
        settings, course = self.job.settings, self.job.courses[self.phase]
        if self.step % settings.log_every == 0 or self.step == course.steps:
            row = self.meter.row(self.ranks, self.engine.device)
            if self.rank == 0:
                self._tell("metrics", self.phase, self.step, row)
        last = self.phase == len(self.job.courses) - 1 and self.step == course.steps
        if overall(self.job.courses, self.phase, self.step) % settings.checkpoint_every == 0 and not last:
            self._save()

    def _begin(self, phase: int) -> None:
        self.engine.destroy()
        self.phase, self.step, self.bad = phase, 0, 0
        self.engine = self._engine(phase)
        self.meter = _Meter()

    def _engine(self, phase: int) -> TrainEngine:
        course = self.job.courses[phase]
        torch.manual_seed(0)  # a phase's own parameters (a probe's) are the same on every rank
        return TrainEngine(course.task.module(self.policy), self.job.optimisers[phase], total_steps=course.steps)

    def _save(self) -> None:
        """A Ray Train checkpoint: what every rank's DeepSpeed writes, and where we are."""
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save(folder, ENGINE)
            state = {"phase": self.phase, "step": self.step, "bad": self.bad}
            (Path(folder) / STATE).write_text(json.dumps(state))
            train.report(state, checkpoint=train.Checkpoint.from_directory(folder))

    def _restore(self) -> None:
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / STATE).read_text())
            if state["phase"] != self.phase:
                self._begin(state["phase"])
            self.engine.load(folder, ENGINE)
        self.step, self.bad = state["step"], state["bad"]

    def _export(self) -> None:
        whole = self.engine.module is self.policy
        weights = self.engine.weights() if whole else dict(self.policy.state_dict())
        if self.rank == 0:
            partial = Path(self.job.out_folder + ".partial")
            save_weights(weights, partial, like=self.job.checkpoint_in)
            shutil.rmtree(self.job.out_folder, ignore_errors=True)
            partial.replace(self.job.out_folder)


class _Meter:
    """Sums of what happened since the last metrics row; nothing is read from the device before a row is asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.seen, self.steps, self.skipped, self.last = 0, 0, 0, (0.0, 0.0)
        self.started, self.waited = time.perf_counter(), 0.0

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            held = self.sums.get(name)
            self.sums[name] = value.detach() if held is None else held + value.detach()

    def step(self, report: Any, portion: Portion) -> None:
        self.seen += portion.size
        self.steps += 1
        self.skipped += report.skipped
        self.last = (report.grad_norm, report.lr)

    def row(self, ranks: int, device: Any) -> dict[str, float]:
        """Means over all ranks since the last row; every rank must ask."""
        names = sorted(self.sums)
        values = [self.sums[name].double() for name in names]
        sums = torch.stack([*values, torch.tensor(float(self.seen), dtype=torch.float64, device=device)])
        if ranks > 1:
            dist.all_reduce(sums)
        seconds = time.perf_counter() - self.started
        row = {f"supervised/{name}": float(s / sums[-1]) for name, s in zip(names, sums, strict=False)}
        row |= {"supervised/grad_norm": self.last[0], "supervised/lr": self.last[1]}
        row |= {"supervised/skipped": float(self.skipped), "supervised/seconds_per_step": seconds / self.steps}
        row |= {
            "supervised/terms_per_second": float(sums[-1]) / seconds,
            "supervised/wait_share": self.waited / seconds,
        }
        self._clear()
        return row
