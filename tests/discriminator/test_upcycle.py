"""Sparse upcycling: what is copied, what is noise, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file as safetensors_save
from torch.profiler import ProfilerActivity, profile

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.batch import Sample, collate
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import load_policy, save_weights
from prism_ray.models.tiny import build_tiny
from prism_ray.models.upcycle import Upcycling, upcycle, upcycle_folder


@pytest.fixture(scope="module")
def dense(tiny_folder):
    return load_policy(tiny_folder).eval()


def test_without_noise_the_mixture_equals_the_dense_model(dense, encoder, prompt_of, response):
    moe = upcycle(dense, Upcycling(experts=4, top_k=2, expert_noise=0.0, router_init=0.5, seed=0))
    prompts = [encoder.prompt(prompt_of(seed, response())) for seed in range(2)]
    texts = (response(), response(think=" max two three"))
    batch = collate([Sample(p, torch.tensor(encoder.response(t))) for p, t in zip(prompts, texts, strict=True)])
    with torch.no_grad():
        real = batch.real_mask_BT
        old, new = (m.lm_head(final_hidden(m, batch))[real] for m in (dense, moe))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_everything_but_the_mlps_is_copied_and_the_head_stays_tied(dense):
    moe = upcycle(dense, Upcycling(experts=3, top_k=1, expert_noise=0.1, router_init=0.02, seed=0))
    new = moe.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".language_model.layers." in name and ".mlp." in name:
            assert name not in new
        else:
            torch.testing.assert_close(new[name], tensor, rtol=0, atol=0)
    assert moe.lm_head.weight is moe.get_input_embeddings().weight


def test_experts_are_noisy_copies_and_the_router_is_small(dense):
    moe = upcycle(dense, Upcycling(experts=4, top_k=2, expert_noise=0.01, router_init=0.02, seed=0))
    mlp, source = moe.model.language_model.layers[0].mlp, dense.model.language_model.layers[0].mlp
    gate_up = torch.cat([source.gate_proj.weight, source.up_proj.weight])
    noise = mlp.experts.gate_up_proj - gate_up
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)
    assert (mlp.experts.down_proj - source.down_proj.weight).std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(noise[0], noise[1])
    assert mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_upcycling_is_deterministic_and_leaves_the_global_random_state_alone(dense):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (upcycle(dense, Upcycling(2, 1, 0.01, 0.02, seed=s)).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    assert torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name])


def test_more_active_experts_than_experts_are_refused(dense):
    with pytest.raises(ValueError, match="top_k is 3"):
        upcycle(dense, Upcycling(experts=2, top_k=3, expert_noise=0.0, router_init=0.0, seed=0))


def test_a_mixture_cannot_be_upcycled_again(dense):
    mixture: Any = upcycle(dense, Upcycling(2, 1, 0.0, 0.0, 0))
    with pytest.raises(ValueError, match="Qwen3VLMoe"):
        upcycle(mixture, Upcycling(2, 1, 0.0, 0.0, 0))


def files_of(folder) -> dict[str, torch.Tensor]:
    """Every weight as the folder's files hold it."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_upcycled_weight_by_weight_is_the_model_upcycled_in_memory_to_the_bit(tiny_folder, tmp_path, dtype):
    upcycling = Upcycling(4, 2, 0.01, 0.02, seed=3)
    upcycle_folder(tiny_folder, tmp_path, upcycling, dtype=dtype, shard_size=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(files_of(tmp_path))
    found = load_policy(tmp_path, dtype)
    expected = upcycle(load_policy(tiny_folder, dtype), upcycling)
    assert type(found) is type(expected) and found.dtype == dtype
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in found.state_dict().items())
    text: Any = found.config.text_config
    assert text.num_experts_per_tok == 2
    assert (tmp_path / "tokenizer.json").read_text() == (tiny_folder / "tokenizer.json").read_text()


def test_the_shards_of_the_dense_model_do_not_matter(tiny_folder, tmp_path):
    """Gate and up projections may lie in different files."""
    upcycling = Upcycling(2, 1, 0.01, 0.02, seed=0)
    source = load_policy(tiny_folder)
    save_weights(source.state_dict(), tmp_path / "one", tiny_folder)
    (path,) = (tmp_path / "one").glob("*.safetensors")
    weights = files_of(tmp_path / "one")
    path.unlink()
    names = sorted(weights)
    for part in (0, 1):
        safetensors_save({n: weights[n] for n in names[part::2]}, path.with_name(f"model-{part}.safetensors"))
    for folder, target in ((tiny_folder, "a"), (tmp_path / "one", "b")):
        upcycle_folder(folder, tmp_path / target, upcycling)
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that tensors held at a time while the function ran, by PyTorch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events: Any = profiler.profiler
    held = most = 0
    for event in sorted(events.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


def test_upcycling_a_folder_holds_one_file_and_one_weight_at_a_time(tmp_path):
    sizes = TinyModelSettings(hidden_size=64, layers=6, heads=2, key_value_heads=1, mlp_size=2048)
    build_tiny(tmp_path / "dense", ["red"], sizes, seed=0)
    upcycling = Upcycling(4, 2, 0.01, 0.02, seed=0)
    weight = 4 * 2 * 2048 * 64 * 4
    shard = 2 * weight
    streamed = peak_bytes(lambda: upcycle_folder(tmp_path / "dense", tmp_path / "moe", upcycling, shard_size=shard))
    streamed -= (tmp_path / "dense" / "model.safetensors").stat().st_size  # mapped into memory, not held there
    whole = sum(w.nbytes for w in files_of(tmp_path / "moe").values())
    in_memory = peak_bytes(lambda: upcycle(load_policy(tmp_path / "dense"), upcycling))
    assert in_memory > whole > 4 * shard, "the measure sees what it must"
    assert shard / 2 < streamed < shard + 1.7 * weight, "a file, and a weight with its transpose or its noise"


@pytest.mark.parametrize(
    "name", ["model.language_model.norm.weight", "model.language_model.layers.1.mlp.up_proj.weight"]
)
def test_a_dense_folder_that_lacks_a_weight_is_refused(tiny_folder, tmp_path, name):
    weights = load_policy(tiny_folder).state_dict()
    save_weights({n: w for n, w in weights.items() if n != name}, tmp_path / "holed", tiny_folder)
    with pytest.raises(ValueError, match=f"{name}.* missing; the checkpoint is incomplete"):
        upcycle_folder(tmp_path / "holed", tmp_path / "moe", Upcycling(2, 1, 0.0, 0.0, 0))


def test_a_folder_of_a_mixture_cannot_be_upcycled_again(tiny_folder, tmp_path):
    upcycling = Upcycling(2, 1, 0.0, 0.0, 0)
    upcycle_folder(tiny_folder, tmp_path / "moe", upcycling)
    with pytest.raises(ValueError, match="Qwen3VLMoe"):
        upcycle_folder(tmp_path / "moe", tmp_path / "again", upcycling)
