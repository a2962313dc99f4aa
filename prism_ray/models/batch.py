"""Samples side by side: right-padded batches in which the images of a shared prompt are held once.

Right padding with a causal mask needs no attention mask: no real token can see a padded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_ray.models.encode import EncodedPrompt


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
    """B samples padded on the right to T tokens, their responses to R.

    `input_ids_BT`, `position_ids_3BT`, `lengths_B`, `prompt_lengths_B`; `response_ids_BR` with `response_mask_BR`
    (bool); `pixel_values` and `grid_thw` of the distinct prompts' images; visual token v sits at flat position
    `visual_positions_V[v]` of [B·T] (ascending) and takes row `visual_sources_V[v]` of the merged image features.
    `indices` says which of the samples given each row is.
    """

    input_ids_BT: Tensor
    position_ids_3BT: Tensor
    lengths_B: Tensor
    prompt_lengths_B: Tensor
    response_ids_BR: Tensor
    response_mask_BR: Tensor
    pixel_values: Tensor
    grid_thw: Tensor
    visual_positions_V: Tensor
    visual_sources_V: Tensor
    indices: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """This batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "indices"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    @property
    def padded_tokens(self) -> int:
        return self.input_ids_BT.numel()

    @property
    def real_mask_BT(self) -> Tensor:
        """True where a token is not padding."""
        return torch.arange(self.input_ids_BT.shape[1], device=self.lengths_B.device) < self.lengths_B[:, None]


def collate(samples: Sequence[Sample], indices: Sequence[int] | None = None) -> Batch:
    """One batch of these samples, in this order; `indices` default to 0, 1, …

    Padding uses token 0 at position 0: it is never seen, never scored, and never an image placeholder because only
    prompts' own visual tokens are filled in.
    """
    if not samples:
        raise ValueError("cannot collate an empty list of samples; skip empty batches")
    prompt_lengths = [len(s.prompt.token_ids) for s in samples]
    lengths_B = torch.tensor([s.length for s in samples])
    prompt_lengths_B = torch.tensor(prompt_lengths)
    response_lengths_B = lengths_B - prompt_lengths_B
    input_ids_BT = pad_sequence([torch.cat((s.prompt.token_ids, s.response_ids)) for s in samples], batch_first=True)
    response_ids_BR = pad_sequence([s.response_ids for s in samples], batch_first=True)
    response_mask_BR = torch.arange(response_ids_BR.shape[1]) < response_lengths_B[:, None]
    distinct, rows = _distinct_prompts(samples)
    positions_V, sources_V = _visual_tokens(samples, distinct, rows, input_ids_BT.shape[1])
    return Batch(
        input_ids_BT=input_ids_BT,
        position_ids_3BT=_positions(samples, prompt_lengths_B, input_ids_BT.shape[1]),
        lengths_B=lengths_B,
        prompt_lengths_B=prompt_lengths_B,
        response_ids_BR=response_ids_BR,
        response_mask_BR=response_mask_BR,
        pixel_values=torch.cat([p.pixel_values for p in distinct]),
        grid_thw=torch.cat([p.grid_thw for p in distinct]),
        visual_positions_V=positions_V,
        visual_sources_V=sources_V,
        indices=list(range(len(samples)) if indices is None else indices),
    )


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


def _positions(samples: Sequence[Sample], prompt_lengths_B: Tensor, width: int) -> Tensor:
    """[3, B, T]: the prompts' own positions, then each response counting on from its prompt's last."""
    prompt_BP3 = pad_sequence([s.prompt.position_ids.T for s in samples], batch_first=True)
    next_B = prompt_BP3.amax(dim=(1, 2)) + 1
    steps_BT = torch.arange(width) - prompt_lengths_B[:, None]
    positions_BT = (next_B[:, None] + steps_BT) * (steps_BT >= 0)
    positions_3BT = positions_BT.repeat(3, 1, 1)
    positions_3BT[:, :, : prompt_BP3.shape[1]] += prompt_BP3.permute(2, 0, 1)
    return positions_3BT


def _distinct_prompts(samples: Sequence[Sample]) -> tuple[list[EncodedPrompt], list[int]]:
    """The distinct prompt objects, and for each sample which of them is its own."""
    seen: dict[int, int] = {}
    distinct: list[EncodedPrompt] = []
    for sample in samples:
        if id(sample.prompt) not in seen:
            seen[id(sample.prompt)] = len(distinct)
            distinct.append(sample.prompt)
    return distinct, [seen[id(s.prompt)] for s in samples]


def _visual_tokens(
    samples: Sequence[Sample], distinct: list[EncodedPrompt], rows: list[int], width: int
) -> tuple[Tensor, Tensor]:
    """Flat positions [V] of the visual tokens in [B·T] and the rows [V] of the merged features that belong there."""
    spots = [p.visual_spots for p in distinct]
    first = [0]
    for spot in spots:
        first.append(first[-1] + len(spot))
    positions = [spots[row] + b * width for b, row in enumerate(rows)]
    sources = [torch.arange(first[row], first[row + 1]) for row in rows]
    return torch.cat(positions), torch.cat(sources)
