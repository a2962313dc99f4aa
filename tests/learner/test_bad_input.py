"""What the learner's mathematics does with what it should never be given."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_ray.config.objective import CorrectionSettings, ObjectiveSettings
from prism_ray.learner.correction import correction_weights
from prism_ray.learner.diagnostics import STALENESS_BUCKETS, merge, summarise
from prism_ray.learner.kl import kl_estimate
from prism_ray.learner.objective import (
    Denominators,
    PolicyBatch,
    count_denominators,
    count_weights,
    policy_loss,
)

NAN, INF = float("nan"), float("inf")

OBJECTIVES = {
    **{kind: ObjectiveSettings(kind=kind, kl_coef=0.1) for kind in ("ppo", "gspo", "cispo", "dppo_tv")},
    "dr_grpo": ObjectiveSettings(aggregation="dr_grpo", dual_clip=None),
    "dppo_capped": ObjectiveSettings(kind="dppo_tv", ratio_cap=20.0, behaviour_kl=1e-3),
    "seq_mean": ObjectiveSettings(kind="cispo", aggregation="seq_mean_token_mean", kl_coef=0.1),
    "k3": ObjectiveSettings(kl_coef=0.1, kl_estimator="k3", aggregation="seq_mean_token_sum_norm"),
}
CORRECTIONS = {
    **{k: CorrectionSettings(kind=k, proximal="recompute") for k in ("none", "tis_token", "tis_sequence", "clamp")},
    **{k: CorrectionSettings(kind=k, proximal="recompute") for k in ("geometric", "icepop", "mask")},
    "geometric_mask": CorrectionSettings(kind="geometric_mask", low=0.5, high=2.0, proximal="recompute"),
    "seq_mask_tis": CorrectionSettings(kind="seq_mask_tis", low=0.0, high=1e30, proximal="recompute"),
    "normalise": CorrectionSettings(normalise=True, proximal="recompute"),
    "loglinear": CorrectionSettings(proximal="loglinear"),
    "linear": CorrectionSettings(proximal="linear"),
    "current": CorrectionSettings(proximal="current"),
    "bypass": CorrectionSettings(kind="none", bypass=True),
}
CROSSED, FEW = ("ppo", "gspo"), ("none", "tis_token")
PAIRS = [
    (o, c)
    for o in OBJECTIVES
    for c in CORRECTIONS
    if (o in CROSSED or c in FEW) and (c == "none" or not o.startswith("dppo"))
]


def evaluate(batch: PolicyBatch, objective: str, correction: str):
    """Loss, gradient and metric sums, with denominators counted on the batch itself."""
    logp = batch.logp_BT.clone().requires_grad_()
    batch = PolicyBatch(**{**vars(batch), "logp_BT": logp})
    denominators = count_denominators(batch.mask_BT)
    if CORRECTIONS[correction].normalise:
        denominators += count_weights(batch.proximal_BT, batch.behaviour_BT, batch.mask_BT, CORRECTIONS[correction])
    loss, sums = policy_loss(batch, denominators, OBJECTIVES[objective], CORRECTIONS[correction])
    loss.backward()
    return loss.detach(), logp.grad, sums


def make(rows: int, columns: int, seed: int, ratio: float = 1.0, dtype=torch.float32) -> PolicyBatch:
    draw = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return 2 * torch.rand(rows, columns, generator=draw, dtype=dtype) - 1

    behaviour = -2 - ratio * uniform().abs()
    mask = torch.rand(rows, columns, generator=draw) < 0.7
    versions = torch.randint(-1, 9, (rows, columns), generator=draw)
    logps = [(behaviour + ratio * uniform()).clamp(max=0) for _ in range(3)]
    return PolicyBatch(logps[0], behaviour, 3 * uniform(), mask, versions, 7, logps[1], logps[2])


def assert_same(one, other) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert summarise(one[2]) == summarise(other[2])


@pytest.mark.parametrize("objective, correction", PAIRS)
@given(seed=st.integers(0, 2**16), garbage=st.sampled_from([NAN, INF, -INF, 1e30, -1e30]))
@settings(max_examples=4, deadline=None)
def test_masked_positions_never_influence_anything(objective, correction, seed, garbage):
    clean = make(4, 6, seed)
    spoilt = {
        name: torch.where(clean.mask_BT, value, garbage)
        for name, value in vars(clean).items()
        if name in ("logp_BT", "behaviour_BT", "advantage_BT", "proximal_BT", "reference_BT")
    }
    dirty = PolicyBatch(**{**vars(clean), **spoilt, "versions_BT": torch.where(clean.mask_BT, clean.versions_BT, -1)})
    one, other = evaluate(clean, objective, correction), evaluate(dirty, objective, correction)
    assert_same(one, other)
    assert not other[1][~clean.mask_BT].any()


@pytest.mark.parametrize("objective, correction", PAIRS)
@given(seed=st.integers(0, 2**16), rows=st.integers(0, 3), columns=st.integers(0, 4), ratio=st.sampled_from([20, 300]))
@settings(max_examples=6, deadline=None)
def test_extreme_log_ratios_and_any_shape_stay_finite(objective, correction, seed, rows, columns, ratio):
    assume(objective != "k3" or ratio == 20)  # the estimator without clamps is what its name says
    batch = make(rows, columns, seed, ratio)
    loss, grad, sums = evaluate(batch, objective, correction)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert all(value == value and abs(value) < INF for value in summarise(sums).values())


@pytest.mark.parametrize("sign", [-20.0, 20.0])
@pytest.mark.parametrize("objective, correction", PAIRS)
def test_a_long_response_all_twenty_off_stays_finite_in_float32(objective, correction, sign):
    behaviour = torch.full((2, 300), -21.0)
    moved, ones = behaviour + sign, torch.ones(2, 300)
    advantage = torch.tensor([[1.0], [-1.0]]).expand(2, 300)
    versions = torch.zeros(2, 300, dtype=torch.long)
    batch = PolicyBatch(moved, behaviour, advantage, ones, versions, 3, moved, behaviour)
    loss, grad, sums = evaluate(batch, objective, correction)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert all(value == value and abs(value) < INF for value in summarise(sums).values())


@pytest.mark.parametrize("log", [-500.0, -25.0, 25.0, 500.0])
def test_an_untruncated_weight_stops_at_twenty_and_carries_no_gradient(log):
    proximal = torch.full((1, 3), log, requires_grad=True)
    correction = CorrectionSettings(kind="seq_mask_tis", low=0.0, high=INF)
    weight = correction_weights(proximal, torch.zeros(1, 3), torch.ones(1, 3), correction).weight_BT
    torch.testing.assert_close(weight, torch.full((1, 3), 20.0 if log > 0 else -20.0).exp())
    assert not weight.requires_grad


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("objective, correction", PAIRS)
def test_tokens_without_a_behaviour_log_prob_are_left_out_and_counted(objective, correction, bad):
    batch = make(4, 6, seed=5, dtype=torch.float64)
    rows, columns = batch.mask_BT.nonzero()[::4].T
    hit = torch.zeros_like(batch.mask_BT)
    hit[rows, columns] = True
    behaviour = torch.where(hit, bad, batch.behaviour_BT)
    loss, grad, sums = evaluate(PolicyBatch(**{**vars(batch), "behaviour_BT": behaviour}), objective, correction)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert not grad[hit].any() and grad[batch.mask_BT & ~hit].any()
    figures = summarise(sums)
    assert figures["correction/nonfinite_tokens"] == hit.sum()
    if correction == "normalise":
        assert figures["correction/weight"] == pytest.approx(1)
    assert all(value == value for value in figures.values())


@pytest.mark.parametrize("objective", ["ppo", "seq_mean", "dr_grpo"])
def test_left_out_tokens_stay_in_the_denominator(objective):
    batch = make(3, 5, seed=1, dtype=torch.float64)
    first = batch.mask_BT.nonzero()[0].tolist()
    behaviour = batch.behaviour_BT.clone()
    behaviour[first[0], first[1]] = NAN
    _, whole, _ = evaluate(batch, objective, "tis_token")
    _, grad, _ = evaluate(PolicyBatch(**{**vars(batch), "behaviour_BT": behaviour}), objective, "tis_token")
    whole[first[0], first[1]] = 0
    torch.testing.assert_close(grad, whole)


def test_a_broken_learner_shows_in_the_loss():
    batch = make(3, 5, seed=1)
    loss, _, _ = evaluate(PolicyBatch(**{**vars(batch), "logp_BT": batch.logp_BT * NAN}), "ppo", "none")
    assert torch.isnan(loss)


@pytest.mark.parametrize("objective, correction", PAIRS)
@pytest.mark.parametrize("rows, columns", [(0, 0), (0, 4), (3, 0), (3, 4)])
def test_empty_batches_and_responses_without_tokens_cost_nothing(objective, correction, rows, columns):
    batch = make(rows, columns, seed=0)
    batch = PolicyBatch(**{**vars(batch), "mask_BT": torch.zeros(rows, columns)})
    loss, grad, sums = evaluate(batch, objective, correction)
    assert loss == 0 and loss.requires_grad is False and not grad.any()
    assert not [name for name in summarise(sums) if name.startswith("staleness/")]
    assert count_denominators(batch.mask_BT) == Denominators(rows=rows)


def test_a_response_without_tokens_counts_in_dr_grpo_alone():
    batch = make(3, 5, seed=2, dtype=torch.float64)
    mask = batch.mask_BT.clone()
    mask[1] = False
    full = PolicyBatch(**{**vars(batch), "mask_BT": mask})
    rest = PolicyBatch(**{k: v[[0, 2]] if isinstance(v, torch.Tensor) else v for k, v in vars(full).items()})
    for objective, ratio in (("ppo", 1.0), ("gspo", 1.0), ("dr_grpo", 2 / 3)):
        with_row, without = (evaluate(b, objective, "tis_token")[0] for b in (full, rest))
        torch.testing.assert_close(with_row, without * ratio)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_clamped", "k3_plus"])
def test_kl_at_twenty_is_finite_and_zero_where_masked(kind):
    logp = torch.tensor([[-20.0, 0.0, NAN]], requires_grad=True)
    kl = kl_estimate(logp, torch.tensor([[0.0, -20.0, NAN]]), torch.tensor([[1, 1, 0]]), kind)
    kl.sum().backward()
    assert logp.grad is not None
    assert torch.isfinite(kl).all() and torch.isfinite(logp.grad).all()
    assert kl[0, 2] == 0 and logp.grad[0, 2] == 0


def test_mixed_versions_fall_into_their_buckets():
    ones = torch.ones(2, 4)
    logp = -ones
    versions = torch.tensor([[9, 8, 7, 6], [5, 2, 0, 12]])  # learner 9; 12 is from the future
    batch = PolicyBatch(logp, logp, ones, ones, versions, 9, reference_BT=logp)
    _, _, sums = evaluate(batch, "ppo", "current")
    figures = summarise(sums)
    tokens = {bucket: 8 * figures[f"staleness/{bucket}/share"] for bucket in STALENESS_BUCKETS}
    assert tokens == {"0": 2, "1": 1, "2": 1, "3": 1, "4_7": 2, "8_more": 1}
    assert figures["staleness/4_7/ess"] == 1 and figures["staleness/4_7/kl_k3"] == 0


@pytest.mark.parametrize("kind", ["loglinear", "linear"])
def test_the_interpolated_proximal_is_the_learner_before_the_update(kind):
    """Halfway between behaviour and current for a token one version old, the behaviour for a fresh one."""
    current, behaviour, ones = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -2.0]]), torch.ones(1, 2)
    batch = PolicyBatch(current, behaviour, ones, ones, torch.tensor([[7, 6]]), 7, reference_BT=current)
    _, _, sums = evaluate(batch, "ppo", kind)
    e = torch.tensor(1.0).exp()
    halfway = e.sqrt() if kind == "loglinear" else 2 * e / (1 + e)
    assert summarise(sums)["policy/ratio"] == pytest.approx(float(e + halfway) / 2, rel=1e-5)


def test_nothing_merges_to_nothing():
    assert merge([]) == {} and summarise({}) == {}
