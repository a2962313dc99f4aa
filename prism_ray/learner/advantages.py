"""Advantages: from judgements of the rollouts of a prompt to a number per token.

Vectors are [N], one entry a response; `group_ids_N` are integer labels (not offsets; groups may interleave). Sums run
in float64 and come back in the input's type, so that a group of equal rewards gets 0 and not rounding noise divided
by eps. A group of one is centred on 0 and scaled by 1 (verl, SkyRL): nothing is known to compare it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_ray.config.objective import VIEW_ESTIMATORS, AdvantageSettings
from prism_ray.config.views import ViewSettings, shares_of

EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Judged:
    """What the judge said of N responses.

    `rewards_N` and `lengths_N` (response tokens) serve the reward estimators, `scores` and `reference_scores` (view ->
    [N]) the view estimators; an invalid response's scores are never read. `valid_N` is bool. `gates` (view -> [N], in
    0..1, the same for a whole group) say how much of a view's signal counts; a view without one counts in full.
    """

    rewards_N: Tensor
    group_ids_N: Tensor
    valid_N: Tensor
    lengths_N: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    reference_scores: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Advantages:
    """`combined_N` is the advantage of a whole response; `views` (view -> [N]) is empty unless credit is per view."""

    combined_N: Tensor
    valid_N: Tensor
    views: Mapping[str, Tensor] = field(default_factory=dict)


def estimate(
    judged: Judged, settings: AdvantageSettings, max_response_tokens: int, views: Sequence[ViewSettings]
) -> Advantages:
    """Advantages of N responses under `settings`; `max_response_tokens` places the overlong zone, `views` say what was
    judged and weigh it.

    Raises ValueError if a view has no scores, or a valid response's score or reward is not finite.
    """
    if settings.estimator in VIEW_ESTIMATORS:
        return _from_views(judged, settings, shares_of(views))
    _require_finite("rewards", judged.rewards_N, torch.ones_like(judged.valid_N, dtype=torch.bool))
    rewards_N = judged.rewards_N
    if settings.overlong_share:
        buffer = settings.overlong_share * max_response_tokens
        penalty_N = overlong_penalty(judged.lengths_N, max_response_tokens, buffer, settings.overlong_factor)
        rewards_N = rewards_N + penalty_N.to(rewards_N.dtype)
    estimator = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}[settings.estimator]
    return Advantages(estimator(rewards_N, judged.group_ids_N), judged.valid_N)


def open_share(judged: Judged, settings: AdvantageSettings, views: Sequence[ViewSettings]) -> Tensor:
    """How much of each response's signal [N] (float64, 0..1) its gates let through: the weighted mean over the views.

    An invalid response counts in full, for its penalty is no view's; so does all under estimators without views.
    """
    shut_N = torch.zeros(len(judged.valid_N), dtype=torch.float64)
    if settings.estimator in VIEW_ESTIMATORS:
        for view, share in shares_of(views).items():
            if view in judged.gates:
                shut_N += share * (1 - judged.gates[view].double())
    return 1 - torch.where(judged.valid_N.bool(), shut_N, 0.0)


def grpo(rewards_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group, std unbiased (n - 1), as verl, SkyRL, TRL and PRISM's code.

    A group of one gets r / (1 + 1e-6); a group of equal rewards gets 0.
    """
    centred_N, std_N, _ = _centre(rewards_N.double(), group_ids_N)
    return (centred_N / (std_N + EPS)).to(rewards_N.dtype)


