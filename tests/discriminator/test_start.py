"""A judge may start from another model than the policy, if it reads and writes alike."""

from __future__ import annotations

import json
import shutil

import pytest

from prism_ray.config.models import TinyModelSettings
from prism_ray.discriminator.start import judge_start
from prism_ray.models.tiny import build_tiny

SMALLER = TinyModelSettings(hidden_size=32, layers=1, heads=1, key_value_heads=1, mlp_size=48, vision_mlp_size=64)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smaller")
    build_tiny(folder, ["red", "green", "blue", "one", "two", "three", "four", "max", "count"], SMALLER, seed=1)
    return folder


def test_without_a_model_of_its_own_the_judge_starts_from_the_policy(tiny_folder):
    assert judge_start(tiny_folder, None) == tiny_folder


def test_a_smaller_model_that_reads_alike_is_taken(tiny_folder, smaller):
    assert judge_start(tiny_folder, smaller) == smaller


def test_another_tokenizer_is_refused(tiny_folder, tmp_path):
    build_tiny(tmp_path, ["other", "words"], SMALLER, seed=1)
    with pytest.raises(ValueError, match=r"discriminator\.policy: .* has another tokenizer than the policy"):
        judge_start(tiny_folder, tmp_path)


def test_another_format_is_refused(tiny_folder, smaller, tmp_path):
    shutil.copytree(smaller, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ValueError, match="has another chat template than the policy"):
        judge_start(tiny_folder, tmp_path / "other")


def test_a_mixture_of_experts_and_a_missing_folder_are_refused(tiny_folder, smaller, tmp_path):
    shutil.copytree(smaller, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a Qwen3VLMoeForConditionalGeneration; give a dense model"):
        judge_start(tiny_folder, tmp_path / "moe")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        judge_start(tiny_folder, tmp_path / "nowhere")
