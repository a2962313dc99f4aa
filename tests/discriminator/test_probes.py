"""Shortcut probes see their shortcut and nothing else; the canary; what an examination says."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.probes import (
    PROBES,
    CanaryBreach,
    ProbePair,
    Side,
    calibration_metrics,
    check_canary,
    examine,
    fit_logistic,
    format_features,
    last_token_features,
    length_features,
    probe_accuracy,
    probe_metrics,
    probe_pairs,
    shortcut_warnings,
    worst_pairs,
)
from prism_ray.discriminator.scorer import group_views, judge
from prism_ray.models.encode import Encoder

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)


def pairs_of(sides, repeat: int = 12) -> list[ProbePair]:
    return [ProbePair(fold, *sides(fold)) for fold in range(repeat)]


def tokens(*ids: int) -> Side:
    return Side(ids, "")


def test_length_alone_is_found_whichever_side_is_longer_or_only_of_middle_length():
    def longer(n):
        return tokens(*range(20 + n % 5)), tokens(*range(10 + n % 5))

    def middle(n):
        return tokens(*range(20)), tokens(*range(10 if n % 2 else 30))

    assert probe_accuracy(pairs_of(longer), length_features) == 1.0
    assert probe_accuracy(pairs_of(lambda n: longer(n)[::-1]), length_features) == 1.0
    assert probe_accuracy(pairs_of(middle), length_features) == 1.0


def test_a_probe_that_sees_no_difference_is_at_chance():
    pairs = pairs_of(lambda n: (tokens(n, 1, 2), tokens(n, 3, 2)))
    assert probe_accuracy(pairs, length_features) == 0.5
    assert probe_accuracy(pairs, format_features) == 0.5


def test_a_probe_is_not_tested_on_the_prompts_it_was_fitted_on():
    pairs = pairs_of(lambda n: (tokens(2 * n, 1), tokens(2 * n + 1, 1)))
    assert probe_accuracy(pairs, last_token_features) == 0.5, "every token occurs once, so there is nothing to learn"


def test_the_last_token_alone_is_found_where_the_head_reads_and_just_before():
    for sides in ((tokens(5, 5, 1), tokens(5, 5, 2)), (tokens(5, 1, 9), tokens(5, 2, 9))):
        assert probe_accuracy(pairs_of(lambda n, sides=sides: sides), last_token_features) == 1.0
    earlier = pairs_of(lambda n: (tokens(1, 5, 9), tokens(2, 5, 9)))
    assert probe_accuracy(earlier, last_token_features) == 0.5


@pytest.mark.parametrize(
    ("reference", "rollout"),
    [("<caption>- a\n- b</caption>", "<caption>a b</caption>"), ("<think> a</think>", "<think>a</think>"),
     ("<think>It is 3.</think>", "<think>It is 3</think>"), ("<think>**3**</think>", "<think>3</think>")],
)  # fmt: skip
def test_format_alone_is_found_by_its_marks(reference, rollout):
    assert probe_accuracy(pairs_of(lambda n: (Side((), reference), Side((), rollout))), format_features) == 1.0


def test_format_does_not_know_length():
    pairs = pairs_of(lambda n: (Side((), "ab, cd 3 " * 20), Side((), "ab, cd 3 " * 2)))
    assert probe_accuracy(pairs, format_features) == 0.5


def test_the_logistic_regression_is_at_its_minimum_and_deterministic():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(40, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, -0.5, 0.0])
    weight = fit_logistic(difference).requires_grad_()
    assert torch.equal(weight, fit_logistic(difference))
    loss = torch.nn.functional.softplus(-difference @ weight).sum() + 0.5 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None and weight.grad.abs().max() < 1e-3
    assert weight[0] > 0.5 and weight[1] < 0


def test_a_separable_shortcut_does_not_blow_the_regression_up():
    assert torch.isfinite(fit_logistic(torch.ones(50, 2, dtype=torch.float64))).all()
    assert fit_logistic(torch.zeros(0, 2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_pairs_are_those_of_valid_rollouts_that_differ_view_by_view(encoder, settings, group_of, response):
    reference = response(" red one", " max one", " one")
    group = group_of(0, reference, reference, "broken", response(" blue", " max one", " one"))
    cut = group_views([group], encoder, settings)
    (perception,) = probe_pairs(cut, "perception")
    (reasoning,) = probe_pairs(cut, "reasoning")
    assert perception.reference.text == "<caption> red one</caption>"
    assert perception.rollout.text == "<caption> blue</caption>"
    assert perception.reference.tokens[-1] == perception.rollout.tokens[-1] == encoder.end_id
    assert reasoning.reference == reasoning.rollout, "its context differs, which no probe sees"


def test_metrics_name_every_probe_and_view_and_leave_out_what_one_prompt_cannot_tell(
    encoder, settings, group_of, response
):
    groups = [group_of(i, response(" red one two three"), response(" red")) for i in range(6)]
    metrics = probe_metrics(group_views(groups, encoder, settings))
    assert set(metrics) == {f"discriminator/probe/{probe}/{view}" for probe in PROBES for view in VIEW_NAMES}
    assert metrics["discriminator/probe/length/perception"] == 1.0
    assert metrics["discriminator/probe/length/reasoning"] == 0.5
    assert probe_metrics(group_views(groups[:1], encoder, settings)) == {}


@pytest.mark.parametrize(
    ("probe", "accuracy", "warned"),
    [(0.95, 0.99, True), (0.9, 0.99, False), (0.52, 0.51, False), (0.99, 0.9, True)],
)
def test_a_shortcut_is_warned_of_if_it_is_as_good_as_the_discriminator_and_good_at_all(probe, accuracy, warned):
    metrics = {"discriminator/probe/length/reasoning": probe, "discriminator/pair_accuracy/reasoning": accuracy}
    found = shortcut_warnings(metrics, margin=0.05)
    assert len(found) == warned
    if found:
        assert found[0].startswith(f"length alone orders {probe:.2f} of the held-out reasoning pairs")
        assert "discriminator.length_debias" in found[0]


class UnevenEncoder(Encoder):
    """Ends every second text otherwise: a fault of the kind the canary is there for."""

    calls = 0

    def response(self, text: str) -> list[int]:
        self.calls += 1
        ids = super().response(text)
        return ids if self.calls % 4 in (1, 2) else [*ids[:-2], ids[-1]]


def test_the_canary_is_silent_on_a_healthy_judge_and_names_view_and_prompt_of_a_sick_one(
    build, encoder, tiny_folder, group_of, response
):
    group = group_of(3, response(), response(" green"))
    assert check_canary(build(), encoder, group) == 0.0
    with pytest.raises(CanaryBreach, match="prompt prompt-3: the perception of its reference scores"):
        check_canary(build(), UnevenEncoder(tiny_folder, 128), group)


def test_the_canary_sees_scores_that_depend_on_more_than_the_text(build, encoder, group_of, response, monkeypatch):
    model = build(head_dropout=0.5)
    group = group_of(3, response(), response(" green"))
    assert check_canary(model.train(), encoder, group) == 0.0
    monkeypatch.setattr(model, "eval", lambda: model)  # dropout stays on
    with pytest.raises(CanaryBreach, match="perception of its reference scores"):
        check_canary(model.train(), encoder, group)


def test_the_canary_takes_a_score_that_is_no_number_for_a_breach(build, encoder, group_of, response):
    model = build()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(CanaryBreach, match="nan"):
        check_canary(model, encoder, group_of(0, response(), response(" green")))


def test_the_canary_runs_at_the_start_and_every_so_many_steps(train, group_of, response):
    trainer = train(canary_every=2)
    groups = [group_of(0, response(), response(" green"))]
    seen = ["discriminator/canary_gap" in trainer.learn(groups, warming=True) for _ in range(4)]
    assert seen == [True, False, True, False]


def test_a_breach_stops_the_training_before_the_update(train, tiny_folder, group_of, response):
    trainer = train()
    trainer.encoder = UnevenEncoder(tiny_folder, 128)
    with pytest.raises(CanaryBreach):
        trainer.learn([group_of(0, response(), response(" green"))])
    assert trainer.version == 0


def test_an_examination_holds_accuracy_calibration_probes_and_the_worst_pairs(build, encoder, group_of, response):
    model = build()
    reference = response(" red one two", " max", " one")
    groups = [group_of(i, reference, response(" blue"), "broken", reference) for i in range(6)]
    found = examine(model, encoder, groups, 0, worst=3, margin=0.05)
    for view in VIEW_NAMES:
        assert 0 <= found.metrics[f"discriminator/calibration_error/{view}"] <= 1
        assert f"discriminator/pair_accuracy/{view}" in found.metrics
        assert f"discriminator/probe/format/{view}" in found.metrics
    assert found.warnings == shortcut_warnings(found.metrics, 0.05)
    judged = judge(model, encoder, groups, 0)
    assert found.worst == [row for view in DEFAULT_VIEWS for row in worst_pairs(judged, view, 3)]


def test_the_worst_pairs_are_wrong_ordered_and_say_which_they_are(build, encoder, group_of, response):
    model = build()
    with torch.no_grad():
        model.head.weight.zero_()
    model.settings = model.settings.model_copy(update={"likelihood_weight": 0.5})
    reference = response(" red one two three", " max", " one")
    groups = [group_of(i, reference, "broken", response(" red"), reference, response(" red one")) for i in range(3)]
    judged = judge(model, encoder, groups, 0)
    rows = worst_pairs(judged, DEFAULT_VIEWS[0], 4)
    gaps = [row["gap"] for row in rows]
    assert len(rows) == 4 and gaps == sorted(gaps) and gaps[-1] < 0, "a shorter caption is likelier"
    assert len(worst_pairs(judged, DEFAULT_VIEWS[0], 100)) == 6, "neither the identical nor the invalid ones"
    first = rows[0]
    group = next(g for g in groups if g.id == first["group_id"])
    verdict = next(j.group for j in judged if j.group.id == group.id).verdicts[first["rollout"]]
    assert first["prompt_id"] == group.prompt.id and first["rollout"] in (1, 3)
    assert first["rollout_score"] == pytest.approx(verdict.scores["perception"])
    assert first["gap"] == pytest.approx(verdict.reference_scores["perception"] - verdict.scores["perception"])
    assert first["reference"] == "<caption> red one two three</caption>" and first["response"].startswith("<caption>")
    assert base64.b64decode(first["image"]) == group.prompt.images[0]
    json.dumps(rows)


def test_calibration_leaves_identical_pairs_out(build, encoder, group_of, response):
    model = build()
    same, other = group_of(0, response(), response()), group_of(1, response(), response(" green"))
    assert calibration_metrics(judge(model, encoder, [same], 0)) == {}
    both, alone = (calibration_metrics(judge(model, encoder, groups, 0)) for groups in ([same, other], [other]))
    assert both == pytest.approx(alone)
