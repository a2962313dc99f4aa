"""The discriminator's loss: Bradley-Terry per view, score clip and score regulariser (PRISM, arXiv 2604.28123).

Pure functions. `P` counts pairs (one rollout and the reference of its prompt), `N` tokens, `E` experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FALLBACK_WEIGHT = 0.01
"""Weight of the loss of an update without a single valid pair: it only keeps the ranks' collectives in step."""


@dataclass(frozen=True, eq=False)
class ViewPairs:
    """The pairs of one view. `*_P` are whole scores, `*_head_P` the (clipped) part of them the head contributed.

    In the published form a score is its head and both are the same tensors.
    """

    reference_P: Tensor
    rollout_P: Tensor
    reference_head_P: Tensor
    rollout_head_P: Tensor


def clip_head(head: Tensor, limit: float | None) -> Tensor:
    """The head's output held within ±`limit`, with no gradient outside; None leaves it alone.

    Only the head is clipped, as only the head can run away: a log-likelihood is at most 0, both sides share its
    level (tens of nats), and clipping it would silence exactly the longest and the worst-judged responses.
    """
    return head if limit is None else head.clamp(-limit, limit)


def debiased(score_B: Tensor, length_B: Tensor, strength: float) -> Tensor:
    """score − strength · log(1 + length): what PRISM's published code calls length debiasing. Lengths are tokens."""
    return score_B - strength * length_B.to(score_B.dtype).log1p() if strength else score_B


def pair_losses(reference_P: Tensor, rollout_P: Tensor, margin: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """−log σ(reference − rollout − margin) of every pair, [P].

    `smoothing` is the share of the loss that takes the rollout for the reference: it is least at a gap of
    log((1 − smoothing) / smoothing) (without margin) and grows again beyond it, so that certainty is bounded.
    """
    losses_P = -F.logsigmoid(reference_P - rollout_P - margin)
    if not smoothing:
        return losses_P
    return (1 - smoothing) * losses_P - smoothing * F.logsigmoid(rollout_P - reference_P - margin)


def weighted_view_loss(
    pairs: ViewPairs, pair_weight_P: Tensor, square_weight_P: Tensor, margin: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Σ over pairs of weight × Bradley-Terry + weight × squares of both heads: one view's share of a loss.

    With weights that count the whole update, micro-batches add up to `discriminator_loss`.
    """
    squares_P = pairs.reference_head_P.square() + pairs.rollout_head_P.square()
    losses_P = pair_losses(pairs.reference_P, pairs.rollout_P, margin, smoothing)
    return (pair_weight_P * losses_P).sum() + (square_weight_P * squares_P).sum()


def discriminator_loss(
    views: Mapping[str, ViewPairs], valid_P: Tensor, score_reg: float, margin: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Σ over views of the mean Bradley-Terry loss of the valid pairs + `score_reg` × mean square of the head.

    The mean square runs over valid and invalid pairs, both sides, all views. Without any valid pair the pair loss is
    replaced by a nearly weightless pull on the references' head. Views count equally: α weighs rewards, not this loss.
    """
    weight_P = valid_P.to(next(iter(views.values())).reference_P.dtype)
    weight_P = weight_P / weight_P.sum().clamp(min=1)
    square_P = torch.full_like(weight_P, score_reg / (2 * len(views) * len(weight_P)))
    losses = [weighted_view_loss(pairs, weight_P, square_P, margin, smoothing) for pairs in views.values()]
    loss = torch.stack(losses).sum()
    if bool(valid_P.any()):
        return loss
    return loss + fallback_loss({view: pairs.reference_head_P for view, pairs in views.items()})


def fallback_loss(reference_heads: Mapping[str, Tensor]) -> Tensor:
    """0.01 × Σ over views of −log σ(mean head of the references): the loss of an update without a valid pair.

    It reads the head even where the score has a likelihood term, so that it never becomes training on references.
    """
    return FALLBACK_WEIGHT * torch.stack([-F.logsigmoid(h.mean()) for h in reference_heads.values()]).sum()


def pair_accuracy(reference_P: Tensor, rollout_P: Tensor, identical_P: Tensor) -> tuple[float, int]:
    """Share of pairs whose reference scores higher, and how many pairs that is about.

    Identical pairs are left out: there is nothing to tell apart. Ties of different texts count one half.
    Returns (nan, 0) if every pair is identical.
    """
    different = ~identical_P.to(torch.bool)
    count = int(different.sum())
    if count == 0:
        return float("nan"), 0
    gap = (reference_P - rollout_P)[different]
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()), count


def calibration_error(gap_P: Tensor, bins: int = 10) -> float:
    """Expected calibration error of the pairs' gaps (reference − rollout), 0..1; nan without pairs.

    The judge calls the higher score the reference, with confidence σ(|gap|) in 0.5..1; per bin of confidence that is
    compared with how often it is right (a tie half the time), and the differences are averaged over the pairs.
    """
    if not len(gap_P):
        return float("nan")
    gap_P = gap_P.double()
    confidence_P = torch.sigmoid(gap_P.abs())
    right_P = (gap_P > 0).double() + 0.5 * (gap_P == 0).double()
    bin_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    surplus_K = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_P, confidence_P - right_P)
    return float(surplus_K.abs().sum() / len(gap_P))


