"""Scores: what they consist of, what must not move them, what must, and that they survive a save."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.model import CARD_FILE, HEAD_FILE, load_discriminator, save_discriminator
from prism_ray.discriminator.scorer import judge, judged_metrics, score_sequences
from prism_ray.discriminator.segments import judged_batch, view_sequences
from prism_ray.models.logprobs import response_logprobs

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)


@pytest.fixture
def cut(encoder, settings, prompt_of, response):
    """Sequences of a response about the image of a seed, perception first."""

    def make(seed: int = 0, text: str | None = None, **changes):
        prompt = encoder.prompt(prompt_of(seed, response()))
        views = view_sequences(prompt, text or response(), encoder, settings.model_copy(update=changes))
        return list(views.sequences.values())

    return make


def scores_of(model, sequences):
    with torch.no_grad():
        return model(judged_batch(sequences))


def test_a_score_is_the_views_head_plus_half_the_views_log_likelihood(build, cut):
    model, sequences = build(), cut()
    judged = judged_batch(sequences)
    with torch.no_grad():
        scores = model(judged)
        logp_BR, _ = response_logprobs(model.backbone, judged.batch)
    expected = torch.stack([logp_BR[i, s.start : s.stop].sum() for i, s in enumerate(sequences)])
    torch.testing.assert_close(scores.likelihood_B, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.score_B, scores.head_B + 0.5 * expected, rtol=1e-5, atol=1e-5)
    assert scores.likelihood_B.max() < 0 and scores.head_B.abs().min() > 0


def test_the_published_form_is_the_head_alone(build, cut):
    scores = scores_of(build(likelihood_weight=0.0), cut())
    torch.testing.assert_close(scores.score_B, scores.head_B)


def test_each_view_has_its_own_row_of_the_head(build, cut):
    model, sequences = build(), cut()
    before = scores_of(model, sequences).head_B
    with torch.no_grad():
        model.head.weight[VIEW_NAMES.index("reasoning")].zero_()
    after = scores_of(model, sequences).head_B
    assert after[0] == before[0] and after[1] == 0 != before[1]


def test_the_head_is_clipped(build, cut):
    model = build(score_clip=0.01)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    assert scores_of(model, cut()).head_B.abs().tolist() == pytest.approx([0.01, 0.01])


def test_padding_and_order_in_the_batch_cannot_move_a_score(build, cut, response):
    model = build()
    sequences = [*cut(), *cut(1, response(think=" one two three four" * 4)), *cut(2, response(caption=""))]
    alone = torch.cat([scores_of(model, [s]).score_B for s in sequences])
    together = scores_of(model, sequences).score_B
    backwards = scores_of(model, sequences[::-1]).score_B.flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backwards, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score_sequences(model, sequences), alone, rtol=1e-5, atol=1e-5)


def test_the_head_reads_the_end_token_of_every_sequence(build, cut, response):
    model = build()
    short, long = cut()[0], cut(1, response(caption=" red one two three"))[0]
    seen = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    scores_of(model, [short])
    scores_of(model, [short, long])
    torch.testing.assert_close(seen[1][:1], seen[0], rtol=1e-5, atol=1e-5)


def test_canary_identical_text_gets_an_identical_score_on_either_side(build, encoder, group_of, response):
    text, other = response(), response(caption=" blue two")
    (judged,) = judge(build(), encoder, [group_of(0, text, other, text)], version=3)
    same, different = judged.group.verdicts[1], judged.group.verdicts[0]
    assert same.scores == same.reference_scores
    assert same.reward == 0.5
    assert different.scores["perception"] != different.reference_scores["perception"]


def test_canary_without_sharing_the_computation(build, cut):
    model = build()
    twice = [*cut(), *cut()]  # encoded anew: other prompt objects, so nothing is recognised as equal
    scores = score_sequences(model, twice)
    torch.testing.assert_close(scores[:2], scores[2:], rtol=1e-6, atol=1e-6)


def test_the_image_matters_in_both_views(build, cut):
    model = build()
    one, two = scores_of(model, cut(0)), scores_of(model, cut(1))
    assert ((one.likelihood_B - two.likelihood_B).abs() > 1e-4).all()
    assert ((one.head_B - two.head_B).abs() > 1e-5).all()


def test_the_caption_matters_to_the_reasoning_only_as_context(build, cut, response, settings, in_context):
    for context, matters in (("own", True), ("none", False)):
        views = in_context(settings, context).views
        model = build(views=views)
        one, two = (cut(0, response(caption=c), views=views)[1] for c in (" red one", " blue two"))
        a, b = scores_of(model, [one]).score_B, scores_of(model, [two]).score_B
        assert bool((a != b).any()) == matters


def test_dropout_is_off_when_scoring_and_the_mode_is_given_back(build, cut):
    model = build(head_dropout=0.9).train()
    first, second = (score_sequences(model, cut()) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert model.training
    noisy = {float(scores_of(model, cut()).head_B.sum()) for _ in range(5)}
    assert len(noisy) > 1


def test_invalid_rollouts_are_not_scored_and_say_why(build, encoder, group_of, response):
    (judged,) = judge(build(), encoder, [group_of(0, response(), "no format", response(" blue"))], version=7)
    bad, good = judged.group.verdicts
    assert (bad.valid, bad.reward, bad.scores, bad.reason) == (False, 0.0, {}, "missing <caption>")
    assert good.valid and set(good.scores) == set(good.reference_scores) == set(VIEW_NAMES)
    gap = good.reference_scores["perception"] - good.scores["perception"]
    assert judged_metrics([judged])["discriminator/gap/perception"] == pytest.approx(gap, rel=1e-5)
    assert judged_metrics([judged])["discriminator/valid"] == 0.5
    assert {v.judge_version for v in judged.group.verdicts} == {7}


def test_a_group_without_a_valid_rollout_has_verdicts_and_no_gap(build, encoder, group_of, response):
    (judged,) = judge(build(), encoder, [group_of(0, response(), "", "<caption>")], version=0)
    assert [v.valid for v in judged.group.verdicts] == [False, False]
    metrics = judged_metrics([judged])
    assert metrics["discriminator/valid"] == 0.0 and metrics["discriminator/groups_without_valid"] == 1.0
    assert not [name for name in metrics if "/gap/" in name or "/pair_accuracy/" in name or "/cut/" in name]


def test_the_reward_is_the_mean_of_squashed_gaps(build, encoder, group_of, response):
    (judged,) = judge(build(), encoder, [group_of(0, response(), response(" blue"))], version=0)
    verdict = judged.group.verdicts[0]
    gaps = [verdict.scores[v] - verdict.reference_scores[v] for v in VIEW_NAMES]
    assert verdict.reward == pytest.approx(torch.sigmoid(torch.tensor(gaps) / 3).mean().item(), rel=1e-5)


def test_a_saved_discriminator_scores_identically(build, cut, tiny_folder, tmp_path):
    model, sequences = build(), cut()
    save_discriminator(dict(model.named_parameters()), model, tmp_path, like=tiny_folder)
    again = load_discriminator(tmp_path).eval()
    assert again.settings == model.settings
    assert torch.equal(scores_of(again, sequences).score_B, scores_of(model, sequences).score_B)


def test_a_saved_discriminator_is_a_hugging_face_folder_in_the_published_layout(build, cut, tiny_folder, tmp_path):
    model, sequences = build(), cut()
    save_discriminator(dict(model.named_parameters()), model, tmp_path, like=tiny_folder)
    backbone = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(backbone).__name__ == "Qwen3VLMoeForConditionalGeneration"
    batch = judged_batch(sequences).batch
    with torch.no_grad():
        found, _ = response_logprobs(backbone, batch)
        expected, _ = response_logprobs(model.backbone, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    inside = model.backbone.state_dict()[name]
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")[name], inside.transpose(1, 2))
    assert (tmp_path / HEAD_FILE).is_file() and (tmp_path / "tokenizer.json").is_file()
    assert json.loads((tmp_path / CARD_FILE).read_text())["views"][1]["tags"] == ["think", "answer"]


def test_a_discriminator_refuses_to_score_otherwise_than_it_was_trained(
    build, tiny_folder, settings, in_context, tmp_path
):
    model = build()
    save_discriminator(dict(model.named_parameters()), model, tmp_path, like=tiny_folder)
    other = in_context(settings, "none")
    with pytest.raises(ValueError, match="reasoning .think . answer; none. but .* trained with .* own.; warm up again"):
        load_discriminator(tmp_path, other)
    free = settings.model_copy(update={"temperature": 1.0, "rollouts_per_update": 2})
    assert load_discriminator(tmp_path, free).settings == free


def test_a_folder_without_a_discriminator_is_named(tiny_folder):
    with pytest.raises(FileNotFoundError, match=f"no {CARD_FILE}"):
        load_discriminator(tiny_folder)
