"""Alarms, remedies, the gate and the watch on reward hacking."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.config.discriminator import (
    DiscriminatorSettings,
    GateSettings,
    GuardSettings,
    ReplaySettings,
)
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.guards import (
    ALARMS,
    Alarms,
    Gate,
    frozen_views,
    gate_weight,
    gated,
    rank_correlation,
    told_apart,
    watch_metrics,
)
from prism_ray.discriminator.scorer import Judged
from prism_ray.discriminator.trainer import DiscriminatorTrainer
from prism_ray.records import Group, Prompt, Rollout, Verdict

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)

QUICK = GuardSettings(patience=3, gap_closing=None)


def step(accuracy: float = 0.8, gap: float = 1.0, saturated: float = 0.0, view: str = "perception"):
    return {
        f"discriminator/train/pair_accuracy/{view}": accuracy,
        f"discriminator/train/gap/{view}": gap,
        f"discriminator/train/saturated/{view}": saturated,
    }


def said(alarms: Alarms, *steps) -> list[list[str]]:
    return [alarms.update(s) for s in steps]


def ringing(alarms: Alarms) -> set[str]:
    return {name.removeprefix("discriminator/alarm/") for name, value in alarms.metrics().items() if value}


def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends():
    alarms = Alarms(QUICK, VIEW_NAMES)
    sentences = said(alarms, *[step(0.99)] * 6, *[step(0.8)] * 5)
    assert [len(s) for s in sentences] == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert sentences[2] == ["discriminator alarm separable (perception) begins: pair accuracy 0.990 for 3 steps"]
    assert "separable (perception) ends: pair accuracy 0.800" in sentences[8][0]


def test_one_ordinary_step_in_between_begins_the_count_anew():
    alarms = Alarms(QUICK, VIEW_NAMES)
    said(alarms, step(0.99), step(0.99), step(0.8), step(0.99), step(0.99))
    assert ringing(alarms) == set()
    said(alarms, step(0.99))
    assert ringing(alarms) == {"separable/perception"}
    said(alarms, step(0.8), step(0.8), step(0.99))
    assert ringing(alarms) == {"separable/perception"}


@pytest.mark.parametrize(
    ("figures", "alarm"),
    [({"accuracy": 0.99}, "separable"), ({"accuracy": 0.5}, "chance"), ({"gap": 6.5}, "drift"),
     ({"saturated": 0.6}, "saturation")],
)  # fmt: skip
def test_every_alarm_rings_for_its_own_figure_in_its_own_view(figures, alarm):
    alarms = Alarms(QUICK, VIEW_NAMES)
    said(alarms, *[step(view="reasoning")] * 3)
    (sentence,) = [s for some in said(alarms, *[step(**figures, view="reasoning")] * 3) for s in some]
    assert ringing(alarms) == {f"{alarm}/reasoning"} and f"alarm {alarm} (reasoning) begins" in sentence
    assert set(alarms.metrics()) == {f"discriminator/alarm/{a}/{v}" for a in ALARMS for v in VIEW_NAMES}


@pytest.mark.parametrize("limit", [{"accuracy": 0.98}, {"accuracy": 0.52}, {"gap": 6.0}, {"saturated": 0.5}])
def test_a_figure_at_its_limit_is_no_alarm(limit):
    alarms = Alarms(QUICK, VIEW_NAMES)
    said(alarms, *[step()] * 3, *[step(**limit)] * 9)
    assert ringing(alarms) == set()


@pytest.mark.parametrize(
    ("field", "value", "figures"),
    [("patience", 9, {"accuracy": 0.99}), ("high_accuracy", 0.995, {"accuracy": 0.99}),
     ("low_accuracy", 0.4, {"accuracy": 0.5}), ("gap_drift", 9.0, {"gap": 7.0}),
     ("saturation", 0.7, {"saturated": 0.6})],
)  # fmt: skip
def test_every_limit_matters(field, value, figures):
    usual, other = Alarms(QUICK, VIEW_NAMES), Alarms(QUICK.model_copy(update={field: value}), VIEW_NAMES)
    for alarms in (usual, other):
        said(alarms, *[step()] * 3, *[step(**figures)] * 4)
    assert ringing(usual) and not ringing(other)


def test_all_pairs_told_apart_is_no_alarm_while_the_gap_closes():
    """The gaps of a healthy run of the testbed, whose policy improved all the while; a gap that stays is one."""
    gaps = [7.7, 7.5, 6.9, 6.5, 6.5, 6.0, 6.3, 5.7, 5.7, 5.1, 4.5, 4.2, 4.8, 5.1, 3.7, 3.4, 3.1, 2.6, 2.4, 2.2]
    healthy, stuck, whatever = (
        Alarms(GuardSettings(patience=4, gap_closing=closing), VIEW_NAMES) for closing in (0.05, 0.05, None)
    )
    said(healthy, *[step(1.0, gap) for gap in gaps])
    said(whatever, *[step(1.0, gap) for gap in gaps])
    said(stuck, *[step(1.0, 7.0 + 0.1 * (i % 2)) for i in range(20)])
    assert ringing(healthy) == set()
    assert ringing(stuck) == ringing(whatever) == {"separable/perception"}
    said(stuck, *[step(1.0, 7.0 * 0.9**i) for i in range(12)])
    assert ringing(stuck) == set(), "and it ends once the gap closes"


def test_how_much_the_gap_must_close_is_a_setting():
    strict, mild = (Alarms(GuardSettings(patience=4, gap_closing=c), VIEW_NAMES) for c in (0.3, 0.02))
    for alarms in (strict, mild):
        said(alarms, *[step(1.0, 8.0 * 0.98**i) for i in range(20)])
    assert ringing(strict) == {"separable/perception"} and ringing(mild) == set()


def test_a_shrinking_gap_is_no_drift_and_steps_without_figures_count_for_nothing():
    alarms = Alarms(QUICK, VIEW_NAMES)
    said(alarms, *[step(gap=20.0)] * 3, *[step(gap=-20.0)] * 9)
    assert ringing(alarms) == set()
    said(alarms, step(0.99), {}, step(0.99), {}, {}, step(0.99))
    assert ringing(alarms) == {"separable/perception"}


def test_a_gap_that_is_no_number_does_not_spoil_what_drift_is_measured_against():
    alarms = Alarms(QUICK, VIEW_NAMES)
    said(alarms, step(gap=math.nan), *[step()] * 3, *[step(gap=9.0)] * 3)
    assert ringing(alarms) == {"drift/perception"}


def test_alarms_go_on_from_their_state():
    one, two = Alarms(QUICK, VIEW_NAMES), Alarms(QUICK, VIEW_NAMES)
    said(one, *[step(gap=1.0)] * 3, *[step(gap=9.0)] * 2)
    two.restore(json.loads(json.dumps(one.state())))
    assert [bool(a.update(step(gap=9.0))) for a in (one, two)] == [True, True]
    assert two.state() == one.state()


@pytest.mark.parametrize("alarm", ALARMS)
def test_an_alarm_calls_for_its_own_remedy_while_it_rings(alarm):
    figures = {
        "separable": step(accuracy=0.99),
        "chance": step(accuracy=0.5),
        "drift": step(gap=9.0),
        "saturation": step(saturated=0.9),
    }
    alarms = Alarms(
        GuardSettings.model_validate({"patience": 2, "gap_closing": None, f"on_{alarm}": "lower_rate"}), VIEW_NAMES
    )
    said(alarms, *[step()] * 2)
    assert alarms.remedies() == set()
    sentences = said(alarms, *[figures[alarm]] * 2)
    assert alarms.remedies() == {"lower_rate"} and sentences[1][0].endswith("; remedy lower_rate starts")
    sentences = said(alarms, *[step()] * 2)
    assert alarms.remedies() == set() and sentences[1][0].endswith("; remedy lower_rate stops")


@pytest.fixture
def easy(group_of, response):
    """A step whose pairs any judge orders rightly, or one it can only toss a coin over."""

    def make(number: int):
        texts = [response(" blue three", " max three", f" {w}") for w in ("one", "two", "three", "four")]
        return [group_of(10 * number + i, response(" red one two", " max one", " one"), *texts) for i in range(2)]

    return make


def guarded(**changes) -> GuardSettings:
    """Either of the accuracy's alarms rings after every step, whatever the accuracy."""
    return GuardSettings.model_validate(
        {"patience": 1, "high_accuracy": 0.51, "low_accuracy": 0.52, "gap_closing": None} | changes
    )


