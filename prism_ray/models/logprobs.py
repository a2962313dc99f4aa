"""Log-probs of responses without ever holding [tokens × vocabulary] in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prism_ray.models.batch import Batch
from prism_ray.models.forward import final_hidden

CHUNK_ELEMENTS = 2**26
"""Logits held at a time by default: 256 MiB in float32."""

_BANNED = -1e9
"""Logit of a banned token: probability 0 in float32, and finite, so that entropy and gradients stay finite."""


def response_logprobs(
    model: Any,
    batch: Batch,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Natural log-probs [B, R] of the response tokens, and the entropies [B, R] in nats if asked.

    Float32; masked positions are 0. `temperature` divides the logits and `banned_ids` are given probability 0, so
    that both together are the distribution the tokens were sampled from. Logits exist for `chunk_tokens` response
    tokens at a time (default: `CHUNK_ELEMENTS` logits) and are computed again in the backward pass if there is more
    than one chunk. Entropies have a gradient only where `entropy_gradient` asks for it, since it costs one more pass
    over the logits.
    """
    hidden_ND = predicting_rows(final_hidden(model, batch), batch)
    targets_N = batch.response_ids_BR[batch.response_mask_BR]
    logp_N, entropy_N = token_logprobs(
        model.lm_head, hidden_ND, targets_N, temperature, chunk_tokens, entropy, entropy_gradient, banned_ids
    )
    logp_BR = _spread(logp_N, batch.response_mask_BR)
    return logp_BR, _spread(entropy_N, batch.response_mask_BR) if entropy_N is not None else None


def token_logprobs(
    head: nn.Linear,
    hidden_ND: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [N] of `targets_N` under the output layer `head` at states `hidden_ND`, and entropies [N] if asked.

    The other arguments are those of `response_logprobs`.
    """
    if temperature != 1.0:
        hidden_ND = hidden_ND / temperature  # the head is linear: one division of the states instead of the logits
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=hidden_ND.device)
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // head.out_features)
    if len(hidden_ND) <= chunk:
        return _score(head, hidden_ND, targets_N, banned, entropy, entropy_gradient)
    parts = [
        checkpoint(_score, head, h, t, banned, entropy, entropy_gradient, use_reentrant=False)
        for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logp_N = torch.cat([logp for logp, _ in parts])
    return logp_N, torch.cat([e for _, e in parts]) if entropy else None


def predicting_rows(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Hidden states [N, D] that predict the N response tokens, sample by sample of the batch, in any layout."""
    return hidden_BTD.flatten(0, 1).index_select(0, batch.predictor_BR[batch.response_mask_BR])


def _score(
    head: Any, hidden_ND: Tensor, targets_N: Tensor, banned: Tensor, entropy: bool, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """In as few copies of the logits as can be: they are what a chunk's memory is made of."""
    logits_NV = head(hidden_ND).float()
    if len(banned):
        logits_NV = logits_NV.index_fill_(1, banned, _BANNED)
    logp_NV = torch.log_softmax(logits_NV, dim=1)
    del logits_NV
    logp_N = logp_NV.gather(1, targets_N[:, None]).squeeze(1)
    if not entropy:
        return logp_N, None
    if gradient:
        return logp_N, -(logp_NV.exp() * logp_NV).sum(dim=1)
    with torch.no_grad():
        return logp_N, -logp_NV.exp().mul_(logp_NV).sum(dim=1)


def _spread(values_N: Tensor, mask_BR: Tensor) -> Tensor:
    """Values [N] of the masked-in positions, back in place, 0 elsewhere."""
    return values_N.new_zeros(mask_BR.shape).masked_scatter(mask_BR, values_N)
