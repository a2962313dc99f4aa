"""Estimates of KL(current || reference) from the log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_ray.config.objective import KLKind

_INPUT_CLAMP = 20.0
_OUTPUT_CLAMP = 10.0


def kl_estimate(logp_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimate [B,T] (nats), 0 and without gradient at masked positions.

    With x = reference - current: `k1` -x; `k2` x^2/2; `k3` exp(x) - x - 1; `k3_clamped` the same with x clamped to
    +-20 and the result to +-10 (verl, SkyRL, NeMo-RL's default; no gradient where a clamp is active); `k3_plus` the
    value of `k3_clamped` with the gradient of `k2`.

    Peers disagree on the clamps (TRL and slime's k3 have none, OpenRLHF clamps every kind to +-10). Ours leaves k1, k2
    and k3 as their definitions say and gives the clamped form its own name. As a loss on the policy's own samples only
    k2 (so `k3_plus`) has the gradient of the reverse KL; k1's is zero in expectation, k3's that of the forward KL.
    """
    x_BT = torch.where(mask_BT.bool(), reference_BT.detach() - logp_BT, 0.0)
    if kind == "k1":
        return -x_BT
    if kind == "k2":
        return x_BT.square() / 2
    if kind == "k3":
        return torch.expm1(x_BT) - x_BT
    clamped_BT = x_BT.clamp(-_INPUT_CLAMP, _INPUT_CLAMP)
    k3_BT = (torch.expm1(clamped_BT) - clamped_BT).clamp(-_OUTPUT_CLAMP, _OUTPUT_CLAMP)
    if kind == "k3_clamped":
        return k3_BT
    k2_BT = x_BT.square() / 2
    return k2_BT - k2_BT.detach() + k3_BT.detach()
