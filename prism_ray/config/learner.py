"""Settings of the learner: the optimiser behind `TrainEngine`, and the learner group's shape."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings


class OptimiserSettings(Settings):
    """AdamW, its schedule, and how DeepSpeed spreads it."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate. 2e-4 is what alignment and RLVR of the tiny model were measured with (3e-4 was unstable); a
    4B model wants about 1e-6."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momenta; the short second one follows the changing policy gradient faster than 0.999 would."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; policy gradients are small, and decay would slowly pull the policy to nothing."""

    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""

    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to 0 at the last step along a cosine (needs the
    total number of steps). Constant for reinforcement learning, whose length is seldom known in advance."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its peak; step k of the warm-up has k / warmup_steps of it."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks divide among them: 0 nothing, 1 optimiser states, 2 also gradients, 3 also parameters. 0 is the
    cheapest where the model fits (an optimiser step of the tiny model takes 4 ms, with stage 1 it takes 7); each higher
    stage pays communication for memory."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; with bfloat16 DeepSpeed keeps float32 master weights and needs zero_stage >= 1."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError("precision: bfloat16 needs zero_stage 1, 2 or 3 (it keeps the float32 master weights)")
        return self


class LearnerSettings(OptimiserSettings):
    """The learner group: its optimiser, how many ranks, what each gets, and how much it computes at a time."""

    ranks: int = Field(default=1, ge=1)
    """Data-parallel processes. One is enough for the tiny model: an update is less than a second of one core."""

    cpus_per_rank: float = Field(default=1, gt=0)
    """CPUs reserved for a rank in Ray, and (rounded up) its compute threads."""

    gpus_per_rank: float = Field(default=0, ge=0)
    """GPUs reserved for a rank: 0 (gloo) or 1 (NCCL)."""

    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Padded tokens computed at a time. It bounds memory and changes nothing else: losses are normalised globally."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more computation for much less memory. For large models."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for a rank (start, update, checkpoint, collective) before the run fails and names it."""
