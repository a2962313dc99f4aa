"""From (prompt, response) to the token sequences that are judged: the one way for references and rollouts.

A view's text is cut out of the response, tokenised on its own and closed by the end token; before it stands what its
context asks for. Whatever side a text comes from, the same text gives the same tokens, ends in the same token and is
cut at the same length, so none of those can tell the sides apart.
What lies between the views (spaces, newlines) is seen by no judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.models.batch import Batch, Sample, collate_shared, shared_microbatches
from prism_ray.models.encode import MARKER, EncodedPrompt, Encoder
from prism_ray.records import Prompt
from prism_ray.response import parse

SEQUENCE = (
    "The prompt in the chat template with the generation prompt; the view's context; the view's text, tokenised on its "
    "own and cut after max_segment_tokens; the end token. The likelihood counts the view's tokens, the head reads the "
    "end token."
)
"""What is judged, in words, for people and for saved discriminators. It changes whenever this module gives another
sequence for the same text, so that an older discriminator is not asked what it has not learned."""

Fault = Literal["", "format", "empty_view", "special_token"]
FAULTS: tuple[Fault, ...] = ("format", "empty_view", "special_token")
"""Why a response is not judged: it breaks the format, a view says nothing, or a special token stands in it."""


@dataclass(frozen=True, eq=False)
class ViewSequence:
    """One view of one response, ready to be judged.

    `token_ids` = context + the view's tokens + end token (follows the prompt); the likelihood counts the tokens
    [start, stop), the head's row `row` reads the end token. `labels` say of each token which view it is text of; it is
    -1 for opening tags, up to which views may read alike. `text` is the view's own, `cut` whether its tokens were too
    many.
    """

    prompt: EncodedPrompt
    view: str
    row: int
    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    start: int
    stop: int
    text: str
    cut: bool

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.token_ids)

    @property
    def key(self) -> tuple[int, str, int, tuple[int, ...]]:
        """Equal for sequences that get equal scores."""
        return id(self.prompt), self.view, self.start, self.token_ids

    @property
    def sample(self) -> Sample:
        """As a batch takes it."""
        return Sample(self.prompt, torch.tensor(self.token_ids, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class ResponseViews:
    """The sequences of a response by view, in order; none if it cannot be judged, as `fault` and `reason` say."""

    fault: Fault = ""
    reason: str = ""
    sequences: dict[str, ViewSequence] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return not self.fault


def seen_prompts(prompts: Sequence[Prompt], encoder: Encoder, settings: DiscriminatorSettings) -> list[EncodedPrompt]:
    """The prompts as the judge sees them: with their images, or (`sees_images: false`) as if they had none."""
    return encoder.prompts(prompts if settings.sees_images else [without_images(p) for p in prompts])


def without_images(prompt: Prompt) -> Prompt:
    """The prompt as if it had no images."""
    messages = tuple({**m, "content": m["content"].replace(MARKER, "")} for m in prompt.messages)
    return replace(prompt, messages=messages, images=())


def view_sequences(
    prompt: EncodedPrompt,
    text: str,
    encoder: Encoder,
    settings: DiscriminatorSettings,
    reference: ResponseViews | None = None,
) -> ResponseViews:
    """The sequences by which this response is judged; a response that cannot be is a value with a reason.

    `reference` are those of the prompt's reference, for views in its context; None: this response is the reference.
    """
    fault, reason, parts = _parts(text, encoder, settings)
    sequences: dict[str, ViewSequence] = {}
    for row, (view, part) in enumerate(zip(settings.views, parts, strict=False)):
        source = sequences if view.context == "own" or reference is None else reference.sequences
        context, labels = _texts(list(source.values())[:row] if view.context != "none" else ())
        own = _labels(part.ids, len(view.tags[0]) + 2, row, encoder)
        sequences[view.name] = ViewSequence(
            prompt,
            view.name,
            row,
            token_ids=(*context, *part.ids, encoder.end_id),
            labels=(*labels, *own, own[-1]),
            start=len(context),
            stop=len(context) + len(part.ids),
            text=part.text,
            cut=part.cut,
        )
    return ResponseViews(fault, reason, sequences)


def refusal(text: str, encoder: Encoder, settings: DiscriminatorSettings) -> str:
    """Why a response of this text cannot be judged; "" if it can."""
    return _parts(text, encoder, settings)[1]


@dataclass(frozen=True)
class _Part:
    """One view's text and its tokens, without the end token; `cut` is whether there were more."""

    text: str
    ids: list[int]
    cut: bool


