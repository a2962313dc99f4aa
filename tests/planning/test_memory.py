"""What training holds, by DeepSpeed's rules; `benchmarks/memory_model.py` holds the same against real updates."""

import pytest

from prism_ray.config.learner import OptimiserSettings
from prism_ray.models.logprobs import CHUNK_ELEMENTS
from prism_ray.planning.architecture import PUBLISHED
from prism_ray.planning.memory import (
    BUCKET_NUMBERS,
    CHUNK_LOGITS,
    Memory,
    Pass,
    activations,
    kv_bytes,
    training_state,
)

FOUR = PUBLISHED["qwen3-vl-4b"]
GB = 10**9


def state(stage: int, precision: str = "bfloat16", offload: str = "none", ranks: int = 4) -> Memory:
    settings = OptimiserSettings(zero_stage=stage, precision=precision, offload=offload)  # type: ignore[arg-type]
    return training_state(4 * GB, 2 * GB, settings, ranks)


def test_the_stages_divide_what_they_say():
    """Four billion parameters of which two train, on four ranks."""
    bucket = BUCKET_NUMBERS * 2
    assert state(0, "float32") == Memory(16 * GB, 8 * GB, 16 * GB)
    assert state(1) == Memory(8 * GB, 4 * GB, 6 * GB, bucket)
    assert state(2) == Memory(8 * GB, 1 * GB, 6 * GB, bucket)
    assert state(3) == Memory(2 * GB, 1 * GB, 6 * GB, bucket)
    assert state(2, ranks=1).optimiser == 24 * GB


def test_what_is_offloaded_waits_in_the_hosts_memory():
    part = state(2, offload="optimizer")
    assert (part.weights, part.gradients, part.optimiser, part.host) == (8 * GB, 0, 0, 10 * GB)
    everything = state(3, offload="parameters")
    assert (everything.weights, everything.optimiser, everything.host) == (0, 0, 12 * GB)


def test_the_chunk_is_the_learners():
    assert CHUNK_LOGITS == CHUNK_ELEMENTS


def test_keys_and_values_of_a_token():
    assert kv_bytes(FOUR, "bfloat16", 1) == 2 * 36 * 8 * 128 * 2
    assert kv_bytes(FOUR, "bfloat16", 4) == kv_bytes(FOUR, "bfloat16", 1) // 4
    assert kv_bytes(FOUR, "bfloat16", 16) == kv_bytes(FOUR, "bfloat16", 8), "a head is not divided"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_grow_with_tokens_and_shrink_with_checkpointing(checkpointing):
    few, many = (activations(FOUR, Pass(n, 512, "bfloat16", checkpointing)) for n in (4096, 8192))
    assert few < many < 2 * few
    kept, again = (activations(FOUR, Pass(8192, 2048, "bfloat16", again)) for again in (False, True))
    assert again < kept / 10


def test_a_frozen_vision_tower_keeps_nothing_for_its_backward_pass():
    trained, frozen = (activations(FOUR, Pass(8192, 2048, "bfloat16", False, trains)) for trains in (True, False))
    assert frozen < trained
