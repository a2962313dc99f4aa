"""Log-probs of responses without ever holding [tokens × vocabulary] in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Natural log-probs [B, R] of the response tokens, and the entropies [B, R] in nats if asked (without gradient).

    Float32; masked positions are 0. `temperature` divides the logits and `banned_ids` are given probability 0, so
    that both together are the distribution the tokens were sampled from. Logits exist for `chunk_tokens` response
    tokens at a time (default: `CHUNK_ELEMENTS` logits) and are computed again in the backward pass if there is more
    than one chunk.
    """
    hidden_BTD = final_hidden(model, batch)
    hidden_ND = predicting_rows(hidden_BTD, batch)
    targets_N = batch.response_ids_BR[batch.response_mask_BR]
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=hidden_ND.device)
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    logp_N, entropy_N = _in_chunks(model.lm_head, hidden_ND, targets_N, temperature, banned, chunk, entropy)
    logp_BR = _spread(logp_N, batch.response_mask_BR)
    return logp_BR, _spread(entropy_N, batch.response_mask_BR) if entropy_N is not None else None


def predicting_rows(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Hidden states [N, D] that predict the N response tokens, row by row of the batch."""
    _, width, size = hidden_BTD.shape
    starts_B = torch.arange(len(batch.lengths_B), device=hidden_BTD.device) * width + batch.prompt_lengths_B - 1
    steps_R = torch.arange(batch.response_mask_BR.shape[1], device=hidden_BTD.device)
    rows_N = (starts_B[:, None] + steps_R)[batch.response_mask_BR]
    return hidden_BTD.reshape(-1, size).index_select(0, rows_N)


def _in_chunks(
    head: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float, banned: Tensor, chunk: int, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if len(hidden_ND) <= chunk:
        return _score(head, hidden_ND, targets_N, temperature, banned, entropy)
    parts = [
        checkpoint(_score, head, h, t, temperature, banned, entropy, use_reentrant=False)
        for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logp_N = torch.cat([logp for logp, _ in parts])
    return logp_N, torch.cat([e for _, e in parts]) if entropy else None


def _score(
    head: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float, banned: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits_NV = head(hidden_ND).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    if len(banned):
        logits_NV = logits_NV.index_fill(1, banned, _BANNED)
    logp_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
    if not entropy:
        return logp_N, None
    with torch.no_grad():
        logp_NV = torch.log_softmax(logits_NV, dim=1)
        return logp_N, -(logp_NV.exp() * logp_NV).sum(1)


def _spread(values_N: Tensor, mask_BR: Tensor) -> Tensor:
    """Values [N] of the masked-in positions, back in place, 0 elsewhere."""
    return values_N.new_zeros(mask_BR.shape).masked_scatter(mask_BR, values_N)
