"""Settings of the learner's mathematics: advantages, objective and off-policy correction."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from prism_ray.config.base import Settings

Estimator = Literal["grpo", "dr_grpo", "rloo", "prism_paper", "prism_code", "bounded_views"]
ObjectiveKind = Literal["ppo", "gspo", "cispo", "dppo_tv"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "dr_grpo"]
KLKind = Literal["k1", "k2", "k3", "k3_clamped", "k3_plus"]
CorrectionKind = Literal[
    "none", "tis_token", "tis_sequence", "geometric", "geometric_mask", "icepop", "seq_mask_tis", "clamp", "mask"
]

VIEW_ESTIMATORS = ("prism_paper", "prism_code", "bounded_views")

_INVALID: dict[str, tuple[float, float]] = {
    "prism_paper": (1.0, 1.5),
    "prism_code": (1.0, 1.5),
    "bounded_views": (0.1, 0.0),
}
"""Usual (invalid_offset, invalid_penalty): those of the published code, and those of the setting that works."""

_CLIP: dict[str, tuple[float, float]] = {
    "ppo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
    "dppo_tv": (0.2, 0.2),
}

_BOUNDS: dict[str, tuple[float, float]] = {
    "none": (0.0, float("inf")),
    "tis_token": (0.0, 2.0),
    "tis_sequence": (0.0, 5.0),
    "geometric": (0.5, 5.0),
    "geometric_mask": (0.99, 1.01),
    "icepop": (0.5, 5.0),
    "seq_mask_tis": (0.5, 5.0),
    "clamp": (0.5, 5.0),
    "mask": (0.0, 5.0),
}
_WITHOUT_LOW = ("none", "tis_token", "tis_sequence", "mask")


class AdvantageSettings(Settings):
    """How judgements become advantages, and which tokens carry them."""

    estimator: Estimator = "bounded_views"
    """`grpo`, `dr_grpo`, `rloo` take the verdict's reward (RLVR); the others take the views' scores (alignment).
    `bounded_views` is the one with which alignment was seen to work: a bounded reward per view, relative to the
    reference."""

    credit: Literal["all_tokens", "per_view"] | None = None
    """`per_view` gives a view's advantage to that view's tokens only, so that a good caption is not blamed for a wrong
    answer; `all_tokens` broadcasts the combined advantage, as the published code does. None: per_view for
    `bounded_views`, all_tokens for the others. With `per_view` a view's tokens get (number of views x its share by
    `discriminator.views`) times its advantage, so that the mean over views is the combined advantage."""

    temperature: float = Field(default=3.0, gt=0)
    """`bounded_views` only: reward = sigmoid((score - reference score) / temperature); bounds what one outlying score
    can do."""

    by_std: bool = True
    """`bounded_views` only: divide by the standard deviation of the view's rewards in the group, as published. False
    centres them alone: a group that the judge finds all alike then moves the policy little, instead of having its
    noise brought to full size."""

    invalid_offset: float | None = Field(default=None, ge=0)
    """How far below the worst valid response of its group an invalid one is scored, per view. None: 1.0 for the PRISM
    forms (published), 0.1 for `bounded_views` (whose rewards lie in 0..1)."""

    invalid_penalty: float | None = Field(default=None, ge=0)
    """Subtracted from an invalid response's combined advantage after normalising. None: 1.5 for the PRISM forms
    (published), 0 for `bounded_views`."""

    overlong_share: float = Field(default=0.0, ge=0, le=1)
    """Reward estimators only: the last part of the longest response in which the reward falls linearly (DAPO's soft
    overlong penalty; 0.5 in the published recipe, 4096 of 8192 tokens). A share, so that it fits any length. 0: off."""

    overlong_factor: float = Field(default=1.0, ge=0)
    """Height of the overlong penalty at the longest response; 1 equals the whole accuracy reward."""

    @property
    def per_view(self) -> bool:
        """Whether credit is per view."""
        return self.credit == "per_view" or (self.credit is None and self.estimator == "bounded_views")

    @property
    def invalid(self) -> tuple[float, float]:
        """(offset, penalty) in force."""
        offset, penalty = _INVALID.get(self.estimator, (0.0, 0.0))
        return (
            offset if self.invalid_offset is None else self.invalid_offset,
            penalty if self.invalid_penalty is None else self.invalid_penalty,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.per_view and self.estimator not in ("prism_code", "bounded_views"):
            raise ValueError(
                f"credit: per_view needs an advantage per view, which estimator {self.estimator} does not give; "
                "set credit: all_tokens, or estimator: bounded_views or prism_code"
            )
        if not self.by_std and self.estimator != "bounded_views":
            raise ValueError(
                f"by_std: false is for estimator bounded_views, not {self.estimator}; rewards have estimator: dr_grpo"
            )
        if self.estimator in VIEW_ESTIMATORS:
            if self.overlong_share:
                raise ValueError(
                    f"overlong_share shapes a reward, which estimator {self.estimator} does not use; set it to 0"
                )
        elif self.invalid_offset is not None or self.invalid_penalty is not None:
            raise ValueError(
                f"invalid_offset and invalid_penalty concern views' scores, which estimator {self.estimator} does not "
                "use (the verifier's reward already gates the format); remove them"
            )
        return self


class ObjectiveSettings(Settings):
    """The policy's loss."""

    kind: ObjectiveKind = "ppo"
    """`ppo` token ratio, clipped; `gspo` sequence ratio, clipped; `cispo` clipped detached ratio on the log-prob;
    `dppo_tv` current/behaviour ratio, masked by probability difference. Dr.GRPO is `ppo` with aggregation `dr_grpo`
    and the advantage estimator `dr_grpo`."""

    clip_low: float | None = Field(default=None, ge=0, le=1)
    """Distance of the lower bound from 1 (`dppo_tv`: probability a token with negative advantage may lose). None: the
    kind's usual: ppo 0.2, gspo 3e-4, cispo 1.0, dppo_tv 0.2."""

    clip_high: float | None = Field(default=None, ge=0)
    """Distance of the upper bound from 1 (`dppo_tv`: probability a token with positive advantage may gain). None: the
    kind's usual: ppo 0.2 (DAPO: 0.28), gspo 4e-4, cispo 4.0, dppo_tv 0.2."""

    dual_clip: float | None = Field(default=3.0, gt=1)
    """`ppo` only: where the advantage is negative the loss is at most dual_clip x |advantage|, which stops a token that
    became much more likely from dominating the batch. None: off."""

    aggregation: Aggregation | None = None
    """How token losses become one number. None: the kind's usual: gspo seq_mean_token_mean, the others token_mean."""

    max_response_tokens: int = Field(default=128, ge=1)
    """Longest response that is sampled: the constant divisor of `seq_mean_token_sum_norm` and `dr_grpo` and the end of
    the overlong zone. A constant, since the padded width (verl's default) depends on how the batch is split. A stage
    fills it in from its own `max_response_tokens`."""

    ratio_cap: float | None = Field(default=None, gt=0)
    """`dppo_tv` only: use the log-prob surrogate with the ratio capped here (documented 20 in verl). None: no cap."""

    behaviour_kl: float = Field(default=0.0, ge=0)
    """`dppo_tv` only: coefficient of (log current - log behaviour)^2 (1e-3 in prime-rl), which pulls in what the
    mask let go."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to a frozen reference policy: the one the stage starts from (with `learner.lora` the same
    weights without the adapters, otherwise a second copy on every rank). 0 needs no reference (PRISM uses none: it
    would anchor the policy to the drift that alignment is to repair)."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Where that KL enters: as a term of the loss, token by token (DeepSeekMath's GRPO), or, summed over a response and
    with what sampled it as the policy, off its reward before advantages are taken (PPO for RLHF). As a reward it is
    seen by the group's comparison; as a loss it acts on every token alike."""

    kl_estimator: KLKind = "k3_plus"
    """Which estimate of that KL; `k3_plus` has k3's low variance as a value and the right gradient (k2's)."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the mean token entropy, which is added to what is maximised. 0, as in the published PRISM scripts;
    a little (1e-3) keeps a policy from collapsing early, too much makes it babble."""

    @property
    def clip(self) -> tuple[float, float]:
        """(low, high) in force."""
        low, high = _CLIP[self.kind]
        return (low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    @property
    def reduction(self) -> Aggregation:
        """The aggregation in force."""
        if self.aggregation is not None:
            return self.aggregation
        return "seq_mean_token_mean" if self.kind == "gspo" else "token_mean"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "dppo_tv" and (self.ratio_cap is not None or self.behaviour_kl):
            raise ValueError(f"ratio_cap and behaviour_kl belong to kind dppo_tv, not {self.kind}; remove them")
        return self


class CorrectionSettings(Settings):
    """The detached weight proximal/behaviour that makes the loss right for what another policy sampled."""

    kind: CorrectionKind = "tis_token"
    """rho = proximal/behaviour per token, geo = its geometric mean over the sequence. `tis_token` min(rho, high);
    `clamp` clamp(rho, low, high); `mask` rho if rho <= high else 0; `icepop` rho if low <= rho <= high else 0;
    `tis_sequence` min(product of rho, high); `geometric` geo if within the bounds else 0; `geometric_mask` 1 if geo is
    within the bounds else 0; `seq_mask_tis` rho (not truncated) if geo is within the bounds else 0."""

    low: float | None = Field(default=None, ge=0)
    """Lower bound. None: the kind's usual: clamp, icepop, geometric, seq_mask_tis 0.5, geometric_mask 0.99."""

    high: float | None = Field(default=None, gt=0)
    """Upper bound. None: the kind's usual: tis_token 2, geometric_mask 1.01, the others 5."""

    normalise: bool = False
    """Divide the weights by their mean over the global batch: less variance, a little bias. Needs
    `proximal: recompute`. Off, as in every peer's default."""

    bypass: bool = False
    """Take the behaviour policy as the proximal one: the clip then bounds current/behaviour, no forward is needed
    and no weight is left to apply."""

    proximal: Literal["current", "recompute", "loglinear", "linear"] = "current"
    """Where the proximal log-probs come from. `current`: the current ones, detached; exact and free when a batch gets
    one optimiser step, which is what the loop does. `recompute`: a forward before the update, needed when a batch gets
    several steps. `loglinear`, `linear`: interpolated between behaviour and current by the tokens' versions, without a
    forward."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) in force."""
        low, high = _BOUNDS[self.kind]
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.low is not None and self.kind in _WITHOUT_LOW:
            raise ValueError(f"low: correction {self.kind} has no lower bound; remove it, or set kind: clamp or icepop")
        if self.kind == "none" and (self.high is not None or self.normalise):
            raise ValueError("high and normalise concern weights, which correction none does not have; remove them")
        if self.bypass and self.kind != "none":
            raise ValueError(
                f"bypass: with the behaviour policy as the proximal one every {self.kind} weight is 1; "
                "set kind: none, or bypass: false"
            )
        if self.normalise and self.proximal != "recompute":
            raise ValueError(
                "normalise needs the whole batch's weights before the update, which proximal: "
                f"{self.proximal} cannot give; set proximal: recompute, or normalise: false"
            )
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"low {self.bounds[0]} is above high {self.bounds[1]}; exchange them")
        return self


def check_together(objective: ObjectiveSettings, correction: CorrectionSettings) -> None:
    """Raise ValueError for an objective and a correction that would count the same ratio twice."""
    if objective.kind == "dppo_tv" and (correction.kind != "none" or correction.bypass):
        raise ValueError(
            "correction: objective dppo_tv already uses the ratio current/behaviour; set correction.kind: none and "
            "correction.bypass: false"
        )


def check_kl(objective: ObjectiveSettings, advantage: AdvantageSettings) -> None:
    """Raise ValueError where a KL is to be taken off a reward that the estimator does not use."""
    if objective.kl_coef and objective.kl_in == "reward" and advantage.estimator in VIEW_ESTIMATORS:
        raise ValueError(
            "objective.kl_in: reward needs an estimator of rewards, but advantage.estimator "
            f"{advantage.estimator} takes the views' scores; set kl_in: loss"
        )
