"""What the stages of one run share: its folders, its corpora, its metrics, and one pool of engines for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.run import RunSettings
from prism_ray.corpora.checks import Requirements
from prism_ray.corpora.files import Source
from prism_ray.discriminator.group import JudgePlaces
from prism_ray.discriminator.segments import refusal
from prism_ray.models.ahead import TokenCounter
from prism_ray.planning.layout import JUDGE_RANKS, LEARNER, SCORERS, engines, judge, learner, scorer, whole_run
from prism_ray.report.incidents import IncidentLog
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.rollout.pool import RolloutPool
from prism_ray.runtime.elastic import Elastic, Following
from prism_ray.runtime.gauges import RayMetrics, endpoints
from prism_ray.runtime.placement import EnginePlaces, Placement
from prism_ray.stages.batches import JudgedBy, needs_of, refusal_of

T = TypeVar("T")

CLEANING_S = 30.0
"""Longest wait for work that was cancelled to clean up."""

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user asked to stop; the state is saved."""


class Session:
    """One run while it runs."""

    def __init__(self, settings: RunSettings, metrics: MetricsLog, summary: Summary):
        self.settings, self.metrics, self.summary = settings, metrics, summary
        self.folder = (settings.runs / settings.name).resolve()
        self.corpora: dict[str, list[Source]] = {}
        self.stop = asyncio.Event()
        self.stage = ""  # the one that runs now
        self.placement = Placement(settings.cluster, whole_run(settings))
        self._pool: RolloutPool | None = None
        self._following: Following | None = None
        self.elastic = Elastic(self.folder, settings.cluster)

    def stage_folder(self, stage: str) -> Path:
        return self.folder / stage

    def checkpoint(self, stage: str) -> Path:
        """The Hugging Face folder a stage wrote; `base` is the user's own policy where one is configured."""
        if stage == "base" and self.settings.policy is not None:
            return self.settings.policy.resolve()
        return self.stage_folder(stage) / "checkpoint"

    async def engines(self, policy: Path, version: int = 0, max_response_tokens: int | None = None) -> RolloutPool:
        """The run's engines, holding this policy; started on first use, afterwards only given new weights (starting
        vLLM takes longer than most of the testbed's stages). Groups are sampled with this longest response (None: that
        of the rollout settings)."""
        if self._pool is None:
            seeded = self.settings.rollout.model_copy(update={"seed": self.settings.seed + self.settings.rollout.seed})
            self._pool = await RolloutPool.create(policy, seeded, version, self._engine_places())
            if not self.colocated:  # there every engine has a learner rank beside it, whose number is fixed
                needs = {"CPU": seeded.cpus_per_engine, "GPU": float(seeded.gpus_per_engine)}
                self._following = self.elastic.follow("rollout.engines", seeded.engines, needs, self._pool.resize)
        else:
            await self._pool.load(policy, version)
        self._pool.max_response_tokens = max_response_tokens
        return self._pool

    @property
    def colocated(self) -> bool:
        """Whether engines and learner ranks share GPUs, and so take turns."""
        return self.settings.cluster.layout == "colocated"

    def _engine_places(self) -> EnginePlaces:
        settings = self.settings
        return EnginePlaces(self.placement, engines(settings.rollout, settings), self.colocated, settings.rollout)

    async def learner_places(self) -> list[dict[str, Any]]:
        """Reserved places for the learner's ranks: of their own, or beside an engine each."""
        if self.colocated:
            places = self._engine_places()
            return [await places.take(rank) for rank in range(self.settings.learner.ranks)]
        await self.placement.reserve([learner(self.settings.learner)])
        return self.placement.all_options(LEARNER)

    async def judge_places(self) -> JudgePlaces:
        """Reserved places for the discriminator's ranks and scorers."""
        settings = self.settings.discriminator
        await self.placement.reserve(judge(settings))
        scorers = [self.placement.options(scorer(i)) for i in range(settings.scorers)]
        return JudgePlaces(self.placement.all_options(JUDGE_RANKS), scorers)

    def leave_places(self) -> None:
        """Give back the places of learner and judge, whose actors have ended; engines keep theirs."""
        self.placement.release(LEARNER, JUDGE_RANKS, SCORERS)

    def follow_scorers(self, pool: Any) -> Following:
        """Let the number of scorers of a discriminator's pool be changed while it judges."""
        judge = self.settings.discriminator
        needs = {"CPU": judge.cpus_per_scorer, "GPU": judge.gpus_per_scorer}
        return self.elastic.follow("discriminator.scorers", judge.scorers, needs, pool.resize)

    async def close(self) -> None:
        """End every actor the session started."""
        if self._following is not None:
            self._following.shutdown()
        if self._pool is not None:
            await self._pool.shutdown()
            self._pool = None
        self.placement.release()

    def requirements(self, policy: Path, *, reference: bool = False, judged_by: JudgedBy | None = None) -> Requirements:
        """What a prompt must have to be used with this policy; the rest is quarantined."""
        return requirements(self.settings, policy, reference=reference, judged_by=judged_by)

    @property
    def quarantine(self) -> Path:
        """Where unusable rows are kept, those of all stages."""
        return self.folder / "quarantine.parquet"

    def journal(self, stage: str) -> Path:
        """Where a stage's judged trajectories are kept."""
        return self.folder / "journal" / stage

    async def until_stopped(self, work: Awaitable[T], grace_s: float = 0.0) -> T:
        """What the work comes to; or Interrupted, when the session is asked to stop and the work has not ended within
        `grace_s` seconds (0: for work that has nothing to save). It is cancelled then."""
        running, stopping = asyncio.ensure_future(work), asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and grace_s:
                await asyncio.wait({running}, timeout=grace_s)
            if running.done():
                return running.result()
            if grace_s:
                log.warning("not ended %g s after the signal (cluster.stop_grace_s): ended as it is", grace_s)
            raise Interrupted
        finally:
            running.cancel()
            stopping.cancel()
            await asyncio.wait({running, stopping}, timeout=CLEANING_S)

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted


@contextmanager
def watched(settings: RunSettings) -> Iterator[Session]:
    """A run's session, with all that keeps and shows what happens in it. Ray must be running; raises WandbError where
    Weights & Biases is asked for and cannot be had."""
    folder = settings.runs / settings.name
    gauges = RayMetrics(settings.name)
    metrics = MetricsLog(folder, settings.report, settings.model_dump(mode="json"), [gauges])
    log.info("metrics for Prometheus: %s", ", ".join(f"http://{address}/metrics" for address in endpoints()))
    session = Session(settings, metrics, Summary(folder, settings.name))
    with IncidentLog(folder, lambda: session.stage, gauges.incident):
        yield session


def requirements(
    settings: RunSettings, policy: Path, *, reference: bool = False, judged_by: JudgedBy | None = None
) -> Requirements:
    """What a prompt of a run's loops must have to be used with this policy, and where answers are judged, by that."""
    tokens = TokenCounter(policy, settings.rollout.max_prompt_tokens)
    return replace(
        needs_of(tokens, settings.rollout, settings.corpora),
        reference=reference,
        ground_truth=judged_by is not None,
        truth_refusal=refusal_of(judged_by, settings.evaluate.truth, settings.verify) if judged_by else None,
        refusal=Refusal(tokens, settings.discriminator) if reference else None,
    )


@dataclass(frozen=True)
class Refusal:
    """Why the discriminator could not judge a text as a reference, in the words of `segments.refusal`."""

    tokens: TokenCounter
    settings: DiscriminatorSettings

    def __call__(self, text: str) -> str:
        return refusal(text, self.tokens.encoder, self.settings)
