"""Adapters, frozen parts, offload and schedules: two ranks train what one process of plain PyTorch trains."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from prism_ray.config.learner import LearnerSettings, LoraSettings, OptimiserSettings
from prism_ray.learner.policy import trainable_policy
from prism_ray.models.batch import Sample, collate
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs

COMMON = {"lr": 1e-3, "grad_clip": 0.5, "warmup_steps": 2, "schedule": "linear", "weight_decay": 0.1}
RATES = [5e-4, 1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
LORA = {"lora": LoraSettings(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj", "qkv")).model_dump()}
WIDE = {"lora": LoraSettings(rank=1100, alpha=100, targets=("q_proj",)).model_dump()}
"""Factors so large that ZeRO-3 divides them; smaller ones it keeps whole."""
FROZEN = {"freeze": [r"^model\.visual\.", "embed_tokens"]}
KINDS = {
    **{f"lora{stage}": LORA | {"zero_stage": stage} for stage in (0, 2, 3)},
    **{f"frozen{stage}": FROZEN | {"zero_stage": stage} for stage in (1, 3)},
    **{f"offload{stage}": {"zero_stage": stage, "offload": "optimizer"} for stage in (1, 2, 3)},
    "offload_parameters": {"zero_stage": 3, "offload": "parameters"},
    "wide": WIDE | {"zero_stage": 3},
    "cosine": {"schedule": "cosine"},
}
LORA_NAMES = [name for name in KINDS if name.startswith("lora")]


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
def trained(policy_folder, samples, run_ranks):
    kinds = {name: {"settings": settings} for name, settings in KINDS.items()}
    inputs = {"policy": policy_folder, "samples": samples, "tokens": 21, "common": COMMON, "kinds": kinds}
    return run_ranks("kinds", 2, inputs)


@pytest.fixture(scope="module")
def plain(policy_folder, samples):
    """Weights and losses of plain PyTorch in one process for some settings; adapters are merged by peft itself."""

    def run(**settings):
        model = trainable_policy(policy_folder, LearnerSettings(**settings))
        free = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(free, betas=(0.9, 0.95), weight_decay=0.1)
        losses = []
        for rate in RATES:
            optimiser.param_groups[0]["lr"] = rate
            loss = -response_logprobs(model, collate(samples))[0].sum() / 21
            loss.backward()
            torch.nn.utils.clip_grad_norm_(free, 0.5)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            layer.merge()
        found = {n.replace(".base_layer.", "."): p.detach() for n, p in model.named_parameters() if "lora_" not in n}
        return found, losses

    return {"": run(), "lora": run(**LORA), "frozen": run(**FROZEN), "wide": run(**WIDE)}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "cosine"])
def test_two_ranks_of_any_kind_equal_plain_pytorch(trained, plain, name):
    theirs, losses = plain[next((kind for kind in ("lora", "frozen", "wide") if name.startswith(kind)), "")]
    for rank in trained:
        result = rank[name]
        assert result["before"]["losses"] + result["after"]["losses"] == pytest.approx(losses, rel=1e-4)
        ours, start = result["after"]["weights"], result["start"]
        assert ours.keys() == theirs.keys()
        error = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in theirs)
        change = sum(float((theirs[n] - start[n]).double().square().sum()) for n in theirs)
        assert error**0.5 < 1e-3 * change**0.5


def test_frozen_parameters_stay_and_all_others_move(trained):
    for name in (name for name in KINDS if name.startswith("frozen")):
        start, end = trained[0][name]["start"], trained[0][name]["after"]["weights"]
        still = {n for n in start if torch.equal(start[n], end[n])}
        assert still == {n for n in start if n.startswith("model.visual.") or "embed_tokens" in n}


def test_weights_come_under_their_original_names_in_the_order_of_the_module(trained, policy_folder):
    original = [(n, (tuple(p.shape), p.dtype)) for n, p in load_policy(policy_folder).named_parameters()]
    for name in KINDS:
        for rank in trained:
            assert list(rank[name]["shapes"].items()) == original
            for weights in (rank[name]["start"], rank[name]["after"]["weights"]):
                assert [(n, (tuple(w.shape), w.dtype)) for n, w in weights.items()] == original


@pytest.mark.parametrize("name", LORA_NAMES)
def test_the_engine_without_its_adapters_is_the_start_policy(trained, policy_folder, samples, name):
    start = load_policy(policy_folder)
    with torch.no_grad():
        expected = [float(response_logprobs(start, collate([sample]))[0].sum()) for sample in samples]
    for rank in trained:
        first, last = rank[name]["reference"]
        assert first == last == expected


def test_schedules_rise_and_fall_to_the_last_step(trained):
    for name, rates in (("lora0", RATES), ("cosine", [5e-4, 1e-3, 1e-3, 7.5e-4, 2.5e-4])):
        result = trained[0][name]
        assert [r.lr for r in result["before"]["reports"] + result["after"]["reports"]] == pytest.approx(rates)


def test_offload_reaches_deepspeed(trained):
    found = {name: trained[0][name]["offloaded"] for name in KINDS}
    optimizer = {name: (True, False) for name in KINDS if name.startswith("offload")}
    nothing = dict.fromkeys(KINDS, (False, False))
    assert found == nothing | optimizer | {"offload_parameters": (True, True)}


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 0), ("parameters", 2)])
def test_offload_without_the_zero_stage_it_needs_is_refused(offload, stage):
    with pytest.raises(ValueError, match=f"offload: {offload} needs zero_stage"):
        OptimiserSettings(offload=offload, zero_stage=stage)


def test_deepspeed_halves_the_gradient_of_an_output_with_loss_and_logits_and_ours_does_not(trained):
    """0.19.8 with ZeRO-1/2: `loss.backward()` under gradient accumulation. Once mended there, this test may go."""
    for rank in trained:
        ratios = rank["half_gradient"]
        by_tensor, by_engine, ours = ({stage: values[i] for stage, values in ratios.items()} for i in range(3))
        assert by_tensor == pytest.approx({1: 0.5, 2: 0.5, 3: 1.0})
        assert by_engine == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
        assert ours == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
