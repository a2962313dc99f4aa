"""Settings of the learner: the optimiser behind `TrainEngine`, and the learner group's shape."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from prism_ray.config.base import Settings


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


NamePattern = Annotated[str, AfterValidator(_regular_expression)]
"""A regular expression that is searched for in a parameter's name."""


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

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to 0 at the last step along a line or cosine, which
    need the total number of steps. Constant for reinforcement learning, whose length is seldom known in advance."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its peak; step k of the warm-up has k / warmup_steps of it."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks divide among them: 0 nothing, 1 optimiser states, 2 also gradients, 3 also parameters. 0 is the
    cheapest where the model fits (an optimiser step of the tiny model takes 4 ms, with stage 1 it takes 7); each higher
    stage pays communication for memory."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; with bfloat16 DeepSpeed keeps float32 master weights and needs zero_stage >= 1."""

    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in the CPU's memory between its uses: nothing, the optimiser's states (which are then also updated
    there; needs zero_stage >= 1), or the parameters too (needs zero_stage 3). It lets a model train whose optimiser
    does not fit beside it, at the price of copying over the bus in every step. The weights alone must fit once, at the
    start."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError("precision: bfloat16 needs zero_stage 1, 2 or 3 (it keeps the float32 master weights)")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer needs zero_stage 1, 2 or 3 (it is ZeRO's optimiser that moves)")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload: parameters needs zero_stage 3 (only there are parameters fetched when used)")
        return self


class LoraSettings(Settings):
    """Low-rank adapters on linear layers, trained instead of the weights and merged into them wherever they go."""

    rank: int = Field(default=16, ge=1)
    """Rank of the change to each weight. 16 to 32 suffice for policy gradients, which carry few bits per episode."""

    alpha: int = Field(default=32, ge=1)
    """The change is scaled by alpha / rank; 2 x rank is customary. Adapters want ten times the full learning rate."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training. 0, because the policy that is trained should be the one that
    sampled."""

    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Linear layers with adapters, by the last part of their names: those of the dense language model. A mixture of
    experts has its experts in one tensor, which takes no adapter: give it the four of attention only."""


class LearnerSettings(OptimiserSettings):
    """The learner group: its optimiser, how many ranks, what each gets, and how much it computes at a time."""

    ranks: int = Field(default=1, ge=1)
    """Data-parallel processes. One is enough for the tiny model: an update is less than a second of one core."""

    cpus_per_rank: float = Field(default=1, gt=0)
    """CPUs reserved for a rank in Ray, and (rounded up) its compute threads."""

    gpus_per_rank: float = Field(default=0, ge=0)
    """GPUs reserved for a rank: 0 (gloo) or 1 (NCCL)."""

    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Most tokens of a packed micro-batch. It bounds memory and changes nothing else: losses are normalised
    globally."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more computation for much less memory. For large models."""

    freeze: tuple[NamePattern, ...] = ()
    """Regular expressions of parameter names that are not trained, such as `^model\\.visual\\.` for the vision tower
    and its projector. A layer frozen so gets no adapter either."""

    lora: LoraSettings | None = None
    """Train adapters in place of all other weights; unset trains the weights themselves. Adapters need a fraction of
    the optimiser's memory, and a KL to the start policy then needs no second copy of the weights."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for a rank (start, update, checkpoint, collective) before the run fails and names it."""

    heartbeat_s: float = Field(default=30.0, gt=0)
    """A rank that answers no ping for so long hangs and counts as dead: the stage goes on from its last checkpoint with
    a new group. Ranks answer while they compute; only a machine that swaps or an import that blocks takes seconds."""

    max_skipped: int = Field(default=5, ge=0)
    """Updates in a row that may be skipped because their gradient is not finite, before the run fails. One bad batch
    passes by; a policy that has become NaN would otherwise skip to the end and look like a finished run."""
