import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.step import Outcome, Recipe, figures, prepare

GRPO = AdvantageSettings(estimator="grpo", credit="all_tokens")
RECIPES = {
    "prism": (Recipe(AdvantageSettings(), ObjectiveSettings(), CorrectionSettings()), 0),
    "grpo": (Recipe(GRPO, ObjectiveSettings(aggregation="dr_grpo"), CorrectionSettings(kind="clamp"), 0.7), 0),
    "gspo": (Recipe(GRPO, ObjectiveSettings(kind="gspo"), CorrectionSettings(kind="none")), 1),
    "normalised": (
        Recipe(AdvantageSettings(), ObjectiveSettings(), CorrectionSettings(normalise=True, proximal="recompute")),
        2,
    ),
}
SMALL = 64
"""Micro-batch tokens that cut the batch into many."""


@pytest.fixture(scope="module")
def groups(make_group):
    return [make_group(0, version=3), make_group(1, version=2), make_group(2, size=2, image=False, version=1)]


@pytest.fixture(scope="module")
def splits(policy_folder, groups, run_ranks):
    """Each recipe whole and in small micro-batches, on one rank and on two."""
    recipes = [(replace(r, micro_batch_tokens=n), z) for r, z in RECIPES.values() for n in (4096, SMALL)]
    recompute = replace(RECIPES["prism"][0], correction=CorrectionSettings(proximal="recompute"))
    inputs = {
        "policy": policy_folder,
        "groups": {1: [groups], 2: [groups[:2], groups[2:]]},
        "recipes": [*recipes, (recompute, 0)],
    }
    return run_ranks("updates", 1, inputs), run_ranks("updates", 2, inputs)


def difference(ours, theirs):
    """Root mean square over all weights; the steps themselves are 1e-5. (The greatest would say nothing: Adam turns
    rounding of near-zero gradients into whole steps.)"""
    squares = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs)
    return (squares / sum(w.numel() for w in theirs.values())).sqrt()


@pytest.mark.parametrize("index", range(len(RECIPES)), ids=list(RECIPES))
def test_neither_microbatches_nor_ranks_change_an_update(splits, index):
    one, two = splits
    whole = one[0][2 * index]
    others = {"micro": one[0][2 * index + 1], "ranks": two[0][2 * index], "both": two[0][2 * index + 1]}
    norm = whole["outcome"].grad_norm
    assert norm > 1e-3 and not whole["outcome"].skipped
    for name, other in others.items():
        assert other["outcome"].grad_norm == pytest.approx(norm, rel=1e-4), name
        assert difference(other["weights"], whole["weights"]) <= 1e-8, name


@pytest.mark.parametrize("index", range(len(RECIPES)), ids=list(RECIPES))
def test_metrics_do_not_depend_on_the_split_either(splits, index):
    one, two = splits
    whole = figures([one[0][2 * index]["outcome"]])
    split = figures([rank[2 * index + 1]["outcome"] for rank in two])
    assert split.keys() == whole.keys()
    for name in whole.keys() - {"learner/padding"}:
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_current_logprobs_as_proximal_equal_a_forward_of_their_own(splits):
    current, recomputed = splits[0][0][0], splits[0][0][-1]
    assert current["outcome"].sums == pytest.approx(recomputed["outcome"].sums)
    assert difference(current["weights"], recomputed["weights"]) <= 1e-8


def test_samples_carry_what_was_sampled(groups, encoder):
    work = prepare(groups, encoder, AdvantageSettings(), 128)
    rollouts = [r for g in groups for r in g.rollouts]
    assert len(work.samples) == len(rollouts) == 10
    for row, rollout in enumerate(rollouts):
        size = len(rollout.token_ids)
        assert work.samples[row].response_ids.tolist() == rollout.token_ids.tolist()
        assert np.array_equal(work.behaviour_NR[row, :size], rollout.logp)
        assert work.versions_NR[row, :size].tolist() == rollout.versions.tolist()
        assert work.mask_NR[row].sum() == size
    assert work.samples[0].prompt is work.samples[3].prompt


def test_views_carry_their_own_advantages(groups, encoder):
    work = prepare(groups[:1], encoder, AdvantageSettings(), 128)
    ends = encoder.tokenizer.convert_tokens_to_ids("</caption>")
    for row in range(3):
        ids = work.samples[row].response_ids
        caption = int((ids == ends).nonzero()) + 1
        values = work.advantage_NR[row, : len(ids)]
        assert len(values[:caption].unique()) == len(values[caption:].unique()) == 1
        assert values[0] != values[-1]
    invalid = work.advantage_NR[3, : len(work.samples[3].response_ids)]
    assert len(invalid.unique()) == 1 and invalid[0] < 0


def test_staleness_and_rewards_are_reported(splits, groups):
    means = figures([splits[0][0][0]["outcome"]])
    assert means["staleness/mean"] == pytest.approx((4 * 0 + 4 * 1 + 2 * 2) / 10)
    rewards = [v.reward for g in groups for v in g.verdicts]
    assert means["reward/mean"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert means["reward/format"] == pytest.approx(7 / 10)
    assert means["reward/part/format"] == 1
    lengths = [len(r.token_ids) for g in groups for r in g.rollouts]
    assert means["rollout/response_tokens"] == pytest.approx(np.mean(lengths))


def test_a_skipped_step_is_reported_without_a_norm():
    metrics = figures([Outcome({}, {}, math.inf, 1e-3, True)])
    assert metrics == {"policy/lr": 1e-3, "policy/skipped": 1.0}


def test_an_engine_that_saw_another_prompt_is_an_error(groups, encoder):
    other = replace(groups[0].rollouts[1], prompt_token_ids=groups[0].rollouts[1].prompt_token_ids[1:])
    broken = replace(groups[0], rollouts=(groups[0].rollouts[0], other, *groups[0].rollouts[2:]))
    with pytest.raises(ValueError, match="group 0: the engine saw .* prompt tokens"):
        prepare([broken], encoder, AdvantageSettings(), 128)


def test_ragged_rollouts_are_an_error(groups, encoder):
    other = replace(groups[0].rollouts[0], logp=groups[0].rollouts[0].logp[1:])
    broken = replace(groups[0], rollouts=(other, *groups[0].rollouts[1:]))
    with pytest.raises(ValueError, match="group 0: a rollout's token_ids, logp and versions differ in length"):
        prepare([broken], encoder, AdvantageSettings(), 128)


def test_an_empty_batch_is_an_error(encoder):
    with pytest.raises(ValueError, match="at least one group"):
        prepare([], encoder, AdvantageSettings(), 128)


def test_an_empty_response_does_no_harm(groups, encoder):
    none = np.zeros(0, np.int32)
    empty = replace(groups[0].rollouts[3], token_ids=none, versions=none, logp=np.zeros(0, np.float32), text="")
    work = prepare([replace(groups[0], rollouts=(*groups[0].rollouts[:3], empty))], encoder, AdvantageSettings(), 128)
    assert work.mask_NR[3].sum() == 0
    assert torch.isfinite(work.advantage_NR).all()


def test_a_reference_policy_is_not_promised():
    with pytest.raises(ValueError, match="holds no reference policy"):
        Recipe(AdvantageSettings(), ObjectiveSettings(kl_coef=0.1), CorrectionSettings())
