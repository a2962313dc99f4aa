"""Settings of the discriminator room: what it is, how it scores, how it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prism_ray.config.base import Settings
from prism_ray.config.judging import JudgingSettings
from prism_ray.config.learner import OptimiserSettings
from prism_ray.config.views import DEFAULT_VIEWS, ViewSettings, check_views

SCORING_FIELDS = (
    "backbone",
    "routing",
    "sees_images",
    "head_weight",
    "likelihood_weight",
    "score_clip",
    "length_debias",
    "max_segment_tokens",
)
"""What decides a score besides the weights and the views; a saved discriminator refuses to be loaded with others."""


class ReplaySettings(Settings):
    """Older rollouts in the discriminator's updates during alignment."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of an update's pairs that are old ones. They come on top of the new ones (0.5 doubles an update's cost;
    halve `rollouts_per_update` to pay for it). In a replication of GAD 0.5 halved the judge's collapses; 0 as
    published."""
    pairs: int = Field(default=4096, ge=1)
    """Pairs kept, the newest; their prompts, images included, stay in the discriminator's memory and checkpoints."""


Remedy = Literal["none", "lower_rate", "raise_replay", "freeze_policy", "restore"]


class GuardSettings(Settings):
    """Alarms of alignment on the discriminator's running figures, per view, and what is done while they last."""

    patience: int = Field(default=10, ge=1)
    """Steps in a row after which an alarm begins, or ends: one strange batch is none."""
    high_accuracy: float = Field(default=0.98, gt=0.5, le=1)
    """Above this pair accuracy (`separable`) every rollout may look equally wrong, so that the policy learns from
    noise; whether it does shows in `gap_closing`."""
    gap_closing: float | None = Field(default=0.05, ge=0, lt=1)
    """By what share the gap must have become smaller, from the older to the newer half of the last two times
    `patience` steps, for pairs that are all told apart to be no alarm. In healthy runs of the testbed 98 % are told
    apart for most of alignment while the gap closes by a third in ten steps: the policy does learn. Null: `separable`
    rings whatever the gap does."""
    low_accuracy: float = Field(default=0.52, ge=0, le=1)
    """Below this pair accuracy (`chance`) the judge has lost its way, or the policy has arrived."""
    gap_drift: float = Field(default=5.0, gt=0)
    """By how much the mean gap may grow over that of the first `patience` steps (`drift`). It should close; one that
    grows for long is a judge that runs away from the policy."""
    saturation: float = Field(default=0.5, gt=0, lt=1)
    """Share of head outputs at the clip (`saturation`), where they have no gradient."""
    on_separable: Remedy = "none"
    """What is done while `separable` rings: `lower_rate` halves the discriminator's learning rate, so that the policy
    can catch up; `raise_replay` replays `raised_replay` of old pairs; `freeze_policy` closes the view's gate, so that
    the judge learns on while the view moves the policy no more (beside a view that still does, AdamW's momentum lets
    it coast for a few updates);
    `restore`, once when the alarm begins, makes the judge what warm-up left, with fresh momentum."""
    on_chance: Remedy = "none"
    """The same while `chance` rings."""
    on_drift: Remedy = "none"
    """The same while `drift` rings."""
    on_saturation: Remedy = "none"
    """The same while `saturation` rings."""
    raised_replay: float = Field(default=0.5, gt=0, lt=1)
    """Share of replayed pairs while an alarm with `raise_replay` rings, in place of `replay.share`."""

    def remedy(self, alarm: str) -> Remedy:
        """The remedy of an alarm, by its name."""
        return getattr(self, f"on_{alarm}")

    def may(self, remedy: Remedy) -> bool:
        """Whether an alarm can ask for this remedy (pairs must be kept for `raise_replay`, for instance)."""
        return remedy in (self.on_separable, self.on_chance, self.on_drift, self.on_saturation)


