import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.config.objective import AdvantageSettings
from prism_ray.config.views import DEFAULT_VIEWS, ViewSettings, shares_of
from prism_ray.learner.advantages import (
    Advantages,
    Judged,
    bounded_view_reward,
    credit_tokens,
    dr_grpo,
    estimate,
    grpo,
    open_share,
    overlong_penalty,
    replace_invalid,
    rloo,
    vtrace,
)

F64 = torch.float64
ONE_GROUP = torch.zeros(4, dtype=torch.long)


def judged(**changes) -> Judged:
    fields = {
        "rewards_N": torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=F64),
        "group_ids_N": ONE_GROUP,
        "valid_N": torch.tensor([True, True, False, True]),
        "lengths_N": torch.tensor([10, 20, 30, 100]),
        "scores": {
            "perception": torch.tensor([2.0, -1.0, 0.0, 0.5], dtype=F64),
            "reasoning": torch.tensor([-3.0, 4.0, 0.0, 1.0], dtype=F64),
        },
        "reference_scores": {
            "perception": torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=F64),
            "reasoning": torch.tensor([2.0, 2.0, 2.0, 2.0], dtype=F64),
        },
    }
    return Judged(**(fields | changes))


def test_rloo_compares_each_with_the_others():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=F64)
    others = torch.stack([rewards[[j for j in range(4) if j != i]].mean() for i in range(4)])
    torch.testing.assert_close(rloo(rewards, ONE_GROUP), rewards - others)


@pytest.mark.parametrize("estimator, scale", [(grpo, 1 / (1 + 1e-6)), (dr_grpo, 1.0), (rloo, 1.0)])
def test_a_group_of_one_gets_its_reward(estimator, scale):
    rewards = torch.tensor([0.7, 3.0, 5.0], dtype=F64)
    actual = estimator(rewards, torch.tensor([9, 4, 4]))
    assert float(actual[0]) == pytest.approx(0.7 * scale, rel=1e-12)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
def test_equal_rewards_give_nothing_even_in_float32(estimator):
    actual = estimator(torch.full((16,), 0.1), torch.arange(16) % 2)
    assert actual.dtype == torch.float32
    assert actual.abs().max() < 1e-9


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e3, 1e3)), max_size=24),
    st.sampled_from([grpo, dr_grpo, rloo]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_groups_may_interleave_and_carry_any_labels(members, estimator, random):
    groups = torch.tensor([g for g, _ in members], dtype=torch.long)
    rewards = torch.tensor([r for _, r in members], dtype=F64)
    actual = estimator(rewards, groups)
    assert torch.isfinite(actual).all()
    order = list(range(len(members)))
    random.shuffle(order)
    torch.testing.assert_close(estimator(rewards[order], groups[order] * 7 - 2), actual[order], rtol=1e-9, atol=1e-6)
    for label in groups.unique():
        if (groups == label).sum() > 1:
            assert float(actual[groups == label].sum()) == pytest.approx(0, abs=1e-6)


def test_an_invalid_response_is_placed_below_the_worst_valid_one():
    scores = torch.tensor([2.0, -1.0, float("nan"), 0.5, 7.0, 8.0], dtype=F64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    valid = torch.tensor([True, True, False, True, False, False])
    expected = torch.tensor([2.0, -1.0, -1.1, 0.5, -0.1, -0.1], dtype=F64)
    torch.testing.assert_close(replace_invalid(scores, groups, valid, 0.1), expected)


def test_bounded_views_is_the_standardised_sigmoid_of_the_gap():
    case = judged(valid_N=torch.ones(4, dtype=torch.bool))
    result = estimate(case, AdvantageSettings(), 128, DEFAULT_VIEWS)
    for view in ("perception", "reasoning"):
        rewards = torch.sigmoid((case.scores[view] - case.reference_scores[view]) / 3)
        torch.testing.assert_close(result.views[view], (rewards - rewards.mean()) / (rewards.std() + 1e-6))
    torch.testing.assert_close(result.combined_N, (result.views["perception"] + result.views["reasoning"]) / 2)


def test_without_the_deviation_views_are_centred_alone():
    case = judged(valid_N=torch.ones(4, dtype=torch.bool))
    result = estimate(case, AdvantageSettings(by_std=False), 128, DEFAULT_VIEWS)
    for view in ("perception", "reasoning"):
        rewards = torch.sigmoid((case.scores[view] - case.reference_scores[view]) / 3)
        torch.testing.assert_close(result.views[view], rewards - rewards.mean())


def weighted(*weights: float) -> list[ViewSettings]:
    return [v.model_copy(update={"weight": w}) for v, w in zip(DEFAULT_VIEWS, weights, strict=True)]


@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.0, 1.0), (3.0, 1.0)])
def test_views_of_any_weight_average_to_the_combined_advantage(weights):
    result = estimate(judged(), AdvantageSettings(), 128, weighted(*weights))
    assert set(result.views) == {"perception", "reasoning"}
    torch.testing.assert_close(torch.stack(list(result.views.values())).mean(0), result.combined_N)


