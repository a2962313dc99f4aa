"""Packing is exact: what is packed equals each sample alone, in values and gradients, and samples never meet.

The samples here have prompts of their own, so that they share nothing; test_shared_prefix.py has those that do.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from prism_ray.models.attention import IMPLEMENTATION, PACKED, Segments, packed_attention
from prism_ray.models.batch import Sample, collate, collate_shared, shared_microbatch_count, shared_microbatches
from prism_ray.models.encode import Encoder
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.packing import balance

ATOL = 1e-5


@pytest.fixture(scope="module")
def samples(dense_folder, prompts):
    """No image, one, another size, several of several sizes, a prompt three times, an empty response."""
    encoded = Encoder(dense_folder, 300).prompts(prompts)
    generator = torch.Generator().manual_seed(0)
    sizes = [(0, 3), (1, 9), (2, 1), (3, 5), (1, 14), (1, 0), (0, 1)]
    own = [dataclasses.replace(encoded[p]) for p, _ in sizes]
    return [Sample(p, torch.randint(20, 300, (n,), generator=generator)) for p, (_, n) in zip(own, sizes, strict=True)]


def loss_of(logp_BR):
    """Of no symmetry between samples or tokens."""
    return (logp_BR * torch.linspace(0.5, 1.5, logp_BR.shape[1])).tanh().sum()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_by_one(model, samples):
    """Log-probs of each sample by a forward pass of its own, and the gradients of the summed loss."""
    logps = []
    for sample in samples:
        logp_BR = response_logprobs(model, collate([sample]))[0]
        if len(sample.response_ids):
            loss_of(logp_BR).backward()
        logps.append(logp_BR[0].detach())
    return logps, gradients(model)


def assert_gradients_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=ATOL, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_a_packed_row_equals_one_by_one_values_and_gradients(policy, samples, how):
    logps, theirs = one_by_one(policy, samples)
    if how == "checkpointed":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate_shared(samples)
    logp_BR = response_logprobs(policy, batch)[0]
    for row, alone in enumerate(logps):
        torch.testing.assert_close(logp_BR.detach()[row, : len(alone)], alone, atol=ATOL, rtol=0)
        assert not logp_BR[row, len(alone) :].any()
    sum(loss_of(logp_BR[row : row + 1, : len(alone)]) for row, alone in enumerate(logps)).backward()
    assert_gradients_equal(gradients(policy), theirs)


def test_packed_microbatches_equal_one_by_one(policy, samples):
    logps, theirs = one_by_one(policy, samples)
    batches = shared_microbatches(samples, 64, count=4)
    assert len(batches) == 4
    for batch in batches:
        logp_BR = response_logprobs(policy, batch)[0]
        for row, index in enumerate(batch.indices):
            torch.testing.assert_close(logp_BR.detach()[row, : len(logps[index])], logps[index], atol=ATOL, rtol=0)
        sum(loss_of(logp_BR[row : row + 1, : len(logps[i])]) for row, i in enumerate(batch.indices)).backward()
    ours = gradients(policy)
    assert_gradients_equal(ours, theirs)


def test_every_attention_implementation_keeps_packed_samples_apart(policy, samples):
    """Hugging Face's own read it off the row of text positions."""
    batch = collate_shared(samples)
    with torch.no_grad():
        ours = response_logprobs(policy, batch)[0]
        for name in ("sdpa", "eager"):
            policy.set_attn_implementation(name)
            torch.testing.assert_close(response_logprobs(policy, batch)[0], ours, atol=ATOL, rtol=0)


