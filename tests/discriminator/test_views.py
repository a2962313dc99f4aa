"""Views as data through the whole room: one, two and three of them, in every context; what cannot be judged."""

from __future__ import annotations

import pytest
import torch

from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.probes import check_canary, probe_metrics
from prism_ray.discriminator.scorer import BadReference, group_views, judge, judged_metrics
from prism_ray.discriminator.segments import FAULTS, ResponseViews, judged_batch, refusal, view_sequences

WHOLE = (ViewSettings(name="whole", tags=("caption", "think", "answer")),)
THREE = (
    ViewSettings(name="seen", tags=("caption",)),
    ViewSettings(name="thought", tags=("think",), weight=2.0),
    ViewSettings(name="said", tags=("answer",), context="reference"),
)
KINDS = pytest.mark.parametrize("views", [WHOLE, THREE], ids=["one", "three"])


def text_of(encoder, ids) -> str:
    return b"".join(encoder.pieces[i] for i in ids).decode()


def shown(encoder, cut: ResponseViews) -> dict[str, tuple[str, str]]:
    """Per view the text of its context and its own."""
    return {
        view: (text_of(encoder, s.token_ids[: s.start]), text_of(encoder, s.token_ids[s.start : s.stop]))
        for view, s in cut.sequences.items()
    }


def test_each_context_shows_what_it_says(encoder, settings, in_context, group_of, response):
    reference, rollout = response(" red", " one", " two"), response(" blue", " three", " four")
    caption, think, answer = "<caption> blue</caption>", "<think> three</think>", "<answer> four</answer>"
    before = {
        "none": ("", ""),
        "own": (caption, caption + think),
        "reference": ("<caption> red</caption>", "<caption> red</caption><think> one</think>"),
    }
    for context, (of_think, of_answer) in before.items():
        asked = in_context(settings.model_copy(update={"views": THREE}), context)
        (views,) = group_views([group_of(0, reference, rollout)], encoder, asked)
        expected = {"seen": ("", caption), "thought": (of_think, think), "said": (of_answer, answer)}
        assert shown(encoder, views.rollouts[0]) == expected
        own = shown(encoder, views.reference)
        assert own["said"][1] == "<answer> two</answer>"
        if context == "reference":
            assert own["said"][0] == of_answer, "both sides alike"


def test_in_the_references_context_a_pair_differs_in_its_view_alone(encoder, settings, in_context, group_of, response):
    reference, other = response(" red one", " max one", " one"), response(" blue two", " max one", " one")
    group = group_of(0, reference, other)
    (own,) = group_views([group], encoder, in_context(settings, "own"))
    (shared,) = group_views([group], encoder, in_context(settings, "reference"))
    assert not own.identical(0, "reasoning") and shared.identical(0, "reasoning")
    assert not shared.identical(0, "perception")


@KINDS
def test_all_views_judge_a_group_and_the_reward_is_their_weighted_mean(build, encoder, group_of, response, views):
    model = build(views=views)
    (judged,) = judge(model, encoder, [group_of(0, response(), response(" blue"), "broken", response())], version=0)
    verdict, broken, same = judged.group.verdicts
    assert list(verdict.scores) == [v.name for v in views] == list(judged.rows)
    gaps = torch.tensor([verdict.scores[v.name] - verdict.reference_scores[v.name] for v in views])
    weights = torch.tensor([v.weight for v in views])
    expected = (torch.sigmoid(gaps / 3) * weights).sum() / weights.sum()
    assert verdict.reward == pytest.approx(expected.item(), rel=1e-5)
    assert same.reward == 0.5 and not broken.valid
    metrics = judged_metrics([judged])
    assert all(f"discriminator/gap/{v.name}" in metrics for v in views)


@KINDS
def test_every_view_has_its_own_row_and_sequences_point_to_it(build, encoder, group_of, response, settings, views):
    model = build(views=views, likelihood_weight=0.0)
    (cut,) = group_views([group_of(0, response())], encoder, model.settings)
    judged = judged_batch(list(cut.reference.sequences.values()))
    assert judged.view_B.tolist() == list(range(len(views))) and len(model.head.weight) == len(views)
    with torch.no_grad():
        model.head.weight[-1].zero_()
        scores = model(judged).head_B
    assert scores[-1] == 0 and scores[:-1].all()


