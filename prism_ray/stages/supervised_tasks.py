"""What a supervised phase learns: responses (cross-entropy on response tokens), or the cells of the testbed's images.

A task has two halves: rows become samples in Ray Data's workers (`prepare`, `size`), and samples become tensors and a
loss in the ranks (`collate`, `module`, `loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prism_ray.corpora.checks import Requirements, check
from prism_ray.corpora.quarantine import Quarantined
from prism_ray.corpora.reader import prompt_at, unit_of
from prism_ray.corpora.rows import COLUMNS, BadRow
from prism_ray.models.ahead import TokenCounter
from prism_ray.models.batch import Batch, Sample, collate
from prism_ray.models.encode import BadImage, EncodedPrompt, Encoder
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.pretrain import CellProbe
from prism_ray.records import Prompt

Entry = tuple[str, int, dict[str, Any] | BadRow]
"""A row: file, place in the file, columns (or why it cannot be read)."""


class Task(Protocol):
    """What the trainer needs of a task. `required` columns must exist, `columns` are read."""

    required: tuple[str, ...]
    columns: tuple[str, ...]

    def prepare(self, entries: Sequence[Entry]) -> list[Any]:
        """A sample, or `Quarantined`, for each row."""
        ...

    def size(self, sample: Any) -> int:
        """Terms of the loss that the sample brings."""
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """Samples side by side as tensors, something with `.to(device)`."""
        ...

    def module(self, policy: Any) -> nn.Module:
        """What is trained: the policy, or something around a part of it."""
        ...

    def loss(self, module: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and further metrics, each summed over the batch's terms."""
        ...


@dataclass(frozen=True, eq=False)
class Demonstration:
    """A prompt and the tokens of its reference, int64 [R], end token included. The prompt has its own token ids; its
    images, of the size that the policy sees, travel as encoded bytes: their patches are some ten times as large."""

    prompt: Prompt
    response_ids: np.ndarray


