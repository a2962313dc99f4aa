"""The discriminator: a Qwen3-VL, upcycled to a mixture of experts or dense, and a scalar head with one row per view.

score = head_weight · head(hidden state of the end token) + likelihood_weight · Σ log p(the view's tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor

from prism_ray.config.discriminator import SCORING_FIELDS, DiscriminatorSettings
from prism_ray.discriminator.objective import clip_head, debiased
from prism_ray.discriminator.segments import SEQUENCE, JudgedBatch
from prism_ray.models.attention import IMPLEMENTATION
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import copy_policy, load_policy, save_policy
from prism_ray.models.logprobs import token_logprobs
from prism_ray.models.routing import make_routers_shiftable
from prism_ray.models.upcycle import Upcycling, upcycle, upcycle_folder

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
        self.mixture = settings.backbone == "moe"
        if self.mixture:
            backbone.set_experts_implementation(settings.experts_implementation)
        backbone.set_attn_implementation(IMPLEMENTATION)
        self.backbone = backbone
        self.settings = settings
        hidden = backbone.config.get_text_config().hidden_size
        weight = next(backbone.parameters())
        self.head = nn.Linear(hidden, len(settings.views), bias=False, dtype=weight.dtype)
        self.dropout = nn.Dropout(settings.head_dropout)
        self.view_embedding: nn.Embedding | None = None
        if settings.routing == "view":
            self.view_embedding = nn.Embedding(len(settings.views), hidden, dtype=weight.dtype)
            nn.init.zeros_(self.view_embedding.weight)  # at first it routes as it would without
            make_routers_shiftable(backbone.model.language_model)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, judged: JudgedBatch, router_logits: list[Tensor] | None = None) -> Scores:
        """Scores of a batch; each layer's router logits [tokens, experts] are appended to `router_logits` if given (a
        dense backbone has none)."""
        routed = router_logits if self.mixture else None
        hidden_BTD = final_hidden(self.backbone, judged.batch, routed, self._router_shift(judged))
        end_BD = hidden_BTD.flatten(0, 1)[judged.batch.last_B]
        head_BV = self.head(self.dropout(end_BD)).float()
        head_B = clip_head(head_BV.gather(1, judged.view_B[:, None])[:, 0], self.settings.score_clip)
        likelihood_B = torch.zeros_like(head_B)
        if self.settings.likelihood_weight:
            likelihood_B = _likelihood(self.backbone, hidden_BTD, judged)
        score_B = self.settings.head_weight * head_B + self.settings.likelihood_weight * likelihood_B
        score_B = debiased(score_B, judged.scored_BR.sum(1), self.settings.length_debias)
        return Scores(score_B, head_B, likelihood_B)

    def _router_shift(self, judged: JudgedBatch) -> Tensor | None:
        """The embedding of every token's view [tokens, D], 0 where it is text of none."""
        if self.view_embedding is None:
            return None
        shift_ND = self.view_embedding(judged.labels_N.clamp(min=0))
        return shift_ND * (judged.labels_N >= 0)[:, None].to(shift_ND.dtype)


def _likelihood(backbone: Any, hidden_BTD: Tensor, judged: JudgedBatch) -> Tensor:
    """Σ log p of each sequence's scored tokens, [B]; logits exist for a chunk of tokens at a time."""
    row_N, step_N = judged.scored_BR.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD.flatten(0, 1)[judged.batch.predictor_BR[row_N, step_N]]
    target_N = judged.batch.response_ids_BR[row_N, step_N]
    logp_N, _ = token_logprobs(backbone.lm_head, hidden_ND, target_N)
    return logp_N.new_zeros(len(judged.view_B)).index_add(0, row_N, logp_N)


def build_discriminator(folder: str | Path, settings: DiscriminatorSettings, seed: int) -> Discriminator:
    """A fresh discriminator of the dense Qwen3-VL in `folder`, in memory; deterministic in `seed`."""
    backbone = load_policy(folder)
    if settings.backbone == "moe":
        backbone = upcycle(backbone, _upcycling(settings, seed))
    model = Discriminator(backbone, settings)
    with torch.no_grad():
        model.head.weight.copy_(_first_head(model.head.weight.shape, seed))
    return model


