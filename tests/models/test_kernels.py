import sys
from types import ModuleType

import pytest
import torch

from prism_ray.models import kernels
from prism_ray.models.kernels import use_liger


def test_a_cpu_keeps_its_own_kernels(policy):
    before = {name: type(module) for name, module in policy.named_modules()}
    assert not use_liger(policy)
    assert {name: type(module) for name, module in policy.named_modules()} == before


def test_only_the_norms_are_patched_and_by_the_models_own_function(policy, monkeypatch):
    """What the package is asked for; its kernels need a GPU."""
    asked = []
    package = ModuleType("liger_kernel.transformers")
    for name in kernels._PATCHES.values():
        setattr(package, name, lambda name=name, **options: asked.append((name, options)))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert use_liger(policy)
    ((name, options),) = asked
    assert name.endswith("moe") == type(policy).__name__.startswith("Qwen3VLMoe")
    assert options.pop("model") is policy and options.pop("rms_norm")
    assert not any(options.values())


@pytest.mark.parametrize("missing", ["package", "gpu"])
def test_neither_is_required(policy, monkeypatch, missing):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if missing == "package" else object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "gpu")
    assert not use_liger(policy)
