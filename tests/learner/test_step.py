import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prism_ray.config.learner import LoraSettings
from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.step import Outcome, Recipe, figures
from prism_ray.models.load import load_policy

GRPO = AdvantageSettings(estimator="grpo", credit="all_tokens")
PRISM = Recipe(AdvantageSettings(), ObjectiveSettings(), CorrectionSettings())
NORMALISED = CorrectionSettings(normalise=True, proximal="recompute")
RECIPES = {
    "prism": (PRISM, {}),
    "grpo": (Recipe(GRPO, ObjectiveSettings(aggregation="dr_grpo"), CorrectionSettings(kind="clamp"), 0.7), {}),
    "gspo": (Recipe(GRPO, ObjectiveSettings(kind="gspo"), CorrectionSettings(kind="none")), {"zero_stage": 1}),
    "normalised": (replace(PRISM, correction=NORMALISED), {"zero_stage": 2}),
    "kl_and_entropy": (replace(PRISM, objective=ObjectiveSettings(kl_coef=0.1, entropy_coef=0.01)), {"zero_stage": 3}),
    "kl_in_reward": (Recipe(GRPO, ObjectiveSettings(kl_coef=0.1, kl_in="reward"), CorrectionSettings()), {}),
    "adapters": (replace(PRISM, objective=ObjectiveSettings(kl_coef=0.1)), {"lora": LoraSettings(), "zero_stage": 2}),
}
SMALL = 64
"""Micro-batch tokens that cut the batch into many."""


@pytest.fixture(scope="module")
def groups(make_group):
    return [make_group(0, version=3), make_group(1, image=2, version=2), make_group(2, size=2, image=0, version=1)]


