"""A copy that is set aside: in buckets that vLLM can unpack, and as old as it was set aside."""

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

from prism_ray.weights.staging import Staging
from tests.weights.test_source import EXPERT, SHAPES, Whole


def staged(trainer, bucket_bytes=64, dtype=torch.float32, **options):
    staging = Staging(trainer, SHAPES, dtype, bucket_bytes, **options)
    staging.fill()
    return staging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_are_what_vllm_unpacks(dtype):
    """Every tensor once, in order, in no more than a bucket's bytes unless it is larger itself."""
    trainer = Whole()
    staging = staged(trainer, dtype=dtype)
    names = [[meta.name for meta in bucket.metas] for bucket in staging.buckets]
    assert names == ([["a"], [EXPERT], ["b"]] if dtype == torch.float32 else [["a", EXPERT], ["b"]])
    for bucket in staging.buckets:
        said = bucket.described
        dtypes = [getattr(torch, name) for name in said["dtype_names"]]
        for name, tensor in unpack_tensor(bucket.buffer, said["names"], said["shapes"], dtypes, bucket.sizes):
            weight = trainer.weights[name].to(dtype)
            assert torch.equal(tensor, weight.transpose(1, 2) if name == EXPERT else weight)
    everything = dict(staging)
    assert list(everything) == list(SHAPES) and all(everything[n].shape == SHAPES[n] for n in SHAPES)


def test_what_is_set_aside_stays_as_it_was_until_it_is_set_aside_anew():
    trainer = Whole()
    staging = staged(trainer)
    before = {name: tensor.clone() for name, tensor in staging}
    addresses = [bucket.buffer.data_ptr() for bucket in staging.buckets]
    for weight in trainer.weights.values():
        weight += 1
    assert all(torch.equal(before[name], tensor) for name, tensor in staging)
    staging.fill()
    assert not any(torch.equal(before[name], tensor) for name, tensor in staging)
    assert [bucket.buffer.data_ptr() for bucket in staging.buckets] == addresses, "memory was taken anew"


def test_a_rank_that_keeps_nothing_still_takes_part():
    trainer = Whole()
    staging = staged(trainer, keep=False)
    assert trainer.passes == 1 and not staging.buckets and not list(staging)
    assert [meta.name for meta in staging.metadata()] == list(SHAPES)


def test_vllms_sender_and_receiver_cut_the_stream_alike():
    """The sender packs what it iterates, the receiver counts the bytes of what was declared (vLLM's own rule: a bucket
    ends with the tensor that overflows it)."""
    staging = staged(Whole(), dtype=torch.bfloat16)
    pairs, packed = NCCLTrainerWeightTransferEngine._checked_iter(staging, staging.metadata()), []
    while chunk := pack_tensors(pairs, lambda item: item[1], 20):
        packed.append(chunk)
    assert [chunk.names for chunk in packed] == [["a", EXPERT], ["b"]]
    for chunk in packed:
        for name, tensor in unpack_tensor(
            chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
        ):
            assert torch.equal(tensor, dict(staging)[name])