def test_the_bounded_reward_survives_any_score():
    scores = torch.tensor([-1e30, 1e30, 0.0], dtype=F64)
    assert bounded_view_reward(scores, torch.zeros_like(scores), 3.0).tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("estimator", ["prism_paper", "prism_code", "bounded_views"])
@pytest.mark.parametrize("hole", [0.0, float("nan"), float("inf")])
def test_what_an_invalid_response_scored_does_not_matter(estimator, hole):
    case = judged()
    holed = {v: torch.where(case.valid_N, s, hole) for v, s in case.scores.items()}
    settings = AdvantageSettings(estimator=estimator)
    expected = estimate(case, settings, 128, DEFAULT_VIEWS).combined_N
    actual = estimate(
        judged(scores=holed, reference_scores=case.reference_scores), settings, 128, DEFAULT_VIEWS
    ).combined_N
    torch.testing.assert_close(actual, expected)
    assert torch.isfinite(expected).all() and expected[2] == expected.min()


@pytest.mark.parametrize("estimator, expected", [("prism_code", -1.5), ("prism_paper", -1.5), ("bounded_views", 0.0)])
def test_a_group_of_invalid_responses_gets_the_penalty_alone(estimator, expected):
    case = judged(valid_N=torch.zeros(4, dtype=torch.bool), scores={v: torch.zeros(4) for v in judged().scores})
    result = estimate(case, AdvantageSettings(estimator=estimator), 128, DEFAULT_VIEWS)
    torch.testing.assert_close(result.combined_N.double(), torch.full((4,), expected, dtype=F64))


def test_no_responses_give_no_advantages():
    none = torch.zeros(0)
    case = Judged(none, none.long(), none.bool(), none.long(), *({v: none for v in judged().scores} for _ in range(2)))
    for estimator in ("grpo", "dr_grpo", "rloo", "prism_paper", "prism_code", "bounded_views"):
        assert estimate(case, AdvantageSettings(estimator=estimator), 128, DEFAULT_VIEWS).combined_N.shape == (0,)
    assert credit_tokens(Advantages(none, none.bool()), [], []).shape == (0, 0)


def test_a_valid_score_or_reward_that_is_not_finite_is_refused():
    scores = judged().scores | {"reasoning": torch.tensor([0.0, float("nan"), float("nan"), 0.0])}
    with pytest.raises(ValueError, match=r"scores\['reasoning'\] is not finite for responses \[1\]"):
        estimate(judged(scores=scores), AdvantageSettings(), 128, DEFAULT_VIEWS)
    with pytest.raises(ValueError, match="rewards is not finite"):
        estimate(
            judged(rewards_N=torch.full((4,), float("inf"))), AdvantageSettings(estimator="grpo"), 128, DEFAULT_VIEWS
        )
    with pytest.raises(ValueError, match="reference_scores has no view 'perception'"):
        estimate(judged(reference_scores={}), AdvantageSettings(), 128, DEFAULT_VIEWS)


def test_credit_goes_to_the_view_and_the_end_token_to_the_last_one():
    advantages = Advantages(
        torch.tensor([0.5, -1.0, 0.25]),
        torch.tensor([True, False, True]),
        {"perception": torch.tensor([2.0, 9.0, 9.0]), "reasoning": torch.tensor([-1.0, 9.0, 9.0])},
    )
    spans = [{"perception": (1, 3), "reasoning": (4, 6)}, {"perception": (0, 2), "reasoning": (2, 4)}, {}]
    expected = [
        [0.5, 2.0, 2.0, 0.5, -1.0, -1.0, -1.0],  # before, caption, between, reasoning, end token
        [-1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0],  # invalid: combined on all of it
        [0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0],  # no spans: combined
    ]
    torch.testing.assert_close(credit_tokens(advantages, spans, [7, 4, 2]), torch.tensor(expected))


