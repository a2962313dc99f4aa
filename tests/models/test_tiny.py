"""The tiny model's folder: complete, loadable by the Auto classes, deterministic, with the tokens it promises."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from prism_ray.config.models import TinyModelSettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.models.tiny import build_tiny
from prism_ray.response import locate, parse, piece_table

WORDS = ["max", "of", "red", "green", "blue", "none", ":", ".", ";", *"ABCDEF", *(str(i) for i in range(12))]
RESPONSE = "<caption> A red 8 B blue 2</caption><think> red : A 8 . max 8 ; blue : B 2</think><answer> 8 11</answer>"


def build(folder: Path, seed: int = 0) -> Path:
    build_tiny(folder, WORDS, TinyModelSettings(), seed)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_each_word_with_its_space_is_one_token(tokenizer):
    for word in [*WORDS, "<caption>", "</answer>"]:
        text = word if word.startswith("<") else f" {word}"
        assert len(tokenizer(text).input_ids) == 1, word
    assert len(tokenizer(RESPONSE).input_ids) == RESPONSE.count(" ") + 6


@pytest.mark.parametrize("text", [RESPONSE, "Übermut\n\ttäte ½ 日本 <caption", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tags_are_ordinary_tokens_and_views_can_be_located(tokenizer):
    ids = tokenizer(RESPONSE).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == RESPONSE
    pieces = piece_table(tokenizer)
    located = locate([pieces[i] for i in ids], DEFAULT_VIEWS)
    assert located.parts == parse(RESPONSE).parts
    low, high = located.spans["perception"]
    assert tokenizer.decode(ids[low:high]) == "<caption> A red 8 B blue 2</caption>"


def test_end_and_padding_are_different_tokens(folder: Path, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_auto_classes_load_it_and_it_generates_from_an_image(folder: Path):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": " max of red"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    image = Image.fromarray(np.zeros((64, 96, 3), np.uint8))
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert inputs["input_ids"].shape == (1, 19), "a longer prompt costs every later stage time"
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= 22


def test_plain_text_contents_render_too(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "max"}, {"role": "user", "content": "of"}], tokenize=False
    )
    assert text == "<|im_start|>system\nmax<|im_end|>\n<|im_start|>user\nof<|im_end|>\n"


def test_it_has_about_three_quarters_of_a_million_parameters(folder: Path):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.8e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_weights_depend_on_the_seed_only(folder: Path, tmp_path: Path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert digest(build(tmp_path / "again")) == digest(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert digest(build(tmp_path / "other", seed=1)) != digest(folder)


def test_a_rotary_section_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="mrope_section"):
        build_tiny(tmp_path, WORDS, TinyModelSettings(mrope_section=(6, 6, 6)), 0)