def create_discriminator(policy: str | Path, folder: str | Path, settings: DiscriminatorSettings, seed: int) -> None:
    """Write into `folder` what `build_discriminator` builds of `policy` and `save_discriminator` saves, to the bit,
    without ever having a model in memory."""
    folder = Path(folder)
    if settings.backbone == "moe":
        upcycle_folder(policy, folder, _upcycling(settings, seed))
    else:
        copy_policy(policy, folder)
    hidden = AutoConfig.from_pretrained(folder).get_text_config().hidden_size
    own = {"head.weight": _first_head((len(settings.views), hidden), seed)}
    if settings.routing == "view":
        own["view_embedding.weight"] = torch.zeros(len(settings.views), hidden)
    _save_own(own, settings, folder)


def _upcycling(settings: DiscriminatorSettings, seed: int) -> Upcycling:
    return Upcycling(settings.experts, settings.top_k, settings.expert_noise, settings.router_init, seed)


def _first_head(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1)) * _HEAD_STD


def save_discriminator(weights: Mapping[str, Tensor], model: Discriminator, folder: str | Path, like: str | Path):
    """Write `weights` (of `model`, gathered) as a Hugging Face folder of the backbone, with all that is not backbone,
    and a card of what it judges and how, beside it.

    Tokenizer, processor and chat template come from `like`.
    """
    folder = Path(folder)
    save_policy(_whole_backbone(weights, model), folder, like)
    _save_own({n: w for n, w in weights.items() if not n.startswith(_BACKBONE)}, model.settings, folder)


def _save_own(weights: Mapping[str, Tensor], settings: DiscriminatorSettings, folder: Path) -> None:
    """The weights that are the discriminator's own, and the card, into a folder that has all the rest."""
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, folder / HEAD_FILE)
    card = {
        "views": [view.model_dump(mode="json") for view in settings.views],
        "template": scoring_template(folder),
        "settings": settings.model_dump(mode="json"),
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def scoring_template(folder: str | Path) -> dict[str, str]:
    """What turns a prompt and a view into the tokens that are judged, as far as the folder's weights do not say it: the
    prompt's chat template, the end token, and the rule of the sequence (`segments.SEQUENCE`)."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    return {
        "chat_template": processor.chat_template or "",
        "end_token": processor.tokenizer.eos_token,
        "sequence": SEQUENCE,
    }


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


def load_discriminator(folder: str | Path, settings: DiscriminatorSettings | None = None) -> Discriminator:
    """The discriminator in `folder`, with its own settings or with `settings`.

    Raises ValueError if `settings` have other views or would score otherwise than the folder was trained to, or if the
    folder's scoring template is not that of its training; FileNotFoundError if it holds no discriminator.
    """
    folder = Path(folder)
    for name in (CARD_FILE, HEAD_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a warmed-up discriminator")
    card = json.loads((folder / CARD_FILE).read_text())
    try:
        saved = DiscriminatorSettings.model_validate(card["settings"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise ValueError(
            f"{folder / CARD_FILE}: its settings are not of this version ({what}); warm up again"
        ) from error
    _check_template(card.get("template", {}), folder)
    if settings is not None:
        _check_settings(settings, saved, folder)
    model = Discriminator(load_policy(folder), settings or saved)
    own = load_file(folder / HEAD_FILE)
    missing, unexpected = model.load_state_dict(own, strict=False)
    if unexpected or any(not name.startswith(_BACKBONE) for name in missing):
        raise ValueError(f"{folder / HEAD_FILE} holds {sorted(own)}, which is not what its card says; warm up again")
    return model


def _check_template(trained: Mapping[str, str], folder: Path) -> None:
    for name, now in scoring_template(folder).items():
        if trained.get(name) != now:
            raise ValueError(
                f"{folder}: its {name.replace('_', ' ')} is not the one that it was trained with (in {CARD_FILE}), so "
                "its scores would mean nothing; copy the folder again, or warm up again"
            )


def _check_settings(settings: DiscriminatorSettings, saved: DiscriminatorSettings, folder: Path) -> None:
    """What decides a score must be as it was in training."""
    asked, trained = ([view.reads for view in s.views] for s in (settings, saved))
    if asked != trained:
        old, new = (
            ", ".join(f"{n} ({' + '.join(tags)}; {context})" for n, tags, context in v) for v in (trained, asked)
        )
        raise ValueError(f"discriminator.views are {new} but {folder} was trained with {old}; warm up again")
    for name in SCORING_FIELDS:
        old, new = getattr(saved, name), getattr(settings, name)
        if old != new:
            raise ValueError(f"discriminator.{name} is {new} but {folder} was trained with {old}; warm up again")
