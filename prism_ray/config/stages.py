"""Settings of the stages that are loops (alignment, RLVR), of the discriminator's warm-up and of the evaluation."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.learner import LearnerSettings
from prism_ray.config.objective import (
    VIEW_ESTIMATORS,
    AdvantageSettings,
    CorrectionSettings,
    ObjectiveSettings,
    check_kl,
    check_together,
)
from prism_ray.config.rollout import RolloutSettings
from prism_ray.config.runtime import LoopSettings


class PhaseOptimiserSettings(Settings):
    """What one phase does otherwise than `learner` says; whatever is unset is as there."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay. DAPO's and GSPO's published scripts take 0.1, where alignment and GRPO take 0.01."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Updates over which the learning rate rises to its peak (DAPO: 10)."""
    warmup_share: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of the phase's updates (GSPO: 0.05), so that it fits runs of any length."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """What the learning rate does after its warm-up."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest global gradient norm."""

    def over(self, learner: LearnerSettings, updates: int) -> LearnerSettings:
        """The learner's settings for a phase of so many updates."""
        own = {name: value for name, value in self.model_dump(exclude={"warmup_share"}).items() if value is not None}
        if self.warmup_share is not None:
            own["warmup_steps"] = math.ceil(self.warmup_share * updates)
        return learner.model_copy(update=own)

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError("warmup_steps and warmup_share say the same thing twice; set one of them to null")
        return self


class PhaseSettings(Settings):
    """One stage of the actor-learner loop."""

    updates: int = Field(default=25, ge=1)
    """Optimiser steps of the policy."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """A response of this phase is cut here: the engines' limit, and the constant that the objective and the overlong
    penalty count with. Unset: `rollout.max_response_tokens`, which is the most it may be."""
    judge: Literal["own", "serve"] = "own"
    """Who judges: the run's own (alignment's discriminator, which learns; RLVR's verifier), or with `serve` the frozen
    discriminator behind `served.url`, which needs references of both and no warm-up."""
    optimiser: PhaseOptimiserSettings = PhaseOptimiserSettings()
    """What this phase's optimiser does otherwise than `learner` says."""
    loop: LoopSettings = LoopSettings()
    """Batch, staleness, time-outs, checkpoints."""
    advantage: AdvantageSettings = AdvantageSettings()
    """How verdicts become advantages."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """The policy loss."""
    correction: CorrectionSettings = CorrectionSettings()
    """The off-policy correction."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_together(self.objective, self.correction)
        check_kl(self.objective, self.advantage)
        if self.loop.dynamic_sampling is not None and self.advantage.estimator in VIEW_ESTIMATORS:
            raise ValueError(
                f"loop.dynamic_sampling: {self.loop.dynamic_sampling} looks at rewards, which estimator "
                f"{self.advantage.estimator} does not use (a discriminator's scores always vary); set it to null"
            )
        return self

    def response_limit(self, rollout: RolloutSettings) -> int:
        """Longest response of this phase, in tokens."""
        return self.max_response_tokens or rollout.max_response_tokens


class RlvrSettings(PhaseSettings):
    """RLVR with a verifier; GRPO by default."""

    updates: int = Field(default=35, ge=1)
    """Optimiser steps after alignment; the arm without alignment gets this many and alignment's."""
    advantage: AdvantageSettings = AdvantageSettings(estimator="grpo", credit="all_tokens")
    """Group-normalised reward, the same for every token."""


class WarmupSettings(Settings):
    """Discriminator warm-up on pairs (reference, SFT rollout) before alignment."""

    prompts_per_step: int = Field(default=48, ge=1)
    """Prompts in one discriminator step. Many prompts with few rollouts each teach more than the reverse."""
    rollouts: int = Field(default=2, ge=1)
    """SFT rollouts for each prompt. With `data.warmup` a row is a prompt with the one rollout it has."""
    min_steps: int = Field(default=12, ge=0)
    """Steps before the target may end the warm-up. Pair accuracy passes .9 within 4, when the judge still ranks the
    rollouts of one prompt at chance; that takes 12 (correlation of its caption score with the cells' truth .40)."""
    max_steps: int = Field(default=20, ge=1)
    """Steps after which warm-up ends whatever the accuracy (then the target decides whether alignment may start)."""
    held_out_prompts: int = Field(default=64, ge=1)
    """Prompts never trained on, whose pairs measure the accuracy."""
    target_accuracy: float = Field(default=0.9, ge=0, le=1)
    """Held-out pair accuracy (pairs of identical text left out) that every view must reach; alignment refuses to start
    below it, because a judge's noise is normalised to full-size policy updates. On the testbed the likelihood form
    passes .99 within 12 steps and aligns; the published scalar head takes 60 to .90 on captions, and aligning with it
    is worse than not to align: what passes this bar need not be good. A policy that is closer to its teacher needs a
    lower target, chosen knowingly."""


class EvaluateSettings(Settings):
    """The evaluation of each checkpoint on held-out prompts."""

    prompts: int = Field(default=512, ge=1)
    """How many held-out prompts; 512 gives a 95 % interval of about +-.04."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled evaluation: T = 1 shows drift that greedy decoding hides."""
    samples_in_report: int = Field(default=6, ge=0)
    """Responses of each checkpoint that the report shows with their images."""
    truth: str = "prism_ray.testbed.truth:truth_of_prompt"
    """`module:function` that tells what of a response is right, given its text and the prompt: a dict with `answer` and
    `format` (0..1). `prism_ray.verify.answer:truth_of` compares with the ground truth; the testbed's knows more."""
