"""One update and several: pairs, micro-batches, invalid rollouts, and that the discriminator learns."""

from __future__ import annotations

import pytest
import torch

from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.objective import ViewPairs, discriminator_loss
from prism_ray.discriminator.pairs import pack_units, pair_units
from prism_ray.discriminator.scorer import group_views, judged_metrics
from prism_ray.discriminator.segments import judged_batch
from prism_ray.discriminator.update import view_of_tokens

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)


def test_the_first_valid_rollouts_by_index_are_paired(encoder, settings, groups):
    units = pair_units(group_views(groups(1), encoder, settings), rollouts_per_update=2)
    assert [u.view for u in units] == list(VIEW_NAMES)
    assert all(len(u.sequences) == 3 and u.identical == (False, True) for u in units)


def test_packs_keep_the_budget_and_split_no_unit(encoder, settings, groups):
    units = pair_units(group_views(groups(), encoder, settings), rollouts_per_update=4)
    packs = pack_units(units, token_budget=300)
    assert len(packs) > 1 and sum(len(p) for p in packs) == len(units)
    for pack in packs:
        rows = sum(len(u.sequences) for u in pack)
        assert rows * max(u.width for u in pack) <= 300 or len(pack) == 1


@pytest.mark.parametrize("budget", [150, 10_000])
def test_an_update_has_the_gradient_of_the_whole_loss_however_it_is_cut(train, encoder, groups, budget):
    trainer = train(head_dropout=0.0, micro_batch_tokens=budget, score_reg=0.1)
    model = trainer.model
    cut = group_views(groups(), encoder, model.settings)
    views = {}
    for view in VIEW_NAMES:
        pairs = [(g.reference.sequences[view], r.sequences[view]) for g in cut for r in g.rollouts if r.valid]
        left, right = (model(judged_batch([p[i] for p in pairs])) for i in (0, 1))
        views[view] = ViewPairs(left.score_B, right.score_B, left.head_B, right.head_B)
    valid = torch.ones_like(views["perception"].reference_P)
    loss = discriminator_loss(views, valid, score_reg=0.1)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    model.zero_grad()
    metrics = trainer.learn(groups())
    assert metrics["discriminator/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["discriminator/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_learning_raises_the_pair_accuracy_of_both_views_on_other_prompts(train, groups):
    trainer = train()
    made = groups(12)
    held_out = made[8:]
    before = judged_metrics(trainer.judge(held_out))
    for _ in range(12):
        metrics = trainer.learn(made[:8], warming=True)
    after = judged_metrics(trainer.judge(held_out))
    for view in VIEW_NAMES:
        assert after[f"discriminator/gap/{view}"] > before[f"discriminator/gap/{view}"] + 1
        assert after[f"discriminator/pair_accuracy/{view}"] == 1.0
        assert after[f"discriminator/identical/{view}"] == pytest.approx(1 / 3)
    assert metrics["discriminator/loss"] < 1.0 and trainer.version == 12
    assert 0.25 <= metrics["discriminator/router_load_max"] < 0.6


def test_verdicts_carry_the_version_that_spoke(train, groups):
    trainer = train()
    trainer.learn(groups())
    (judged,) = trainer.judge(groups(1))
    assert {v.judge_version for v in judged.group.verdicts} == {1}


def test_the_same_reasoning_after_another_caption_is_not_identical(encoder, settings, in_context, group_of, response):
    group = group_of(0, response(), response(caption=" blue two"), response())
    (views,) = group_views([group], encoder, settings)
    assert [views.identical(i, "reasoning") for i in (0, 1)] == [False, True]
    (alone,) = group_views([group], encoder, in_context(settings, "none"))
    assert alone.identical(0, "reasoning") and not alone.identical(0, "perception")


def test_an_update_without_groups_is_refused(train):
    with pytest.raises(ValueError, match="no groups"):
        train().learn([])


def test_identical_pairs_alone_leave_the_weights_to_the_regulariser(train, group_of, response):
    trainer = train(score_reg=0.0, head_dropout=0.0)
    metrics = trainer.learn([group_of(0, response(), response(), response())])
    assert metrics["discriminator/grad_norm"] == 0.0
    assert "discriminator/train/pair_accuracy/perception" not in metrics


def test_without_a_valid_rollout_the_update_is_nearly_nothing_but_a_step(train, group_of, response):
    trainer = train(head_dropout=0.0)
    metrics = trainer.learn([group_of(0, response(), "broken", "")])
    assert 0 < metrics["discriminator/loss"] < 0.05 and metrics["discriminator/grad_norm"] < 0.5
    assert trainer.version == 1


def test_balancing_adds_the_routers_loss_in_warm_up_only(train, groups):
    plain, balanced = (
        train(head_dropout=0.0, balance_coefficient=1.0).learn(groups(), warming=w) for w in (False, True)
    )
    extra = balanced["discriminator/loss"] - plain["discriminator/loss"]
    assert extra == pytest.approx(balanced["discriminator/balance_loss"], rel=1e-3)
    assert extra > 0.9


def test_a_trainer_goes_on_from_what_it_saved(train, groups, tmp_path):
    one, two = train(head_dropout=0.0), train(head_dropout=0.0)
    for _ in range(2):
        one.learn(groups())
    one.save(tmp_path)
    two.load(tmp_path)
    assert two.version == 2
    expected, found = (t.learn(groups()) for t in (one, two))
    assert found["discriminator/loss"] == pytest.approx(expected["discriminator/loss"], rel=1e-5)
    for (name, a), b in zip(one.engine.weights().items(), two.engine.weights().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_loading_from_an_empty_folder_is_refused(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="discriminator_state.json"):
        train().load(tmp_path)


def test_alignment_balances_with_its_own_coefficient(train, groups):
    plain, balanced = (
        train(head_dropout=0.0, balance_coefficient=5.0, alignment_balance_coefficient=c).learn(groups())
        for c in (0.0, 1.0)
    )
    extra = balanced["discriminator/loss"] - plain["discriminator/loss"]
    assert extra == pytest.approx(balanced["discriminator/balance_loss"], rel=1e-3) and extra > 0.9


@pytest.mark.parametrize("option", [{"margin": 1.0}, {"label_smoothing": 0.2}, {"length_debias": 1.0}])
def test_the_options_of_the_loss_reach_an_update(train, groups, option):
    plain, changed = (train(head_dropout=0.0, **o).learn(groups()) for o in ({}, option))
    assert changed["discriminator/loss"] != pytest.approx(plain["discriminator/loss"], rel=1e-3)


def test_the_routers_health_is_told_per_view_and_expert_of_the_views_own_tokens(train, groups):
    trainer = train(head_dropout=0.0)
    metrics = trainer.learn(groups())
    for view in VIEW_NAMES:
        loads = [metrics[f"discriminator/router/load/{view}/{expert}"] for expert in range(4)]
        assert sum(loads) == pytest.approx(1.0, abs=1e-5) and min(loads) >= 0
        assert 0.0 < metrics[f"discriminator/router/entropy/{view}"] <= 1.0
    assert 0.0 <= metrics["discriminator/router/view_information"] <= 0.6932
    units = pair_units(group_views(groups(1), trainer.encoder, trainer.settings), 1)
    for sequence in (s for u in units for s in u.sequences):
        judged = judged_batch([sequence])
        view_N = view_of_tokens(judged)
        marked = judged.batch.input_ids_BT.flatten()[view_N >= 0].tolist()
        assert marked == list(sequence.token_ids[sequence.start : sequence.stop])
        assert set(view_N.tolist()) == {-1, VIEW_NAMES.index(sequence.view)}


def test_gradient_checkpointing_holds_less_for_the_same_update(train, groups):
    said, held = [], []
    for checkpointing in (False, True):
        trainer = train(head_dropout=0.0, gradient_checkpointing=checkpointing)
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            said.append(trainer.learn(groups(), warming=True))
        held.append(sum(kept.values()))
    plain, again = said
    assert again == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in plain.items()}
    assert held[1] < 0.75 * held[0]
