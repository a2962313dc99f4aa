"""The policy's loss: token losses, aggregation with global denominators, and `policy_loss` that joins them.

All tensors are [B,T], one row a response, masks 0/1; minimise. Denominators are counted once over the whole global
batch and handed in, so that the losses (and gradients) of micro-batches and ranks SUM to those of the unsplit batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from prism_ray.config.objective import Aggregation, CorrectionSettings, ObjectiveSettings, check_together
from prism_ray.learner.correction import (
    LOG_CLAMP,
    Weights,
    correction_weights,
    interpolated_proximal,
    log_ratio,
    normalised,
    sequence_mean,
    usable_tokens,
)
from prism_ray.learner.diagnostics import Sums, correction_sums
from prism_ray.learner.kl import kl_estimate


class TokenLoss(NamedTuple):
    """`loss_BT` per token; `clipped_BT` (bool) where clipping or masking stops the gradient; `ratio_BT` detached."""

    loss_BT: Tensor
    clipped_BT: Tensor
    ratio_BT: Tensor


@dataclass(frozen=True)
class Denominators:
    """What a loss is divided by, counted over a whole global batch; add those of its parts.

    `tokens` response tokens, `sequences` responses with at least one, `rows` all responses, `weight_sum` and
    `weight_tokens` sum and number of the correction weights (only where they are normalised: `count_weights`).
    """

    tokens: float = 0.0
    sequences: float = 0.0
    rows: float = 0.0
    weight_sum: float = 0.0
    weight_tokens: float = 0.0

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """A micro-batch as `policy_loss` takes it; log-probs are natural, of the sampled tokens.

    `logp_BT` current (with gradient), `behaviour_BT` the engine's, `advantage_BT`, `mask_BT` response tokens,
    `versions_BT` the policy version of each token, `version` the learner's before this update; `proximal_BT` the
    learner's before the update (where `needs_proximal_forward`), `reference_BT` a frozen policy's (where kl_coef > 0);
    `entropy_BT` entropies in nats (with gradient, where entropy_coef > 0).
    """

    logp_BT: Tensor
    behaviour_BT: Tensor
    advantage_BT: Tensor
    mask_BT: Tensor
    versions_BT: Tensor
    version: int
    proximal_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    entropy_BT: Tensor | None = None


def count_denominators(mask_BT: Tensor) -> Denominators:
    """The denominators of these responses; add those of all micro-batches and ranks to get the global ones."""
    lengths_B = mask_BT.bool().sum(dim=1)
    return Denominators(float(lengths_B.sum()), float((lengths_B > 0).sum()), float(len(lengths_B)))


def count_weights(
    proximal_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, correction: CorrectionSettings
) -> Denominators:
    """The sum of correction weights, as denominators to add to the others; needed where `correction.normalise`."""
    mask_BT = usable_tokens(behaviour_BT, mask_BT)
    weight_BT = correction_weights(proximal_BT, behaviour_BT, mask_BT, correction).weight_BT
    return Denominators(weight_sum=float(weight_BT.sum(dtype=torch.float64)), weight_tokens=float(mask_BT.sum()))


def aggregate(
    loss_BT: Tensor, mask_BT: Tensor, how: Aggregation, denominators: Denominators, max_response_tokens: int
) -> Tensor:
    """This micro-batch's share of the aggregated loss (scalar); the shares of a global batch sum to the whole.

    `token_mean` over all response tokens; `seq_mean_token_mean` and `seq_mean_token_sum` mean over non-empty
    sequences (verl, OpenRLHF; TRL counts empty ones); `seq_mean_token_sum_norm` the latter / max_response_tokens (verl
    divides by the padded width by default, which a split changes); `dr_grpo` sum / (rows x max_response_tokens), where
    every row counts, empty ones too (TRL, SkyRL). A sequence's tokens must lie in one micro-batch. Empty: 0.
    """
    mask_BT = mask_BT.bool()
    loss_BT = torch.where(mask_BT, loss_BT, 0.0)
    if how == "token_mean":
        return loss_BT.sum() / max(denominators.tokens, 1.0)
    if how == "dr_grpo":
        return loss_BT.sum() / (max(denominators.rows, 1.0) * max_response_tokens)
    if how == "seq_mean_token_mean":
        loss_BT = loss_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    scale = max_response_tokens if how == "seq_mean_token_sum_norm" else 1
    return loss_BT.sum() / (max(denominators.sequences, 1.0) * scale)


def ppo_clip(
    logp_BT: Tensor, proximal_BT: Tensor, advantage_BT: Tensor, low: float, high: float, dual_clip: float | None = None
) -> TokenLoss:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = current/proximal; with dual_clip c, where A < 0: min(that, -A c).

    r's log is clamped to +-20 (verl, slime, SkyRL; TRL and AReaL do not clamp), so that no ratio overflows.
    """
    return _clipped(_ratio(logp_BT - proximal_BT), advantage_BT, low, high, dual_clip)


