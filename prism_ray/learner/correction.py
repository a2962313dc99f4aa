"""Off-policy correction: the detached weight rho = proximal/behaviour, and where the proximal log-probs come from.

All tensors are [B,T], one row a response; `mask_BT` is 1 at response tokens. Masked positions may hold anything, NaN
included. Bounds always apply to rho itself (verl's k1 rejection bounds apply to 1/rho: ours follows SkyRL, slime, ROLL
and AReaL). Weights never shrink a loss's denominator: a rejected token counts with loss 0 (SkyRL, NeMo-RL, AReaL,
OpenRLHF), since dividing by the kept tokens, as verl's rejection does, makes the step larger the worse the data is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_ray.config.objective import CorrectionSettings, ObjectiveSettings

LOG_CLAMP = 20.0
"""Log ratios (of sequences: their sum or mean) are clamped to +-this before an exponential (verl, slime, SkyRL)."""


@dataclass(frozen=True, eq=False)
class Weights:
    """`weight_BT` detached, 0 at masked positions; `truncated_BT` where a bound changed the weight, `rejected_BT` where
    a mask set a response token's weight to 0 (both bool)."""

    weight_BT: Tensor
    truncated_BT: Tensor
    rejected_BT: Tensor


def needs_proximal_forward(objective: ObjectiveSettings, correction: CorrectionSettings) -> bool:
    """Whether the learner must compute log-probs under its weights before the update."""
    return correction.proximal == "recompute" and not correction.bypass and objective.kind != "dppo_tv"


def usable_tokens(behaviour_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The response tokens [B,T] (bool) whose behaviour log-prob is finite.

    An engine's NaN or infinite log-prob says nothing of how the token was sampled, so the token is left out of loss,
    ratios and diagnostics (it stays in the denominators, which are known before any log-prob) and is counted.
    """
    return mask_BT.bool() & torch.isfinite(behaviour_BT)


def log_ratio(numerator_BT: Tensor, denominator_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(numerator/denominator) [B,T], 0 and without gradient at masked positions, whatever these hold."""
    mask_BT = mask_BT.bool()
    return torch.where(mask_BT, numerator_BT, 0.0) - torch.where(mask_BT, denominator_BT, 0.0)


def sequence_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over each row's valid tokens, [B,1]."""
    return torch.where(mask_BT.bool(), values_BT, 0.0).sum(dim=1, keepdim=True)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over each row's valid tokens, [B,1]; 0 for a row without any."""
    return sequence_sum(values_BT, mask_BT) / mask_BT.bool().sum(dim=1, keepdim=True).clamp(min=1)


def sequence_ratio(current_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Geometric mean over each row's tokens of current/behaviour, [B]: how much likelier a response has become since it
    was sampled. 1 for a row without a usable token; the log is clamped to +-20."""
    mask_BT = usable_tokens(behaviour_BT, mask_BT) & torch.isfinite(current_BT)
    return _exp(sequence_mean(log_ratio(current_BT, behaviour_BT, mask_BT), mask_BT))[:, 0]


def correction_weights(
    proximal_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, settings: CorrectionSettings
) -> Weights:
    """The weight of every response token under `settings.kind` (see its docstring for the formulae).

    Where peers disagree: "tis" has no lower bound here (verl, SkyRL, slime; OpenRLHF's clamps below at 0.5: that is
    `clamp`); `icepop` zeroes on both sides; `seq_mask_tis` keeps the raw token ratio (OpenRLHF, NeMo-RL); sequences
    use the product of ratios, its log clamped as verl, SkyRL and slime do (TRL, ROLL: no clamp).
    """
    mask_BT = mask_BT.bool()
    low, high = settings.bounds
    log_BT = log_ratio(proximal_BT.detach(), behaviour_BT.detach(), mask_BT)
    if settings.kind == "none":
        return _weights(torch.ones_like(log_BT), torch.zeros_like(mask_BT), torch.zeros_like(mask_BT), mask_BT)
    rho_BT = _exp(log_BT)
    if settings.kind == "tis_sequence":
        product_BT = _exp(sequence_sum(log_BT, mask_BT)).expand_as(log_BT)
        return _truncated(product_BT, low, high, mask_BT)
    if settings.kind in ("tis_token", "clamp"):
        return _truncated(rho_BT, low, high, mask_BT)
    if settings.kind in ("icepop", "mask"):
        return _rejected(rho_BT, _within(rho_BT, low, high), mask_BT)
    geometric_BT = _exp(sequence_mean(log_BT, mask_BT)).expand_as(log_BT)
    weight_BT = {"geometric": geometric_BT, "geometric_mask": torch.ones_like(rho_BT), "seq_mask_tis": rho_BT}
    return _rejected(weight_BT[settings.kind], _within(geometric_BT, low, high), mask_BT)


def normalised(weight_BT: Tensor, weight_sum: float, tokens: float) -> Tensor:
    """The weights divided by their mean weight_sum/tokens over the whole global batch; all 0 where that mean is 0."""
    return weight_BT * (tokens / weight_sum) if weight_sum > 0 else torch.zeros_like(weight_BT)


def interpolated_proximal(
    logp_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    versions_BT: Tensor,
    target_version: int,
    log_space: bool = True,
) -> Tensor:
    """Proximal log-probs [B,T] (detached, 0 at masked positions) without a forward: between behaviour and current.

    `versions_BT` is the policy version of each token (negative: unknown), `target_version` V the version the update
    will produce, so that V - 1 is the proximal one. With v a token's version and alpha = (V - 1 - v)/(V - v), clamped
    to 0..1 and 0 for v unknown or not below V: log_space interpolates log-probs, else probabilities (+1e-10). AReaL's
    formulae; its alpha is float32, ours has the log-probs' type.
    """
    mask_BT = mask_BT.bool()
    gap_BT = (target_version - versions_BT).to(logp_BT.dtype)
    known_BT = (versions_BT >= 0) & (versions_BT < target_version)
    alpha_BT = torch.where(known_BT, (gap_BT - 1) / gap_BT.clamp(min=1), 0.0).clamp(0, 1)
    current_BT = torch.where(mask_BT, logp_BT.detach(), 0.0)
    behaviour_BT = torch.where(mask_BT, behaviour_BT, 0.0)
    if log_space:
        mixed_BT = behaviour_BT + alpha_BT * (current_BT - behaviour_BT)
    else:
        mixed_BT = torch.log((1 - alpha_BT) * behaviour_BT.exp() + alpha_BT * current_BT.exp() + 1e-10)
    return torch.where(mask_BT, mixed_BT, 0.0)


def _exp(log_BT: Tensor) -> Tensor:
    return log_BT.clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def _within(ratio_BT: Tensor, low: float, high: float) -> Tensor:
    return (ratio_BT >= low) & (ratio_BT <= high)


def _truncated(ratio_BT: Tensor, low: float, high: float, mask_BT: Tensor) -> Weights:
    outside_BT = ~_within(ratio_BT, low, high)
    return _weights(ratio_BT.clamp(low, high), outside_BT, torch.zeros_like(mask_BT), mask_BT)


def _rejected(weight_BT: Tensor, keep_BT: Tensor, mask_BT: Tensor) -> Weights:
    return _weights(weight_BT * keep_BT, torch.zeros_like(mask_BT), ~keep_BT, mask_BT)


def _weights(weight_BT: Tensor, truncated_BT: Tensor, rejected_BT: Tensor, mask_BT: Tensor) -> Weights:
    return Weights(torch.where(mask_BT, weight_BT, 0.0), truncated_BT & mask_BT, rejected_BT & mask_BT)