@dataclass(frozen=True)
class ResponseTask:
    """Cross-entropy on the tokens of the references (the end token included), read as `model`'s tokenizer has it.

    Rows may share an id: each is a demonstration, and a step is counted by rows.
    """

    model: str
    max_prompt_tokens: int
    max_response_tokens: int
    max_image_pixels: int
    required: tuple[str, ...] = ("prompt", "teacher_response")
    columns: tuple[str, ...] = COLUMNS

    @property
    def needs(self) -> Requirements:
        """What a row must have."""
        tokens = _tokens(self.model, self.max_prompt_tokens)
        return Requirements(
            reference=True,
            max_image_pixels=self.max_image_pixels,
            tokenise=tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            unique=False,
        )

    def prepare(self, entries: Sequence[Entry]) -> list[Any]:
        needs = self.needs
        return [self._prepared(entry, needs) for entry in entries]

    def _prepared(self, entry: Entry, needs: Requirements) -> Demonstration | Quarantined:
        tokens = _tokens(self.model, self.max_prompt_tokens)
        try:
            prompt, _ = check(prompt_at(*entry), needs)
            ids = tokens.encoder.response(prompt.reference)
            if len(ids) > self.max_response_tokens:
                detail = f"{len(ids)} tokens, the limit is {self.max_response_tokens}"
                raise BadRow("teacher_response: too long", detail)
        except BadRow as bad:
            return _bad(entry, bad.reason, bad.detail)
        return Demonstration(replace(tokens.fitted(prompt), reference="", extra={}), np.array(ids, np.int64))

    def size(self, sample: Demonstration) -> int:
        return len(sample.response_ids)

    def collate(self, samples: Sequence[Demonstration]) -> Batch:
        encoder = _tokens(self.model, self.max_prompt_tokens).encoder
        encoded = encoder.prompts([sample.prompt for sample in samples])
        responses = [torch.from_numpy(sample.response_ids) for sample in samples]
        return collate([Sample(*pair) for pair in zip(encoded, responses, strict=True)])

    def module(self, policy: Any) -> nn.Module:
        return policy

    def loss(self, module: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logp_BR, _ = response_logprobs(module, batch)
        return -logp_BR.sum(), {}


@dataclass(frozen=True, eq=False)
class CellBatch:
    """Images [patches, 1536] with grids [images, 3], and the labels [tokens, kinds] of their visual tokens."""

    pixel_values: Tensor
    grid_thw: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> CellBatch:
        """This batch on another device."""
        return CellBatch(*(t.to(device, non_blocking=True) for t in (self.pixel_values, self.grid_thw, self.labels)))


class CellReader(nn.Module):
    """A vision tower and the probe that reads it."""

    def __init__(self, visual: nn.Module, probe: CellProbe) -> None:
        super().__init__()
        self.visual = visual
        self.probe = probe


@dataclass(frozen=True)
class CellTask:
    """Vision pre-training of the testbed: `labels` (class indices of each cell, in reading order) from `images`."""

    model: str
    max_image_pixels: int
    required: tuple[str, ...] = ("images", "labels")
    columns: tuple[str, ...] = ("images", "labels")

    def prepare(self, entries: Sequence[Entry]) -> list[Any]:
        needs = Requirements(decode=False, max_image_pixels=self.max_image_pixels)
        asked = [{"role": "user", "content": "<image>"}]
        prompts = [_prompt((file, at, _asking(row, asked)), needs) for file, at, row in entries]
        encoded = _encoded(_tokens(self.model, self.max_image_pixels).encoder, entries, prompts)
        return [_cells(entry, e) for entry, e in zip(entries, encoded, strict=True)]

    def size(self, sample: CellBatch) -> int:
        return len(sample.labels)

    def collate(self, samples: Sequence[CellBatch]) -> CellBatch:
        fields = ([s.pixel_values for s in samples], [s.grid_thw for s in samples], [s.labels for s in samples])
        return CellBatch(*map(torch.cat, fields))

    def module(self, policy: Any) -> nn.Module:
        levels = len(policy.config.vision_config.deepstack_visual_indexes)
        return CellReader(policy.model.visual, CellProbe(policy.config.get_text_config().hidden_size, levels))

    def loss(self, module: Any, batch: CellBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, accuracy = module.probe(module.visual, batch.pixel_values, batch.grid_thw, batch.labels)
        return loss * len(batch.labels), {"accuracy": accuracy * len(batch.labels)}


@lru_cache(maxsize=2)
def _tokens(model: str, max_prompt_tokens: int) -> TokenCounter:
    return TokenCounter(Path(model), max_prompt_tokens)


def _asking(row: dict[str, Any] | BadRow, asked: list[dict[str, str]]) -> dict[str, Any] | BadRow:
    return row if isinstance(row, BadRow) else {**row, "prompt": asked}


def _bad(entry: Entry, reason: str, detail: str) -> Quarantined:
    """The row as it goes into quarantine."""
    return Quarantined(entry[0], entry[1], reason, detail, unit_of(entry[2]))


def _prompt(entry: Entry, needs: Requirements) -> Prompt | Quarantined:
    try:
        prompt = prompt_at(*entry)
        check(prompt, needs)
    except BadRow as bad:
        return _bad(entry, bad.reason, bad.detail)
    return prompt


def _encoded(encoder: Encoder, entries: Sequence[Entry], prompts: Sequence[Any]) -> list[Any]:
    """`EncodedPrompt` or `Quarantined` for each; all at once, and one by one only if one of them is bad."""
    good = [p for p in prompts if isinstance(p, Prompt)]
    try:
        encoded = iter(encoder.prompts(good))
        return [next(encoded) if isinstance(p, Prompt) else p for p in prompts]
    except ValueError:
        pairs = zip(entries, prompts, strict=True)
        return [_encoded_one(encoder, e, p) if isinstance(p, Prompt) else p for e, p in pairs]


def _encoded_one(encoder: Encoder, entry: Entry, prompt: Prompt) -> EncodedPrompt | Quarantined:
    try:
        return encoder.prompt(prompt)
    except BadImage as error:
        return _bad(entry, "images: does not decode", str(error))
    except ValueError as error:  # the model's own processor refuses some images
        return _bad(entry, "prompt: cannot be encoded", str(error))


def _cells(entry: Entry, encoded: Any) -> CellBatch | Quarantined:
    if isinstance(encoded, Quarantined):
        return encoded
    labels = [] if isinstance(entry[2], BadRow) else entry[2].get("labels") or []
    tokens = len(encoded.visual_spots)
    if tokens == 0 or not labels or len(labels) % tokens:
        return _bad(entry, "labels: do not fit the image", f"{len(labels)} for {tokens} tokens")
    return CellBatch(encoded.pixel_values, encoded.grid_thw, torch.tensor(labels).view(tokens, -1))
