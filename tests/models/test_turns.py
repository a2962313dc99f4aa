"""Conversations of several turns: what the learner computes of them is what one long prompt would give."""

from dataclasses import replace

import jinja2
import numpy as np
import pytest
import torch

from prism_ray.models.batch import Sample, collate, collate_shared
from prism_ray.models.encode import BadImage, Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.turns import collapsed, continuation
from prism_ray.records import Prompt, Rollout

FIRST, SECOND = " max of red", " count of blue 7"
MORE = {"role": "user", "content": "<image> min of<image> green"}


@pytest.fixture(scope="module")
def encoder(dense_folder):
    return Encoder(dense_folder, 300)


@pytest.fixture(scope="module")
def model(dense_folder):
    return load_policy(dense_folder).eval()


@pytest.fixture(scope="module")
def talk(encoder, ask, picture):
    """Makes a sample of two turns, later images between them."""
    prompt = ask("p", picture(0), question=" count of blue")
    encoded = encoder.prompt(prompt)

    def make(*images, second=SECOND, message=MORE):
        first = encoder.response(FIRST)
        answer = encoder.answer("p", message, images, ended=True).tolist()
        ids, second = np.asarray([*first, *answer, *encoder.response(second)]), encoder.response(second)
        mask = torch.tensor([True] * len(first) + [False] * len(answer) + [True] * len(second))
        later = encoder.later(encoded, ids, images) if images else None
        return prompt, Sample(encoded, torch.from_numpy(ids), mask, later)

    return make


def as_one_prompt(encoder, prompt, images, message=MORE):
    """The conversation up to the second response, as a prompt of its own."""
    messages = (*prompt.messages, {"role": "assistant", "content": FIRST}, message)
    return encoder.prompt(replace(prompt, messages=messages, images=(*prompt.images, *images)))


def logp(model, batch):
    with torch.no_grad():
        return response_logprobs(model, batch)[0]


def test_a_conversation_is_encoded_as_one_prompt_would_be(encoder, talk, picture):
    images = (picture(1, 64, 160), picture(2))
    prompt, sample = talk(*images)
    whole = as_one_prompt(encoder, prompt, images)
    size = len(whole.token_ids)
    batch = collate([sample])
    assert torch.equal(batch.input_ids_BT[0, :size], whole.token_ids)
    assert torch.equal(batch.position_ids_3BT[:, 0, :size], whole.position_ids)
    assert torch.equal(batch.pixel_values, whole.pixel_values) and torch.equal(batch.grid_thw, whole.grid_thw)
    assert torch.equal(batch.visual_positions_V, whole.visual_spots)
    assert batch.visual_sources_V.tolist() == list(range(len(whole.visual_spots)))
    after = whole.next_position + torch.arange(batch.input_ids_BT.shape[1] - size)
    assert torch.equal(batch.position_ids_3BT[:, 0, size:], after.expand(3, -1))


def test_only_what_the_policy_wrote_is_scored_and_it_has_read_the_rest(encoder, model, talk, picture):
    images = (picture(1, 64, 160), picture(2))
    prompt, sample = talk(*images)
    first, second = (torch.tensor(encoder.response(text)) for text in (FIRST, SECOND))
    batch = collate([sample])
    assert batch.response_ids_BR[0].tolist() == [*first.tolist(), *second.tolist()]
    alone = logp(model, collate([Sample(sample.prompt, first)]))[0]
    rest = logp(model, collate([Sample(as_one_prompt(encoder, prompt, images), second)]))[0]
    torch.testing.assert_close(logp(model, batch)[0], torch.cat((alone, rest)), atol=1e-5, rtol=0)


