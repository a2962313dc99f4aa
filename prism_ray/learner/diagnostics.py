"""How far the data is from the policy: figures that are logged at every step.

Everything is gathered as sums, so that those of micro-batches and ranks add up to exactly the whole batch's figures:
`correction_sums` -> add (`merge`, or one all-reduce over `torch.stack(list(sums.values()))`; the keys and their order
never depend on the data) -> `summarise`. Tensors are [B,T], one row a response; sums are float64 scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from prism_ray.learner.correction import LOG_CLAMP, Weights, log_ratio, sequence_mean, sequence_sum

Sums = dict[str, Tensor]

STALENESS_BUCKETS: dict[str, tuple[int, int]] = {
    "0": (0, 0),
    "1": (1, 1),
    "2": (2, 2),
    "3": (3, 3),
    "4_7": (4, 7),
    "8_more": (8, 2**31 - 1),
}
"""Label -> (least, greatest) staleness of a token: learner version - version that sampled it."""

_MEANS: dict[str, tuple[str, str]] = {
    "correction/kl_direct": ("log_gap", "tokens"),
    "correction/kl_k3": ("k3", "tokens"),
    "correction/weight": ("weight", "tokens"),
    "correction/truncated_share": ("truncated", "tokens"),
    "correction/rejected_share": ("rejected", "tokens"),
    "correction/log_ppl_gap": ("ppl_gap", "sequences"),
    "correction/log_ppl_abs_gap": ("ppl_abs_gap", "sequences"),
    "correction/ppl_ratio": ("ppl_ratio", "sequences"),
    "policy/ratio": ("ratio", "tokens"),
    "policy/clipped_share": ("clipped", "tokens"),
    "policy/advantage": ("advantage", "tokens"),
}
_TOTALS = {"policy/loss": "loss", "policy/kl_reference": "kl_reference", "correction/nonfinite_tokens": "nonfinite"}


def correction_sums(
    proximal_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, weights: Weights, staleness_BT: Tensor
) -> Sums:
    """The sums behind every `correction/…` and `staleness/…` figure, over the tokens of `mask_BT`.

    Log ratios are clamped to +-20 before an exponential, as verl does. `staleness_BT` is an integer tensor; a negative
    entry (a version from the future) counts as 0.
    """
    mask_BT = mask_BT.bool()
    log_BT = log_ratio(proximal_BT.detach().double(), behaviour_BT.detach().double(), mask_BT)
    gap_B1 = -sequence_mean(log_BT, mask_BT)
    rho_BT = _exp(log_BT)
    filled_B1 = mask_BT.any(dim=1, keepdim=True)
    per_token = {
        "tokens": torch.ones_like(log_BT),
        "log_gap": -log_BT,
        "k3": rho_BT - 1 - log_BT,
        "rho2": rho_BT.square(),
        "weight": weights.weight_BT.double(),
        "weight2": weights.weight_BT.double().square(),
        "truncated": weights.truncated_BT.double(),
        "rejected": weights.rejected_BT.double(),
    }
    per_sequence = {
        "sequences": torch.ones_like(gap_B1),
        "chi2_sequence": _exp(sequence_sum(log_BT, mask_BT)).square(),
        "ppl_gap": gap_B1,
        "ppl_abs_gap": gap_B1.abs(),
        "ppl_ratio": _exp(gap_B1),
    }
    sums = {name: torch.where(mask_BT, v, 0.0).sum() for name, v in per_token.items()}
    sums |= {name: torch.where(filled_B1, v, 0.0).sum() for name, v in per_sequence.items()}
    for label, (least, greatest) in STALENESS_BUCKETS.items():
        inside_BT = mask_BT & (staleness_BT.clamp(min=0) >= least) & (staleness_BT <= greatest)
        for name in ("tokens", "k3", "weight", "weight2", "truncated", "rejected"):
            sums[f"{label}/{name}"] = torch.where(inside_BT, per_token[name], 0.0).sum()
    return sums


def merge(parts: Iterable[Sums]) -> Sums:
    """The sums of several micro-batches (or ranks) as one; empty for no parts."""
    total: Sums = {}
    for part in parts:
        total = {name: total[name] + v for name, v in part.items()} if total else dict(part)
    return total


def summarise(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures, by metric name; those of an empty batch or bucket are left out, never NaN.

    `correction/ess` is the effective sample size as a share, (sum w)^2 / (n sum w^2); `chi2_token` and `chi2_sequence`
    are E[rho^2] - 1; `kl_direct` and `kl_k3` estimate KL(behaviour || proximal); `log_ppl_gap` is the mean over
    sequences of log-perplexity under proximal minus that under behaviour. `staleness/<bucket>/…` repeats the main ones
    for the tokens of that staleness. Single `policy/…` figures appear where the sums hold them.
    """
    have = {name: float(v) for name, v in sums.items()}
    figures = {metric: have[name] for metric, name in _TOTALS.items() if name in have}
    for metric, (name, count) in _MEANS.items():
        if name in have and have[count] > 0:
            figures[metric] = have[name] / have[count]
    if have.get("tokens", 0) > 0:
        figures["correction/ess"] = _ess(have["weight"], have["weight2"], have["tokens"])
        figures["correction/chi2_token"] = have["rho2"] / have["tokens"] - 1
        figures["correction/chi2_sequence"] = have["chi2_sequence"] / have["sequences"] - 1
    for label in STALENESS_BUCKETS:
        count = have.get(f"{label}/tokens", 0)
        if count > 0:
            figures[f"staleness/{label}/share"] = count / have["tokens"]
            figures[f"staleness/{label}/ess"] = _ess(have[f"{label}/weight"], have[f"{label}/weight2"], count)
            figures[f"staleness/{label}/kl_k3"] = have[f"{label}/k3"] / count
            figures[f"staleness/{label}/truncated_share"] = have[f"{label}/truncated"] / count
            figures[f"staleness/{label}/rejected_share"] = have[f"{label}/rejected"] / count
    return figures


def _exp(log: Tensor) -> Tensor:
    return log.clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def _ess(weight: float, weight2: float, count: float) -> float:
    return weight * weight / (count * weight2) if weight2 > 0 else 0.0
