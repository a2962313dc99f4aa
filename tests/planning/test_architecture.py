"""The parameters of a model, worked out, are those that transformers builds."""

import json
import re

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LoraSettings
from prism_ray.config.models import TinyModelSettings
from prism_ray.models.adapters import add_lora, freeze
from prism_ray.models.tiny import build_tiny
from prism_ray.models.upcycle import Upcycling
from prism_ray.planning.architecture import PUBLISHED, Architecture, PlanError, architecture_of, tiny
from prism_ray.testbed.words import vocabulary

VISION = r"^model\.visual\."


def config_of(a: Architecture) -> Qwen3VLConfig:
    """A configuration in transformers' own words."""
    text = {
        "vocab_size": a.vocabulary, "hidden_size": a.hidden, "intermediate_size": a.mlp, "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim,
    }  # fmt: skip
    vision = {
        "depth": a.vision_layers, "hidden_size": a.vision_hidden, "intermediate_size": a.vision_mlp, "num_heads": 16,
        "out_hidden_size": a.hidden, "num_position_embeddings": a.vision_positions,
        "deepstack_visual_indexes": list(range(a.deepstack)),
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=a.tied)


def sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_that_transformers_gives_it(name):
    with torch.device("meta"):
        built = Qwen3VLForConditionalGeneration(config_of(PUBLISHED[name]))
    assert PUBLISHED[name].parameters == sizes(built)


def test_the_published_models_are_as_large_as_their_names_say():
    billions = {name: round(a.total / 1e9, 2) for name, a in PUBLISHED.items()}
    assert billions == {"qwen3-vl-2b": 2.13, "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77, "qwen3-vl-32b": 33.36}


@pytest.mark.parametrize("settings", [{}, {"routing": "view"}, {"experts": 2, "top_k": 1}, {"backbone": "dense"}])
def test_an_upcycled_model_has_the_parameters_that_the_discriminator_gets(settings):
    made = DiscriminatorSettings(**settings)
    start = PUBLISHED["qwen3-vl-2b"]
    with torch.device("meta"):
        if made.backbone == "dense":
            backbone = Qwen3VLForConditionalGeneration(config_of(start))
        else:
            config = Upcycling(made.experts, made.top_k, 0.0, 0.0, 0).config(config_of(start))
            backbone = Qwen3VLMoeForConditionalGeneration(config)
    own = {"head.weight": 2 * start.hidden} | ({"view_embedding.weight": 4096} if made.routing == "view" else {})
    assert start.upcycled(made).parameters == sizes(backbone) | own


def test_what_trains_is_what_freezing_and_adapters_leave():
    a = PUBLISHED["qwen3-vl-2b"]
    with torch.device("meta"):
        frozen, adapted = (Qwen3VLForConditionalGeneration(config_of(a)) for _ in range(2))
    freeze(frozen, [VISION])
    freeze(adapted, [VISION])
    add_lora(adapted, LoraSettings(rank=4))

    def trainable(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert a.trained([VISION]) == trainable(frozen) < a.total
    assert a.trained([VISION], LoraSettings(rank=4)) == trainable(adapted)


def test_a_folder_says_how_large_its_model_is(tmp_path):
    build_tiny(tmp_path, vocabulary(), TinyModelSettings(), seed=0)
    found = architecture_of(tmp_path, "policy")
    built = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert found.parameters == sizes(built)
    assert abs(tiny(TinyModelSettings()).total / found.total - 1) < 0.1, "the testbed's own, before it is built"


def test_a_model_that_is_not_there_is_known_by_its_name_or_refused(tmp_path):
    assert architecture_of(tmp_path / "Qwen3-VL-8B-Instruct", "policy") is PUBLISHED["qwen3-vl-8b"]
    with pytest.raises(PlanError, match=re.escape(f"policy: {tmp_path / 'mine'} is not there")):
        architecture_of(tmp_path / "mine", "policy")


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "llama"}), json.dumps({"model_type": "qwen3_vl"})])
def test_a_config_of_something_else_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PlanError, match=r"discriminator.policy: .*config.json is not that of a Qwen3-VL model"):
        architecture_of(tmp_path, "discriminator.policy")