def test_a_sample_does_not_see_its_neighbours(policy, samples):
    """Neither their tokens nor their images: what changes in one changes that one only."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = response_logprobs(policy, collate_shared(samples))[0]
        for changed, sample in enumerate(samples):
            other = torch.randint(20, 300, sample.response_ids.shape, generator=generator)
            prompt = dataclasses.replace(
                sample.prompt,
                token_ids=sample.prompt.token_ids.clone().index_fill(0, torch.tensor([0]), 40),
                pixel_values=sample.prompt.pixel_values.flip(0) * 0.5,
            )
            now = [*samples]
            now[changed] = Sample(prompt, other)
            after = response_logprobs(policy, collate_shared(now))[0]
            moved = (after - before).abs().amax(dim=1)
            if len(other):
                assert moved[changed] > 1e-2
            moved[changed] = 0
            assert moved.max() < ATOL


@pytest.mark.parametrize("layout", [collate, collate_shared])
def test_no_mask_is_made(policy, samples, layout, monkeypatch):
    made = []
    original = masking_utils.sdpa_mask

    def spy(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, PACKED, spy)
    final_hidden(policy, layout(samples))
    assert made == [None]


def test_the_vision_tower_keeps_its_own_attention(policy_folder, tmp_path):
    model = load_policy(policy_folder)
    assert model.model.language_model.config._attn_implementation == PACKED
    assert model.model.visual.config._attn_implementation == "sdpa"
    model.config.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()


def test_a_mask_beside_segments_is_an_error(policy, samples):
    batch = collate_shared(samples)
    embeds = policy.get_input_embeddings()(batch.input_ids_BT)
    mask = torch.ones(1, 1, batch.computed_tokens, batch.computed_tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        policy.model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids_3BT, attention_mask=mask, segments=batch.segments
        )


def test_hugging_faces_own_forward_works_under_our_attention(policy, samples):
    """Padding on the left and a cache need masks, which our attention leaves to `sdpa`."""
    ids = torch.cat((samples[0].prompt.token_ids, samples[0].response_ids))[None]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    policy.eval()
    with torch.no_grad():
        results = []
        for name in (IMPLEMENTATION, "sdpa"):
            policy.set_attn_implementation(name)
            logits = policy(input_ids=padded, attention_mask=mask).logits[0, 4:]
            new = policy.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            results.append((logits, new))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    assert torch.equal(results[0][1], results[1][1])


def test_router_logits_of_a_packed_row_are_those_of_its_tokens(moe_folder, samples):
    model, packed, padded = load_policy(moe_folder), [], []
    batch = collate(samples)
    with torch.no_grad():
        final_hidden(model, collate_shared(samples), packed)
        final_hidden(model, batch, padded)
    assert len(packed) == len(padded) == 4
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs[batch.real_mask_BT.flatten()], atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's variable-length kernel needs CUDA")
def test_the_variable_length_kernel_equals_one_by_one():
    generator = torch.Generator("cuda").manual_seed(0)
    segments = Segments.of([5, 300, 1, 64])
    heads = {"query": 8, "key": 2, "value": 2}
    inputs = {n: torch.randn(1, 370, h, 64, device="cuda", generator=generator) for n, h in heads.items()}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items()}
        turned = {n: x.transpose(1, 2) for n, x in leaves.items()}
        mixed, _ = packed_attention(None, **turned, attention_mask=None, segments=segments.to("cuda"), scaling=0.1)
        mixed.float().tanh().sum().backward()
        results.append((mixed.float(), *(x.grad.float() for x in leaves.values())))
    for exact, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact, atol=0.05, rtol=0.05)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 12))
def test_parts_are_balanced(lengths, count):
    """No two differ by more than the longest sample."""
    count = min(count, len(lengths))
    parts = balance(lengths, count)
    loads = [sum(lengths[i] for i in p) for p in parts]
    assert len(parts) == count and sorted(i for p in parts for i in p) == list(range(len(lengths)))
    assert max(loads) - min(loads) <= max(lengths)
    assert loads == sorted(loads, reverse=True) and all(p and p == sorted(p) for p in parts)
    assert parts == balance(list(lengths), count)


def test_exchanges_balance_what_longest_first_does_not():
    assert [sum(b) for b in ([[5, 5, 4, 3, 3][i] for i in p] for p in balance([5, 5, 4, 3, 3], 2))] == [10, 10]


def test_the_count_is_that_of_the_batches_and_nothing_is_padded(samples):
    for budget in (1, 40, 90, 1000):
        batches = shared_microbatches(samples, budget)
        assert shared_microbatch_count(samples, budget) == len(batches)
        assert sum(b.computed_tokens for b in batches) == sum(s.length for s in samples)
    assert shared_microbatches([], 10) == [] and shared_microbatch_count([], 10) == 0
