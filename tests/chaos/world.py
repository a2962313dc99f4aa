"""A small run of real parts in which things are killed: tiny policy, testbed corpora, one or two vLLM engines.

A fault is a function that is called when a chosen metrics row is written, that is between two updates; what it returns
goes on beside the run. Processes are found among the descendants of this process by the names Ray gives its actors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray

from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.config.run import RunSettings
from prism_ray.discriminator.model import create_discriminator
from prism_ray.discriminator.pool import DiscriminatorPool
from prism_ray.models.tiny import build_tiny
from prism_ray.records import Ticket
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.stages.phase import Phase, run_phase
from prism_ray.stages.replay import read_record
from prism_ray.stages.session import Session
from prism_ray.testbed.corpora import write_corpora
from prism_ray.testbed.words import vocabulary
from prism_ray.verify.pool import VerifierPool

UPDATES, GROUPS = 6, 2
HEARTBEAT_S = 20
"""More than a busy machine of two cores lets an actor wait for its turn."""
SMALL = [
    "name=chaos", "verify.environment=slow_environment:prism-test/Parity-v0",
    "rollout.engines=2", "rollout.cpus_per_engine=0.25", "rollout.kv_cache_gb=0.05", "rollout.group_size=2",
    "rollout.max_response_tokens=24", f"rollout.heartbeat_s={HEARTBEAT_S}",
    "learner.cpus_per_rank=0.25", "learner.ranks=2", f"learner.heartbeat_s={HEARTBEAT_S}",
    "journal.keep=true", "journal.segment_mb=0.01", f"journal.heartbeat_s={HEARTBEAT_S}",
    f"verify.heartbeat_s={HEARTBEAT_S}", "corpora.look_ahead=4",
    "discriminator.scorers=1", "discriminator.cpus_per_rank=0.25", "discriminator.cpus_per_scorer=0.25",
    f"discriminator.heartbeat_s={HEARTBEAT_S}",
    *(f"{phase}.{setting}" for phase in ("align", "rlvr") for setting in (
        f"loop.groups_per_step={GROUPS}", "loop.checkpoint_every=2", "loop.stall_timeout_s=240",
    )),
    *(f"testbed.{split}=8" for split in ("pretrain", "base", "sft", "evaluate", "evaluate_unseen")),
    "testbed.rlvr=64", "testbed.align=64",
]  # fmt: skip

Fault = Callable[[], Awaitable[Any] | None]

RANDOM = random.Random()
"""Unseeded: when a fault comes to be depends on how fast the machine is anyway."""


class World:
    """One session, whose engines serve every phase that is run in it."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        self.settings = load_config(RunSettings, None, [f"runs={folder}", *SMALL, *overrides])
        self.policy, self.judge = folder / "policy", folder / "judge"
        if not self.policy.exists():
            build_tiny(self.policy, vocabulary(), TinyModelSettings(), seed=0)
            create_discriminator(self.policy, self.judge, self.settings.discriminator, 0)
            write_corpora(folder / "corpora", self.settings.testbed, seed=0)
        self.verifiers: LosingVerifiers | None = None
        self.metrics = _Watched(folder / "chaos")
        self.session = Session(self.settings, self.metrics, Summary(folder / "chaos", "chaos"))

    async def rlvr(self, name: str, faults: Mapping[int, Fault]) -> Evidence:
        async def judge():
            self.verifiers = verifiers = LosingVerifiers(self.settings.verify)
            return verifiers

        corpus, settings = [self.corpus("rlvr")], self.settings.rlvr
        return await self._run(Phase(name, self.policy, corpus, settings, UPDATES, judge, False), faults)

    async def align(self, name: str, faults: Mapping[int, Fault]) -> Evidence:
        async def judge():
            settings = self.settings
            return await DiscriminatorPool.start(self.judge, settings.discriminator, settings.rollout.max_prompt_tokens)

        corpus, settings = [self.corpus("align")], self.settings.align
        return await self._run(Phase(name, self.policy, corpus, settings, UPDATES, judge, True), faults)

    def lose_next_group(self) -> None:
        """A fault: of the next judged group only a reference remains, as after an eviction from the object store."""
        assert self.verifiers is not None
        self.verifiers.losing = True

    def corpus(self, name: str) -> Path:
        return self.folder / "corpora" / f"{name}.parquet"

    async def _run(self, phase: Phase, faults: Mapping[int, Fault]) -> Evidence:
        self.metrics.faults, self.metrics.striking = dict(faults), []
        self.session.stage_folder(phase.name).mkdir(parents=True, exist_ok=True)
        with logged() as sentences:
            outcome = await run_phase(self.session, phase)
        assert not self.metrics.faults, "not every fault came to be"
        await asyncio.gather(*self.metrics.striking)
        assert outcome.updates == UPDATES and outcome.checkpoint and (outcome.checkpoint / "config.json").exists()
        return Evidence(self, phase.name, sentences)

    async def close(self) -> None:
        await self.session.close()
        self.metrics.close()


