"""The discriminator's mathematics beyond the golden vectors."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from prism_ray.discriminator.objective import (
    ViewPairs,
    clip_head,
    discriminator_loss,
    fallback_loss,
    load_balancing_loss,
    pair_accuracy,
    weighted_view_loss,
)


def random_pairs(count: int, seed: int) -> ViewPairs:
    generator = torch.Generator().manual_seed(seed)
    return ViewPairs(*(torch.randn(count, generator=generator, dtype=torch.float64) * 3 for _ in range(4)))


def part(pairs: ViewPairs, rows: slice) -> ViewPairs:
    return ViewPairs(*(getattr(pairs, n)[rows] for n in ViewPairs.__dataclass_fields__))


def test_micro_batches_add_up_to_the_loss_of_the_whole():
    views = {"perception": random_pairs(7, 0), "reasoning": random_pairs(7, 1)}
    whole = discriminator_loss(views, torch.ones(7), score_reg=0.1)
    total = torch.zeros((), dtype=torch.float64)
    for pairs in views.values():
        for rows in (slice(0, 3), slice(3, 7)):
            piece = part(pairs, rows)
            weight = torch.full((len(piece.reference_P),), 1 / 7, dtype=torch.float64)
            total += weighted_view_loss(piece, weight, 0.1 / 4 * weight)
    torch.testing.assert_close(total, whole)


def test_an_invalid_rollout_moves_only_the_regulariser():
    pairs = random_pairs(3, 2)
    for tensor in (pairs.rollout_P, pairs.rollout_head_P):
        tensor.requires_grad_()
    discriminator_loss({"perception": pairs}, torch.tensor([1, 0, 1]), score_reg=0.1).backward()
    assert pairs.rollout_P.grad is not None and pairs.rollout_head_P.grad is not None
    assert pairs.rollout_P.grad[1] == 0 and pairs.rollout_head_P.grad[1] != 0


def test_the_head_has_no_gradient_beyond_the_clip():
    head = torch.tensor([-12.0, 3.0, 12.0], requires_grad=True)
    clip_head(head, 10.0).sum().backward()
    assert head.grad is not None and head.grad.tolist() == [0.0, 1.0, 0.0]
    assert clip_head(head, None) is head


def test_the_fallback_is_nearly_weightless():
    assert fallback_loss({"a": torch.zeros(3), "b": torch.zeros(2)}).item() == pytest.approx(0.02 * math.log(2))


def test_pair_accuracy_leaves_identical_texts_out_and_halves_ties():
    reference, rollout = torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 2.0])
    assert pair_accuracy(reference, rollout, torch.tensor([False, False, False, True])) == (0.5, 3)
    accuracy, count = pair_accuracy(reference, rollout, torch.ones(4))
    assert math.isnan(accuracy) and count == 0


def test_load_balancing_agrees_with_hugging_face_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(12, 4, generator=generator) for _ in range(3)]
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1])
    ours, load = load_balancing_loss(logits, mask.bool(), top_k=2)
    theirs = load_balancing_loss_func(tuple(logits), 4, 2, mask[None])  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(2 * ours, torch.as_tensor(theirs))
    assert load.sum().item() == pytest.approx(1.0)
    for layer in logits:
        layer[mask == 0] = 100.0
    again, _ = load_balancing_loss(logits, mask.bool(), top_k=2)
    torch.testing.assert_close(again, ours)


def test_load_balancing_is_one_when_tokens_spread_evenly_and_grows_with_collapse():
    even = torch.eye(4).repeat(5, 1) * 9
    assert load_balancing_loss([even], torch.ones(20), top_k=1)[0].item() == pytest.approx(1.0)
    collapsed = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(20, 1)
    assert load_balancing_loss([collapsed], torch.ones(20), top_k=1)[0].item() > 3.9