def test_lower_rate_halves_the_learning_rate_while_the_alarm_rings_and_no_longer(train, easy):
    both = {"on_separable": "lower_rate", "on_chance": "lower_rate"}
    trainer = train(guard=guarded(**both))
    usual = trainer.settings.optimiser.lr
    rates = [trainer.learn(easy(n))["discriminator/lr"] for n in range(3)]
    assert rates == pytest.approx([usual, usual / 2, usual / 2]), "and it does not halve what is halved"
    trainer.alarms = Alarms(GuardSettings(), VIEW_NAMES)
    assert trainer.learn(easy(4))["discriminator/lr"] == pytest.approx(usual)
    plain = train(guard=guarded())
    assert [plain.learn(easy(n))["discriminator/lr"] for n in range(2)] == pytest.approx([usual, usual])


def test_a_halved_rate_makes_a_smaller_step_and_a_skipped_one_leaves_the_rate_alone(train, easy):
    guard = GuardSettings(on_chance="lower_rate", patience=99)
    whole, half = (train(head_dropout=0.0, guard=guard) for _ in range(2))
    before = whole.engine.weights()["head.weight"]
    half.alarms.restore({"watches": {"chance/perception": [True, 0]}, "gaps": {}})
    moved = []
    for trainer in (whole, half):
        trainer.learn(easy(0))
        moved.append((trainer.engine.weights()["head.weight"] - before).norm().item())
    assert moved[1] == pytest.approx(0.5 * moved[0], rel=0.05)
    engine = half.engine
    engine.run(lambda model: engine.backward(model.head.weight.sum() * math.nan))
    assert engine.step(0.5).skipped
    engine.run(lambda model: engine.backward(model.head.weight.sum()))
    assert engine.step().lr == pytest.approx(half.settings.optimiser.lr)