@pytest.fixture(scope="module")
def splits(policy_folder, groups, run_ranks):
    """Each recipe whole and in small micro-batches, on one rank and on two."""
    recipes = [(replace(r, micro_batch_tokens=n), z) for r, z in RECIPES.values() for n in (4096, SMALL)]
    recompute = replace(RECIPES["prism"][0], correction=CorrectionSettings(proximal="recompute"))
    inputs = {
        "policy": policy_folder,
        "groups": {1: [groups], 2: [groups[:2], groups[2:]]},
        "recipes": [*recipes, (recompute, {}), (PRISM, {"gradient_checkpointing": True})],
        "versions": [3],
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
    norm = whole["outcomes"][0].grad_norm
    assert norm > 1e-3 and not whole["outcomes"][0].skipped
    for name, other in others.items():
        assert other["outcomes"][0].grad_norm == pytest.approx(norm, rel=1e-4), name
        assert difference(other["weights"], whole["weights"]) <= 1e-8, name


@pytest.mark.parametrize("index", range(len(RECIPES)), ids=list(RECIPES))
def test_metrics_do_not_depend_on_the_split_either(splits, index):
    one, two = splits
    whole = figures([one[0][2 * index]["outcomes"][0]])
    split = figures([rank[2 * index + 1]["outcomes"][0] for rank in two])
    assert split.keys() == whole.keys()
    for name in whole.keys() - {"learner/packing_efficiency"}:
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_current_logprobs_as_proximal_equal_a_forward_of_their_own(splits):
    current, recomputed = splits[0][0][0], splits[0][0][-2]
    assert current["outcomes"][0].sums == pytest.approx(recomputed["outcomes"][0].sums)
    assert difference(current["weights"], recomputed["weights"]) <= 1e-8


def test_each_rollout_has_its_ratio_to_what_sampled_it_however_the_batch_is_split(splits, groups):
    one, two = splits
    recipe = list(RECIPES).index("normalised")
    whole = one[0][2 * recipe]["outcomes"][0].ratios
    assert {group: len(ratios) for group, ratios in whole.items()} == {g.id: len(g.rollouts) for g in groups}
    assert len({round(r, 6) for ratios in whole.values() for r in ratios}) > 3, "they are not all alike"
    for ranks in (one, two):
        split = {g: r for rank in ranks for g, r in rank[2 * recipe + 1]["outcomes"][0].ratios.items()}
        assert split.keys() == whole.keys()
        for group, ratios in split.items():
            assert ratios == pytest.approx(whole[group], rel=1e-4)


def test_efficiency_is_what_ranks_compute_of_what_they_wait_for(splits):
    one, two = splits
    assert figures([one[0][0]["outcomes"][0]])["learner/packing_efficiency"] == 1
    outcomes = [rank[0]["outcomes"][0] for rank in two]
    computed = [outcome.means["learner/packing_efficiency"][0] for outcome in outcomes]
    assert computed[0] > computed[1] > 0
    expected = sum(computed) / (2 * max(computed))
    assert figures(outcomes)["learner/packing_efficiency"] == pytest.approx(expected)


def test_gradient_checkpointing_changes_no_number(splits):
    plain, checkpointed = splits[0][0][0], splits[0][0][-1]
    assert checkpointed["outcomes"][0].grad_norm == pytest.approx(plain["outcomes"][0].grad_norm, rel=1e-5)
    assert difference(checkpointed["weights"], plain["weights"]) <= 1e-8


@pytest.fixture(scope="module")
def against_reference(policy_folder, groups, run_ranks):
    """Two updates each, with a KL to the start: in the loss, in the reward, with adapters, and without any."""
    recipes = [RECIPES[name] for name in ("kl_and_entropy", "kl_in_reward", "adapters")]
    without = replace(RECIPES["kl_in_reward"][0], objective=ObjectiveSettings(kl_in="reward"))
    inputs = {"policy": policy_folder, "groups": {1: [groups]}, "versions": [3, 4]}
    inputs["recipes"] = [(r, s | {"lr": 1e-3}) for r, s in [*recipes, (without, {})]]
    return run_ranks("updates", 1, inputs)[0]


def test_the_reference_policy_is_the_start_and_stays_there(against_reference):
    for result in against_reference[:3]:
        first, second = (figures([o])["policy/kl_reference"] for o in result["outcomes"])
        assert abs(first) < 1e-6 and second > 1e-4


def test_a_kl_in_the_reward_changes_what_is_learned(against_reference):
    penalised, without = (against_reference[i]["outcomes"][0] for i in (1, 3))
    assert penalised.grad_norm != pytest.approx(without.grad_norm, rel=1e-2)
    assert penalised.sums["loss"] != pytest.approx(without.sums["loss"], rel=1e-2)


def test_only_adapted_layers_move(against_reference, policy_folder):
    start = dict(load_policy(policy_folder).named_parameters())
    weights = against_reference[2]["weights"]
    moved = {name for name in start if not torch.equal(weights[name], start[name])}
    assert moved and all("proj" in name and "language_model" in name for name in moved)


@pytest.fixture(scope="module")
def spoilt(policy_folder, groups, run_ranks):
    """An update with a group whose image is not finite, and one whose gradient overflows elsewhere; two ZeRO stages."""
    groups = [[groups[0], groups[2]], [groups[1]]]
    inputs = {"policy": policy_folder, "groups": groups, "recipe": PRISM, "micro_batch_tokens": 300, "spoilt_group": 0}
    return run_ranks("spoilt", 2, inputs)


@pytest.mark.parametrize("index", [0, 2], ids=["zero 0", "zero 2"])
def test_a_skipped_step_names_the_trajectories_at_fault(spoilt, index):
    first, second = (rank[index] for rank in spoilt)
    assert first.skipped and second.skipped
    assert first.suspects == tuple(f"group 0 rollout {i} (prompt p0)" for i in range(4))
    assert second.suspects == ()


@pytest.mark.parametrize("index", [1, 3], ids=["zero 0", "zero 2"])
def test_no_trajectory_is_blamed_for_what_overflows_elsewhere(spoilt, index):
    assert all(rank[index].skipped and rank[index].suspects == () for rank in spoilt)


def gated(groups, gate):
    """The groups' valid rollouts, with this gate on every view."""

    def verdict(v):
        return replace(v, parts=v.parts | {f"gate/{view}": gate for view in v.scores})

    return [
        replace(g, rollouts=g.rollouts[:-1], verdicts=tuple(verdict(v) for v in g.verdicts[:-1])) for g in groups[:2]
    ]


def test_a_gate_makes_steps_smaller_for_as_long_as_it_stands(policy_folder, groups, run_ranks):
    """AdamW makes up for smaller gradients, and would go on as fast as before; momentum would let a shut one coast."""
    moved, start = {}, load_policy(policy_folder).state_dict()
    for gate in (1.0, 0.25, 0.0):
        inputs = {"policy": policy_folder, "groups": {1: [gated(groups, gate)]}, "recipes": [(PRISM, {})]}
        ((done,),) = run_ranks("updates", 1, inputs | {"versions": [3] * 4})
        assert [outcome.lr for outcome in done["outcomes"]] == pytest.approx([1e-5 * gate] * 4)
        moved[gate] = float(difference(done["weights"], {name: start[name] for name in done["weights"]}))
    assert moved[1.0] > 1e-6 and moved[0.0] == 0.0
    assert 0.2 < moved[0.25] / moved[1.0] < 0.33, "not quite in proportion: it meets other gradients on its way"


def test_what_gates_leave_of_a_batch_is_known_on_every_rank(policy_folder, groups, run_ranks):
    ranks = [gated(groups[:1], 0.5), groups[1:2]]
    inputs = {"policy": policy_folder, "groups": {2: ranks}, "recipes": [(PRISM, {})], "versions": [3]}
    for (done,) in run_ranks("updates", 2, inputs):
        assert done["outcomes"][0].lr == pytest.approx(1e-5 * (3 * 0.5 + 4) / 7)


def test_staleness_and_rewards_are_reported(splits, groups):
    means = figures([splits[0][0][0]["outcomes"][0]])
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


def test_a_kl_in_the_reward_needs_rewards():
    with pytest.raises(ValueError, match="kl_in: reward needs an estimator of rewards"):
        Recipe(AdvantageSettings(), ObjectiveSettings(kl_coef=0.1, kl_in="reward"), CorrectionSettings())