def test_credit_refuses_a_span_beyond_its_response_and_takes_empty_responses():
    advantages = Advantages(torch.tensor([1.0]), torch.tensor([True]), {"perception": torch.tensor([2.0])})
    with pytest.raises(ValueError, match="response 0 has 3 tokens but a view at 1..5"):
        credit_tokens(advantages, [{"perception": (1, 5)}], [3])
    assert credit_tokens(advantages, [{}], [0]).shape == (1, 0)


def test_overlong_penalty_is_capped():
    actual = overlong_penalty(torch.tensor([0, 96, 112, 128, 10_000]), 128, 32, 0.5)
    assert actual.tolist() == [0.0, 0.0, -0.25, -0.5, -0.5]


def test_vtrace_advantage_of_a_terminal_reward_is_a_suffix_product():
    log = torch.tensor([[-0.5, 0.3, -0.2, -1.0]], dtype=F64)
    zeros, reward = torch.zeros_like(log), torch.tensor([[0.0, 0.0, 0.0, 2.0]], dtype=F64)
    baseline = torch.full_like(log, 0.5)
    done = torch.tensor([True])
    actual = vtrace(log, zeros, reward, baseline, torch.zeros(1, dtype=F64), torch.tensor([4]), done)
    expected = 1.5 * log.exp().clamp(max=1).flip(1).cumprod(1).flip(1)
    torch.testing.assert_close(actual.advantage_BT, expected)


def test_vtrace_takes_empty_rows_extreme_ratios_and_garbage_in_the_padding():
    log = torch.tensor([[20.0, -20.0, float("nan")], [float("nan")] * 3, [1e4, 1.0, 1.0]], dtype=F64)
    zeros = torch.zeros_like(log)
    garbage = torch.where(torch.isnan(log), float("nan"), 1.0)
    lengths, done = torch.tensor([2, 0, 3]), torch.tensor([True, True, False])
    result = vtrace(log, zeros, garbage, garbage, torch.ones(3, dtype=F64), lengths, done, 0.9)
    assert torch.isfinite(result.vs_BT).all() and torch.isfinite(result.advantage_BT).all()
    assert not result.vs_BT[1].any() and not result.advantage_BT[0, 2]


@pytest.mark.parametrize("estimator", ["prism_code", "bounded_views"])
def test_a_gate_scales_what_its_view_contributes_and_leaves_the_others_alone(estimator):
    config = AdvantageSettings.model_validate({"estimator": estimator})
    half = {"perception": torch.full((4,), 0.5, dtype=F64)}
    shut = {"perception": torch.zeros(4, dtype=F64)}
    plain, halved, without = (estimate(judged(gates=g), config, 128, DEFAULT_VIEWS) for g in ({}, half, shut))
    torch.testing.assert_close(halved.combined_N, (plain.combined_N + without.combined_N) / 2)
    valid = judged().valid_N
    assert bool((plain.combined_N != without.combined_N)[valid].all())
    for view, scale in (("perception", 0.5), ("reasoning", 1.0)) if plain.views else ():
        torch.testing.assert_close(halved.views[view], scale * plain.views[view])
    both = estimate(
        judged(gates={v: torch.zeros(4, dtype=F64) for v in shares_of(DEFAULT_VIEWS)}), config, 128, DEFAULT_VIEWS
    )
    assert both.combined_N[[0, 1, 3]].abs().max() == 0 and both.combined_N[2] == -config.invalid[1], "format still pays"


def test_a_gate_where_the_sum_is_normalised_is_refused():
    gates = {"reasoning": torch.full((4,), 0.5, dtype=F64)}
    with pytest.raises(ValueError, match="undoes discriminator.gate"):
        estimate(
            judged(gates=gates), AdvantageSettings(estimator="prism_paper", credit="all_tokens"), 128, DEFAULT_VIEWS
        )


def test_what_gates_leave_counts_views_by_weight_and_invalid_responses_in_full():
    found = judged(gates={"a": torch.tensor([0.0, 1.0, 0.0, 0.0])})
    views = [ViewSettings(name="a", tags=["caption"], weight=0.3), ViewSettings(name="b", tags=["think"], weight=0.9)]
    opened = open_share(found, AdvantageSettings(), views)
    assert opened.tolist() == pytest.approx([0.75, 1.0, 1.0, 0.75]) and opened[1] == 1
    of_rewards = AdvantageSettings(estimator="grpo", credit="all_tokens")
    assert open_share(found, of_rewards, views).tolist() == [1] * 4
