import pytest
import torch
from pydantic import ValidationError
from torch import nn

from prism_ray.config.learner import LearnerSettings, LoraSettings
from prism_ray.config.trainer import TrainerSettings
from prism_ray.models.adapters import add_lora, freeze, original_weights, without_adapters
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.forward import final_hidden
from prism_ray.models.load import load_policy

ATTENTION = LoraSettings(rank=4, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
VISION = LoraSettings(rank=4, alpha=8, targets=("qkv", "q_proj"))


@pytest.fixture(scope="module")
def batch(dense_folder, prompts):
    encoded = Encoder(dense_folder, 300).prompts(prompts)
    generator = torch.Generator().manual_seed(0)
    return collate([Sample(p, torch.randint(20, 300, (5,), generator=generator)) for p in encoded])


def hidden(model, batch):
    with torch.no_grad():
        return final_hidden(model, batch)


def train_adapters(model):
    """Adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_patterns_are_searched_in_names_and_leave_the_rest(policy):
    every = trained(policy)
    freeze(policy, [r"^model\.visual\.", r"layers\.0\."])
    left = trained(policy)
    assert left == {n for n in every if not n.startswith("model.visual.") and ".layers.0." not in n}
    assert left < every


def test_no_pattern_freezes_nothing(policy):
    freeze(policy, [])
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_a_pattern_without_a_match_is_named_with_its_neighbours(policy):
    with pytest.raises(ValueError, match=r"'\^model\\\\.vision\\\\.' matches no parameter; there are model.visual,"):
        freeze(policy, [r"^model\.vision\."])


def test_freezing_everything_is_refused(policy):
    with pytest.raises(ValueError, match="leave no parameter to train"):
        freeze(policy, ["visual", "language_model"])


@pytest.mark.parametrize("settings", [LearnerSettings, TrainerSettings])
def test_a_pattern_that_is_no_regular_expression_is_refused_when_read(settings):
    with pytest.raises(ValidationError, match=r"'model\(' is no regular expression"):
        settings(freeze=["model("])


def test_new_adapters_change_nothing_and_train_alone(policy, batch):
    before = hidden(policy, batch)
    add_lora(policy, ATTENTION)
    assert torch.equal(hidden(policy, batch), before)
    names = trained(policy)
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    final_hidden(policy, batch).square().mean().backward()
    assert all((parameter.grad is not None) == (name in names) for name, parameter in policy.named_parameters())


def test_adapters_depend_on_the_seed_alone(dense_folder):
    def factors(seed):
        model = load_policy(dense_folder)
        torch.manual_seed(torch.seed())  # elsewhere each time
        state = torch.get_rng_state()
        add_lora(model, ATTENTION, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(factors(3), factors(3))
    assert not torch.equal(factors(3), factors(4))


@pytest.mark.parametrize("settings", [ATTENTION, VISION])
def test_merged_weights_are_the_adapted_model_under_its_original_names(policy_folder, policy, batch, settings):
    before = hidden(policy, batch)
    add_lora(policy, settings)
    train_adapters(policy)
    merged = {weight.name: weight.merged() for weight in original_weights(policy)}
    plain = load_policy(policy_folder)
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        assert torch.equal(merged[name], parameter) != any(f".{t}.weight" in name for t in settings.targets)
    plain.load_state_dict(merged, strict=False)
    adapted = hidden(policy, batch)
    assert not torch.allclose(adapted, before, atol=1e-2)
    torch.testing.assert_close(hidden(plain, batch), adapted, atol=2e-5, rtol=1e-4)


def test_without_adapters_the_model_is_what_it_was(policy, batch):
    before = hidden(policy, batch)
    add_lora(policy, ATTENTION)
    train_adapters(policy)
    names, adapted = trained(policy), hidden(policy, batch)
    with pytest.raises(KeyError), without_adapters(policy):
        assert torch.equal(hidden(policy, batch), before)
        raise KeyError
    assert torch.equal(hidden(policy, batch), adapted)
    assert trained(policy) == names


def test_without_adapters_changes_nothing_where_there_are_none(policy, batch):
    before = hidden(policy, batch)
    with without_adapters(policy):
        assert torch.equal(hidden(policy, batch), before)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_merging_in_bfloat16_rounds_once():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    add_lora(layer, LoraSettings(rank=1, alpha=3, targets=("0",)))
    parts = dict(layer.named_parameters())
    down, up = parts["0.lora_A.default.weight"], parts["0.lora_B.default.weight"]
    nn.init.normal_(up, std=0.1)
    merged = {weight.name: weight.merged() for weight in original_weights(layer)}
    exact = parts["0.base_layer.weight"].double() + 3 * up.double() @ down.double()
    assert torch.equal(merged["0.weight"], exact.bfloat16())
    assert torch.equal(merged["0.bias"], parts["0.base_layer.bias"])


def test_frozen_layers_get_no_adapter(dense_folder):
    model = load_policy(dense_folder)
    freeze(model, [r"language_model\.layers\.0\."])
    add_lora(model, ATTENTION)
    assert trained(model) and not any("layers.0." in name for name in trained(model))


def test_an_unknown_target_is_named_with_what_there_is(dense_folder):
    with pytest.raises(ValueError, match=r"'query'; there are: .*q_proj"):
        add_lora(load_policy(dense_folder), LoraSettings(targets=("query",)))


def test_experts_take_no_adapter(moe_folder):
    with pytest.raises(ValueError, match="no trainable linear layer is called 'gate_proj'"):
        add_lora(load_policy(moe_folder), LoraSettings())


def test_a_tied_output_layer_takes_no_adapter(dense_folder):
    with pytest.raises(ValueError, match="'lm_head'"):
        add_lora(load_policy(dense_folder), LoraSettings(targets=("lm_head",)))


def test_dropout_acts_in_training_only(dense_folder, batch):
    model = load_policy(dense_folder)
    add_lora(model, ATTENTION.model_copy(update={"dropout": 0.5}))
    train_adapters(model)
    assert not torch.equal(hidden(model, batch), hidden(model, batch))
    model.eval()
    assert torch.equal(hidden(model, batch), hidden(model, batch))