def _parts(text: str, encoder: Encoder, settings: DiscriminatorSettings) -> tuple[Fault, str, list[_Part]]:
    """The response's views in order; or none, what is wrong, and the same in words."""
    parsed = parse(text, settings.views)
    if not parsed.valid:
        return "format", parsed.reason, []
    data = text.encode(errors="replace")
    forbidden = {*encoder.banned_ids, encoder.end_id}
    parts = []
    for view in settings.views:
        if not any(parsed.parts[tag].strip() for tag in view.tags):
            return "empty_view", f"nothing in the {view.name} view", []
        low, high = parsed.spans[view.name]
        own = data[low:high].decode(errors="replace")
        ids = encoder.response(own)[:-1]
        if not forbidden.isdisjoint(ids):
            return "special_token", f"a special token in the {view.name} view", []
        kept = ids[: settings.max_segment_tokens]
        parts.append(_Part(own, kept, len(kept) < len(ids)))
    return "", "", parts


def _labels(ids: Sequence[int], tag_bytes: int, row: int, encoder: Encoder) -> list[int]:
    """`row` for each token that begins behind the opening tag of so many bytes, else -1."""
    labels, read = [], 0
    for token in ids:
        labels.append(row if read >= tag_bytes else -1)
        read += len(encoder.pieces[token])
    return labels


def _texts(earlier: Iterable[ViewSequence]) -> tuple[list[int], list[int]]:
    """Tokens and labels of these views' own texts, one after another."""
    ids: list[int] = []
    labels: list[int] = []
    for sequence in earlier:
        ids += sequence.token_ids[sequence.start : sequence.stop]
        labels += sequence.labels[sequence.start : sequence.stop]
    return ids, labels


@dataclass(frozen=True, eq=False)
class JudgedBatch:
    """Sequences in one batch: `view_B` is the view (a row of the head) of each, `scored_BR` marks the tokens that the
    likelihood counts, `labels_N` says of every flat token which view it is text of (-1: none)."""

    batch: Batch
    view_B: Tensor
    scored_BR: Tensor
    labels_N: Tensor

    def to(self, device: torch.device | str) -> JudgedBatch:
        return JudgedBatch(self.batch.to(device), *(x.to(device) for x in (self.view_B, self.scored_BR, self.labels_N)))


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
    return JudgedBatch(batch, torch.tensor([s.row for s in rows]), scored_BR, _flat_labels(batch, rows))


def _flat_labels(batch: Batch, rows: Sequence[ViewSequence]) -> Tensor:
    """Labels in place. Sequences that share a token agree on its label: it depends on nothing but the tokens up to it,
    since what follows an opening tag belongs to its view, and opening tags have none."""
    last_B = batch.response_mask_BR.sum(1) - 1
    place_BR = batch.predictor_BR.roll(-1, dims=1)  # a token lies where the next one is predicted
    place_BR[torch.arange(len(rows)), last_B] = batch.last_B
    labels_BR = pad_sequence([torch.tensor(s.labels) for s in rows], batch_first=True)
    labels_N = torch.full_like(batch.input_ids_BT.flatten(), -1)
    labels_N[place_BR[batch.response_mask_BR]] = labels_BR[batch.response_mask_BR]
    return labels_N


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
