"""From (prompt, response) to the token sequences that are judged: the one way for references and rollouts.

A view's text is cut out of the response, tokenised on its own and closed by the end token; for `own` context the
earlier views of the same response stand before it. Whatever side a text comes from, the same text gives the same
tokens, ends in the same token and is cut at the same length, so none of those can tell the sides apart.
What lies between the views (spaces, newlines) is seen by no judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.models.batch import Batch, Sample, collate_shared, shared_microbatches
from prism_ray.models.encode import EncodedPrompt, Encoder
from prism_ray.response import VIEWS, parse

VIEW_NAMES = tuple(VIEWS)
"""Order of the views, and of the rows of the head."""


@dataclass(frozen=True, eq=False)
class ViewSequence:
    """One view of one response, ready to be judged.

    `token_ids` = context + the view's tokens + end token (follows the prompt); the likelihood counts the tokens
    [start, stop), the head reads the end token.
    """

    prompt: EncodedPrompt
    view: str
    token_ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.token_ids)

    @property
    def key(self) -> tuple[int, str, tuple[int, ...]]:
        """Equal for sequences that get equal scores."""
        return id(self.prompt), self.view, self.token_ids

    @property
    def sample(self) -> Sample:
        """As a batch takes it."""
        return Sample(self.prompt, torch.tensor(self.token_ids, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class ResponseViews:
    """The sequences of a response by view; empty if the format is broken, which `reason` then explains."""

    valid: bool
    reason: str = ""
    sequences: dict[str, ViewSequence] = field(default_factory=dict)


def view_sequences(
    prompt: EncodedPrompt, text: str, encoder: Encoder, settings: DiscriminatorSettings
) -> ResponseViews:
    """The sequences by which this response is judged; a response that cannot be is a value with a reason."""
    parsed = parse(text)
    if not parsed.valid:
        return ResponseViews(False, parsed.reason)
    data = text.encode(errors="replace")
    forbidden = {*encoder.banned_ids, encoder.end_id}
    sequences: dict[str, ViewSequence] = {}
    context: list[int] = []
    for view in VIEW_NAMES:
        low, high = parsed.spans[view]
        *ids, end = encoder.response(data[low:high].decode(errors="replace"))
        if not forbidden.isdisjoint(ids):
            return ResponseViews(False, f"a special token in the {view} view")
        ids = ids[: settings.max_segment_tokens]
        sequences[view] = ViewSequence(prompt, view, (*context, *ids, end), len(context), len(context) + len(ids))
        if settings.reasoning_context == "own":
            context += ids
    return ResponseViews(True, "", sequences)


@dataclass(frozen=True, eq=False)
class JudgedBatch:
    """Sequences in one batch: `view_B` indexes VIEW_NAMES, `scored_BR` marks the tokens the likelihood counts."""

    batch: Batch
    view_B: Tensor
    scored_BR: Tensor

    def to(self, device: torch.device | str) -> JudgedBatch:
        return JudgedBatch(self.batch.to(device), self.view_B.to(device), self.scored_BR.to(device))


def judged_batch(sequences: Sequence[ViewSequence]) -> JudgedBatch:
    """One batch of these sequences, in this order. What those of a prompt begin with alike (the prompt with its image,
    and mostly the earlier views) is computed once."""
    return judged_of(collate_shared([s.sample for s in sequences]), sequences)


def judged_batches(sequences: Sequence[ViewSequence], token_budget: int) -> list[JudgedBatch]:
    """Such batches of at most `token_budget` computed tokens; `batch.indices` says which sequence is where."""
    return [judged_of(b, sequences) for b in shared_microbatches([s.sample for s in sequences], token_budget)]


def judged_of(batch: Batch, sequences: Sequence[ViewSequence]) -> JudgedBatch:
    """A batch, of any layout, of the samples of some of these sequences, with what the judge must know of them."""
    rows = [sequences[i] for i in batch.indices]
    start_B, stop_B = torch.tensor([[s.start, s.stop] for s in rows]).T
    steps_R = torch.arange(batch.response_mask_BR.shape[1])
    scored_BR = (steps_R >= start_B[:, None]) & (steps_R < stop_B[:, None])
    return JudgedBatch(batch, torch.tensor([VIEW_NAMES.index(s.view) for s in rows]), scored_BR)


def distinct(sequences: Sequence[ViewSequence]) -> tuple[list[ViewSequence], list[int]]:
    """The sequences without repetitions, and for each of the given ones where it is among them.

    Rollouts repeat each other and the reference (captions above all); what is the same is computed once.
    """
    rows: dict[tuple, int] = {}
    unique: list[ViewSequence] = []
    for sequence in sequences:
        if sequence.key not in rows:
            rows[sequence.key] = len(unique)
            unique.append(sequence)
    return unique, [rows[s.key] for s in sequences]
