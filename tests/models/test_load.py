import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from prism_ray.models import load
from prism_ray.models.batch import Sample, collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import copy_policy, load_policy, save_policy, save_weights
from prism_ray.models.logprobs import response_logprobs


@pytest.fixture(scope="module")
def batch(dense_folder, prompts):
    encoder = Encoder(dense_folder, 300)
    return collate([Sample(p, torch.arange(260, 270)) for p in encoder.prompts(prompts)])


def score(model, batch):
    with torch.no_grad():
        return response_logprobs(model, batch)[0]


def perturbed(folder):
    model = load_policy(folder)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * (index % 7 - 3) * parameter.abs().mean())
    return model


@pytest.mark.parametrize("form", ["model", "tensors", "arrays"])
def test_what_was_saved_scores_the_same(policy_folder, batch, tmp_path, form):
    model = perturbed(policy_folder)
    if form == "model":
        save_policy(model, tmp_path / "out", like=policy_folder)
    else:
        state = model.state_dict()
        weights = state if form == "tensors" else {n: w.numpy() for n, w in state.items()}
        save_weights(weights, tmp_path / "out", like=policy_folder)
    torch.testing.assert_close(score(load_policy(tmp_path / "out"), batch), score(model, batch), atol=1e-6, rtol=0)


def test_the_saved_folder_is_an_ordinary_one(policy_folder, tmp_path):
    save_policy(perturbed(policy_folder), tmp_path / "out", like=policy_folder)
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.eos_token == "<|im_end|>"
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_shards_of_an_earlier_export_do_not_stay_behind(policy_folder, tmp_path, monkeypatch):
    model = perturbed(policy_folder)
    with monkeypatch.context() as patched:
        patched.setattr(load, "SHARD_SIZE", "1MB")
        save_policy(load_policy(policy_folder), tmp_path / "out", like=policy_folder)
    assert len(list((tmp_path / "out").glob("*.safetensors*"))) > 2
    save_policy(model, tmp_path / "out", like=policy_folder)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(load_policy(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_a_copied_policy_is_the_same_and_nothing_stays_behind(dense_folder, moe_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(load, "SHARD_SIZE", "1MB")
        save_policy(load_policy(moe_folder), tmp_path / "out", like=moe_folder)
    copy_policy(dense_folder, tmp_path / "out")
    copied, source = (load_policy(folder).state_dict() for folder in (tmp_path / "out", dense_folder))
    assert copied.keys() == source.keys() and all(torch.equal(copied[n], source[n]) for n in source)
    assert len(list((tmp_path / "out").glob("*.safetensors*"))) == 1


def test_saving_leaves_the_model_as_it_was(dense_folder, tmp_path):
    model = load_policy(dense_folder).bfloat16()
    model.config.dtype = torch.float32
    save_policy(model, tmp_path / "out", like=dense_folder)
    assert model.config.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_experts_are_filed_transposed_as_published_checkpoints_have_them(moe_folder):
    from safetensors import safe_open

    model = load_policy(moe_folder)
    with safe_open(moe_folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if "experts" in n]  # noqa: SIM118 - safe_open is not a dict
        assert len(names) == 8
        for name in names:
            assert torch.equal(file.get_tensor(name), model.get_parameter(name).transpose(1, 2))
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_wrong_or_broken_folder_is_named(dense_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no config.json"):
        load_policy(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(dense_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder}: no .*safetensors"):
        load_policy(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=f"{folder}: architecture LlamaForCausalLM is not supported"):
        load_policy(folder)


def test_precision_is_as_asked(dense_folder):
    assert load_policy(dense_folder, torch.bfloat16).dtype == torch.bfloat16


def test_square_experts_are_refused(moe_folder, tmp_path):
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ValueError, match="square experts"):
        save_weights({name: torch.zeros(4, 96, 96)}, tmp_path, like=moe_folder)
