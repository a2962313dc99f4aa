"""From responses to judged sequences: none of the ways in which the published code told the sides apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.discriminator.scorer import BadReference, group_views
from prism_ray.discriminator.segments import distinct, judged_batch, judged_batches, seen_prompts, view_sequences
from prism_ray.response import render

VIEW_NAMES = tuple(view.name for view in DEFAULT_VIEWS)

PARTS = st.text(alphabet=" red1\n.é", max_size=40).filter(str.strip)


@pytest.fixture
def prompt(encoder, prompt_of, response):
    return encoder.prompt(prompt_of(0, response()))


def decoded(encoder, ids) -> str:
    return b"".join(encoder.pieces[i] for i in ids).decode()


def test_a_reference_and_a_rollout_take_the_same_path(encoder, group_of, response, settings):
    text = response()
    (views,) = group_views([group_of(0, text, text)], encoder, settings)
    for view in VIEW_NAMES:
        assert views.reference.sequences[view].key == views.rollouts[0].sequences[view].key


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(PARTS, PARTS, PARTS)
def test_every_sequence_ends_in_the_end_token_and_holds_its_view(encoder, prompt, settings, caption, think, answer):
    wide = settings.model_copy(update={"max_segment_tokens": 10_000})
    views = view_sequences(prompt, render(caption, think, answer), encoder, wide)
    whole = {"perception": f"<caption>{caption}</caption>"}
    whole["reasoning"] = f"<think>{think}</think><answer>{answer}</answer>"
    for view, sequence in views.sequences.items():
        assert sequence.token_ids[-1] == encoder.end_id and encoder.end_id not in sequence.token_ids[:-1]
        assert decoded(encoder, sequence.token_ids[sequence.start : sequence.stop]) == whole[view]
        assert sequence.stop == len(sequence.token_ids) - 1
    assert (
        decoded(encoder, views.sequences["reasoning"].token_ids[: views.sequences["reasoning"].start])
        == whole["perception"]
    )


def test_the_ids_of_a_prompt_are_taken_only_where_the_judge_sees_the_same_prompt(
    encoder, prompt_of, response, settings
):
    """What is judged after it is tokenised by the judge itself."""
    plain, blind = prompt_of(0, response()), settings.model_copy(update={"sees_images": False})
    travelled = encoder.tokenised(plain)
    marked = replace(travelled, token_ids=(*travelled.token_ids, encoder.end_id))

    def seen(prompt, how):
        return seen_prompts([prompt], encoder, how)[0].token_ids.tolist()

    assert seen(travelled, settings) == seen(plain, settings)
    assert seen(marked, settings) == [*seen(plain, settings), encoder.end_id], "the prompt's own ids were not used"
    assert seen(marked, blind) == seen(plain, blind) != seen(plain, settings)


def test_without_context_the_caption_is_not_in_the_reasoning(encoder, prompt, response, settings, in_context):
    alone = in_context(settings, "none")
    one, two = (view_sequences(prompt, response(caption=c), encoder, alone) for c in (" red", " blue two"))
    assert one.sequences["reasoning"].token_ids == two.sequences["reasoning"].token_ids
    assert one.sequences["perception"].token_ids != two.sequences["perception"].token_ids


def test_what_lies_between_and_around_the_views_is_seen_by_no_judge(encoder, prompt, response, settings):
    text = response()
    spaced = " \n" + text.replace("</caption><think>", "</caption>\n\n<think>") + "\n"
    plain, other = (view_sequences(prompt, t, encoder, settings) for t in (text, spaced))
    for view in VIEW_NAMES:
        assert plain.sequences[view].key == other.sequences[view].key


def test_both_sides_are_cut_at_the_same_length_and_still_end_in_the_end_token(encoder, group_of, response, settings):
    short = settings.model_copy(update={"max_segment_tokens": 3})
    long = response(caption=" red one two three four", think=" one two three four")
    (views,) = group_views([group_of(0, long, long)], encoder, short)
    for side in (views.reference, *views.rollouts):
        for sequence in side.sequences.values():
            assert sequence.stop - sequence.start == 3
            assert sequence.token_ids[-1] == encoder.end_id
        assert side.sequences["reasoning"].start == 3


def test_an_invalid_response_is_a_value_with_a_reason(encoder, prompt, settings):
    views = view_sequences(prompt, "<caption> red</caption>", encoder, settings)
    assert not views.valid and views.reason == "missing <think>" and not views.sequences


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_a_special_token_in_the_text_makes_a_response_invalid(encoder, prompt, response, settings, token):
    views = view_sequences(prompt, response(think=f" one {token} two"), encoder, settings)
    assert not views.valid and "special token in the reasoning view" in views.reason


def test_a_malformed_reference_is_refused_by_name(encoder, group_of, response, settings):
    with pytest.raises(BadReference, match=r"prompt-3: its reference is malformed \(missing </answer>\)"):
        group_views([group_of(3, response().removesuffix("</answer>"), response())], encoder, settings)


def test_the_likelihood_counts_the_views_own_tokens_only(encoder, prompt, response, settings):
    views = view_sequences(prompt, response(), encoder, settings)
    sequences = list(views.sequences.values())
    judged = judged_batch(sequences)
    for row, sequence in enumerate(sequences):
        scored = judged.batch.response_ids_BR[row][judged.scored_BR[row]]
        assert tuple(scored.tolist()) == sequence.token_ids[sequence.start : sequence.stop]
    assert not bool((judged.scored_BR & ~judged.batch.response_mask_BR).any())


def test_batches_keep_the_budget_and_cover_every_sequence_once(encoder, prompt, response, settings):
    texts = [response(think=" one" * n) for n in range(1, 9)]
    sequences = [s for t in texts for s in view_sequences(prompt, t, encoder, settings).sequences.values()]
    batches = judged_batches(sequences, token_budget=40)
    assert len(batches) > 1 and all(b.batch.computed_tokens <= 40 for b in batches)
    assert sorted(i for b in batches for i in b.batch.indices) == list(range(len(sequences)))
    for b in batches:
        wanted = [VIEW_NAMES.index(sequences[i].view) for i in b.batch.indices]
        assert torch.equal(b.view_B, torch.tensor(wanted))


def test_repeated_sequences_are_found(encoder, prompt, prompt_of, response, settings):
    elsewhere = encoder.prompt(prompt_of(1, response()))
    one, two, three = (
        view_sequences(p, response(), encoder, settings).sequences["reasoning"] for p in (prompt, prompt, elsewhere)
    )
    unique, rows = distinct([one, two, three])
    assert len(unique) == 2 and rows == [0, 0, 1]
