"""Margin, smoothing, length debiasing, calibration and the router's figures: what they do, at their edges too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.model import load_discriminator, save_discriminator
from prism_ray.discriminator.objective import (
    ViewPairs,
    calibration_error,
    count_routing,
    debiased,
    discriminator_loss,
    pair_losses,
    view_information,
)
from prism_ray.discriminator.scorer import group_views, score_sequences
from prism_ray.discriminator.segments import judged_batch

SCORE = st.floats(-1e4, 1e4)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(SCORE, SCORE, st.floats(0, 100), st.floats(0, 0.49))
def test_a_pair_loss_is_finite_and_no_less_than_log_2_before_the_margin(reference, rollout, margin, smoothing):
    score = one(reference).requires_grad_()
    loss = pair_losses(score, one(rollout), margin, smoothing)
    loss.sum().backward()
    assert score.grad is not None and torch.isfinite(loss).all() and torch.isfinite(score.grad).all()
    assert float(loss.detach()) >= 0
    if not smoothing and reference - rollout <= margin:
        assert float(loss.detach()) >= math.log(2) - 1e-12


@given(SCORE, SCORE)
def test_without_options_the_loss_is_the_published_one(reference, rollout):
    plain = -torch.nn.functional.logsigmoid(one(reference) - one(rollout))
    assert pair_losses(one(reference), one(rollout), 0.0, 0.0).equal(plain)


def test_a_margin_moves_the_loss_by_itself():
    torch.testing.assert_close(pair_losses(one(5.0), one(2.0), margin=2.0), pair_losses(one(3.0), one(2.0)))


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.3])
def test_a_smoothed_loss_is_least_at_the_gap_of_its_odds(smoothing):
    best = math.log((1 - smoothing) / smoothing)
    gap = one(best).requires_grad_()
    pair_losses(gap, one(0.0), smoothing=smoothing).sum().backward()
    assert gap.grad is not None and abs(float(gap.grad)) < 1e-12
    at, beyond = (float(pair_losses(one(best + d), one(0.0), smoothing=smoothing)) for d in (0.0, 1.0))
    assert beyond > at


def test_a_smoothed_loss_is_the_mean_over_labels_of_which_some_are_swapped():
    mixed = 0.8 * pair_losses(one(3.0), one(1.0), 0.5) + 0.2 * pair_losses(one(1.0), one(3.0), 0.5)
    torch.testing.assert_close(pair_losses(one(3.0), one(1.0), 0.5, 0.2), mixed)


def test_options_reach_the_whole_loss_but_not_the_fallback_of_an_update_without_valid_pairs():
    pairs = ViewPairs(*(torch.full((2,), value) for value in (1.0, 0.0, 1.0, 0.0)))
    views = {"perception": pairs}
    changed = [{}, {"margin": 1.0}, {"smoothing": 0.2}]
    some, none = ([float(discriminator_loss(views, torch.full((2,), v), 0.0, **c)) for c in changed] for v in (1, 0))
    assert len(set(some)) == 3 and len(set(none)) == 1


def test_identical_texts_get_no_gradient_whatever_the_margin():
    score = torch.tensor([2.0], requires_grad=True)
    pair_losses(score[[0]], score[[0]], margin=3.0, smoothing=0.1).sum().backward()
    assert score.grad is not None and float(score.grad) == 0.0


def test_debiasing_takes_the_same_off_equal_lengths_and_more_off_longer_ones():
    score, length = torch.zeros(3), torch.tensor([0, 7, 63])
    assert debiased(score, length, 2.0).tolist() == pytest.approx([0.0, -2 * math.log(8), -2 * math.log(64)])
    assert debiased(score, length, 0.0) is score


def test_debiasing_counts_in_scoring_as_in_training_by_the_views_own_tokens(build, encoder, group_of, response):
    plain, costly = build(), build(length_debias=2.0)
    group = group_of(0, response(), response(caption=" red one two three", think=" count"))
    (views,) = group_views([group], encoder, plain.settings)
    sequences = [*views.reference.sequences.values(), *views.rollouts[0].sequences.values()]
    lengths = torch.tensor([s.stop - s.start for s in sequences])
    expected = score_sequences(plain, sequences) - 2.0 * lengths.log1p()
    torch.testing.assert_close(score_sequences(costly, sequences), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        trained = costly(judged_batch(sequences)).score_B
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)


def test_a_judge_trained_with_another_debiasing_is_refused(build, tiny_folder, tmp_path, settings):
    model = build()
    save_discriminator(dict(model.named_parameters()), model, tmp_path, like=tiny_folder)
    with pytest.raises(ValueError, match="length_debias is 1.0 but .* was trained with 0.0"):
        load_discriminator(tmp_path, settings.model_copy(update={"length_debias": 1.0}))


@pytest.mark.parametrize("value", [-0.1, 0.5])
def test_smoothing_beyond_a_coin_toss_is_refused(value):
    with pytest.raises(ValueError, match="label_smoothing"):
        DiscriminatorSettings(label_smoothing=value)


def test_calibration_is_right_where_confidence_is_and_wrong_where_it_is_not():
    gap = math.log(0.75 / 0.25)
    assert calibration_error(torch.tensor([gap, gap, gap, -gap])) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(torch.tensor([40.0, 40.0, -40.0, -40.0])) == pytest.approx(0.5)
    assert calibration_error(torch.zeros(3)) == pytest.approx(0.0)
    assert math.isnan(calibration_error(torch.zeros(0)))


def test_calibration_does_not_let_bins_cancel():
    sure, unsure = 6.0, 0.01
    both = [sure, -sure, unsure, unsure]
    assert calibration_error(torch.tensor(both)) == pytest.approx(0.5 * 0.4975 + 0.5 * 0.4975, abs=1e-3)


@given(st.lists(SCORE, min_size=1, max_size=50))
def test_a_calibration_error_is_a_share(gaps):
    assert 0.0 <= calibration_error(torch.tensor(gaps)) <= 1.0


def routed_by(experts: list[int], views: list[int], sharp: float = 50.0):
    logits = torch.nn.functional.one_hot(torch.tensor(experts), 4).float() * sharp
    return count_routing([logits, logits], torch.tensor(views), views=2, top_k=1)


def test_experts_of_their_own_views_tell_all_and_shared_ones_nothing():
    own, shared = routed_by([0, 1, 2, 3], [0, 0, 1, 1]), routed_by([0, 1, 0, 1], [0, 0, 1, 1])
    assert view_information(own.routed_LVE) == pytest.approx(math.log(2))
    assert view_information(shared.routed_LVE) == pytest.approx(0.0)


def test_information_is_taken_layer_by_layer_as_experts_have_no_names_across_layers():
    first, second = (torch.eye(2)[torch.tensor(e)] * 9 for e in ([0, 1], [1, 0]))
    both = count_routing([first, second], torch.tensor([0, 1]), views=2, top_k=1)
    assert view_information(both.routed_LVE) == pytest.approx(math.log(2))


def test_tokens_of_no_view_are_not_counted_and_batches_add_up():
    whole = routed_by([0, 1, 2, 3], [0, -1, 1, 1])
    parts = routed_by([0, 1], [0, -1]) + routed_by([2, 3], [1, 1])
    assert whole.routed_LVE.sum((0, 2)).tolist() == [2.0, 4.0]
    torch.testing.assert_close(whole.routed_LVE, parts.routed_LVE)
    torch.testing.assert_close(whole.entropy_V, parts.entropy_V)


def test_the_routers_entropy_is_1_where_it_cannot_decide_and_0_where_it_is_sure():
    assert routed_by([0, 1], [0, 1], sharp=0.0).entropy_V.tolist() == pytest.approx([1.0, 1.0])
    assert routed_by([0, 1], [0, 1]).entropy_V.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    alone = count_routing([torch.zeros(3, 1)], torch.zeros(3, dtype=torch.long), views=1, top_k=1)
    assert alone.entropy_V.tolist() == [0.0] and view_information(alone.routed_LVE) == 0.0
