"""Samples in one of two layouts: rows padded on the right, or one packed row that shares beginnings.

Right padding with a causal mask needs no attention mask: no real token can see a padded one. A packed row has no
padding at all; `Batch.segments` tells attention who sees whom. In it, whatever samples of one prompt have in common
(prompt, images, first tokens of the response) is computed once: a hidden state depends on nothing but what stands
before it. Images of a shared prompt are held once in both layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_ray.models.attention import Segments
from prism_ray.models.encode import EncodedPrompt
from prism_ray.models.packing import pack_chain
from prism_ray.models.turns import LaterImages


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and one response to it: `response_ids` int64 [R], R may be 0.

    In a conversation of several turns these are the tokens of all that came after the prompt: `mask` bool [R] says
    which of them the policy wrote (None: all), and `later` holds the images among them. What others wrote is read and
    not scored: in a `Batch`, response tokens are those of the mask.
    """

    prompt: EncodedPrompt
    response_ids: Tensor
    mask: Tensor | None = None
    later: LaterImages | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def shareable(self) -> int:
        """How many of the response's first tokens are all that a hidden state depends on: those before an image."""
        return len(self.response_ids) if self.later is None else int(self.later.visual_spots[0])

    def scored(self, values_R: Tensor) -> Tensor:
        """Of one value for each token after the prompt, those of the tokens that the policy wrote."""
        return values_R if self.mask is None else values_R[self.mask]


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples and their responses, the latter always padded to R tokens.

    `input_ids_BT` and `position_ids_3BT` (time, height, width) hold the samples as rows padded to T tokens, with
    `real_mask_BT` (bool); or as a single row [1, S] without padding, and `segments` says how it is made up. Flat
    positions are those of [B·T] or [S]: the state at `predictor_BR[b, r]` predicts response token r of sample b, and
    its last token (the prompt's if there is no response) is at `last_B[b]`. `response_ids_BR` with `response_mask_BR`
    (bool). `pixel_values` and `grid_thw` are those of the distinct prompts' images, then of those that came later;
    visual token v sits at `visual_positions_V[v]` (ascending) and takes row `visual_sources_V[v]` of the merged image
    features. `indices` says which of the samples given each one is.
    """

    input_ids_BT: Tensor
    position_ids_3BT: Tensor
    real_mask_BT: Tensor
    predictor_BR: Tensor
    last_B: Tensor
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


def collate(samples: Sequence[Sample], indices: Sequence[int] | None = None) -> Batch:
    """One padded batch of these samples, in this order; `indices` default to 0, 1, …

    Padding uses token 0 at position 0: it is never seen, never scored, and never an image placeholder because only
    prompts' own visual tokens are filled in.
    """
    tokens, positions = _rows(samples)
    input_ids_BT = pad_sequence(tokens, batch_first=True)
    width = input_ids_BT.shape[1]
    lengths_B = torch.tensor([len(ids) for ids in tokens])
    return _batch(
        samples,
        input_ids_BT=input_ids_BT,
        position_ids_3BT=pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1).contiguous(),
        real_mask_BT=torch.arange(width) < lengths_B[:, None],
        paths=[torch.arange(b * width, b * width + len(ids)) for b, ids in enumerate(tokens)],
        holders=range(len(samples)),
        indices=indices,
    )


def collate_shared(samples: Sequence[Sample], indices: Sequence[int] | None = None) -> Batch:
    """One packed batch in which what samples of the same prompt object begin with is computed once.

    Exact, gradients included: those of a shared token are the sum over its samples. `indices` default to 0, 1, …
    """
    tokens, positions = _rows(samples)
    paths = [torch.zeros(0, dtype=torch.int64)] * len(samples)
    new_tokens, new_positions, prefixes, holders = [], [], [], []
    path, size = paths[0], 0
    for i, common in _chain(samples):
        prefix, new = path[:common], len(tokens[i]) - common
        path = paths[i] = torch.cat((prefix, torch.arange(size, size + new)))
        size += new
        if not common:
            holders.append(i)
        if new:
            new_tokens.append(tokens[i][common:])
            new_positions.append(positions[i][:, common:])
            prefixes.append(prefix)
    input_ids_BT = torch.cat(new_tokens)[None]
    return _batch(
        samples,
        input_ids_BT=input_ids_BT,
        position_ids_3BT=torch.cat(new_positions, dim=1)[:, None],
        real_mask_BT=torch.ones_like(input_ids_BT, dtype=torch.bool),
        paths=paths,
        holders=holders,
        indices=indices,
        segments=Segments(tuple(len(ids) for ids in new_tokens), tuple(prefixes)),
    )


def shared_microbatch_count(samples: Sequence[Sample], token_budget: int) -> int:
    """How many micro-batches of at most `token_budget` computed tokens these samples make."""
    return len(_pack_shared(samples, token_budget, None))


def shared_microbatches(samples: Sequence[Sample], token_budget: int, count: int | None = None) -> list[Batch]:
    """Batches that share beginnings, of at most `token_budget` computed tokens (a longer sample gets its own).

    Samples of one prompt lie together as far as they fit, as `models.packing.pack_chain` has it. `count` asks for
    exactly so many: ranks whose forward passes must be equally many agree on the maximum of their
    `shared_microbatch_count`. `Batch.indices` leads back to the input order.
    """
    bins = _pack_shared(samples, token_budget, count)
    return [collate_shared([samples[i] for i in members], members) for members in bins]


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
    positions = []
    for s in samples:
        plain = longest[:, : len(s.response_ids)] + s.prompt.next_position
        positions.append(torch.cat((s.prompt.position_ids, s.later.position_ids if s.later else plain), dim=1))
    return tokens, positions


def _chain(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """The samples in an order in which each has the most in common with the one before it: prompt by prompt, and by
    their tokens; with each, how many of its first tokens are those of the one before it."""
    prompts: dict[int, int] = {}
    keys = [(prompts.setdefault(id(s.prompt), len(prompts)), s.response_ids.tolist()) for s in samples]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    chain = [(i, 0) for i in order]
    for at, (before, now) in enumerate(pairwise(order), start=1):
        if keys[before][0] == keys[now][0]:
            common = min(_common(keys[before][1], keys[now][1]), samples[before].shareable, samples[now].shareable)
            chain[at] = (now, len(samples[now].prompt.token_ids) + common)
    return chain


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _pack_shared(samples: Sequence[Sample], token_budget: int, count: int | None) -> list[list[int]]:
    chain = _chain(samples)
    runs = pack_chain([samples[i].length for i, _ in chain], [common for _, common in chain], token_budget, count)
    return [sorted(chain[at][0] for at in run) for run in runs]


def _batch(
    samples: Sequence[Sample],
    input_ids_BT: Tensor,
    position_ids_3BT: Tensor,
    real_mask_BT: Tensor,
    paths: list[Tensor],
    holders: Sequence[int],
    indices: Sequence[int] | None,
    segments: Segments | None = None,
) -> Batch:
    """What both layouts have in common: `paths` are the flat positions of each sample's tokens; `holders`, ascending in
    them, are the samples whose prompts are computed."""
    predictors = [s.scored(p[len(s.prompt.token_ids) - 1 : -1]) for s, p in zip(samples, paths, strict=True)]
    response_lengths_B = torch.tensor([len(predictor) for predictor in predictors])
    response_ids_BR = pad_sequence([s.scored(s.response_ids) for s in samples], batch_first=True)
    distinct, rows = _distinct_prompts([samples[i] for i in holders])
    visual = [(distinct[row].visual_spots, paths[i], row) for row, i in zip(rows, holders, strict=True)]
    later = [(s.later, path[len(s.prompt.token_ids) :]) for s, path in zip(samples, paths, strict=True) if s.later]
    visual += [(images.visual_spots, path, len(distinct) + n) for n, (images, path) in enumerate(later)]
    positions_V, sources_V = _visual_tokens(visual)
    shown = [*distinct, *(images for images, _ in later)]
    return Batch(
        input_ids_BT=input_ids_BT,
        position_ids_3BT=position_ids_3BT,
        real_mask_BT=real_mask_BT,
        predictor_BR=pad_sequence(predictors, batch_first=True),
        last_B=torch.stack([path[-1] for path in paths]),
        response_ids_BR=response_ids_BR,
        response_mask_BR=torch.arange(response_ids_BR.shape[1]) < response_lengths_B[:, None],
        pixel_values=torch.cat([images.pixel_values for images in shown]),
        grid_thw=torch.cat([images.grid_thw for images in shown]),
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


def _visual_tokens(shown: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Flat positions [V] of the visual tokens, ascending, and the rows [V] of the merged features that belong there.

    Of each place where images are shown: the spots of their tokens, the path on which these lie, and which of the
    holders of images, in the order of their features, it is.
    """
    sizes = {holder: len(spots) for spots, _, holder in shown}
    first = {holder: sum(sizes[before] for before in range(holder)) for holder in sizes}
    positions_V = torch.cat([path[spots] for spots, path, _ in shown])
    sources_V = torch.cat([torch.arange(first[h], first[h] + sizes[h]) for *_, h in shown])
    order_V = positions_V.argsort()
    return positions_V[order_V], sources_V[order_V]
