"""The discriminator: an upcycled Qwen3-VL-MoE, its tied language head, and a scalar head with one row per view.

score = head_weight · head(hidden state of the end token) + likelihood_weight · Σ log p(the view's tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prism_ray.config.discriminator import SCORING_FIELDS, DiscriminatorSettings
from prism_ray.discriminator.objective import clip_head, debiased
from prism_ray.discriminator.segments import VIEW_NAMES, JudgedBatch
from prism_ray.models.attention import IMPLEMENTATION
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import load_policy, save_policy
from prism_ray.models.logprobs import token_logprobs
from prism_ray.models.upcycle import upcycle
from prism_ray.response import VIEWS

HEAD_FILE = "discriminator.safetensors"
CARD_FILE = "discriminator.json"
_BACKBONE = "backbone."
_HEAD_STD = 0.02


@dataclass(frozen=True, eq=False)
class Scores:
    """Per sequence: the score, the clipped output of its view's head, and its log-likelihood in nats; float32 [B]."""

    score_B: Tensor
    head_B: Tensor
    likelihood_B: Tensor


class Discriminator(nn.Module):
    """Scores sequences of any views, mixed in one batch. `forward` is the only entrance (ZeRO hooks need that)."""

    def __init__(self, backbone: Any, settings: DiscriminatorSettings) -> None:
        super().__init__()
        backbone.set_experts_implementation(settings.experts_implementation)
        backbone.set_attn_implementation(IMPLEMENTATION)
        self.backbone = backbone
        self.settings = settings
        hidden = backbone.config.get_text_config().hidden_size
        weight = next(backbone.parameters())
        self.head = nn.Linear(hidden, len(VIEW_NAMES), bias=False, dtype=weight.dtype)
        self.dropout = nn.Dropout(settings.head_dropout)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, judged: JudgedBatch, router_logits: list[Tensor] | None = None) -> Scores:
        """Scores of a batch; each layer's router logits [tokens, experts] are appended to `router_logits` if given."""
        hidden_BTD = final_hidden(self.backbone, judged.batch, router_logits)
        end_BD = hidden_BTD.flatten(0, 1)[judged.batch.last_B]
        head_BV = self.head(self.dropout(end_BD)).float()
        head_B = clip_head(head_BV.gather(1, judged.view_B[:, None])[:, 0], self.settings.score_clip)
        likelihood_B = torch.zeros_like(head_B)
        if self.settings.likelihood_weight:
            likelihood_B = _likelihood(self.backbone, hidden_BTD, judged)
        score_B = self.settings.head_weight * head_B + self.settings.likelihood_weight * likelihood_B
        score_B = debiased(score_B, judged.scored_BR.sum(1), self.settings.length_debias)
        return Scores(score_B, head_B, likelihood_B)


def _likelihood(backbone: Any, hidden_BTD: Tensor, judged: JudgedBatch) -> Tensor:
    """Σ log p of each sequence's scored tokens, [B]; logits exist for a chunk of tokens at a time."""
    row_N, step_N = judged.scored_BR.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD.flatten(0, 1)[judged.batch.predictor_BR[row_N, step_N]]
    target_N = judged.batch.response_ids_BR[row_N, step_N]
    logp_N, _ = token_logprobs(backbone.lm_head, hidden_ND, target_N)
    return logp_N.new_zeros(len(judged.view_B)).index_add(0, row_N, logp_N)


def build_discriminator(folder: str | Path, settings: DiscriminatorSettings, seed: int) -> Discriminator:
    """A fresh discriminator upcycled from the dense Qwen3-VL in `folder`; deterministic in `seed`."""
    model = Discriminator(
        upcycle(
            load_policy(folder),
            settings.experts,
            settings.top_k,
            expert_noise=settings.expert_noise,
            router_init=settings.router_init,
            seed=seed,
        ),
        settings,
    )
    weight = torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(seed + 1)) * _HEAD_STD
    with torch.no_grad():
        model.head.weight.copy_(weight)
    return model


def save_discriminator(weights: Mapping[str, Tensor], model: Discriminator, folder: str | Path, like: str | Path):
    """Write `weights` (of `model`, gathered) as a Hugging Face folder of the backbone, with head and card beside it.

    Tokenizer, processor and chat template come from `like`: with the card they are the scoring template.
    """
    folder = Path(folder)
    save_policy(_whole_backbone(weights, model), folder, like)
    save_file({"head.weight": weights["head.weight"].detach().cpu().contiguous()}, folder / HEAD_FILE)
    card = {
        "views": {view: list(tags) for view, tags in VIEWS.items()},
        "sequence": "prompt, context, the view's text tokenised on its own, end token; the head reads the end token",
        "settings": model.settings.model_dump(mode="json"),
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")


def _whole_backbone(weights: Mapping[str, Tensor], model: Discriminator) -> Any:
    """The backbone with gathered weights; `model` itself may hold only this rank's part of them."""
    with torch.device("meta"):
        whole = type(model.backbone)(model.backbone.config)
    own = {n.removeprefix(_BACKBONE): w for n, w in weights.items() if n.startswith(_BACKBONE)}
    missing, unexpected = whole.load_state_dict(own, strict=False, assign=True)
    tied = {"lm_head.weight"} if model.backbone.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"weights do not fit the backbone: missing {missing}, unexpected {unexpected}")
    return whole


def save_new(model: Discriminator, folder: str | Path, like: str | Path) -> None:
    """Write a discriminator that no optimiser holds yet (see `save_discriminator`)."""
    save_discriminator(dict(model.named_parameters()), model, folder, like)


def load_discriminator(folder: str | Path, settings: DiscriminatorSettings | None = None) -> Discriminator:
    """The discriminator in `folder`, with its own settings or with `settings`.

    Raises ValueError if `settings` would score otherwise than the folder was trained to, or if it has other views;
    FileNotFoundError if the folder holds no discriminator.
    """
    folder = Path(folder)
    for name in (CARD_FILE, HEAD_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a warmed-up discriminator")
    card = json.loads((folder / CARD_FILE).read_text())
    if card["views"] != {view: list(tags) for view, tags in VIEWS.items()}:
        raise ValueError(f"{folder / CARD_FILE}: its views are {card['views']}, not {VIEWS}; warm up again")
    saved = DiscriminatorSettings.model_validate(card["settings"])
    for name in SCORING_FIELDS if settings else ():
        old, new = getattr(saved, name), getattr(settings, name)
        if old != new:
            raise ValueError(f"discriminator.{name} is {new} but {folder} was trained with {old}; warm up again")
    model = Discriminator(load_policy(folder), settings or saved)
    model.head.load_state_dict({"weight": load_file(folder / HEAD_FILE)["head.weight"]})
    return model
