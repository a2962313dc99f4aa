from dataclasses import replace

import pytest
import torch

from prism_ray.models.batch import Sample, collate, collate_shared, microbatches
from prism_ray.models.encode import Encoder


@pytest.fixture(scope="module")
def encoded(dense_folder, prompts):
    return Encoder(dense_folder, 300).prompts(prompts)


def sample(prompt, length):
    return Sample(prompt, torch.arange(length) % 50 + 20)


def test_rows_hold_prompt_and_response_padded_on_the_right(encoded):
    samples = [sample(encoded[0], 3), sample(encoded[3], 5), sample(encoded[1], 0)]
    batch = collate(samples)
    for row, s in enumerate(samples):
        whole = torch.cat((s.prompt.token_ids, s.response_ids))
        assert torch.equal(batch.input_ids_BT[row, : s.length], whole)
        assert batch.real_mask_BT[row].sum() == s.length
        assert torch.equal(batch.response_ids_BR[row][batch.response_mask_BR[row]], s.response_ids)
    assert batch.real_mask_BT.sum() == sum(s.length for s in samples)


def test_response_positions_go_on_from_the_prompt(encoded):
    samples = [sample(encoded[0], 3), sample(encoded[3], 5)]
    batch = collate(samples)
    for row, s in enumerate(samples):
        size = len(s.prompt.token_ids)
        assert torch.equal(batch.position_ids_3BT[:, row, :size], s.prompt.position_ids)
        after = s.prompt.next_position + torch.arange(len(s.response_ids))
        assert torch.equal(batch.position_ids_3BT[:, row, size : s.length], after.expand(3, -1))


def test_the_images_of_a_shared_prompt_are_held_once(encoded):
    batch = collate([sample(encoded[1], 3), sample(encoded[3], 2), sample(encoded[1], 6), sample(encoded[0], 1)])
    assert len(batch.grid_thw) == 4
    one, many = len(encoded[1].visual_spots), len(encoded[3].visual_spots)
    assert batch.visual_sources_V.tolist() == [*range(one), *range(one, one + many), *range(one)]
    flat = batch.input_ids_BT.flatten()[batch.visual_positions_V]
    assert len(set(flat.tolist())) == 1
    assert torch.equal(batch.visual_positions_V, batch.visual_positions_V.sort().values)


def test_microbatches_keep_the_budget_and_every_sample_once(encoded):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 60, (40,), generator=generator).tolist()
    samples = [sample(encoded[i % 4], n) for i, n in enumerate(lengths)]
    batches = microbatches(samples, 256)
    assert all(b.computed_tokens <= 256 for b in batches)
    assert sorted(i for b in batches for i in b.indices) == list(range(40))
    for batch in batches:
        assert batch.real_mask_BT.sum(1).tolist() == [samples[i].length for i in batch.indices]
    padding = sum(b.computed_tokens for b in batches) / sum(s.length for s in samples)
    assert padding < 1.3


def test_a_sample_longer_than_the_budget_stands_alone(encoded):
    batches = microbatches([sample(encoded[0], 5), sample(encoded[0], 90)], 64)
    assert [b.indices for b in batches] == [[1], [0]]


def test_nothing_to_collate_is_an_error():
    assert microbatches([], 10) == []
    for layout in (collate, collate_shared):
        with pytest.raises(ValueError, match="empty list"):
            layout([])


def test_a_packed_row_holds_what_padded_rows_hold_without_the_padding(encoded):
    """Prompts are equal but not the same, so that nothing is shared."""
    samples = [sample(replace(encoded[p]), n) for p, n in [(0, 3), (3, 5), (1, 0), (3, 2)]]
    packed, padded = collate_shared(samples, [7, 5, 3, 1]), collate(samples)
    real = padded.real_mask_BT
    assert packed.input_ids_BT.shape == (1, packed.computed_tokens) == (1, int(real.sum()))
    assert packed.real_mask_BT.all() and packed.real_mask_BT.shape == packed.input_ids_BT.shape
    assert torch.equal(packed.input_ids_BT[0], padded.input_ids_BT[real])
    assert torch.equal(packed.position_ids_3BT[:, 0], padded.position_ids_3BT[:, real])
    for name in ("response_ids_BR", "response_mask_BR", "visual_sources_V", "grid_thw"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    for batch in (packed, padded):
        ids = batch.input_ids_BT.flatten()
        assert torch.equal(
            ids[batch.last_B], torch.stack([torch.cat((s.prompt.token_ids, s.response_ids))[-1] for s in samples])
        )
        before = [torch.cat((s.prompt.token_ids[-1:], s.response_ids))[:-1] for s in samples]
        assert torch.equal(ids[batch.predictor_BR[batch.response_mask_BR]], torch.cat(before))
        assert set(ids[batch.visual_positions_V].tolist()) == {int(encoded[1].token_ids[encoded[1].visual_spots[0]])}
    assert packed.indices == [7, 5, 3, 1]


def test_a_batch_moves_as_a_whole(encoded):
    batch = collate_shared([sample(encoded[0], 3), sample(encoded[1], 5)]).to("meta")
    assert {batch.input_ids_BT.device.type, batch.last_B.device.type, batch.segments.offsets.device.type} == {"meta"}
    assert batch.indices == [0, 1]
    assert collate([sample(encoded[0], 3)]).to("meta").segments is None