class LosingVerifiers(VerifierPool):
    """Judges as the verifiers do; one group may get lost on the way to whoever asked."""

    losing = False

    async def judge(self, ticket: Ticket) -> Ticket:
        ticket = await super().judge(ticket)
        if not self.losing:
            return ticket
        self.losing = False
        owner: Any = _Owner.remote()
        (lost,) = await owner.keep.remote([ticket.ref])
        ray.kill(owner)
        return replace(ticket, ref=lost)


@ray.remote(num_cpus=0)
class _Owner:
    """What it put into the object store is lost with it."""

    def keep(self, refs):
        return [ray.put(ray.get(refs[0]))]


class Evidence:
    """What a run left: its log, and its journal."""

    def __init__(self, world: World, stage: str, sentences: list[str]):
        self.sentences = sentences
        self.record = read_record(world.session.journal(stage))

    def check_exactly_once(self) -> None:
        """Every update trained on whole groups, and no prompt of the epoch came twice or was left out."""
        updates = self.record.updates
        assert sorted(updates) == list(range(UPDATES))
        ids = [group for version in sorted(updates) for group in updates[version]]
        assert max(Counter(ids).values()) == 1
        positions = sorted(self.record.tickets[group]["position"] for group in ids)
        assert len(ids) == UPDATES * GROUPS and max(Counter(positions).values()) == 1
        assert positions[-1] < len(positions) + 2 * GROUPS, "a prompt was left behind"

    def check_cause(self, *words: str) -> None:
        """One sentence of the log has all these words."""
        assert any(all(word in sentence for word in words) for sentence in self.sentences), self.sentences


class _Watched(MetricsLog):
    """Injects the fault of a step when its row is written; each once."""

    faults: dict[int, Fault]
    striking: list[asyncio.Future[Any]]

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        super().write(stage, step, numbers)
        if (fault := self.faults.pop(step, None)) and (under_way := fault()):
            self.striking.append(asyncio.ensure_future(under_way))


@contextmanager
def logged():
    """Warnings of the package, as a person finds them in the log."""
    sentences: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            sentences.append(record.getMessage())

    handler = Note(logging.WARNING)
    logger = logging.getLogger("prism_ray")
    logger.addHandler(handler)
    try:
        yield sentences
    finally:
        logger.removeHandler(handler)


def titles() -> dict[int, str]:
    """The living processes below this one, by what they call themselves."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = (process.cmdline() or [""])[0]
        except psutil.NoSuchProcess:
            continue
    return found


def actors(name: str) -> list[psutil.Process]:
    """Living processes of this actor class below this process, the oldest first."""
    found = [psutil.Process(pid) for pid, title in titles().items() if title.split(".")[0].strip() == f"ray::{name}"]
    return sorted(found, key=lambda p: p.create_time())


def strike(*names: str, number: int = signal.SIGKILL, which: int = 0, within_s: float = 0.0) -> Fault:
    """A fault: send the signal to one actor of each of these classes, each at a random moment of the next `within_s`
    seconds, or as soon as there is one."""

    async def one(name: str) -> None:
        await asyncio.sleep(RANDOM.uniform(0, within_s))
        while len(found := actors(name)) <= which:
            await asyncio.sleep(0.1)  # it is only just being started
        os.kill(found[which].pid, number)

    async def all_of_them() -> None:
        async with asyncio.timeout(120):
            await asyncio.gather(*(one(name) for name in names))

    return all_of_them


RAYS_OWN = ("ray::IDLE", "ray::_StatsActor", "ray::_AutoscalingCoordinatorActor")
"""Workers without work, and actors that Ray Data keeps for the next dataset."""


def check_no_orphans(before: set[int]) -> None:
    """The processes that the run started are gone, but for Ray's own."""
    deadline = time.monotonic() + 60

    def left() -> list[str]:
        return [title for pid, title in titles().items() if pid not in before and not title.startswith(RAYS_OWN)]

    while left():
        assert time.monotonic() < deadline, left()
        time.sleep(0.2)
