"""Settings of the discriminator's processes: the ranks that train it, the scorers that judge with it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from prism_ray.config.base import Settings


class JudgingSettings(Settings):
    """What the discriminator starts from, on which processes it is trained and scores, and how those are watched."""

    policy: Path | None = None
    """Hugging Face folder of the dense model that the discriminator is upcycled from, with the policy's tokenizer and
    format. Unset: the SFT policy itself. PRISM judges 4B and 8B policies by a 2B model, which costs a fraction."""
    ranks: int = Field(default=1, ge=1)
    """Data-parallel processes that train the discriminator. One is enough while an update of it takes no longer than
    one of the policy, beside which it runs; every rank needs a group of each step."""
    cpus_per_rank: float = Field(default=0.5, ge=0)
    """CPUs reserved for a rank in Ray, and (rounded up) its compute threads. Half of one, since on a laptop the judge
    takes turns with engine and learner."""
    gpus_per_rank: float = Field(default=0, ge=0, le=1)
    """GPUs reserved for a rank: 0 (gloo), 1 (NCCL), or a part of one that a scorer shares."""
    gradient_checkpointing: bool = False
    """Recompute the ranks' activations in the backward pass: a third more computation for much less memory. A judge of
    2B with four experts and views of thousands of tokens does not fit on a GPU of 80 GB without it."""
    scorers: int = Field(default=0, ge=0)
    """Processes that only judge, each with a copy of the discriminator, so that verdicts do not wait for training.
    0: the ranks judge between their updates, which is cheapest where all share a few cores."""
    cpus_per_scorer: float = Field(default=0.5, ge=0)
    """CPUs reserved for a scorer in Ray, and (rounded up) its compute threads."""
    gpus_per_scorer: float = Field(default=0, ge=0, le=1)
    """GPUs reserved for a scorer; a part of one is enough for a small judge."""
    max_scorer_lag: int = Field(default=1, ge=0)
    """Most updates by which a scorer's weights may be behind those that have been trained when it gets work; one that
    is further behind waits for newer ones. 1 lets weights travel while it scores; 0 is for exact comparisons."""
    max_restarts: int = Field(default=3, ge=0)
    """How often each scorer may be replaced after it died or hung, before the run fails."""
    heartbeat_s: float = Field(default=15.0, gt=0)
    """A rank or scorer that answers no ping for so long hangs and counts as dead. They answer while they compute; only
    a machine that swaps takes seconds."""


JUDGING_FIELDS = frozenset(JudgingSettings.model_fields) - {"policy"}
"""What says where and how fast the discriminator works, not what it becomes."""