def load_balancing_loss(router_logits: Sequence[Tensor], token_mask_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Switch-style load balancing over all layers; 1 when tokens spread evenly, `E` / `top_k` at worst.

    `router_logits` holds [N, E] per layer and `token_mask_N` says which tokens are real: padding must not be
    balanced. Returns the loss and the share of assignments per expert, [E], detached, summing to 1. Divide-by-top_k
    aside it is Hugging Face's `load_balancing_loss_func` (which is `top_k` times this).
    """
    logits = torch.stack(list(router_logits))  # layers, N, E
    weight = token_mask_N.to(torch.float32).expand(logits.shape[0], -1)
    probs = logits.float().softmax(-1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(top_k, dim=-1).indices, 1.0 / top_k)
    total = weight.sum()
    load_E = torch.einsum("lne,ln->e", chosen, weight) / total
    mass_E = torch.einsum("lne,ln->e", probs, weight) / total
    return logits.shape[-1] * (load_E * mass_E).sum(), load_E.detach()


@dataclass(frozen=True, eq=False)
class RouterCounts:
    """Sums over the tokens of each view: `routed_LVE` assignments (1 a token, shared by its experts) of each layer,
    `entropy_V` of the routing distribution in units of log `E`, mean over layers. They add up over batches."""

    routed_LVE: Tensor
    entropy_V: Tensor

    def __add__(self, other: RouterCounts) -> RouterCounts:
        return RouterCounts(self.routed_LVE + other.routed_LVE, self.entropy_V + other.entropy_V)


@torch.no_grad()
def count_routing(router_logits: Sequence[Tensor], view_N: Tensor, views: int, top_k: int) -> RouterCounts:
    """Where the router sent each view's tokens. `router_logits` holds [N, E] per layer; `view_N` is a token's view
    from 0 to `views` - 1, or -1 for a token that is to be left out (prompts, context, padding). On the CPU."""
    kept_N = view_N >= 0
    logits_LNE = torch.stack(list(router_logits))[:, kept_N].float()
    view_NV = F.one_hot(view_N[kept_N], views).float()
    chosen_LNE = torch.zeros_like(logits_LNE)
    chosen_LNE.scatter_(-1, logits_LNE.topk(top_k, dim=-1).indices, 1.0 / top_k)
    log_LNE = logits_LNE.log_softmax(-1)
    entropy_N = -(log_LNE.exp() * log_LNE).sum(-1).mean(0) / max(math.log(logits_LNE.shape[-1]), 1e-9)
    return RouterCounts(torch.einsum("lne,nv->lve", chosen_LNE, view_NV).cpu(), (entropy_N @ view_NV).cpu())


def view_information(routed_LVE: Tensor) -> float:
    """Mutual information in nats of a token's view and its expert, mean over layers: 0 where experts take all views
    alike, at most log of the number of views."""
    joint_LVE = routed_LVE.double() / routed_LVE.double().sum((1, 2), keepdim=True).clamp(min=1e-12)
    apart_LVE = joint_LVE.sum(2, keepdim=True) * joint_LVE.sum(1, keepdim=True)
    ratio_LVE = torch.where(joint_LVE > 0, joint_LVE / apart_LVE.clamp(min=1e-300), 1.0)
    return float((joint_LVE * ratio_LVE.log()).sum((1, 2)).mean())
