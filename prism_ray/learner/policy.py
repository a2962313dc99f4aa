"""The policy as the learner holds it: the model that trains, and the frozen one a KL is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_ray.config.learner import LearnerSettings
from prism_ray.learner.engine import TrainEngine
from prism_ray.learner.step import ReferencePolicy
from prism_ray.models.adapters import add_lora, freeze, without_adapters
from prism_ray.models.batch import Batch
from prism_ray.models.kernels import use_liger
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs


def trainable_policy(folder: str | Path, settings: LearnerSettings) -> Any:
    """The model in `folder`, ready for an engine: frozen parts, adapters and gradient checkpointing as configured, and
    faster kernels where there are any."""
    model = load_policy(folder, getattr(torch, settings.precision))
    use_liger(model)
    freeze(model, settings.freeze)
    if settings.lora is not None:
        add_lora(model, settings.lora)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def reference_policy(
    folder: str | Path, engine: TrainEngine, settings: LearnerSettings, temperature: float, banned_ids: Sequence[int]
) -> ReferencePolicy:
    """The policy in `folder` as it was, for log-probs under the rollouts' sampling.

    With adapters it is the engine's own module without them; otherwise a second copy of the weights, in the training
    precision, on this rank's device.
    """
    options: dict[str, Any] = {"temperature": temperature, "banned_ids": banned_ids}
    if settings.lora is not None:
        return lambda batch: engine.run(_without_adapters, batch, options)
    frozen = load_policy(folder, getattr(torch, settings.precision)).requires_grad_(False).eval().to(engine.device)
    return lambda batch: response_logprobs(frozen, batch, **options)[0]


def _without_adapters(model: Any, batch: Batch, options: dict[str, Any]) -> Tensor:
    with without_adapters(model):
        return response_logprobs(model, batch, **options)[0]
