"""What a model is made of, worked out from a few numbers: every parameter by name and size, dense and mixture.

The numbers come from a Hugging Face folder's `config.json`, or, for models that are not there yet, from the table of
published ones. No weights are read and no model is built, so that a plan takes no time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.learner import LoraSettings
from prism_ray.config.models import TinyModelSettings

PATCH_VALUES = 3 * 2 * 16 * 16
"""Numbers of one patch: colours, frames, pixels (Qwen3-VL)."""


class PlanError(ValueError):
    """Something that is needed to make a plan is not known; the message names the setting and the cure."""


@dataclass(frozen=True)
class Architecture:
    """A Qwen3-VL, dense or (with `experts`) a mixture of experts in every layer."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    vision_layers: int
    vision_hidden: int
    vision_mlp: int
    vision_positions: int = 2304
    deepstack: int = 3
    merge: int = 2
    experts: int = 0
    top_k: int = 0
    extra: tuple[tuple[str, int], ...] = ()
    """Parameters beside the backbone's, such as a discriminator's head."""

    @cached_property
    def parameters(self) -> dict[str, int]:
        """How many numbers each parameter has, by the name that transformers gives it."""
        return self._text() | self._vision() | dict(self.extra)

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Parameters of the language model that compute a token (the embedding is only looked up)."""
        text = {n: size for n, size in self._text().items() if "embed_tokens" not in n and n != "lm_head.weight"}
        share = self.top_k / self.experts if self.experts else 1.0
        used = sum(size * (share if ".experts." in name else 1.0) for name, size in text.items())
        return round(used) + self.vocabulary * self.hidden

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def patches_per_token(self) -> int:
        """Patches that are merged into one visual token."""
        return self.merge**2

    def trained(self, freeze: Sequence[str] = (), lora: LoraSettings | None = None) -> int:
        """How many numbers train: all but what the patterns freeze, or the adapters of what they do not."""
        free = {n: size for n, size in self.parameters.items() if not any(re.search(p, n) for p in freeze)}
        if lora is None:
            return sum(free.values())
        return sum(lora.rank * sum(self._sides(n)) for n in free if _layer_of(n) in lora.targets)

    def upcycled(self, settings: DiscriminatorSettings) -> Architecture:
        """The discriminator made of this model: experts in place of every MLP, and a head with a row for each view."""
        views = len(settings.views)
        extra = [("head.weight", views * self.hidden)]
        if settings.routing == "view":
            extra.append(("view_embedding.weight", views * self.hidden))
        if settings.backbone == "dense":
            return replace(self, extra=tuple(extra))
        return replace(self, experts=settings.experts, top_k=settings.top_k, extra=tuple(extra))

    def _sides(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a linear layer of the language model."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }[_layer_of(name)]

    def _text(self) -> dict[str, int]:
        root, h = "model.language_model", self.hidden
        found = {f"{root}.embed_tokens.weight": self.vocabulary * h, f"{root}.norm.weight": h}
        for i in range(self.layers):
            layer = f"{root}.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{norm}.weight"] = h
            for norm in ("q_norm", "k_norm"):
                found[f"{layer}.self_attn.{norm}.weight"] = self.head_dim
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                inputs, outputs = self._sides(f"x.{name}.weight")
                found[f"{layer}.self_attn.{name}.weight"] = inputs * outputs
            if self.experts:
                found[f"{layer}.mlp.gate.weight"] = self.experts * h
                found[f"{layer}.mlp.experts.gate_up_proj"] = self.experts * 2 * self.mlp * h
                found[f"{layer}.mlp.experts.down_proj"] = self.experts * self.mlp * h
            else:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    found[f"{layer}.mlp.{name}.weight"] = self.mlp * h
        return found if self.tied else found | {"lm_head.weight": self.vocabulary * h}

    def _vision(self) -> dict[str, int]:
        root, v, m = "model.visual", self.vision_hidden, self.vision_mlp
        merged = v * self.patches_per_token

        def linear(name: str, inputs: int, outputs: int) -> dict[str, int]:
            return {f"{root}.{name}.weight": inputs * outputs, f"{root}.{name}.bias": outputs}

        def norm(name: str, width: int) -> dict[str, int]:
            return {f"{root}.{name}.weight": width, f"{root}.{name}.bias": width}

        found = linear("patch_embed.proj", PATCH_VALUES, v)
        found[f"{root}.pos_embed.weight"] = self.vision_positions * v
        for i in range(self.vision_layers):
            block = f"blocks.{i}"
            found |= norm(f"{block}.norm1", v) | norm(f"{block}.norm2", v)
            found |= linear(f"{block}.attn.qkv", v, 3 * v) | linear(f"{block}.attn.proj", v, v)
            found |= linear(f"{block}.mlp.linear_fc1", v, m) | linear(f"{block}.mlp.linear_fc2", m, v)
        mergers = ["merger", *(f"deepstack_merger_list.{i}" for i in range(self.deepstack))]
        for name in mergers:
            found |= norm(f"{name}.norm", v if name == "merger" else merged)
            found |= linear(f"{name}.linear_fc1", merged, merged) | linear(f"{name}.linear_fc2", merged, self.hidden)
        return found


def _layer_of(name: str) -> str:
    return name.split(".")[-2]


PUBLISHED = {
    "qwen3-vl-2b": Architecture(28, 2048, 6144, 16, 8, 128, 151_936, True, 24, 1024, 4096),
    "qwen3-vl-4b": Architecture(36, 2560, 9728, 32, 8, 128, 151_936, True, 24, 1024, 4096),
    "qwen3-vl-8b": Architecture(36, 4096, 12_288, 32, 8, 128, 151_936, False, 27, 1152, 4304),
    "qwen3-vl-32b": Architecture(64, 5120, 25_600, 64, 8, 128, 151_936, False, 27, 1152, 4304),
}
"""From the published `config.json` files (Apache-2.0); 2.13, 4.44, 8.77 and 33.4 billion parameters."""


def architecture_of(folder: str | Path, setting: str) -> Architecture:
    """The model in a Hugging Face folder; or, where it is not there, the published one that its name begins with.

    Raises PlanError, naming the `setting` that the folder comes from.
    """
    config = Path(folder) / "config.json"
    if config.is_file():
        try:
            return from_config(json.loads(config.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{setting}: {config} is not that of a Qwen3-VL model ({error}); name another") from None
    for name, numbers in PUBLISHED.items():
        if Path(folder).name.lower().startswith(name):
            return numbers
    raise PlanError(
        f"{setting}: {folder} is not there, and its name begins with none of {', '.join(PUBLISHED)}, whose numbers are "
        "known; put the folder (its config.json is enough) there"
    )


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The model of a `config.json`. Raises KeyError or ValueError where it is none of Qwen3-VL's."""
    kind = str(config.get("model_type"))
    if kind not in ("qwen3_vl", "qwen3_vl_moe"):
        raise ValueError(f"its model_type is {kind}")
    text, vision = config["text_config"], config["vision_config"]
    experts = int(text.get("num_experts") or 0) if kind == "qwen3_vl_moe" else 0
    return Architecture(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        mlp=text["moe_intermediate_size"] if experts else text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        vision_layers=vision["depth"],
        vision_hidden=vision["hidden_size"],
        vision_mlp=vision["intermediate_size"],
        vision_positions=vision.get("num_position_embeddings", 2304),
        deepstack=len(vision.get("deepstack_visual_indexes", ())),
        merge=vision.get("spatial_merge_size", 2),
        experts=experts,
        top_k=int(text.get("num_experts_per_tok") or 0) if experts else 0,
    )


TESTBED_VOCABULARY = 512
"""More words than the testbed's tokenizer has; the exact number, which is known once it is built, matters to nobody."""


def tiny(settings: TinyModelSettings) -> Architecture:
    """The testbed's own model."""
    return Architecture(
        settings.layers, settings.hidden_size, settings.mlp_size, settings.heads, settings.key_value_heads,
        settings.head_dim, TESTBED_VOCABULARY, True, settings.vision_depth, settings.vision_hidden_size,
        settings.vision_mlp_size, settings.vision_positions, len(settings.deepstack),
    )  # fmt: skip
