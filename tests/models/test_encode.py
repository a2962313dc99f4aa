import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from prism_ray.codec import decode, encode
from prism_ray.models.encode import BadImage, Encoder, PromptTooLong, rope_positions
from prism_ray.models.load import copy_policy, load_policy
from prism_ray.models.template import set_system_turn
from prism_ray.models.tokens import writer_of
from prism_ray.records import Prompt


def hugging_face(folder, prompt):
    """What AutoProcessor makes of the prompt."""
    import io

    processor = AutoProcessor.from_pretrained(folder)
    content = prompt.messages[0]["content"]
    text = content.replace("<image>", "")
    parts = [{"type": "image"}] * content.count("<image>") + [{"type": "text", "text": text}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(data)) for data in prompt.images] or None
    return processor(text=[chat], images=images, return_tensors="pt")


@pytest.fixture(scope="module")
def encoder(dense_folder):
    return Encoder(dense_folder, max_prompt_tokens=200)


def with_odd_sizes(prompts, picture):
    big = Prompt(
        "odd", ({"role": "user", "content": "<image><image> max"},), (picture(5, 70, 50), picture(6, 400, 300))
    )
    return [*prompts, big]


def test_a_prompt_is_encoded_as_the_hugging_face_processor_does(encoder, dense_folder, prompts, picture):
    prompts = with_odd_sizes(prompts, picture)
    model = load_policy(dense_folder).model
    for prompt, ours in zip(prompts, encoder.prompts(prompts), strict=True):
        theirs = hugging_face(dense_folder, prompt)
        assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
        positions = torch.arange(len(ours.token_ids)).expand(3, -1)
        if prompt.images:
            torch.testing.assert_close(ours.pixel_values, theirs["pixel_values"], atol=1e-6, rtol=0)
            assert torch.equal(ours.grid_thw, theirs["image_grid_thw"])
            grids = {"image_grid_thw": theirs["image_grid_thw"], "mm_token_type_ids": theirs["mm_token_type_ids"]}
            positions = model.get_rope_index(theirs["input_ids"], **grids)[0][:, 0]
        else:
            assert ours.pixel_values.shape == (0, 1536) and ours.grid_thw.shape == (0, 3)
        assert torch.equal(ours.position_ids, positions)


def test_images_that_fit_do_not_take_the_slow_path(encoder, prompts, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the Hugging Face processor was called")

    monkeypatch.setattr(encoder, "_image_processor", _Frozen(encoder._image_processor, refuse))
    assert len(encoder.prompts(prompts)) == len(prompts)


class _Frozen:
    """Attributes of the processor without its call."""

    def __init__(self, processor, call):
        self._processor, self._call = processor, call

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)


def test_encoding_together_equals_encoding_alone(encoder, prompts):
    for prompt, together in zip(prompts, encoder.prompts(prompts), strict=True):
        alone = encoder.prompt(prompt)
        assert torch.equal(alone.pixel_values, together.pixel_values)
        assert torch.equal(alone.token_ids, together.token_ids)


