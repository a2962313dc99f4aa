"""Scenarios of rank_program.py about the engine: what it trains, saved half-way, and what others make of that."""

import random
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from prism_ray.config.learner import LearnerSettings, OptimiserSettings
from prism_ray.learner.engine import TrainEngine
from prism_ray.learner.policy import trainable_policy
from prism_ray.models.adapters import without_adapters
from prism_ray.models.batch import collate
from prism_ray.models.logprobs import response_logprobs

STEPS_BEFORE, STEPS_AFTER = 2, 3


def kinds(inputs, rank, world, folder):
    """What is trained with each kind of settings, and how DeepSpeed's own gradients compare with ours."""
    return train(inputs, rank, world, folder) | {"half_gradient": half_gradient(world)}


def train(inputs, rank, world, folder):
    """Each kind: two steps, a checkpoint if there is a folder for it, three more steps."""
    results = {}
    for name, kind in inputs["kinds"].items():
        engine = make_engine(inputs, kind)
        result = {"shapes": engine.weight_shapes(), "start": engine.weights()}
        adapted = "lora" in kind["settings"]
        result["reference"] = [reference_logp(engine, inputs)] if adapted else []
        result["before"] = steps(engine, inputs, STEPS_BEFORE)
        if "checkpoints" in inputs:
            engine.save(inputs["checkpoints"], name)
        result["after"] = steps(engine, inputs, STEPS_AFTER)
        result["reference"] += [reference_logp(engine, inputs)] if adapted else []
        inner = engine._engine
        result["offloaded"] = bool(inner.zero_use_cpu_optimizer()), inner.zero_offload_param() is not None
        results[name] = result
        engine.destroy()
    return results


def resume(inputs, rank, world, folder):
    """Each kind: the three steps after the checkpoint `load`; with `save_as`, it is written again before them."""
    results = {}
    for name, kind in inputs["kinds"].items():
        engine = make_engine(inputs, kind)
        try:
            engine.load(inputs["checkpoints"], kind["load"])
        except (ValueError, RuntimeError) as error:
            results[name] = str(error)
            continue
        if "save_as" in kind:
            engine.save(inputs["checkpoints"], kind["save_as"])
        results[name] = steps(engine, inputs, STEPS_AFTER)
        engine.destroy()
    return results


def make_engine(inputs, kind):
    settings = LearnerSettings(**inputs["common"] | kind["settings"])
    model = trainable_policy(inputs["policy"], settings)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = kind.get("attention_dropout", 0.0)
    torch.manual_seed(torch.distributed.get_rank())
    return TrainEngine(model, settings, total_steps=STEPS_BEFORE + STEPS_AFTER)


def steps(engine, inputs, count):
    """What `count` steps on this rank's samples were: losses over all ranks, reports, random draws, weights after."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    losses, reports = [], []
    for _ in range(count):
        total = 0.0
        for sample in inputs["samples"][rank::world]:
            loss = -engine.run(sum_logp, collate([sample])) / inputs["tokens"]
            engine.backward(loss)
            total += float(loss)
        losses += engine.over_ranks([total], "sum")
        reports.append(engine.step())
    draws = random.random(), np.random.random(), float(torch.rand(()))
    return {"losses": losses, "reports": reports, "draws": draws, "weights": engine.weights()}


def sum_logp(module, batch):
    return response_logprobs(module, batch)[0].sum()


def reference_logp(engine, inputs):
    """Log-probs without adapters, as a reference policy asks for them."""
    with torch.no_grad():
        return [float(engine.run(sum_logp_without_adapters, collate([sample]))) for sample in inputs["samples"]]


def sum_logp_without_adapters(module, batch):
    with without_adapters(module):
        return sum_logp(module, batch)


class TwoOutputs(nn.Module):
    """A loss and logits, both with gradients, as a Hugging Face model returns them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        logits = self.linear(x).tanh()
        return {"loss": logits.square().mean(), "logits": logits}


def half_gradient(world):
    """Gradient norms of the mean of two micro-batches, the same on each rank, as shares of the true one.

    For each ZeRO stage: those of DeepSpeed's two ways, and ours.
    """
    micros = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    module = TwoOutputs()
    torch.stack([module(x)["loss"] for x in micros]).mean().backward()
    truth = float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
    results = {}
    for stage in (1, 2, 3):
        plain = [_plain_norm(stage, micros, by_engine) for by_engine in (False, True)]
        ours = TrainEngine(TwoOutputs(), OptimiserSettings(zero_stage=stage))
        for x in micros:
            ours.backward(ours.run(lambda module, x: module(x), x)["loss"] / (2 * world))
        results[stage] = [norm / truth for norm in (*plain, ours.step().grad_norm)]
        ours.destroy()
    return results


def _plain_norm(stage, micros, by_engine):
    module = TwoOutputs()
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "steps_per_print": None,
    }
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=module, optimizer=optimiser, config=config)[0]
    for x in micros:
        loss = engine(x)["loss"]
        engine.backward(loss) if by_engine else loss.backward()
        engine.step()
    norm: Any = engine.get_global_grad_norm()
    engine.destroy()
    return float(norm)
