"""What leaves the learner, as a folder or as a stream, is the policy that transformers reads back."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from prism_ray.models import load
from prism_ray.models.load import load_policy, save_policy, save_weights
from prism_ray.models.logprobs import response_logprobs


def logp(model, batch):
    with torch.no_grad():
        return response_logprobs(model.eval(), batch)[0].float()


def with_weights(policy, weights, precision):
    """The policy in memory as the learner had it: no file in between."""
    model = load_policy(policy, getattr(torch, precision))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


@pytest.fixture
def learner(place, seen, policies):
    kind, precision = place.name.split("-")
    return with_weights(policies[kind], seen["weights"], precision)


@pytest.fixture(params=["weights", "stream", "model", "shards"])
def folder(request, place, seen, policies, learner, tmp_path, monkeypatch):
    """The trained policy's folder: `save_weights` after ZeRO-3, the source's stream, `save_policy`, or in shards."""
    if request.param == "weights":
        return place / "export"
    if request.param == "shards":
        monkeypatch.setattr(load, "SHARD_SIZE", "300KB")
        save_weights(seen["weights"], tmp_path / "out", like=policies[place.name.split("-")[0]])
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    elif request.param == "model":
        save_policy(learner, tmp_path / "out", like=policies["dense"])
    else:
        shutil.copytree(place / "export", tmp_path / "out")
        shutil.copy(place / "source" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    return tmp_path / "out"


def test_transformers_reads_back_every_tensor_and_every_log_prob(folder, learner, batch):
    back = load_policy(folder, learner.dtype)
    given, found = learner.state_dict(), back.state_dict()
    assert given.keys() == found.keys()
    for name, weight in given.items():
        assert torch.equal(found[name], weight), name
    torch.testing.assert_close(logp(back, batch), logp(learner, batch), atol=1e-6, rtol=0)


def test_the_precision_is_that_of_the_weights_in_files_and_configuration(folder, learner):
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {learner.dtype}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    named = {part["dtype"] for part in (config, config["text_config"], config["vision_config"])}
    assert named == {str(learner.dtype).removeprefix("torch.")}
    assert AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").dtype == learner.dtype