def test_the_engine_gets_one_placeholder_for_each_image(encoder, prompts):
    prompt = encoder.engine_prompt(prompts[3])
    assert prompt["prompt_token_ids"].count(encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 3
    assert [image.size for image in prompt["multi_modal_data"]["image"]] == [(96, 64), (64, 64), (96, 64)]
    assert "multi_modal_data" not in encoder.engine_prompt(prompts[0])


def test_markers_become_images_where_they_stand(encoder, picture):
    content = " red <image> blue <image>"
    prompt = Prompt("p", ({"role": "user", "content": content},), (picture(0), picture(1)))
    text = encoder.tokenizer.decode(encoder.engine_prompt(prompt)["prompt_token_ids"])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f" red {image} blue {image}<|im_end|>" in text


def test_a_response_ends_with_the_end_token_and_its_pieces_are_its_text(encoder):
    text = "<caption> A red 8</caption><think> max 8</think><answer> 8 é</answer>"
    ids = encoder.response(text)
    assert ids[-1] == encoder.end_id
    assert b"".join(encoder.pieces[i] for i in ids).decode() == text


def test_the_policy_may_end_but_not_sample_other_special_tokens(encoder):
    named = {t: encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|im_start|>")}
    assert set(named.values()) <= set(encoder.banned_ids)
    assert encoder.end_id not in encoder.banned_ids
    assert encoder.tokenizer.convert_tokens_to_ids("<caption>") not in encoder.banned_ids


@pytest.mark.parametrize("data", [b"", b"not an image", "truncated"])
def test_an_image_that_does_not_decode_names_its_prompt(encoder, ask, picture, data):
    bad = picture(0)[:200] if data == "truncated" else data
    with pytest.raises(BadImage, match="prompt broken: image 1 does not decode"):
        encoder.prompts([ask("fine", picture(0)), ask("broken", picture(0), bad)])


def test_images_and_markers_must_match(encoder, picture):
    prompt = Prompt("p7", ({"role": "user", "content": "<image> max"},), (picture(0), picture(1)))
    with pytest.raises(BadImage, match="prompt p7: 1 <image> markers but 2 images"):
        encoder.prompt(prompt)


def test_a_prompt_that_is_too_long_names_itself_and_the_limit(encoder, ask, picture):
    with pytest.raises(PromptTooLong, match="prompt wordy: .* exceed the limit of 200 tokens"):
        encoder.prompt(ask("wordy", question=" max" * 300))
    with pytest.raises(PromptTooLong, match="prompt large"):
        encoder.prompt(ask("large", *[picture(0, 256, 256)] * 4))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Encoder(tmp_path, 100)


def test_rope_positions_of_adjacent_images_do_not_overlap():
    positions = rope_positions(2, (0, 1), ((1, 4, 6), (1, 2, 2)), 2)
    assert positions.shape == (3, 7)
    assert np.array_equal(positions[:, -1], [3, 3, 3])


def test_a_length_is_known_without_decoding(encoder, ask, picture, prompts):
    odd = ask("odd", picture(0, 70, 50), picture(1, 300, 30), picture(2, 5, 7))
    for prompt in (*prompts, odd):
        assert encoder.length(prompt) == len(encoder.prompt(prompt).token_ids)


def test_fitted_images_give_the_same_tensors_and_are_fitted_once(encoder, ask, picture):
    prompt = ask("odd", picture(0, 70, 50), picture(1, 96, 64), picture(2, 300, 30))
    fitted = encoder.fitted(prompt)
    before, after = encoder.prompt(prompt), encoder.prompt(fitted)
    assert torch.equal(before.token_ids, after.token_ids) and torch.equal(before.grid_thw, after.grid_thw)
    assert torch.allclose(before.pixel_values, after.pixel_values, atol=1e-6)
    assert fitted.images[1] == prompt.images[1] and fitted.images[0] != prompt.images[0]
    assert encoder.fitted(fitted) == fitted
    sizes = [image.size for image in encoder.engine_prompt(fitted)["multi_modal_data"]["image"]]
    assert all(side % 32 == 0 for size in sizes for side in size)


def test_an_image_that_its_resizing_makes_too_narrow_is_refused_by_name(encoder, ask, picture, monkeypatch):
    """9353 x 47 is within what Qwen3-VL's image processor takes, the 9344 x 32 that it makes of it is not."""
    monkeypatch.setattr(encoder._image_processor, "size", {"shortest_edge": 2**16, "longest_edge": 2**24})
    for use in (encoder.length, encoder.fitted):
        with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
            use(ask("narrow", picture(0, 9353, 47)))


def test_ten_megabytes_are_too_long_before_they_are_tokenised(encoder, ask, monkeypatch):
    monkeypatch.setattr(encoder, "tokenizer", None)
    with pytest.raises(PromptTooLong, match="prompt wordy: .* tokens exceed") as caught:
        encoder.prompt(ask("wordy", question=" max" * 2_500_000))
    assert caught.value.tokens > encoder.max_prompt_tokens


def with_a_system_turn(prompts):
    several = replace(prompts[3], messages=({"role": "system", "content": "max of red"}, *prompts[3].messages))
    return [*prompts, replace(several, id="told")]


def test_ids_that_came_with_a_prompt_are_those_that_would_be_computed(encoder, prompts, picture):
    for prompt in with_a_system_turn(with_odd_sizes(prompts, picture)):
        tokenised = decode(encode(encoder.tokenised(prompt)))
        assert tokenised == replace(prompt, token_ids=tokenised.token_ids, tokens_of=tokenised.tokens_of)
        assert list(tokenised.token_ids) == encoder.engine_prompt(prompt)["prompt_token_ids"]
        assert encoder.engine_prompt(tokenised) == encoder.engine_prompt(prompt)
        assert encoder.length(tokenised) == encoder.length(prompt) and encoder.tokenised(tokenised) == tokenised
        once, again = encoder.prompt(prompt), encoder.prompt(encoder.fitted(tokenised))
        for name in ("token_ids", "grid_thw", "position_ids", "visual_spots"):
            assert torch.equal(getattr(once, name), getattr(again, name)), name
        torch.testing.assert_close(once.pixel_values, again.pixel_values, atol=1e-6, rtol=0)


def test_nobody_tokenises_a_prompt_that_has_its_ids(encoder, prompts, monkeypatch):
    tokenised = [encoder.tokenised(prompt) for prompt in with_a_system_turn(prompts)]
    wanted = [e.token_ids.tolist() for e in encoder.prompts(tokenised)]

    def refuse(*args, **kwargs):
        raise AssertionError("a prompt was rendered again")

    monkeypatch.setattr(encoder, "_rendered", refuse)
    monkeypatch.setattr(encoder, "tokenizer", refuse)
    assert [e.token_ids.tolist() for e in encoder.prompts(tokenised)] == wanted
    with pytest.raises(AssertionError, match="rendered again"):
        encoder.prompts(prompts)


def test_ids_of_other_messages_or_of_another_checkpoint_are_not_taken(encoder, dense_folder, prompts, tmp_path):
    copy_policy(dense_folder, tmp_path / "same")
    copy_policy(dense_folder, tmp_path / "told")
    set_system_turn(tmp_path / "told", "max of red")
    same, told = Encoder(tmp_path / "same", 200), Encoder(tmp_path / "told", 200)
    assert same.writer == encoder.writer != told.writer
    for prompt in prompts:
        tokenised = encoder.tokenised(prompt)
        forged = replace(tokenised, token_ids=(*tokenised.token_ids, encoder.end_id))
        assert len(same.prompt(forged).token_ids) == len(encoder.prompt(prompt).token_ids) + 1, "these are its own"
        assert told.prompt(forged).token_ids.tolist() == told.prompt(prompt).token_ids.tolist()
        asked = ({"role": "user", "content": prompt.messages[0]["content"] + " blue"},)
        other, wanted = (encoder.prompt(replace(p, messages=asked)).token_ids.tolist() for p in (forged, prompt))
        assert other == wanted


def test_a_folder_of_weights_alone_writes_no_prompts(dense_folder, tmp_path):
    shutil.copy(dense_folder / "model.safetensors", tmp_path)
    assert writer_of(tmp_path) == "" != writer_of(dense_folder)


def test_ids_and_images_must_match_as_markers_do(encoder, prompts):
    with pytest.raises(BadImage, match="prompt many: 3 <image> markers but 2 images"):
        encoder.prompt(replace(encoder.tokenised(prompts[3]), images=prompts[3].images[:2]))