@KINDS
def test_training_probes_canary_and_examination_name_every_view(train, encoder, groups, views):
    trainer = train(views=views)
    made = groups()
    metrics = trainer.learn([j.group for j in trainer.judge(made)])
    found = trainer.examine(made, worst=2)
    assert check_canary(trainer.model, encoder, made[0]) == 0.0
    probed = probe_metrics(group_views(made, encoder, trainer.settings))
    for view in (v.name for v in views):
        assert f"discriminator/train/gap/{view}" in metrics
        assert f"discriminator/router/entropy/{view}" in metrics
        assert f"discriminator/alarm/chance/{view}" in metrics
        assert f"discriminator/calibration_error/{view}" in found.metrics
        assert f"discriminator/probe/length/{view}" in probed
        assert any(row["view"] == view and row["reference"].startswith("<") for row in found.worst)


def test_an_update_moves_every_row_of_the_head(train, groups):
    trainer = train(views=THREE)
    before = trainer.model.head.weight.detach().clone()
    trainer.learn(groups(), warming=True)
    assert ((trainer.model.head.weight - before).abs().amax(1) > 0).all()


BAD = {
    "format": ("<think> a</think><answer> b</answer>", "missing <caption>"),
    "empty_view": ("<caption> \n</caption><think> a</think><answer> b</answer>", "nothing in the perception view"),
    "special_token": ("<caption> a</caption><think><|im_end|></think><answer> b</answer>", "a special token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_judged_is_a_value_with_a_fault_and_counted(build, encoder, group_of, response, fault):
    text, reason = BAD[fault]
    model = build()
    (judged,) = judge(model, encoder, [group_of(0, response(), text, response(" blue"), "", response())], version=0)
    verdict = judged.group.verdicts[0]
    assert (verdict.valid, verdict.reward, verdict.scores) == (False, 0.0, {}) and verdict.reason.startswith(reason)
    metrics = judged_metrics([judged])
    shares = {name: metrics[f"discriminator/invalid/{name}"] for name in FAULTS}
    expected = dict.fromkeys(FAULTS, 0.0) | {"format": 0.25}
    expected[fault] += 0.25
    assert shares == expected and metrics["discriminator/valid"] == 0.5


def test_a_view_is_empty_only_if_all_of_it_is(encoder, settings, prompt_of, response):
    prompt = encoder.prompt(prompt_of(0, response()))
    whole = settings.model_copy(update={"views": WHOLE})
    assert view_sequences(prompt, response(caption=""), encoder, whole).valid
    assert view_sequences(prompt, response(think=""), encoder, settings).valid, "its answer says something"
    assert view_sequences(prompt, response("", "", " "), encoder, whole).fault == "empty_view"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_corpus_may_hold_as_a_reference_is_what_the_judge_takes(encoder, settings, prompt_of, response, fault):
    text, reason = BAD[fault]
    assert refusal(text, encoder, settings).startswith(reason) and refusal(response(), encoder, settings) == ""
    assert view_sequences(encoder.prompt(prompt_of(0, response())), text, encoder, settings).fault == fault


def test_a_reference_that_cannot_be_judged_is_refused_by_name(encoder, settings, group_of, response):
    with pytest.raises(BadReference, match=r"prompt-5: its reference is malformed \(nothing in the perception view\)"):
        group_views([group_of(5, response(caption=" "), response())], encoder, settings)


def test_views_over_the_limit_are_cut_alike_and_counted(build, encoder, group_of, response):
    model = build(max_segment_tokens=5)
    long, short = response(caption=" red one two three four"), response(caption=" red")
    (judged,) = judge(model, encoder, [group_of(0, long, short, long + " ", "broken")], version=0)
    metrics = judged_metrics([judged])
    assert metrics["discriminator/cut/perception"] == 0.5, "of the valid ones"
    assert metrics["discriminator/cut_reference/perception"] == 1.0
    assert metrics["discriminator/groups_without_valid"] == 0.0
    assert judged.group.verdicts[1].scores == judged.group.verdicts[1].reference_scores


def test_a_group_without_a_valid_rollout_is_counted_and_teaches_nothing_but_the_fallback(train, group_of, response):
    trainer = train()
    groups = [group_of(0, response(), "", "<caption>"), group_of(1, response(), response(" blue"))]
    judged = trainer.judge(groups)
    assert judged_metrics(judged)["discriminator/groups_without_valid"] == 0.5
    metrics = trainer.learn([judged[0].group], warming=True)
    assert 0 < metrics["discriminator/loss"] < 0.1 and "discriminator/train/gap/perception" not in metrics
