"""What the stages of one run share: its folders, its corpora, its metrics, and one pool of engines for all of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prism_ray.config.run import RunSettings
from prism_ray.corpora.checks import Requirements
from prism_ray.models.encode import Encoder
from prism_ray.records import Prompt
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary
from prism_ray.rollout.pool import RolloutPool


class Interrupted(Exception):
    """The user asked to stop; the state is saved."""


class Session:
    """One run while it runs."""

    def __init__(self, settings: RunSettings, metrics: MetricsLog, summary: Summary):
        self.settings, self.metrics, self.summary = settings, metrics, summary
        self.folder = (settings.runs / settings.name).resolve()
        self.corpora: dict[str, list[Path]] = {}
        self.stop = asyncio.Event()
        self._pool: RolloutPool | None = None

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
            self._pool = await RolloutPool.create(policy, seeded, version)
        else:
            await self._pool.load(policy, version)
        self._pool.max_response_tokens = max_response_tokens
        return self._pool

    async def close(self) -> None:
        """End every actor the session started."""
        if self._pool is not None:
            await self._pool.shutdown()
            self._pool = None

    def requirements(self, policy: Path, *, reference: bool = False, ground_truth: bool = False) -> Requirements:
        """What a prompt must have to be used with this policy; the rest is quarantined."""
        limit = self.settings.rollout.max_prompt_tokens
        count = TokenCounter(policy, limit)
        pixels = self.settings.corpora.max_image_pixels
        return Requirements(
            reference,
            ground_truth,
            max_image_pixels=pixels,
            max_images=self.settings.rollout.max_images,
            count_tokens=count,
            max_prompt_tokens=limit,
        )

    @property
    def quarantine(self) -> Path:
        """Where unusable rows are kept, those of all stages."""
        return self.folder / "quarantine.parquet"

    def journal(self, stage: str) -> Path:
        """Where a stage's judged trajectories are kept."""
        return self.folder / "journal" / stage

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted


class TokenCounter:
    """Length of a prompt in the policy's tokens, for Ray Data's workers: the encoder is loaded where it is used."""

    def __init__(self, policy: Path, limit: int):
        self._policy, self._limit = policy, limit
        self._encoder: Encoder | None = None

    def __call__(self, prompt: Prompt) -> int:
        if self._encoder is None:
            self._encoder = Encoder(self._policy, self._limit)
        return len(self._encoder.prompt(prompt).token_ids)

    def __getstate__(self) -> dict[str, object]:
        return {"_policy": self._policy, "_limit": self._limit, "_encoder": None}
