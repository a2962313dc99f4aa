"""Samples side by side, padded on the right, or packed one after another; images of a shared prompt are held once.

Right padding with a causal mask needs no attention mask: no real token can see a padded one. A packed row has no
padding at all; `Batch.segments` tells attention where samples end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_ray.models.attention import Segments
from prism_ray.models.encode import EncodedPrompt
from prism_ray.models.packing import pack


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and one response to it: `response_ids` int64 [R], R may be 0."""

    prompt: EncodedPrompt
    response_ids: Tensor

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples and their responses, the latter always padded to R tokens.

    `input_ids_BT` and `position_ids_3BT` (time, height, width) hold the samples as rows padded to T tokens; in a packed
    batch as a single row [1, S] without padding, and `segments` says how it is made up. Sample b has `lengths_B[b]`
    tokens from flat position `starts_B[b]` of [B·T] or [S], the first `prompt_lengths_B[b]` of them its prompt;
    `response_ids_BR` with `response_mask_BR` (bool). `pixel_values` and `grid_thw` are those of the distinct prompts'
    images; visual token v sits at flat position `visual_positions_V[v]` (ascending) and takes row
    `visual_sources_V[v]` of the merged image features. `indices` says which of the samples given each one is.
    """

    input_ids_BT: Tensor
    position_ids_3BT: Tensor
    starts_B: Tensor
    lengths_B: Tensor
    prompt_lengths_B: Tensor
    response_ids_BR: Tensor
    response_mask_BR: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    visual_positions_V: Tensor
    visual_sources_V: Tensor
    indices: list[int]
    segments: Segments | None = None

    def to(self, device: torch.device | str) -> Batch:
        """This batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors, segments=self.segments and self.segments.to(device))

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.input_ids_BT.numel()

    @property
    def real_mask_BT(self) -> Tensor:
        """True where a token is not padding; [1, S] in a packed batch."""
        if self.segments is not None:
            return torch.ones_like(self.input_ids_BT, dtype=torch.bool)
        return torch.arange(self.input_ids_BT.shape[1], device=self.lengths_B.device) < self.lengths_B[:, None]


def collate(samples: Sequence[Sample], indices: Sequence[int] | None = None) -> Batch:
    """One padded batch of these samples, in this order; `indices` default to 0, 1, …

    Padding uses token 0 at position 0: it is never seen, never scored, and never an image placeholder because only
    prompts' own visual tokens are filled in.
    """
    tokens, positions = _rows(samples)
    input_ids_BT = pad_sequence(tokens, batch_first=True)
    position_ids_3BT = pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1).contiguous()
    starts_B = torch.arange(len(samples)) * input_ids_BT.shape[1]
    return _batch(samples, input_ids_BT, position_ids_3BT, starts_B, indices, None)


def collate_packed(samples: Sequence[Sample], indices: Sequence[int] | None = None) -> Batch:
    """One packed batch of these samples, in this order: a row without padding; `indices` default to 0, 1, …"""
    tokens, positions = _rows(samples)
    segments = Segments.of([len(ids) for ids in tokens])
    starts_B = segments.offsets[:-1].long()
    return _batch(samples, torch.cat(tokens)[None], torch.cat(positions, dim=1)[:, None], starts_B, indices, segments)


def microbatch_count(samples: Sequence[Sample], token_budget: int) -> int:
    """How many packed micro-batches of at most `token_budget` tokens these samples make."""
    return len(pack([s.length for s in samples], token_budget))


def packed_microbatches(samples: Sequence[Sample], token_budget: int, count: int | None = None) -> list[Batch]:
    """Packed batches of at most `token_budget` tokens (a longer sample gets its own), as `models.packing.pack` has it.

    `count` asks for exactly so many: ranks whose forward passes must be equally many agree on the maximum of their
    `microbatch_count`. `Batch.indices` leads back to the input order.
    """
    bins = pack([s.length for s in samples], token_budget, count)
    return [collate_packed([samples[i] for i in members], members) for members in bins]


def microbatches(samples: Sequence[Sample], token_budget: int) -> list[Batch]:
    """Batches of at most `token_budget` padded tokens, longest samples first; a longer sample gets its own batch.

    Samples of similar length lie together, so little is padded; `Batch.indices` leads back to the input order.
    """
    order = sorted(range(len(samples)), key=lambda i: -samples[i].length)
    batches, first = [], 0
    while first < len(order):
        width = max(1, samples[order[first]].length)
        chosen = order[first : first + max(1, token_budget // width)]
        batches.append(collate([samples[i] for i in chosen], chosen))
        first += len(chosen)
    return batches


def _rows(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each sample: its tokens [T], and its positions [3, T], those of the response counting on from the prompt."""
    if not samples:
        raise ValueError("cannot collate an empty list of samples; skip empty batches")
    tokens = [torch.cat((s.prompt.token_ids, s.response_ids)) for s in samples]
    longest = torch.arange(max(len(s.response_ids) for s in samples)).expand(3, -1)
    positions = [
        torch.cat((s.prompt.position_ids, longest[:, : len(s.response_ids)] + s.prompt.next_position), dim=1)
        for s in samples
    ]
    return tokens, positions


def _batch(
    samples: Sequence[Sample],
    input_ids_BT: Tensor,
    position_ids_3BT: Tensor,
    starts_B: Tensor,
    indices: Sequence[int] | None,
    segments: Segments | None,
) -> Batch:
    """What both layouts have in common."""
    prompt_lengths_B = torch.tensor([len(s.prompt.token_ids) for s in samples])
    response_lengths_B = torch.tensor([len(s.response_ids) for s in samples])
    response_ids_BR = pad_sequence([s.response_ids for s in samples], batch_first=True)
    distinct, rows = _distinct_prompts(samples)
    positions_V, sources_V = _visual_tokens(distinct, rows, starts_B)
    return Batch(
        input_ids_BT=input_ids_BT,
        position_ids_3BT=position_ids_3BT,
        starts_B=starts_B,
        lengths_B=prompt_lengths_B + response_lengths_B,
        prompt_lengths_B=prompt_lengths_B,
        response_ids_BR=response_ids_BR,
        response_mask_BR=torch.arange(response_ids_BR.shape[1]) < response_lengths_B[:, None],
        pixel_values=torch.cat([p.pixel_values for p in distinct]),
        grid_thw=torch.cat([p.grid_thw for p in distinct]),
        visual_positions_V=positions_V,
        visual_sources_V=sources_V,
        indices=list(range(len(samples)) if indices is None else indices),
        segments=segments,
    )


def _distinct_prompts(samples: Sequence[Sample]) -> tuple[list[EncodedPrompt], list[int]]:
    """The distinct prompt objects, and for each sample which of them is its own."""
    seen: dict[int, int] = {}
    distinct: list[EncodedPrompt] = []
    for sample in samples:
        if id(sample.prompt) not in seen:
            seen[id(sample.prompt)] = len(distinct)
            distinct.append(sample.prompt)
    return distinct, [seen[id(s.prompt)] for s in samples]


def _visual_tokens(distinct: list[EncodedPrompt], rows: list[int], starts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions [V] of the visual tokens and the rows [V] of the merged features that belong there."""
    spots = [p.visual_spots for p in distinct]
    first = [0]
    for spot in spots:
        first.append(first[-1] + len(spot))
    positions = [spots[row] + start for row, start in zip(rows, starts_B.tolist(), strict=True)]
    sources = [torch.arange(first[row], first[row + 1]) for row in rows]
    return torch.cat(positions), torch.cat(sources)
