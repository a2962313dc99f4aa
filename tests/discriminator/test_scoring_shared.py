"""Scoring with shared beginnings: every score and gradient is that of the sequence alone, and less is computed."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prism_ray.discriminator.scorer import group_views, score_sequences
from prism_ray.discriminator.segments import JudgedBatch, judged_batch, judged_batches, judged_of
from prism_ray.models.attention import Segments
from prism_ray.models.batch import collate
from prism_ray.records import Group, Prompt

ATOL = 1e-5


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Of three sizes, and none."""
    made = []
    for seed, (height, width) in enumerate([(32, 64), (64, 64), (96, 32)]):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        made.append(data.getvalue())
    return made


@pytest.fixture
def sequences(encoder, settings, group_of, response, images):
    """Of five prompts, with up to two images: captions that repeat, that part late, an empty view, and reasoning of
    many lengths."""
    found = []
    reference = response(" red one two", " max one", " one")
    texts = [
        reference,
        response(" red one four", " max" * 9, ""),
        response("", "", " two"),
        response(" red one", " one"),
    ]
    for seed, shown in enumerate([*([image] for image in images), [], images[:2]]):
        rollouts = group_of(seed, reference, *texts[: seed + 1]).rollouts
        content = "<image>" * len(shown) + (" max of" if shown else "max")
        prompt = Prompt(f"p{seed}", ({"role": "user", "content": content},), tuple(shown), reference)
        (views,) = group_views([Group(seed, prompt, rollouts)], encoder, settings)
        found += [s for r in (views.reference, *views.rollouts) for s in r.sequences.values()]
    return found


@pytest.fixture(params=[(4, 2), (1, 1)], ids=["mixture", "one expert"])
def model(request, build):
    """A mixture of experts, and one that is as good as dense."""
    experts, top_k = request.param
    return build(experts=experts, top_k=top_k)


def alone(sequence) -> JudgedBatch:
    """The sequence as a batch of its own, in the layout that shares nothing."""
    return judged_of(collate([sequence.sample]), [sequence])


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("budget", [60, 10_000])
def test_scores_and_gradients_are_those_of_each_sequence_alone(model, sequences, budget):
    weights = torch.linspace(-1, 1, len(sequences))
    expected = []
    for sequence, weight in zip(sequences, weights, strict=True):
        scores = model(alone(sequence))
        (weight * (scores.score_B / 10).tanh().sum()).backward()
        expected.append(torch.stack([scores.score_B, scores.head_B, scores.likelihood_B])[:, 0].detach())
    theirs = gradients(model)
    batches = judged_batches(sequences, budget)
    assert (len(batches) == 1) == (budget == 10_000)
    for judged in batches:
        scores = model(judged)
        rows = torch.stack([expected[i] for i in judged.batch.indices], dim=1)
        found = torch.stack([scores.score_B, scores.head_B, scores.likelihood_B])
        torch.testing.assert_close(found.detach(), rows, atol=ATOL, rtol=ATOL)
        (weights[judged.batch.indices] * (scores.score_B / 10).tanh()).sum().backward()
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=ATOL, rtol=0, msg=lambda m, n=name: n + m)


def test_one_response_alone_scores_as_in_a_group(model, sequences):
    together = score_sequences(model, sequences)
    for first in range(0, len(sequences), 2):
        pair = score_sequences(model, sequences[first : first + 2])
        torch.testing.assert_close(pair, together[first : first + 2], atol=ATOL, rtol=ATOL)


def test_prompt_image_and_context_are_computed_once(sequences):
    judged = judged_batch(sequences)
    prompts = {id(s.prompt): s.prompt for s in sequences}
    beginnings = {(id(s.prompt), s.token_ids[:n]) for s in sequences for n in range(1, len(s.token_ids) + 1)}
    assert judged.batch.computed_tokens == sum(len(p.token_ids) for p in prompts.values()) + len(beginnings)
    assert len(judged.batch.grid_thw) == 5
    assert judged.batch.computed_tokens < sum(s.length for s in sequences) / 2


def test_the_router_sees_what_is_shared_once(build, sequences):
    model, judged, router_logits = build(), judged_batch(sequences), []
    with torch.no_grad():
        model(judged, router_logits)
    assert {len(x) for x in router_logits} == {judged.batch.computed_tokens} == {int(judged.batch.real_mask_BT.sum())}


def test_no_mask_of_the_whole_row_is_made(build, sequences, monkeypatch):
    def refuse(self):
        raise AssertionError("attention runs by pieces")

    monkeypatch.setattr(Segments, "mask", refuse)
    with torch.no_grad():
        build()(judged_batch(sequences))
