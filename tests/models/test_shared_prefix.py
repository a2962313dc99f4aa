"""Sharing beginnings is exact: values and gradients are those of each sample alone, and less is computed."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_ray.models.attention import Segments, packed_attention
from prism_ray.models.batch import (
    Sample,
    collate,
    collate_shared,
    shared_microbatch_count,
    shared_microbatches,
)
from prism_ray.models.encode import Encoder
from prism_ray.models.forward import final_hidden
from prism_ray.models.logprobs import response_logprobs
from prism_ray.models.packing import pack_chain

ATOL = 1e-5


@pytest.fixture(scope="module")
def encoded(dense_folder, prompts):
    return Encoder(dense_folder, 300).prompts(prompts)


@pytest.fixture(scope="module")
def samples(encoded):
    """Prompts without image, with one, with several of several sizes, mixed up; of the second: a response three times,
    one that is the beginning of another, one that goes on from it, one that parts early, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 300, (40,), generator=generator)
    branch = torch.cat((ids[:4], ids[20:26]))
    of_second = [ids[:9], branch, ids[:5], ids[:9], ids[30:33], ids[:0], ids[:14], ids[:9]]
    others = [(0, ids[:3]), (2, ids[5:6]), (3, ids[:5]), (0, ids[2:9]), (3, ids[:7]), (0, ids[2:12])]
    mixed = [Sample(encoded[1], r) for r in of_second]
    for at, (prompt, response) in enumerate(others):
        mixed.insert(2 * at, Sample(encoded[prompt], response))
    return mixed


def loss_of(logp_BR):
    """Of no symmetry between tokens."""
    return (logp_BR * torch.linspace(0.5, 1.5, logp_BR.shape[1])).tanh().sum()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_one_by_one(model, samples, batches):
    """Log-probs, last hidden states and the gradients of a loss on both."""
    logps, lasts = [], []
    for sample in samples:
        alone = collate([sample])
        logp_BR, last_BD = both(model, alone)
        (loss_of(logp_BR) + last_BD.tanh().sum()).backward()
        logps.append(logp_BR[0].detach())
        lasts.append(last_BD[0].detach())
    theirs = gradients(model)
    for batch in batches:
        logp_BR, last_BD = both(model, batch)
        loss = last_BD.tanh().sum()
        for row, index in enumerate(batch.indices):
            size = len(logps[index])
            torch.testing.assert_close(logp_BR[row, :size].detach(), logps[index], atol=ATOL, rtol=0)
            torch.testing.assert_close(last_BD[row].detach(), lasts[index], atol=ATOL, rtol=ATOL)
            assert not logp_BR[row, size:].any()
            loss = loss + loss_of(logp_BR[row : row + 1, :size])
        loss.backward()
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=ATOL, rtol=0, msg=lambda m, n=name: n + m)


def both(model, batch):
    last_BD = final_hidden(model, batch).flatten(0, 1)[batch.last_B]
    return response_logprobs(model, batch)[0], last_BD


@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_shared_beginnings_equal_one_by_one_values_and_gradients(policy, samples, how):
    if how == "checkpointed":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_one_by_one(policy, samples, [collate_shared(samples)])


def test_shared_microbatches_equal_one_by_one(policy, samples):
    batches = shared_microbatches(samples, 60, count=7)
    assert len(batches) == 7
    assert_equal_one_by_one(policy, samples, batches)


@pytest.mark.parametrize("chosen", [[11], [2], [11, 0]], ids=["empty response", "one response", "one each"])
def test_samples_that_share_nothing_are_a_packed_row(policy, samples, chosen):
    some = [samples[i] for i in chosen]
    shared = collate_shared(some)
    assert shared.computed_tokens == sum(s.length for s in some)
    assert_equal_one_by_one(policy, some, [shared])


def test_what_is_common_is_held_once(samples, encoded):
    batch = collate_shared(samples)
    distinct = {
        (id(s.prompt), tuple(s.response_ids[:n].tolist())) for s in samples for n in range(len(s.response_ids) + 1)
    }
    prompts = sum(len(p.token_ids) for p in encoded)
    assert batch.computed_tokens == len(distinct) - len(encoded) + prompts
    assert batch.input_ids_BT.shape == (1, batch.computed_tokens) and batch.real_mask_BT.all()
    assert len(batch.grid_thw) == sum(len(p.grid_thw) for p in encoded)
    assert len(batch.visual_positions_V) == sum(len(p.visual_spots) for p in encoded)
    assert torch.equal(batch.visual_positions_V, batch.visual_positions_V.sort().values)
    image = int(encoded[1].token_ids[encoded[1].visual_spots[0]])
    assert set(batch.input_ids_BT[0, batch.visual_positions_V].tolist()) == {image}
    assert batch.segments is not None and sum(batch.segments.lengths) == batch.computed_tokens