def gspo(
    logp_BT: Tensor, proximal_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> TokenLoss:
    """PPO-clip on the sequence's ratio s = exp(mean over tokens of log r) (arXiv 2507.18071), in its token form.

    Every token has the value s and the gradient s x d log current, so that a per-token advantage is possible; with one
    advantage per response and seq_mean_token_mean it is GSPO exactly (verl, TRL, OpenRLHF, SkyRL, NeMo-RL). AReaL
    averages over tokens instead, so that long sequences weigh more: aggregation token_mean.
    """
    mean_B1 = sequence_mean(log_ratio(logp_BT, proximal_BT, mask_BT).detach(), mask_BT)
    return _clipped(_ratio(mean_B1 + logp_BT - logp_BT.detach()), advantage_BT, low, high, None)


def cispo(logp_BT: Tensor, proximal_BT: Tensor, advantage_BT: Tensor, low: float, high: float) -> TokenLoss:
    """-sg(clip(r, 1 - low, 1 + high)) A log current (arXiv 2506.13585): a clipped token keeps its gradient.

    Bounds are distances from 1, as verl's; TRL's epsilon_high is absolute (its 5.0 is our 4.0). Defaults 1.0/4.0, the
    paper's and TRL's, not verl's 0.2/0.2.
    """
    ratio_BT = _ratio(logp_BT - proximal_BT).detach()
    kept_BT = ratio_BT.clamp(1 - low, 1 + high)
    return TokenLoss(-kept_BT * advantage_BT * logp_BT, kept_BT != ratio_BT, ratio_BT)


def dppo_tv(
    logp_BT: Tensor,
    behaviour_BT: Tensor,
    advantage_BT: Tensor,
    low: float,
    high: float,
    ratio_cap: float | None = None,
    behaviour_kl: float = 0.0,
) -> TokenLoss:
    """-A r keep + behaviour_kl (log r)^2, r = current/behaviour; a token is dropped where A > 0 and its probability
    rose by more than `high`, or A < 0 and it fell by more than `low` (prime-rl, SkyRL).

    With `ratio_cap` c the surrogate is -A sg(min(r, c)) log current keep (verl): the same gradient up to the cap, which
    verl's documentation puts at 20 and its configuration at 3.0; ours is off unless asked for.
    """
    log_BT = logp_BT - behaviour_BT
    ratio_BT = _ratio(log_BT)
    moved_BT = logp_BT.detach().exp() - behaviour_BT.exp()
    dropped_BT = ((advantage_BT > 0) & (moved_BT > high)) | ((advantage_BT < 0) & (moved_BT < -low))
    surrogate_BT = ratio_BT if ratio_cap is None else ratio_BT.detach().clamp(max=ratio_cap) * logp_BT
    loss_BT = torch.where(dropped_BT, 0.0, -advantage_BT * surrogate_BT) + behaviour_kl * log_BT.square()
    return TokenLoss(loss_BT, dropped_BT, ratio_BT.detach())


def policy_loss(
    batch: PolicyBatch, denominators: Denominators, objective: ObjectiveSettings, correction: CorrectionSettings
) -> tuple[Tensor, Sums]:
    """A micro-batch's share of the loss (scalar, to be SUMMED over micro-batches and ranks) and its metric sums.

    An engine that averages gradients over ranks needs the loss times the number of ranks. The sums add up in the same
    way and become figures in `diagnostics.summarise`. Tokens whose behaviour log-prob is not finite are left out and
    counted (`usable_tokens`). A current or proximal log-prob that is not finite is a fault of the learner and shows in
    the loss. Raises ValueError where the settings ask for log-probs the batch lacks.
    """
    check_together(objective, correction)
    mask_BT = usable_tokens(batch.behaviour_BT, batch.mask_BT)
    behaviour_BT = torch.where(mask_BT, batch.behaviour_BT, 0.0).detach()
    logp_BT = torch.where(mask_BT, batch.logp_BT, 0.0)
    advantage_BT = batch.advantage_BT.detach()
    proximal_BT = _proximal(batch, logp_BT, behaviour_BT, mask_BT, objective, correction)
    weights = correction_weights(proximal_BT, behaviour_BT, mask_BT, correction)
    if correction.normalise:
        scaled_BT = normalised(weights.weight_BT, denominators.weight_sum, denominators.weight_tokens)
        weights = Weights(scaled_BT, weights.truncated_BT, weights.rejected_BT)

    token = _token_loss(logp_BT, proximal_BT, behaviour_BT, advantage_BT, mask_BT, objective)
    reduction = (objective.reduction, denominators, objective.max_response_tokens)
    loss = aggregate(weights.weight_BT * token.loss_BT, batch.mask_BT, *reduction)
    sums = correction_sums(proximal_BT, behaviour_BT, mask_BT, weights, batch.version - batch.versions_BT)
    sums |= _policy_sums(token, advantage_BT, batch.mask_BT, mask_BT)
    kl = loss.new_zeros(())
    if objective.kl_coef:
        if batch.reference_BT is None:
            raise ValueError("objective.kl_coef is set but the batch has no reference log-probs; set it to 0")
        kl_BT = kl_estimate(logp_BT, batch.reference_BT, mask_BT, objective.kl_estimator)
        kl = aggregate(kl_BT, batch.mask_BT, *reduction)
        if objective.kl_in == "loss":
            loss = loss + objective.kl_coef * kl
    if objective.entropy_coef:
        if batch.entropy_BT is None:
            raise ValueError("objective.entropy_coef is set but the batch has no entropies; set it to 0")
        loss = loss - objective.entropy_coef * aggregate(batch.entropy_BT, batch.mask_BT, *reduction)
    sums |= {"kl_reference": kl.detach().double(), "loss": loss.detach().double()}
    return loss, sums


def _proximal(
    batch: PolicyBatch,
    logp_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    objective: ObjectiveSettings,
    correction: CorrectionSettings,
) -> Tensor:
    if correction.bypass:
        return behaviour_BT
    if objective.kind == "dppo_tv" or correction.proximal == "current":
        return logp_BT.detach()
    if correction.proximal == "recompute":
        if batch.proximal_BT is None:
            raise ValueError(
                "correction.proximal: recompute needs the learner's log-probs from before the update, which the batch "
                "does not have; compute them, or set it to current"
            )
        return torch.where(mask_BT, batch.proximal_BT, 0.0).detach()
    return interpolated_proximal(
        logp_BT, behaviour_BT, mask_BT, batch.versions_BT, batch.version + 1, correction.proximal == "loglinear"
    )


def _token_loss(
    logp_BT: Tensor,
    proximal_BT: Tensor,
    behaviour_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    objective: ObjectiveSettings,
) -> TokenLoss:
    low, high = objective.clip
    if objective.kind == "ppo":
        return ppo_clip(logp_BT, proximal_BT, advantage_BT, low, high, objective.dual_clip)
    if objective.kind == "gspo":
        return gspo(logp_BT, proximal_BT, advantage_BT, mask_BT, low, high)
    if objective.kind == "cispo":
        return cispo(logp_BT, proximal_BT, advantage_BT, low, high)
    cap, kl = objective.ratio_cap, objective.behaviour_kl
    return dppo_tv(logp_BT, behaviour_BT, advantage_BT, low, high, cap, kl)


def _policy_sums(token: TokenLoss, advantage_BT: Tensor, response_BT: Tensor, mask_BT: Tensor) -> Sums:
    values = {"ratio": token.ratio_BT, "clipped": token.clipped_BT, "advantage": advantage_BT}
    sums = {name: torch.where(mask_BT, v.detach().double(), 0.0).sum() for name, v in values.items()}
    return sums | {"nonfinite": (response_BT.bool() & ~mask_BT).sum().double()}


def _clipped(ratio_BT: Tensor, advantage_BT: Tensor, low: float, high: float, dual_clip: float | None) -> TokenLoss:
    loss_BT = torch.maximum(-advantage_BT * ratio_BT, -advantage_BT * ratio_BT.clamp(1 - low, 1 + high))
    clipped_BT = ((advantage_BT > 0) & (ratio_BT > 1 + high)) | ((advantage_BT < 0) & (ratio_BT < 1 - low))
    if dual_clip is not None:
        negative_BT = advantage_BT < 0
        loss_BT = torch.where(negative_BT, torch.minimum(loss_BT, -advantage_BT * dual_clip), loss_BT)
        clipped_BT = clipped_BT | (negative_BT & (ratio_BT > dual_clip))
    return TokenLoss(loss_BT, clipped_BT, ratio_BT.detach())


def _ratio(log_BT: Tensor) -> Tensor:
    return log_BT.clamp(-LOG_CLAMP, LOG_CLAMP).exp()
