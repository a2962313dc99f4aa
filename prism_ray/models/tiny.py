"""A tiny Qwen3-VL built from nothing and saved as an ordinary Hugging Face folder.

Tokenizer, processor, chat template and configuration are complete, so that AutoProcessor,
AutoModelForImageTextToText and vLLM load the folder like any published checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from prism_ray.config.models import TinyModelSettings
from prism_ray.response import TAGS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
PATCH, MERGE, FRAMES = 16, 2, 2
"""Pixels of a patch's side, patches merged along a side into one visual token, frames of a patch (Qwen3-VL)."""

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '" + START + "' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '" + VISION_START + IMAGE + VISION_END + "' }}"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '" + END + "\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + START + "assistant\n' }}{%- endif -%}"
)


def build_tiny(folder: Path, words: Iterable[str], settings: TinyModelSettings, seed: int) -> None:
    """Write an untrained tiny Qwen3-VL into `folder`: configuration, weights, tokenizer, processor, chat template.

    Each of `words` becomes one token when it follows a space. The weights depend on `settings`, `words` and `seed`
    only; torch's global random state is left as it was.
    """
    tokenizer = build_tokenizer(words)
    model = build_model(tokenizer, settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _processor(tokenizer, settings).save_pretrained(folder)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has each of `words` with its leading space as one token.

    The special tokens are Qwen's; the response format's tags are ordinary tokens, so that they survive decoding.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,  # never reached: training ends when every word is a single token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = sorted({f" {word}" for word in words} | set(ROLES))
    core.train_from_iterator(pieces, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL if t not in (PAD, END)],
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(
    tokenizer: PreTrainedTokenizerFast, settings: TinyModelSettings, seed: int
) -> Qwen3VLForConditionalGeneration:
    """The untrained model for `tokenizer`, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(_config(tokenizer, settings))
        _initialise(model, settings)
    ids = tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(eos_token_id=ids(END), pad_token_id=ids(PAD), do_sample=True)
    return model.eval()


def _config(tokenizer: PreTrainedTokenizerFast, s: TinyModelSettings) -> Qwen3VLConfig:
    ids = {token: int(tokenizer.added_tokens_encoder[token]) for token in SPECIAL}
    if sum(s.mrope_section) * 2 != s.head_dim:
        raise ValueError(f"mrope_section {s.mrope_section} must add up to half of head_dim {s.head_dim}")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": s.hidden_size,
        "intermediate_size": s.mlp_size,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.key_value_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": s.rope_theta,
            "mrope_section": list(s.mrope_section),
            "mrope_interleaved": True,
        },
        "pad_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    vision = {
        "depth": s.vision_depth,
        "hidden_size": s.vision_hidden_size,
        "num_heads": s.vision_heads,
        "intermediate_size": s.vision_mlp_size,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "out_hidden_size": s.hidden_size,
        "num_position_embeddings": s.vision_positions,
        "deepstack_visual_indexes": list(s.deepstack),
        "dtype": "float32",
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        dtype="float32",
    )


def _initialise(model: nn.Module, settings: TinyModelSettings) -> None:
    """Weights of variance 1/fan-in (the default 0.02 is far too small at this width), embeddings as configured."""
    for name, module in model.named_modules():
        if name.endswith("lm_head"):
            continue  # tied to the embedding
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            vision = name.endswith("pos_embed")
            nn.init.normal_(module.weight, std=settings.vision_position_std if vision else settings.embedding_std)


def _processor(tokenizer: PreTrainedTokenizerFast, settings: TinyModelSettings) -> Qwen3VLProcessor:
    shape = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**shape),
        chat_template=CHAT_TEMPLATE,
    )