def test_raise_replay_keeps_pairs_from_the_start_and_replays_them_while_the_alarm_rings(train, easy):
    both = {"on_separable": "raise_replay", "on_chance": "raise_replay", "raised_replay": 0.25}
    trainer = train(guard=guarded(**both), rollouts_per_update=3)
    first, second = (trainer.learn(easy(n)) for n in range(2))
    assert "discriminator/replay/share" not in first and len(trainer.replay) == 16
    assert second["discriminator/replay/share"] == pytest.approx(0.25)
    assert len(trainer.notices) >= 2 and "remedy raise_replay starts" in trainer.notices[0]


def test_an_alarm_with_freeze_policy_closes_the_gate_of_its_view_alone():
    guard = guarded(on_separable="freeze_policy")
    alarms = Alarms(guard, VIEW_NAMES)
    alarms.update(step(accuracy=0.99, view="reasoning") | step(accuracy=0.5))
    assert frozen_views(alarms.metrics(), guard) == {"reasoning"}
    assert frozen_views(alarms.metrics(), guarded()) == set(), "without the remedy no alarm closes anything"
    alarms.update(step(accuracy=0.5, view="reasoning"))
    assert frozen_views(alarms.metrics(), guard) == set(), "and it opens when the alarm ends"


def test_restore_begins_anew_from_the_warmed_up_judge_once_an_alarm_begins(train, easy, build, encoder):
    guard = guarded(on_separable="restore", on_chance="restore")
    trainer = DiscriminatorTrainer(
        build(guard=guard, head_dropout=0.0), encoder, build(guard=guard).settings, warmed_up=lambda: build(guard=guard)
    )
    first = build().state_dict()
    metrics = trainer.learn(easy(0))
    assert trainer.alarms.begun == {"restore"} and "remedy restore starts" in trainer.notices[0]
    assert all(torch.equal(first[name], weight) for name, weight in trainer.engine.weights().items())
    assert trainer.version == metrics["discriminator/version"] == 1, "old weights, but a version of their own"
    assert trainer.judge(easy(1))[0].group.verdicts[0].judge_version == 1
    trainer.alarms = Alarms(GuardSettings(), VIEW_NAMES)
    trainer.learn(easy(2))
    assert trainer.alarms.begun == set() and trainer.version == 2
    moved = trainer.engine.weights()
    assert any(not torch.equal(first[name], weight) for name, weight in moved.items()), "and it learns on from there"


def test_a_restored_judge_recomputes_its_activations_as_before(train, easy, build, encoder):
    settings = build(guard=guarded(on_separable="restore", on_chance="restore"), gradient_checkpointing=True).settings
    trainer = DiscriminatorTrainer(build(), encoder, settings, warmed_up=build)
    assert trainer.model.backbone.is_gradient_checkpointing
    before = trainer.model
    trainer.learn(easy(0))
    assert trainer.alarms.begun == {"restore"} and trainer.model is not before
    assert trainer.model.backbone.is_gradient_checkpointing
    trainer.alarms = Alarms(GuardSettings(), VIEW_NAMES)
    trainer.learn(easy(1))


