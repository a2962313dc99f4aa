"""Settings of the supervised trainer: what does not depend on what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism_ray.config.base import Settings
from prism_ray.config.learner import NamePattern


class TrainerSettings(Settings):
    """Ray Train's TorchTrainer with DeepSpeed, for every supervised stage."""

    ranks: int = Field(default=1, ge=1)
    """Data-parallel processes. One is the fastest on two CPU cores: the other core prepares the data."""
    cpus_per_rank: float = Field(default=1, gt=0)
    """CPUs that Ray books for a rank, and (rounded up) its compute threads."""
    gpus_per_rank: float = Field(default=0, ge=0)
    """GPUs that Ray books for a rank: 0 (gloo) or 1 (NCCL)."""
    micro_batch: int = Field(default=16, ge=1)
    """Examples of a rank computed at a time. It bounds memory and changes nothing else: losses are normalised over the
    whole batch."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the ranks: 0 nothing, 1 optimiser states, 2 gradients too, 3 parameters too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more computation for much less memory. A 4B model and a
    response of 8,192 tokens do not fit on a GPU of 80 GB without it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; bfloat16 needs a zero_stage of 1 or more, which keeps float32 master weights."""
    freeze: tuple[NamePattern, ...] = ()
    """Regular expressions of the policy's parameter names that no supervised stage trains; PRISM's SFT freezes the
    vision tower and its projector: `^model\\.visual\\.`. Nothing by default, since the tiny model starts untrained."""
    max_prompt_tokens: int = Field(default=256, ge=1)
    """Tokens of a prompt, image tokens included, above which its row is quarantined."""
    max_response_tokens: int = Field(default=256, ge=1)
    """Tokens of a reference above which its row is quarantined; references are never cut, a cut one teaches to stop."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints, which is also what a killed worker can cost."""
    max_failures: int = Field(default=3, ge=0)
    """Times the ranks are started again after one of them died before the stage fails."""
    log_every: int = Field(default=10, ge=1)
    """Steps between metrics rows."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest a rank waits for another in a collective before the run fails."""