def test_positions_go_on_from_the_own_prompt(samples):
    batch = collate_shared(samples)
    for row, s in enumerate(samples):
        tokens = len(s.response_ids)
        at = torch.cat((batch.predictor_BR[row, 1:tokens], batch.last_B[row : row + 1])) if tokens else batch.last_B[:0]
        expected = (s.prompt.next_position + torch.arange(tokens)).expand(3, -1)
        assert torch.equal(batch.position_ids_3BT[:, 0, at], expected)
        assert torch.equal(batch.input_ids_BT[0, at], s.response_ids)


def test_every_attention_implementation_knows_what_is_shared(policy, samples):
    batch = collate_shared(samples)
    with torch.no_grad():
        ours = response_logprobs(policy, batch)[0]
        for name in ("sdpa", "eager"):
            policy.set_attn_implementation(name)
            torch.testing.assert_close(response_logprobs(policy, batch)[0], ours, atol=ATOL, rtol=0)


def test_a_response_sees_its_prompt_and_itself_and_no_other_response(policy, encoded):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 300, (4, 8), generator=generator)
    with torch.no_grad():
        before = response_logprobs(policy, collate_shared([Sample(encoded[1], r) for r in ids]))[0]
        for changed in range(4):
            now = ids.clone()
            now[changed, 3] = 300 - now[changed, 3]
            after = response_logprobs(policy, collate_shared([Sample(encoded[1], r) for r in now]))[0]
            moved = (after - before).abs()
            assert (moved[changed, 3:] > 1e-4).all() and moved[changed, :3].max() < ATOL
            moved[changed] = 0
            assert moved.max() < ATOL
        prompt = dataclasses.replace(encoded[1], pixel_values=encoded[1].pixel_values.flip(0) * 0.5)
        other = response_logprobs(policy, collate_shared([Sample(prompt, r) for r in ids]))[0]
    assert ((other - before).abs().amax(1) > 1e-2).all()


@pytest.mark.parametrize("held", ["once", "each"])
def test_what_is_not_finite_in_one_prompt_stays_there(policy, encoded, held):
    """So that a spoilt update can name the samples at fault."""
    pixels = torch.full_like(encoded[1].pixel_values, torch.nan)
    spoilt = dataclasses.replace(encoded[1], pixel_values=pixels)
    some = [Sample(p, torch.arange(30, 30 + n)) for p in (spoilt, encoded[2], encoded[0]) for n in (5, 6, 7, 3)]
    if held == "each":
        some = [dataclasses.replace(s, prompt=dataclasses.replace(s.prompt)) for s in some]
    with torch.no_grad():
        finite_B = response_logprobs(policy, collate_shared(some))[0].isfinite().all(1)
    assert finite_B.tolist() == [False] * 4 + [True] * 8


def pieces(data, most):
    """A row of pieces whose prefixes are earlier positions, in any order."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=most))
    prefixes, size = [], 0
    for length in lengths:
        count = data.draw(st.integers(0, size))
        prefixes.append(torch.randperm(size, generator=torch.Generator().manual_seed(count))[:count])
        size += length
    return Segments(tuple(lengths), tuple(prefixes))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_by_pieces_equals_attention_under_the_whole_mask(data):
    segments = pieces(data, 12)
    size = sum(segments.lengths)
    generator = torch.Generator().manual_seed(size)
    heads = {"query": 4, "key": 2, "value": 2}
    inputs = {n: torch.randn(1, size, h, 8, generator=generator).transpose(1, 2) for n, h in heads.items()}
    ours, _ = packed_attention(None, **inputs, attention_mask=None, segments=segments, scaling=0.3)
    scores = inputs["query"] @ inputs["key"].repeat_interleave(2, 1).mT * 0.3
    weights = scores.masked_fill(~segments.mask(), -torch.inf).softmax(-1)
    expected = (weights @ inputs["value"].repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_pieces_keys_are_laid_out_as_the_variable_length_kernel_wants_them():
    """Prefix before own tokens, so that causality aligned at the lower right is ours."""
    segments = Segments((3, 2, 1), (torch.arange(0), torch.tensor([0, 1]), torch.tensor([0, 1, 4])))
    assert segments.offsets.tolist() == [0, 3, 5, 6] and segments.offsets.dtype == torch.int32
    assert segments.keys is not None and segments.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 4, 5]
    assert segments.key_offsets.tolist() == [0, 3, 7, 11] and segments.longest == (3, 4)
    assert Segments.of([3, 2]).keys is None
    assert Segments.of([3, 2]).key_offsets.tolist() == [0, 3, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's variable-length kernel needs CUDA")
def test_the_variable_length_kernel_equals_attention_by_pieces():
    generator = torch.Generator("cuda").manual_seed(0)
    prefixes = (torch.arange(0), torch.arange(250), torch.arange(250), torch.arange(260))
    segments = Segments((300, 70, 1, 129), prefixes).to("cuda")
    heads = {"query": 8, "key": 2, "value": 2}
    inputs = {n: torch.randn(1, 500, h, 64, device="cuda", generator=generator) for n, h in heads.items()}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items()}
        turned = {n: x.transpose(1, 2) for n, x in leaves.items()}
        mixed, _ = packed_attention(None, **turned, attention_mask=None, segments=segments, scaling=0.1)
        mixed.float().tanh().sum().backward()
        results.append((mixed.float(), *(x.grad.float() for x in leaves.values())))
    for exact, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact, atol=0.05, rtol=0.05)


@st.composite
def chains(draw, least=0):
    """Lengths, and how much each sample has in common with the one before it."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=least, max_size=40))
    common = [0] * len(lengths)
    for i in range(1, len(lengths)):
        common[i] = draw(st.integers(0, min(lengths[i], lengths[i - 1])))
    return lengths, common