def test_beginnings_are_shared_up_to_the_first_image_that_came_later(encoder, model, talk, picture):
    """Same tokens, other pictures; other sizes with as many tokens; none; and another second response."""
    one, other, tall, wide = picture(1), picture(2), picture(3, 64, 96), picture(3, 96, 64)
    answers = [(one, other), (other, one), (one, other), (tall, one), (wide, one)]
    samples = [talk(*images)[1] for images in answers]
    samples.append(talk(one, other, second=" 7 7")[1])
    samples.append(talk(message={"role": "user", "content": " min of green"})[1])
    assert len({tuple(s.response_ids.tolist()) for s in samples[:5]}) == 1
    plain = Sample(samples[0].prompt, torch.tensor(encoder.response(FIRST)[:3]))
    samples.insert(3, plain)
    shared = collate_shared(samples)
    assert shared.computed_tokens < sum(s.length for s in samples) - 5 * len(plain.prompt.token_ids)
    assert torch.equal(shared.visual_positions_V, shared.visual_positions_V.sort().values)
    together, padded = logp(model, shared), logp(model, collate(samples))
    torch.testing.assert_close(together, padded, atol=1e-5, rtol=0)
    for row, sample in enumerate(samples):
        alone = logp(model, collate([sample]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=0)
    first = len(encoder.response(FIRST))
    assert torch.equal(padded[0, :first], padded[1, :first])
    assert (padded[0, first:] - padded[1, first:]).abs().max() > 1e-4, "the later images do not reach the model"
    assert (padded[4, first:] - padded[5, first:]).abs().max() > 1e-4


def test_images_that_are_not_those_of_the_tokens_are_refused(encoder, talk, picture):
    prompt, sample = talk(picture(1), picture(2))
    ids = sample.response_ids.numpy()
    for images in [(picture(1),), (picture(1), picture(2, 64, 160)), ()]:
        with pytest.raises(ValueError, match="image placeholders of a later turn are not those of its"):
            encoder.later(sample.prompt, ids, images)
    with pytest.raises(BadImage, match="prompt p: image 1 does not decode"):
        encoder.answer("p", MORE, (picture(1), b"no image"), True)
    with pytest.raises(BadImage, match="prompt p: 2 <image> markers but 1 images"):
        encoder.answer("p", MORE, (picture(1),), True)


def test_an_engine_is_asked_to_go_on_from_the_tokens_that_were_sampled(encoder, talk, picture):
    images = (picture(1, 64, 160), picture(2))
    prompt, sample = talk(*images)
    ids = sample.response_ids.numpy().astype(np.int32)
    begun = Rollout("p", 0, ids, ids, ids, ids, "", "abort", images=images)
    asked = encoder.going_on(encoder.engine_prompt(prompt), begun)
    image = encoder.processor.image_token_id
    assert asked["prompt_token_ids"].count(image) == len(asked["multi_modal_data"]["image"]) == 3
    whole = encoder.engine_prompt(
        Prompt("w", (*prompt.messages, {"role": "assistant", "content": FIRST}, MORE), (*prompt.images, *images))
    )
    assert asked["prompt_token_ids"][: len(whole["prompt_token_ids"])] == whole["prompt_token_ids"]
    assert encoder.going_on(encoder.engine_prompt(encoder.tokenised(prompt)), begun) == asked
    plain = encoder.going_on(encoder.engine_prompt(prompt), replace(begun, token_ids=ids[:3], images=()))
    assert len(plain["multi_modal_data"]["image"]) == 1


def test_placeholders_are_collapsed_one_for_each_image():
    assert collapsed(np.array([9, 9, 1, 9, 2, 2, 9, 9, 9]), 9).tolist() == [9, 1, 9, 2, 2, 9]
    assert collapsed(np.array([], np.int32), 9).tolist() == []


TEMPLATE = jinja2.Environment(keep_trailing_newline=True).from_string(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def chatml(messages):
    return TEMPLATE.render(messages=messages)


def test_continuation_is_what_the_template_puts_between_two_responses():
    message = {"role": "user", "content": "too low"}
    between = continuation(chatml, message, "<|im_end|>", ended=False)
    assert between == "<|im_end|>\n<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n"
    assert continuation(chatml, message, "<|im_end|>", ended=True) == between.removeprefix("<|im_end|>")
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3"}, message]
    assert chatml(conversation) == chatml(conversation[:1]) + "3" + between
    with pytest.raises(ValueError, match="does not end a response with '</s>'"):
        continuation(chatml, message, "</s>", ended=True)
