"""The replay buffer: bounded, deterministic, true to what it was given, and mixed into every update of alignment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prism_ray.config.discriminator import ReplaySettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.pairs import all_units, pair_units
from prism_ray.discriminator.replay import REPLAY_FILE, Replay
from prism_ray.discriminator.scorer import group_views, score_sequences
from prism_ray.records import Group, Prompt, Rollout

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)

HALF = ReplaySettings(share=0.5)


def group(number: int, rollouts: int = 4, versions: tuple[int, ...] = (3, 7)) -> Group:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": "?"},), (b"image",), f"reference {number}")
    ids, logp = np.arange(len(versions), dtype=np.int32), np.zeros(len(versions), np.float32)
    made = [
        Rollout(prompt.id, i, ids, ids, logp, np.array(versions, np.int32), f"text {number}.{i}", "stop")
        for i in range(rollouts)
    ]
    return Group(number, prompt, tuple(made))


def texts(groups) -> list[str]:
    return [r.text for g in groups for r in g.rollouts]


def everything(replay: Replay) -> list[str]:
    return texts(replay.draw(fresh=10**9, share=0.5, turn=0))


def test_the_buffer_is_bounded_and_the_oldest_give_way():
    replay = Replay(6, seed=0)
    replay.add([group(0), group(1)])
    assert len(replay) == 6
    assert everything(replay) == ["text 0.2", "text 0.3", "text 1.0", "text 1.1", "text 1.2", "text 1.3"]


@pytest.mark.parametrize(
    ("fresh", "share", "drawn"), [(8, 0.5, 8), (8, 0.2, 2), (0, 0.5, 0), (8, 0.0, 0), (8, 0.9, 40)]
)
def test_a_draw_makes_up_its_share_as_far_as_there_is_something(fresh, share, drawn):
    replay = Replay(100, seed=0)
    replay.add([group(i) for i in range(10)])
    assert len(texts(replay.draw(fresh, share, turn=0))) == drawn


def test_a_draw_repeats_no_pair_and_depends_on_the_seed_and_the_turn_alone():
    one, same, other = (Replay(100, seed=s) for s in (1, 1, 2))
    for replay in (one, same, other):
        replay.add([group(i) for i in range(10)])
    draws = [texts(r.draw(12, 0.5, turn)) for r, turn in ((one, 5), (same, 5), (one, 6), (other, 5))]
    assert draws[0] == draws[1] and len(set(draws[0])) == 12
    assert draws[0] != draws[2] and draws[0] != draws[3]
    assert texts(one.draw(12, 0.5, 5)) == draws[0], "drawing changes nothing"


def test_a_pair_keeps_its_reference_its_version_and_nothing_heavy_and_comes_with_its_group():
    replay = Replay(100, seed=0)
    replay.add([group(0, versions=(7, 3, 9)), group(1)])
    first, second = replay.draw(100, 0.5, 0)
    assert (first.id, second.id) == (0, 1) and first.prompt.reference == "reference 0"
    kept = first.rollouts[0]
    assert kept.oldest_version == 3 and len(kept.token_ids) == len(kept.logp) == len(kept.prompt_token_ids) == 0


def test_a_saved_buffer_goes_on_as_the_one_that_was_saved(tmp_path):
    replay, loaded = Replay(30, seed=4), Replay(30, seed=4)
    replay.add([group(i) for i in range(9)])
    replay.save(tmp_path)
    loaded.add([group(77)])
    loaded.load(tmp_path)
    assert everything(loaded) == everything(replay)
    for buffer in (replay, loaded):
        buffer.add([group(10)])
    one, two = (b.draw(8, 0.5, 3) for b in (replay, loaded))
    assert texts(one) == texts(two) and len(loaded) == 30
    assert [r.oldest_version for g in two for r in g.rollouts] == [r.oldest_version for g in one for r in g.rollouts]


def test_what_several_ranks_saved_is_dealt_out_to_another_number_of_them(tmp_path):
    for rank in range(2):
        replay = Replay(30, seed=rank)
        replay.add([group(10 * rank + i) for i in range(3)])
        replay.save(tmp_path, rank)
    same, alone, many = Replay(30, 0), Replay(30, 0), [Replay(30, 0) for _ in range(3)]
    same.load(tmp_path, 1, 2)
    assert {text.split(".")[0] for text in everything(same)} == {"text 10", "text 11", "text 12"}
    alone.load(tmp_path, 0, 1)
    assert len(alone) == 24
    for rank, replay in enumerate(many):
        replay.load(tmp_path, rank, 3)
    assert sorted(t for replay in many for t in everything(replay)) == sorted(everything(alone))
    assert {len(replay) for replay in many} == {8}


def test_a_checkpoint_without_a_buffer_leaves_it_empty(tmp_path):
    replay = Replay(30, seed=0)
    replay.add([group(0)])
    replay.load(tmp_path)
    assert len(replay) == 0


@pytest.fixture
def batch(group_of, response):
    """Two groups of a step: `number` tells the steps apart, by their texts and their policy version."""

    def make(number: int):
        words = ("one", "two", "three", "four")
        made = []
        for seed in range(2):
            other = [response(f" {words[(number + i) % 4]} {words[i]}", " max", " two") for i in range(3)]
            given = group_of(10 * number + seed, response(" red one", " max one", " one"), *other, "broken")
            version = np.array([number], np.int32)
            made.append(replace(given, rollouts=tuple(replace(r, versions=version) for r in given.rollouts)))
        return made

    return make


def test_an_update_trains_on_older_pairs_beside_the_new_ones_and_counts_them(train, batch):
    trainer = train(replay=HALF, rollouts_per_update=2, head_dropout=0.0)
    first, second = trainer.learn(batch(1)), trainer.learn(batch(4))
    assert first["discriminator/replay/size"] == 0.0 and first["discriminator/replay/share"] == 0.0
    assert "discriminator/replay/age" not in first
    assert second["discriminator/replay/size"] == 6.0, "every valid rollout is kept"
    assert second["discriminator/replay/share"] == 0.5 and second["discriminator/replay/age"] == 3.0
    for view in VIEW_NAMES:
        assert f"discriminator/replay/gap/{view}" in second and f"discriminator/replay/gap/{view}" not in first


def test_a_replayed_pair_weighs_as_much_as_a_new_one(train, batch, encoder):
    trainer = train(replay=HALF, rollouts_per_update=2, head_dropout=0.0, score_reg=0.0)
    trainer.learn(batch(1))
    losses = []
    for view in VIEW_NAMES:
        old = trainer.replay.draw(4, 0.5, trainer.version)
        units = pair_units(group_views(batch(4), encoder, trainer.settings), 2)
        units += all_units(group_views(old, encoder, trainer.settings), "replay")
        gaps = []
        with torch.no_grad():
            for unit in units:
                if unit.view == view:
                    reference, *rollouts = score_sequences(trainer.model, unit.sequences)
                    gaps += [reference - r for r in rollouts]
        assert len(gaps) == 8
        losses.append(-torch.nn.functional.logsigmoid(torch.stack(gaps)).mean())
    assert trainer.learn(batch(4))["discriminator/loss"] == pytest.approx(float(sum(losses)), rel=1e-3)


def test_neither_warm_up_nor_a_share_of_0_replays_or_keeps_anything(train, batch):
    for settings, warming in (({"replay": HALF}, True), ({}, False)):
        trainer = train(**settings)
        metrics = trainer.learn(batch(1), warming=warming) | trainer.learn(batch(2), warming=warming)
        assert len(trainer.replay) == 0 and not any("replay" in name for name in metrics)
    trainer = train(replay=HALF)
    trainer.learn(batch(1))
    assert not any("replay" in name for name in trainer.learn(batch(2), warming=True))


def test_a_trainer_goes_on_with_the_replay_it_saved(train, batch, tmp_path):
    one, two = (train(replay=HALF, head_dropout=0.0) for _ in range(2))
    for number in (1, 2):
        one.learn(batch(number))
    one.save(tmp_path)
    two.load(tmp_path)
    expected, found = (t.learn(batch(3)) for t in (one, two))
    found.pop("discriminator/canary_gap")  # looked at anew by every process
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["discriminator/replay/share"] == 0.5
    (tmp_path / REPLAY_FILE.format(0)).unlink()
    two.load(tmp_path)
    assert two.learn(batch(3))["discriminator/replay/share"] == 0.0


def test_the_replay_of_a_bounded_buffer_stays_bounded(train, batch):
    trainer = train(replay=ReplaySettings(share=0.5, pairs=5))
    for number in range(3):
        trainer.learn(batch(number))
    assert len(trainer.replay) == 5


def test_a_step_makes_as_many_updates_as_configured_each_on_the_next_rollouts(train, batch, encoder, settings):
    (views,) = group_views(batch(1)[:1], encoder, settings)
    chosen = [[u.sequences[1:] for u in pair_units([views], 2, turn)][0] for turn in range(3)]
    keys = [[s.key[1:] for s in sequences] for sequences in chosen]
    own = [r.sequences["perception"].key[1:] for r in views.rollouts if r.valid]
    assert keys == [[own[0], own[1]], [own[2], own[0]], [own[1], own[2]]]
    once, twice = (train(updates_per_step=n, rollouts_per_update=2, head_dropout=0.0) for n in (1, 2))
    first, both = once.learn(batch(1)), twice.learn(batch(1))
    assert (once.version, twice.version) == (1, 2) and both["discriminator/version"] == 2.0
    assert both["discriminator/loss"] == pytest.approx(first["discriminator/loss"]), "measured before the first"
    assert not torch.equal(once.engine.weights()["head.weight"], twice.engine.weights()["head.weight"])
    twice.learn(batch(2), warming=True)
    assert twice.version == 3, "warm-up counts its own steps"