class GateSettings(Settings):
    """How much of a view's signal is let through to the policy, by the view's pair accuracy on rollouts that the
    discriminator has not trained on yet."""

    tolerance: float = Field(default=0.05, ge=0, lt=0.5)
    """Up to chance (0.5) and this much above it the weight is 0: there the order of rollouts is noise."""
    full_accuracy: float = Field(default=0.7, gt=0.5, le=1)
    """From this pair accuracy on the weight is 1; below it falls on a line. On the testbed a gate at .6 closed too
    late."""
    window: int = Field(default=64, ge=1)
    """Judged groups that the accuracy is taken over."""

    @model_validator(mode="after")
    def _rising(self) -> GateSettings:
        if self.full_accuracy <= 0.5 + self.tolerance:
            raise ValueError(
                f"discriminator.gate.full_accuracy is {self.full_accuracy} but the gate is shut up to 0.5 + tolerance "
                f"= {0.5 + self.tolerance}; raise it, or lower the tolerance"
            )
        return self


class DiscriminatorSettings(JudgingSettings):
    """The judge: what it judges, what it is, how it scores and how it is trained."""

    views: tuple[ViewSettings, ...] = DEFAULT_VIEWS
    """The parts of a response that are judged, in the order of the response, each with `name`, `tags`, `weight` and
    `context`. One view of all three tags is whole-response distillation (GAD, arXiv 2511.10643)."""

    sees_images: bool = True
    """False hides the prompt's images from the judge (the paper's text-only ablation): it then tells how a teacher
    writes, not whether it is true of the image."""
    backbone: Literal["moe", "dense"] = "moe"
    """`moe` upcycles the policy to a mixture of experts; `dense` takes it as it is (the paper's ablation), and the
    settings of experts and router say nothing."""
    experts: int = Field(default=4, ge=1)
    """Experts of every MLP after upcycling (PRISM, arXiv 2604.28123)."""
    top_k: int = Field(default=2, ge=1)
    """Experts active per token; at most `experts`."""
    expert_noise: float = Field(default=0.01, ge=0)
    """Standard deviation added to each expert's copy of the dense MLP, so that experts can grow apart; absolute."""
    router_init: float = Field(default=0.02, ge=0)
    """Standard deviation of the router's initial weights: near-uniform routing at first."""
    routing: Literal["token", "view"] = "token"
    """What the router goes by: the token's hidden state (as published), or with `view` also a learned embedding of the
    view that the token is text of, 0 at first, so that experts can specialise in views
    (`discriminator/router/view_information` says whether they do). Prompts and opening tags belong to no view."""
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
    max_segment_tokens: int = Field(default=2048, ge=1)
    """A view is cut after so many tokens, references and rollouts alike; the end token always follows."""
    score_clip: float | None = Field(default=10.0, gt=0)
    """The head's output is held within ± this, without gradient outside. The likelihood is not clipped: it cannot grow
    without bound (at most 0) and both sides share its level."""
    score_reg: float = Field(default=1e-3, ge=0)
    """Coefficient of the mean square of the head's output (as published); keeps its level from drifting."""

    length_debias: float = Field(default=0.0, ge=0)
    """Taken off a score for each log(1 + tokens of the view), in training and in verdicts alike (published, and off in
    its script). Raise it where the policy grows longer without growing better: it makes every word cost."""
    margin: float = Field(default=0.0, ge=0)
    """By how much a reference is to score above a rollout before the pair's loss falls below log 2. It keeps a gradient
    on pairs that are told apart by a hair; 0 is the published loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of each pair's loss that takes the rollout for the reference. It bounds the gap that pays (0.1: at 2.2), so
    that a judge of nearly equal texts does not run off to certainty; 0 is the published loss."""

    temperature: float = Field(default=3.0, gt=0)
    """A verdict's reward is the mean over views of sigmoid((score − reference's score) / temperature): bounded, so that
    one absurd response does not set the scale of its group."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Most tokens of one forward pass, in scoring and (counted as if padded) in training; a longer single sequence goes
    alone."""

    rollouts_per_update: int = Field(default=4, ge=1)
    """How many of a group's valid rollouts are paired with the reference in one update: half of them teach as much as
    all and cost half."""
    foreign_references: int = Field(default=0, ge=0)
    """For each group of an update, how many references of other prompts are paired with its own as if they were
    rollouts (hard negatives): perfect in style, untrue of this image, so that only looking at the image tells them
    apart. 0 as published; each costs as much as a rollout."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the router's load-balancing loss in warm-up."""
    alignment_balance_coefficient: float = Field(default=0.0, ge=0)
    """The same in alignment. 0 as published; raise it where `discriminator/router_load_max` nears 1 / `top_k`."""
    updates_per_step: int = Field(default=1, ge=1)
    """Discriminator updates for each of the policy's in alignment, each on the group's next `rollouts_per_update`
    rollouts. 1 as published; how fast the two learn is also set by `optimiser.lr` here and `learner.lr` there."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh the pairs of an alignment update by how much likelier each rollout is under the policy now than when it was
    sampled (geometric mean over its tokens, at most this; 2 is customary), so that the judge learns about the policy
    of today. It then waits for the policy's update instead of learning beside it. Unset: all pairs weigh alike, which
    costs little while rollouts are a version or two old."""
    canary_every: int = Field(default=10, ge=1)
    """Training steps between two checks, the first at the very start, that a reference and a rollout of the same text
    score exactly alike. A side that is recognised by anything but its text (an end token, a cut) makes a perfect
    judge that teaches nothing; a check costs two sequences."""
    probe_margin: float = Field(default=0.05, ge=0, lt=0.5)
    """A shortcut (length alone, last token alone, format alone) is warned of if its held-out pair accuracy comes within
    this of the discriminator's."""
    replay: ReplaySettings = ReplaySettings()
    """Older rollouts in alignment's updates."""
    guard: GuardSettings = GuardSettings()
    """Alarms, and what is done while they last."""
    gate: GateSettings | None = None
    """Put into every verdict how much of each view's signal deserves to move the policy (`gate/<view>` of its parts).
    Unset: no such part, and every view counts in full."""
    optimiser: OptimiserSettings = OptimiserSettings(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, grad_clip=1.0)
    """AdamW as on the testbed; a 2B judge wants a learning rate nearer 1e-6 (PRISM, arXiv 2604.28123)."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long a caller waits for a discriminator actor before it gives up and names it."""

    @property
    def view_names(self) -> tuple[str, ...]:
        """The views in order, which is that of the head's rows."""
        return tuple(view.name for view in self.views)

    @model_validator(mode="after")
    def _consistent(self) -> DiscriminatorSettings:
        check_views(self.views)
        if self.backbone == "dense" and self.routing == "view":
            raise ValueError("discriminator.routing is view but a dense backbone has no router; set it to token")
        if self.backbone == "moe" and self.top_k > self.experts:
            raise ValueError(f"discriminator.top_k is {self.top_k} but there are only {self.experts} experts")
        if self.optimiser.zero_stage == 3 and not self.scorers:
            raise ValueError(
                "discriminator.optimiser.zero_stage is 3 but there are no scorers; ranks that hold only parts of the "
                "weights cannot judge, so set discriminator.scorers to 1 or more, or zero_stage to 2"
            )
        if self.guard.may("raise_replay") and self.guard.raised_replay <= self.replay.share:
            raise ValueError(
                f"discriminator.guard.raised_replay is {self.guard.raised_replay}, no more than replay.share "
                f"{self.replay.share}, so the remedy raise_replay would do nothing; raise it"
            )
        if self.head_weight == 0 and self.likelihood_weight == 0:
            raise ValueError("discriminator.head_weight and likelihood_weight are both 0; a score needs one of them")
        return self