def test_restore_without_anything_to_restore_is_refused(train):
    with pytest.raises(ValueError, match="say how to load what it restores"):
        train(guard=guarded(on_drift="restore"))


def test_warm_up_raises_no_alarm(train, easy):
    trainer = train(guard=guarded())
    metrics = trainer.learn(easy(0), warming=True)
    assert trainer.notices == [] and not any("alarm" in name for name in metrics)


def test_saturation_is_the_share_of_heads_at_the_clip(train, easy):
    trainer = train(head_dropout=0.0, score_clip=1e-6)
    assert trainer.learn(easy(0))["discriminator/train/saturated/reasoning"] == 1.0
    assert train(head_dropout=0.0).learn(easy(0))["discriminator/train/saturated/reasoning"] == 0.0
    assert not any("saturated" in name for name in train(score_clip=None).learn(easy(0)))


def test_a_trainer_goes_on_with_its_alarms(train, easy, tmp_path):
    settings = {"guard": guarded(patience=2), "head_dropout": 0.0}
    one, two = train(**settings), train(**settings)
    one.learn(easy(0))
    one.save(tmp_path)
    two.load(tmp_path)
    assert two.alarms.state() == one.alarms.state() != train(**settings).alarms.state()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"guard": {"on_drift": "raise_replay", "raised_replay": 0.3}, "replay": {"share": 0.3}}, "raised_replay is 0.3"),
     ({"gate": {"tolerance": 0.2, "full_accuracy": 0.7}}, "full_accuracy is 0.7 but the gate is shut up to")],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiscriminatorSettings.model_validate(settings)
    assert GuardSettings(on_drift="raise_replay").may("raise_replay") and not GuardSettings(on_drift="lower_rate").may(
        "raise_replay"
    )
    assert ReplaySettings().share == 0.0


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_gate_is_shut_at_chance_open_from_its_accuracy_and_rises_between(one, other):
    settings = GateSettings()
    low, high = sorted((one, other))
    assert 0.0 <= gate_weight(low, settings) <= gate_weight(high, settings) <= 1.0
    assert gate_weight(0.55, settings) == 0.0 and gate_weight(0.7, settings) == 1.0
    assert gate_weight(0.625, settings) == pytest.approx(0.5)


@pytest.mark.parametrize(("field", "value"), [("tolerance", 0.0), ("full_accuracy", 0.9)])
def test_both_ends_of_the_gate_matter(field, value):
    assert gate_weight(0.6, GateSettings.model_validate({field: value})) != gate_weight(0.6, GateSettings())


def judged_of(*right: bool | None) -> Judged:
    """Pairs that are ordered rightly or not, or (None) identical, the same in every view."""
    rows = torch.tensor([[float(r is not False), 0.5, float(r is None)] for r in right]).reshape(-1, 3)
    return Judged(Group(0, Prompt("p", ()), ()), dict.fromkeys(VIEW_NAMES, rows))


def counts_of(*right: bool | None) -> dict[str, tuple[float, int]]:
    return told_apart(judged_of(*right))


def test_pairs_are_counted_by_whether_they_are_ordered_rightly():
    tie = Judged(judged_of().group, dict.fromkeys(VIEW_NAMES, torch.tensor([[0.5, 0.5, 0.0], [2.0, 1.0, 0.0]])))
    assert told_apart(tie) == dict.fromkeys(VIEW_NAMES, (1.5, 2))
    assert counts_of(True, False, None) == dict.fromkeys(VIEW_NAMES, (1.0, 2))
    assert counts_of(None) == counts_of() == dict.fromkeys(VIEW_NAMES, (0.0, 0))


def test_the_gate_follows_the_last_groups_weighted_by_their_pairs():
    gate = Gate(GateSettings(window=2), VIEW_NAMES)
    assert set(gate.weights().values()) == {1.0} and gate.accuracy("perception") is None
    gate.see([counts_of(False), counts_of(False)])
    assert set(gate.weights().values()) == {0.0}
    gate.see([counts_of(True, True, True)])
    assert gate.accuracy("reasoning") == 0.75
    gate.see([counts_of(None, None), counts_of()])
    assert gate.accuracy("reasoning") == 0.75, "identical pairs and empty groups say nothing"
    gate.see([counts_of(True)])
    assert gate.metrics() == {f"discriminator/gate/{v}": 1.0 for v in VIEW_NAMES} | {
        f"discriminator/gate_accuracy/{v}": 1.0 for v in VIEW_NAMES
    }