def load(members, lengths, common):
    """Distinct tokens: a sample and the one before it have in common what all have that stand between them."""
    shared = sum(min(common[a + 1 : b + 1]) for a, b in pairwise(members))
    return sum(lengths[i] for i in members) - shared


def fewest_runs(lengths, common, budget):
    """By trying every cut (dynamic programming)."""
    best = [0]
    for stop in range(1, len(lengths) + 1):
        starts = [s for s in range(stop) if stop - s == 1 or load(range(s, stop), lengths, common) <= budget]
        best.append(1 + min(best[s] for s in starts))
    return best[-1]


@settings(max_examples=200, deadline=None)
@given(chains(), st.integers(1, 150))
def test_bins_keep_the_budget_and_are_no_more_than_runs_of_neighbours(chain, budget):
    lengths, common = chain
    bins = pack_chain(lengths, common, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and b == sorted(b) for b in bins)
    loads = [load(b, lengths, common) for b in bins]
    assert all(n <= budget or len(b) == 1 for n, b in zip(loads, bins, strict=True))
    assert loads == sorted(loads, reverse=True)
    assert len(bins) <= fewest_runs(lengths, common, budget)
    assert bins == pack_chain(list(lengths), list(common), budget)


@settings(max_examples=200, deadline=None)
@given(chains(least=1), st.integers(1, 150), st.data())
def test_bins_are_as_many_as_asked_for_and_no_fuller_than_runs_of_neighbours(chain, budget, data):
    lengths, common = chain
    fewest = len(pack_chain(lengths, common, budget))
    count = data.draw(st.integers(fewest, len(lengths)))
    bins = pack_chain(lengths, common, budget, count)
    assert len(bins) == count and all(bins)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or load(b, lengths, common) <= budget for b in bins)
    fullest = max((load(b, lengths, common) for b in bins if len(b) > 1), default=0)
    if fullest > 1:
        assert fewest_runs(lengths, common, fullest - 1) > count or fullest <= max(lengths)


def test_a_bin_is_filled_from_the_whole_prompt():
    """Runs of neighbours would be three: the first alone, two, the last alone."""
    lengths, common = [7, 6, 5, 4], [0, 1, 1, 1]
    assert pack_chain(lengths, common, 10) == [[0, 3], [1, 2]]
    assert fewest_runs(lengths, common, 10) == 3


def test_what_more_than_the_prompt_is_common_stays_together():
    """Choosing by length alone would part the last two, and need three bins."""
    assert pack_chain([2, 5, 7, 7], [0, 0, 1, 4], 10) == [[2, 3], [0, 1]]


def test_bins_that_cannot_be_had_are_errors():
    assert pack_chain([], [], 10) == [] == pack_chain([], [], 10, 0)
    assert pack_chain([30], [0], 10) == [[0]]
    for bins in (0, 3):
        with pytest.raises(ValueError, match=f"2 samples cannot fill {bins} bins"):
            pack_chain([3, 4], [0, 2], 10, bins)
    with pytest.raises(ValueError, match="1 bins of 10 tokens do not hold the samples; ask for 2"):
        pack_chain([6, 6], [0, 1], 10, 1)
    assert pack_chain([6, 6], [0, 2], 10, 1) == [[0, 1]]


def test_microbatches_count_what_is_really_computed(samples):
    for budget in (1, 40, 90, 1000):
        batches = shared_microbatches(samples, budget)
        assert shared_microbatch_count(samples, budget) == len(batches)
        assert all(b.computed_tokens <= budget or len(b.indices) == 1 for b in batches)
        assert sorted(i for b in batches for i in b.indices) == list(range(len(samples)))
    assert batches[0].computed_tokens < sum(s.length for s in samples) / 2
    assert shared_microbatches([], 10) == [] and shared_microbatch_count([], 10) == 0
