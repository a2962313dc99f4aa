"""Settings of the curation: which prompts a policy learns from, which it cannot solve, and pairs for the warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.corpora import CorporaSettings, SourceSettings
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.config.verify import VerifySettings


class CurateSettings(Settings):
    """A run of `jobs/curate.py`."""

    prompts: list[Path | SourceSettings] = Field(min_length=1)
    """Corpora with verifiable prompts."""
    policy: Path
    """Hugging Face folder of the policy that tries to solve them."""
    output: Path = Path("runs/curation")
    """Folder for what comes of it; the same folder again goes on where the run ended."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many rows, drawn from all files. Unset: all. Raise it to go on."""
    low: float = Field(default=0.2, ge=0, le=1)
    """Least share of right rollouts of a prompt for RL: of those that almost never succeed a policy learns little."""
    high: float = Field(default=0.8, ge=0, le=1)
    """Greatest share of right rollouts of a prompt for RL: what nearly always succeeds teaches nothing any more."""
    hardest: int | None = Field(default=None, ge=1)
    """How many of the prompts that no rollout solved go to the teacher, the hardest first: those with the least
    accurate, then the best formed, then the longest rollouts. Unset: all."""
    pairs_per_prompt: int = Field(default=16, ge=0)
    """Most warm-up pairs of one prompt (it must have a reference). The published data seems to have 16."""
    batch: int = Field(default=64, ge=1)
    """Prompts that are sampled together and noted together: what a killed run samples again is at most two batches."""
    seed: int = 0
    """Seed of the order in which prompts are taken and of the sampling."""
    rollout: RolloutSettings = RolloutSettings(group_size=16)
    """The engines; `rollout.group_size` is the number of rollouts of each prompt, `rollout.temperature` theirs."""
    verify: VerifySettings = VerifySettings(environment="prism/Answer-v0")
    """What says whether a rollout is right."""
    corpora: CorporaSettings = CorporaSettings()
    """How the prompts are read and checked."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must not exceed high")
        return self