def test_verdicts_carry_the_gates_weights_and_keep_everything_else(train, easy):
    (judged, _) = train().judge(easy(0))
    weighed = gated(judged.group, {"perception": 0.25, "reasoning": 1.0})
    for before, after in zip(judged.group.verdicts, weighed.verdicts, strict=True):
        assert after.parts == before.parts | {"gate/perception": 0.25, "gate/reasoning": 1.0}
        assert replace(after, parts=before.parts) == before


def test_a_gate_goes_on_from_its_state():
    one, two = (Gate(GateSettings(window=3), VIEW_NAMES) for _ in range(2))
    one.see([counts_of(True, False), counts_of(True)])
    two.restore(json.loads(json.dumps(one.state())))
    for gate in (one, two):
        gate.see([counts_of(False), counts_of(False)])
    assert two.metrics() == one.metrics() and one.accuracy("reasoning") == pytest.approx(1 / 3)


def test_rank_correlation_is_within_groups_and_takes_ties_and_order_for_what_they_are():
    def group(x, y):
        return torch.tensor(x).double(), torch.tensor(y).double()

    assert rank_correlation([group([1, 2, 3], [10, 20, 99])]) == pytest.approx(1.0)
    assert rank_correlation([group([1, 2, 3], [3, 2, 1])]) == pytest.approx(-1.0)
    assert rank_correlation([group([1, 2], [1, 2]), group([100, 101], [0, 1])]) == pytest.approx(1.0), "not across"
    assert rank_correlation([group([1, 2], [1, 2]), group([5, 5], [0, 1])]) == pytest.approx(1.0)
    assert rank_correlation([group([1, 1], [0, 1]), group([1, 2], [0, 0]), group([], [])]) is None
    tied = rank_correlation([group([1, 2, 3, 4], [0, 0, 1, 1])])
    assert tied == pytest.approx(2 / math.sqrt(5)), "Spearman with mean ranks"


def judged_group(number: int, scores: list[float], rights: list[float], truth: str = "4") -> Group:
    prompt = Prompt(f"p{number}", (), ground_truth=truth)
    none, logp = np.zeros(0, np.int32), np.zeros(0, np.float32)
    rollouts = tuple(Rollout(prompt.id, i, none, none, logp, none, str(r), "stop") for i, r in enumerate(rights))
    verdicts = tuple(Verdict(0.0, True, scores={v: s for v in VIEW_NAMES}) for s in scores)
    return Group(number, prompt, rollouts, verdicts)


def told(text: str, prompt: object) -> dict[str, float]:
    return {"answer": float(text), "format": 1.0}


def test_the_watch_says_whether_better_rollouts_are_liked_better():
    liked, hated = judged_group(0, [1.0, 2.0], [0, 1]), judged_group(1, [5.0, 4.0], [0, 1])
    expected = {f"discriminator/watch/{view}/answer": pytest.approx(1.0) for view in VIEW_NAMES}
    assert watch_metrics([liked], told) == expected, "format does not vary, so nothing is said of it"
    assert watch_metrics([liked, hated], told)["discriminator/watch/reasoning/answer"] == pytest.approx(0.0)


def test_the_watch_leaves_out_what_cannot_be_told():
    liked = judged_group(0, [1.0, 2.0], [0, 1])
    unknown = judged_group(1, [5.0, 4.0], [0, 1], truth="")
    invalid = replace(liked, verdicts=(liked.verdicts[0], Verdict(0.0, False)))

    def cannot(text, prompt):
        raise KeyError("cells")

    assert watch_metrics([liked, unknown], told) == watch_metrics([liked], told)
    assert watch_metrics([invalid, unknown], told) == {} == watch_metrics([liked], cannot)


def test_a_trainer_watches_with_the_truth_it_was_given(train, easy):
    trainer = train()
    groups = [replace(g, prompt=replace(g.prompt, ground_truth="one")) for g in easy(0)]
    judged = [j.group for j in trainer.judge(groups)]
    assert not any("watch" in name for name in trainer.learn(judged))
    trainer.truth = lambda text, prompt: {"answer": float(f"<answer> {prompt.ground_truth}" in text)}
    metrics = trainer.learn(judged)
    assert metrics == {**metrics, **watch_metrics(judged, trainer.truth)}
    assert -1 <= metrics["discriminator/watch/reasoning/answer"] <= 1
    assert "discriminator/watch/reasoning/answer" in trainer.examine(groups, worst=0).metrics
    trainer.learn(groups)