def dr_grpo(rewards_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """r - mean within each group, no standard deviation (arXiv 2503.20783); a group of one gets r."""
    return _centre(rewards_N.double(), group_ids_N)[0].to(rewards_N.dtype)


def rloo(rewards_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """r minus the mean of the group's other rewards (arXiv 2402.14740); a group of one gets r."""
    centred_N, _, size_N = _centre(rewards_N.double(), group_ids_N)
    return (centred_N * size_N / (size_N - 1).clamp(min=1)).to(rewards_N.dtype)


def replace_invalid(scores_N: Tensor, group_ids_N: Tensor, valid_N: Tensor, offset: float) -> Tensor:
    """Scores with an invalid response's replaced by (lowest valid score of its group) - offset, or -offset if the group
    has no valid response. What an invalid response's entry held (NaN included) does not matter."""
    valid_N = valid_N.bool()
    _, index_N = torch.unique(group_ids_N, return_inverse=True)
    lowest_G = scores_N.new_full((_count(index_N),), float("inf"))
    lowest_G = lowest_G.scatter_reduce(0, index_N[valid_N], scores_N[valid_N], reduce="amin")
    lowest_G = torch.where(torch.isinf(lowest_G), 0.0, lowest_G)
    return torch.where(valid_N, scores_N, lowest_G[index_N] - offset)


def prism_paper(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_ids_N: Tensor,
    valid_N: Tensor,
    offset: float = 1.0,
    penalty: float = 1.5,
) -> Tensor:
    """PRISM's Eq. 1 and 3: the weighted sum of the views' scores, normalised in the group.

    The paper says nothing of invalid responses; they take the published code's rule (replaced before normalising,
    `penalty` subtracted after). With every response valid this is the paper's formula alone.
    """
    replaced = {v: replace_invalid(scores[v], group_ids_N, valid_N, offset) for v in weights}
    mixed_N = torch.stack([w * replaced[v] for v, w in weights.items()]).sum(dim=0)
    return _penalised(grpo(mixed_N, group_ids_N), valid_N, penalty)


def prism_code(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_ids_N: Tensor,
    valid_N: Tensor,
    offset: float = 1.0,
    penalty: float = 1.5,
) -> Tensor:
    """PRISM's published code: each view normalised by itself, then weighted, then `penalty` off an invalid response."""
    views = normalised_views(scores, weights, group_ids_N, valid_N, offset)
    return _combine(views, weights, valid_N, penalty)


def normalised_views(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_ids_N: Tensor,
    valid_N: Tensor,
    offset: float,
    by_std: bool = True,
) -> dict[str, Tensor]:
    """The group-normalised scores [N] of every weighted view, invalid responses replaced first; without `by_std` they
    are centred only (Dr. GRPO's argument, arXiv 2503.20783, for views)."""
    normalise = grpo if by_std else dr_grpo
    return {v: normalise(replace_invalid(scores[v], group_ids_N, valid_N, offset), group_ids_N) for v in weights}


def bounded_view_reward(scores_N: Tensor, reference_scores_N: Tensor, temperature: float) -> Tensor:
    """sigmoid((score - reference score) / temperature): how close a view comes to the reference's, in 0..1.

    Bounded, so that one response the judge loathes cannot set the scale of its whole group; relative to the reference,
    so that the judge's offset from prompt to prompt cancels (measured on the testbed).
    """
    return torch.sigmoid((scores_N - reference_scores_N) / temperature)


def overlong_penalty(lengths_N: Tensor, max_response_tokens: int, buffer: float, factor: float) -> Tensor:
    """DAPO's soft penalty [N] float64 (added to the reward): 0 up to max - buffer tokens, then linearly down to
    -factor at max.

    Longer responses get -factor, as in the paper and OpenRLHF; verl, AReaL and NeMo-RL let it keep growing, which
    would let a miscounted length dominate its group.
    """
    beyond_N = lengths_N.double() - (max_response_tokens - buffer)
    return -(beyond_N / buffer).clamp(0, 1) * factor


def credit_tokens(
    advantages: Advantages, spans: Sequence[Mapping[str, tuple[int, int]]], lengths: Sequence[int]
) -> Tensor:
    """The advantage of every response token, [N, longest], 0 beyond a response's length.

    `spans[i]` maps each view to its half-open token span in response i (`response.locate`), empty for an invalid
    response. A view's tokens get that view's advantage; tokens after the last view (the end token) get the last
    view's, since ending there is its last decision; tokens before or between views (white space) get the combined
    advantage. An invalid response, or one without views, gets the combined advantage on all its tokens.
    Raises ValueError if a span reaches beyond its response.
    """
    combined_N = advantages.combined_N
    adv_BT = combined_N.new_zeros((len(lengths), max(lengths, default=0)))
    for row, (length, views) in enumerate(zip(lengths, spans, strict=True)):
        adv_BT[row, :length] = combined_N[row]
        if not bool(advantages.valid_N[row]):
            continue
        credited = sorted((views[v], advantages.views[v][row]) for v in advantages.views if v in views)
        for (start, end), value in credited:
            if not 0 <= start <= end <= length:
                raise ValueError(f"spans: response {row} has {length} tokens but a view at {start}..{end}")
            adv_BT[row, start:end] = value
        if credited:
            (_, end), value = credited[-1]
            adv_BT[row, end:length] = value
    return adv_BT


@dataclass(frozen=True, eq=False)
class VTrace:
    """`vs_BT` value targets, `advantage_BT` policy-gradient advantages; both detached and 0 beyond `lengths_B`."""

    vs_BT: Tensor
    advantage_BT: Tensor


def vtrace(
    target_BT: Tensor,
    behaviour_BT: Tensor,
    rewards_BT: Tensor,
    values_BT: Tensor,
    bootstrap_B: Tensor,
    lengths_B: Tensor,
    terminated_B: Tensor,
    gamma: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    rho_bar_pg: float = 1.0,
) -> VTrace:
    """V-trace (arXiv 1802.01561) for trajectories with per-step rewards and values, as RLlib computes it.

    Log-probs, rewards and values are [B,T] with a valid prefix of `lengths_B` steps; a terminated row has discount 0
    at its last step, another bootstraps from `bootstrap_B`.

    A step here should be a turn, not a token: with a terminal reward, gamma 1 and a constant baseline b the advantage
    at step t is (R - b) times the product of min(1, rho_i) for i >= t, which for thousands of tokens decays to 0 at
    the early ones. Long responses need a value head and segments, or the token weights of `correction`.
    """
    steps_T = torch.arange(rewards_BT.shape[1], device=rewards_BT.device)
    valid_BT = steps_T < lengths_B[:, None]
    last_BT = steps_T == lengths_B[:, None] - 1
    discount_BT = gamma * (~(last_BT & terminated_B.bool()[:, None])).to(values_BT.dtype)
    log_BT, values_BT = (target_BT - behaviour_BT).detach(), values_BT.detach()
    rho_BT, c_BT, pg_BT = (_truncated_ratio(log_BT, bar) for bar in (rho_bar, c_bar, rho_bar_pg))

    following_BT = _shifted(values_BT, last_BT, bootstrap_B)
    delta_BT = rho_BT * (rewards_BT + discount_BT * following_BT - values_BT)
    excess_BT = torch.zeros_like(values_BT)
    carry_B = torch.zeros_like(bootstrap_B)
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        carry_B = torch.where(valid_BT[:, t], delta_BT[:, t] + discount_BT[:, t] * c_BT[:, t] * carry_B, 0.0)
        excess_BT[:, t] = carry_B
    vs_BT = values_BT + excess_BT
    advantage_BT = pg_BT * (rewards_BT + discount_BT * _shifted(vs_BT, last_BT, bootstrap_B) - values_BT)
    return VTrace(torch.where(valid_BT, vs_BT, 0.0), torch.where(valid_BT, advantage_BT, 0.0))


def _truncated_ratio(log_BT: Tensor, bar: float) -> Tensor:
    return log_BT.clamp(max=20.0).exp().clamp(max=bar)


def _shifted(values_BT: Tensor, last_BT: Tensor, bootstrap_B: Tensor) -> Tensor:
    next_BT = torch.cat([values_BT[:, 1:], bootstrap_B[:, None]], dim=1)
    return torch.where(last_BT, bootstrap_B[:, None], next_BT)


def _from_views(judged: Judged, settings: AdvantageSettings, weights: Mapping[str, float]) -> Advantages:
    offset, penalty = settings.invalid
    valid_N, groups_N = judged.valid_N, judged.group_ids_N
    for view in weights:
        _require_scores("scores", view, judged.scores, valid_N)
    if settings.estimator == "prism_paper":
        if any(bool((gate_N != 1).any()) for gate_N in judged.gates.values()):
            raise ValueError(
                "advantage.estimator prism_paper normalises the sum of the views, which undoes discriminator.gate; set "
                "prism_code or bounded_views, or unset the gate"
            )
        return Advantages(prism_paper(judged.scores, weights, groups_N, valid_N, offset, penalty), valid_N)
    scores = judged.scores
    if settings.estimator == "bounded_views":
        for view in weights:
            _require_scores("reference_scores", view, judged.reference_scores, valid_N)
        scores = {v: bounded_view_reward(scores[v], judged.reference_scores[v], settings.temperature) for v in weights}
    views = normalised_views(scores, weights, groups_N, valid_N, offset, settings.by_std)
    views = {v: values_N * judged.gates.get(v, 1.0) for v, values_N in views.items()}
    combined_N = _combine(views, weights, valid_N, penalty)
    if not settings.per_view:
        return Advantages(combined_N, valid_N)
    return Advantages(combined_N, valid_N, {v: len(weights) * weights[v] * views[v] for v in weights})


def _combine(views: Mapping[str, Tensor], weights: Mapping[str, float], valid_N: Tensor, penalty: float) -> Tensor:
    return _penalised(torch.stack([w * views[v] for v, w in weights.items()]).sum(dim=0), valid_N, penalty)


def _penalised(advantage_N: Tensor, valid_N: Tensor, penalty: float) -> Tensor:
    return advantage_N - penalty * (~valid_N.bool()).to(advantage_N.dtype)


def _require_scores(name: str, view: str, scores: Mapping[str, Tensor], valid_N: Tensor) -> None:
    if view not in scores:
        raise ValueError(f"{name} has no view {view!r}, which discriminator.views names; have {sorted(scores)}")
    _require_finite(f"{name}[{view!r}]", scores[view], valid_N)


def _require_finite(name: str, values_N: Tensor, where_N: Tensor) -> None:
    bad = (where_N.bool() & ~torch.isfinite(values_N)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} is not finite for responses {bad}; mend or drop the judge's verdicts on them")


def _centre(values_N: Tensor, group_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value - group mean, group std, group size), each [N]; mean 0 and std 1 for a group of one."""
    _, index_N = torch.unique(group_ids_N, return_inverse=True)
    size_G = values_N.new_zeros(_count(index_N)).index_add(0, index_N, torch.ones_like(values_N))
    mean_G = torch.zeros_like(size_G).index_add(0, index_N, values_N) / size_G
    mean_G = torch.where(size_G > 1, mean_G, 0.0)
    centred_N = values_N - mean_G[index_N]
    variance_G = torch.zeros_like(size_G).index_add(0, index_N, centred_N.square()) / (size_G - 1).clamp(min=1)
    std_G = torch.where(size_G > 1, variance_G.sqrt(), 1.0)
    return centred_N, std_G[index_N], size_G[index_N]


def _count(index_N: Tensor) -> int:
    return int(index_N.max()) + 1 if len(index_N) else 0
