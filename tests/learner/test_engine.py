import math

import pytest
import torch

from prism_ray.config.learner import OptimiserSettings
from prism_ray.learner.engine import TrainEngine
from prism_ray.models.batch import Sample, collate
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs

COMMON = {"lr": 1e-2, "grad_clip": 0.5, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1}
KINDS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16")]


@pytest.fixture(scope="module")
def samples(encoder, make_group):
    """Two with an image for rank 0, two without any for rank 1."""
    generator = torch.Generator().manual_seed(0)
    prompts = encoder.prompts([make_group(i, image=i % 2 == 0).prompt for i in range(4)])
    return [
        Sample(p, torch.randint(260, 280, (n,), generator=generator))
        for p, n in zip(prompts, (4, 9, 2, 6), strict=True)
    ]


@pytest.fixture(scope="module")
def two_ranks(policy_folder, samples, run_ranks):
    settings = [COMMON | {"zero_stage": stage, "precision": precision} for stage, precision in KINDS]
    tokens = sum(len(s.response_ids) for s in samples)
    inputs = {"policy": policy_folder, "samples": samples, "settings": settings, "tokens": tokens}
    return run_ranks("engines", 2, inputs)


@pytest.fixture(scope="module")
def plain(policy_folder, samples):
    """The same with plain PyTorch in one process: weights before and after each good step, norms, learning rates."""
    model = load_policy(policy_folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    states, norms, rates = [_copy(model)], [], [5e-3, 1e-2]
    for rate in rates:
        optimiser.param_groups[0]["lr"] = rate
        logp_BR = response_logprobs(model, collate(samples))[0]
        (-logp_BR.sum() / sum(len(s.response_ids) for s in samples)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimiser.step()
        optimiser.zero_grad()
        states.append(_copy(model))
    return states, norms, rates


def _copy(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same_change(ours, theirs, start):
    """Equal up to 0.1 % of the change since `start`: Adam turns rounding of near-zero gradients into whole steps, so
    single weights say nothing. (That it hides the gradient's scale is why norms are compared too.)"""
    assert ours.keys() == theirs.keys()
    error = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs)
    change = sum((theirs[n] - start[n]).double().square().sum() for n in theirs)
    assert (error / change).sqrt() < 1e-3


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_two_ranks_with_any_zero_stage_equal_plain_pytorch(two_ranks, plain, kind):
    states, norms, rates = plain
    for rank in two_ranks:
        result = rank[kind]
        assert_same_change(result["first"], states[1], states[0])
        assert_same_change(result["last"], states[2], states[1])
        good = [result["reports"][0], result["reports"][2]]
        assert [r.lr for r in good] == pytest.approx(rates)
        assert [r.grad_norm for r in good] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(two_ranks, kind):
    for rank in two_ranks:
        reports = rank[kind]["reports"]
        assert [r.skipped for r in reports] == [False, True, False]
        assert math.isinf(reports[1].grad_norm)
        assert reports[1].lr == reports[2].lr  # the schedule waited


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_weights_optimiser_and_schedule(two_ranks, kind):
    for rank in two_ranks:
        result = rank[kind]
        assert_equal(result["back"], result["first"])
        assert_equal(result["again"], result["last"])
        assert result["again_report"] == result["reports"][2]


def test_bfloat16_trains_what_float32_trains(two_ranks, plain):
    weights = two_ranks[0][(1, "bfloat16")]["last"]
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    moved = plain[0][2]["model.language_model.norm.weight"] - 1
    assert torch.allclose(weights["model.language_model.norm.weight"].float() - 1, moved, atol=2e-2)


def test_all_ranks_end_with_the_same_weights(two_ranks):
    for kind in KINDS:
        assert_equal(two_ranks[1][kind]["last"], two_ranks[0][kind]["last"])


def test_values_are_reduced_over_ranks(two_ranks):
    for rank in two_ranks:
        assert rank[KINDS[0]]["sum"] == [3.0, 4.0]
        assert rank[KINDS[0]]["max"] == [2.0]


def test_an_engine_without_process_group_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have joined one
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        TrainEngine(torch.nn.Linear(1, 1), OptimiserSettings())


def test_bfloat16_without_zero_is_refused():
    with pytest.raises(ValueError, match="bfloat16 needs zero_stage"):
        OptimiserSettings(precision="bfloat16", zero_stage=0)
