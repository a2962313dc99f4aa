"""Settings of the discriminator room: what it is, how it scores, how it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.learner import OptimiserSettings

SCORING_FIELDS = (
    "head_weight",
    "likelihood_weight",
    "reasoning_context",
    "score_clip",
    "max_segment_tokens",
)
"""What decides a score besides the weights; a saved discriminator refuses to be loaded with other values."""


class DiscriminatorSettings(Settings):
    """The mixture-of-experts judge of perception and reasoning."""

    experts: int = Field(default=4, ge=1)
    """Experts of every MLP after upcycling (PRISM, arXiv 2604.28123)."""
    top_k: int = Field(default=2, ge=1)
    """Experts active per token; at most `experts`."""
    expert_noise: float = Field(default=0.01, ge=0)
    """Standard deviation added to each expert's copy of the dense MLP, so that experts can grow apart; absolute."""
    router_init: float = Field(default=0.02, ge=0)
    """Standard deviation of the router's initial weights: near-uniform routing at first."""
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = "grouped_mm"
    """How transformers computes the experts. On one CPU core `eager` and `grouped_mm` are equally fast and `batched_mm`
    is 40 to 90 times slower (it copies an expert's weights for every token)."""

    head_weight: float = Field(default=1.0, ge=0)
    """Weight of the scalar head in a score; 1 with `likelihood_weight` 0 is the published form."""
    likelihood_weight: float = Field(default=0.5, ge=0)
    """Weight of the view's summed log-likelihood under the judge's own language head, per nat. 0 is the published form,
    which stays near chance on captions on the testbed (measured); 0.5 separates them within a dozen steps."""
    head_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the head while training (as published); always off when scoring."""
    reasoning_context: Literal["own", "none"] = "own"
    """What the judge of a later view sees of the same response before it: the earlier views (`own`) or nothing (`none`,
    as published). Without the caption it cannot tell whether the reasoning follows from what was seen, and
    rewards short thinks (measured)."""
    max_segment_tokens: int = Field(default=2048, ge=1)
    """A view is cut after so many tokens, references and rollouts alike; the end token always follows."""
    score_clip: float | None = Field(default=10.0, gt=0)
    """The head's output is held within ± this, without gradient outside. The likelihood is not clipped: it cannot grow
    without bound (at most 0) and both sides share its level."""
    score_reg: float = Field(default=1e-3, ge=0)
    """Coefficient of the mean square of the head's output (as published); keeps its level from drifting."""

    temperature: float = Field(default=3.0, gt=0)
    """A verdict's reward is the mean over views of sigmoid((score − reference's score) / temperature): bounded, so that
    one absurd response does not set the scale of its group."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Padded tokens of one forward pass, in scoring and in training; a longer single sequence goes alone."""

    rollouts_per_update: int = Field(default=4, ge=1)
    """How many of a group's valid rollouts are paired with the reference in one update: half of them teach as much as
    all and cost half."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the router's load-balancing loss in warm-up; alignment goes without, as published."""
    optimiser: OptimiserSettings = OptimiserSettings(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, grad_clip=1.0)
    """AdamW as on the testbed; a 2B judge wants a learning rate nearer 1e-6 (PRISM, arXiv 2604.28123)."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long a caller waits for a discriminator actor before it gives up and names it."""

    @model_validator(mode="after")
    def _consistent(self) -> DiscriminatorSettings:
        if self.top_k > self.experts:
            raise ValueError(f"discriminator.top_k is {self.top_k} but there are only {self.experts} experts")
        if self.head_weight == 0 and self.likelihood_weight == 0:
            raise ValueError("discriminator.head_weight and likelihood_weight are both 0; a score needs one of them")
        return self
