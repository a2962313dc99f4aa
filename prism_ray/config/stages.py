"""Settings of the stages that are loops (alignment, RLVR), of the discriminator's warm-up and of the evaluation."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings, check_together
from prism_ray.config.runtime import LoopSettings


class PhaseSettings(Settings):
    """One stage of the actor-learner loop."""

    updates: int = Field(default=25, ge=1)
    """Optimiser steps of the policy."""
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
        return self


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
    """SFT rollouts for each prompt."""
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
    passes .99 and aligns; the published scalar head stops at .76 on captions, and aligning with it makes the policy
    worse. A policy that is closer to its teacher needs a lower target, chosen knowingly."""


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
