"""The discriminator's loss: Bradley-Terry per view, score clip and score regulariser (PRISM, arXiv 2604.28123).

Pure functions. `P` counts pairs (one rollout and the reference of its prompt), `N` tokens, `E` experts.
"""

from __future__ import annotations

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


def pair_losses(reference_P: Tensor, rollout_P: Tensor) -> Tensor:
    """−log σ(reference − rollout) of every pair, [P]."""
    return -F.logsigmoid(reference_P - rollout_P)


def weighted_view_loss(pairs: ViewPairs, pair_weight_P: Tensor, square_weight_P: Tensor) -> Tensor:
    """Σ over pairs of weight × Bradley-Terry + weight × squares of both heads: one view's share of a loss.

    With weights that count the whole update, micro-batches add up to `discriminator_loss`.
    """
    squares_P = pairs.reference_head_P.square() + pairs.rollout_head_P.square()
    losses_P = pair_losses(pairs.reference_P, pairs.rollout_P)
    return (pair_weight_P * losses_P).sum() + (square_weight_P * squares_P).sum()


def discriminator_loss(views: Mapping[str, ViewPairs], valid_P: Tensor, score_reg: float) -> Tensor:
    """Σ over views of the mean Bradley-Terry loss of the valid pairs + `score_reg` × mean square of the head.

    The mean square runs over valid and invalid pairs, both sides, all views. Without any valid pair the pair loss is
    replaced by a nearly weightless pull on the references' head. Views count equally: α weighs rewards, not this loss.
    """
    weight_P = valid_P.to(next(iter(views.values())).reference_P.dtype)
    weight_P = weight_P / weight_P.sum().clamp(min=1)
    square_P = torch.full_like(weight_P, score_reg / (2 * len(views) * len(weight_P)))
    loss = torch.stack([weighted_view_loss(pairs, weight_P, square_P) for pairs in views.values()]).sum()
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
