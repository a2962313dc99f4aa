"""Pairs that count more or less: by how likely a rollout still is, and references of other prompts as negatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.pairs import foreign_groups, pair_units
from prism_ray.discriminator.scorer import group_views, score_sequences

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)


def ratios_of(groups, value):
    return {g.id: [value(g.id, i) for i in range(len(g.rollouts))] for g in groups}


def losses_by_pair(trainer, encoder, groups, view):
    """−log σ(gap) of the pairs an update takes, with the group and rollout each is of."""
    found = {}
    with torch.no_grad():
        for cut in group_views(groups, encoder, trainer.settings):
            for row, rollout in enumerate(cut.rollouts):
                if rollout.valid:
                    pair = (cut.reference.sequences[view], rollout.sequences[view])
                    reference, own = score_sequences(trainer.model, pair)
                    found[cut.group.id, row] = float(-torch.nn.functional.logsigmoid(reference - own))
    return found


def test_pairs_weigh_what_the_policy_now_thinks_of_their_rollouts_up_to_the_cap(train, groups, encoder):
    trainer = train(head_dropout=0.0, score_reg=0.0, importance_cap=2.0)
    made = groups()
    ratios = ratios_of(made, lambda group, row: 0.25 + 0.5 * group + 3.0 * (row == 3))
    expected = 0.0
    for view in VIEW_NAMES:
        losses = losses_by_pair(trainer, encoder, made, view)
        weights = {(g, i): min(2.0, ratios[g][i]) for g, i in losses}
        expected += sum(weights[p] * losses[p] for p in losses) / sum(weights.values())
    plain = sum(
        sum(found.values()) / len(found) for found in (losses_by_pair(trainer, encoder, made, v) for v in VIEW_NAMES)
    )
    assert abs(expected - plain) > 1e-3, "the weights matter here"
    assert trainer.learn(made, ratios=ratios)["discriminator/loss"] == pytest.approx(expected, rel=1e-3)


def test_equal_ratios_change_nothing(train, groups):
    weighed, plain = (train(head_dropout=0.0, importance_cap=2.0) for _ in range(2))
    made = groups()
    found = weighed.learn(made, ratios=ratios_of(made, lambda group, row: 0.5))
    assert found["discriminator/loss"] == pytest.approx(plain.learn(made)["discriminator/loss"], rel=1e-5)


def test_other_prompts_references_are_negatives_for_every_group(groups):
    made = groups(3)
    twins = foreign_groups(made, each=2)
    assert [t.prompt for t in twins] == [g.prompt for g in made]
    assert [[r.prompt_id for r in t.rollouts] for t in twins] == [
        ["prompt-1", "prompt-2"], ["prompt-2", "prompt-0"], ["prompt-0", "prompt-1"]
    ]  # fmt: skip
    assert all(r.text == made[0].prompt.reference for t in twins for r in t.rollouts)
    later = foreign_groups(made, each=1, turn=1)
    assert [t.rollouts[0].prompt_id for t in later] == ["prompt-2", "prompt-0", "prompt-1"]
    assert foreign_groups(made[:1], each=2) == [] and foreign_groups([made[0], made[0]], each=1) == []


def test_no_prompt_with_the_same_images_gives_negatives(groups):
    """Its reference may be true of this one: another question about the picture, or the question by another teacher."""
    first, second, other = groups(3)
    alike = replace(second, prompt=replace(second.prompt, images=first.prompt.images))
    twins = foreign_groups([first, alike, other], each=2)
    assert [[r.prompt_id for r in t.rollouts] for t in twins] == [["prompt-2"], ["prompt-2"], ["prompt-0", "prompt-1"]]
    assert foreign_groups([first, alike], each=2) == []
    blind = [replace(g, prompt=replace(g.prompt, images=())) for g in (first, second, other)]
    assert foreign_groups(blind, each=2) == [], "without images, those that are asked the same"
    asked = replace(blind[1], prompt=replace(blind[1].prompt, messages=({"role": "user", "content": "another"},)))
    assert len(foreign_groups([blind[0], asked], each=2)) == 2


def test_negatives_train_beside_the_rollouts_and_are_reported_apart(train, group_of, response, encoder):
    texts = [response(f" {colour} one", f" count {colour}", " one") for colour in ("red", "blue", "green")]
    made = [group_of(seed, texts[seed], response(" two", " two", " two")) for seed in range(3)]
    trainer = train(head_dropout=0.0, foreign_references=2)
    metrics = trainer.learn(made)
    plain = train(head_dropout=0.0).learn(made)
    assert metrics["discriminator/train/gap/perception"] == pytest.approx(plain["discriminator/train/gap/perception"])
    assert {f"discriminator/foreign/gap/{view}" for view in VIEW_NAMES} <= metrics.keys()
    assert not any("foreign" in name for name in plain)
    for _ in range(15):
        metrics = trainer.learn(made)
    assert metrics["discriminator/foreign/pair_accuracy/perception"] > 0.9, "only the image tells them apart"


def test_a_pair_is_weighed_by_its_own_rollout(groups, encoder, settings):
    made = groups(1)
    units = pair_units(group_views(made, encoder, settings), 4, ratios={0: [0.1, 0.2, 0.3, 5.0]}, cap=2.0)
    assert [u.weights for u in units] == [(0.1, 0.3, 2.0)] * 2, "the second is not valid"
