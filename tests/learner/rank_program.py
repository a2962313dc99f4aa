"""One rank of a test: `python rank_program.py scenario rank world port folder`; results go to folder/rank.pt.

The inputs lie in folder/inputs.pt.
"""

import sys
from pathlib import Path

import rank_engine
import torch

from prism_ray.config.learner import LearnerSettings, OptimiserSettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.learner.policy import reference_policy, trainable_policy
from prism_ray.learner.step import update
from prism_ray.learner.work import prepare
from prism_ray.models.batch import collate
from prism_ray.models.encode import Encoder
from prism_ray.models.load import load_policy
from prism_ray.models.logprobs import response_logprobs

LR = 1e-5


def mean_loss(module, batch, tokens):
    return -response_logprobs(module, batch)[0].sum() / tokens


def engines(inputs, rank, world, folder):
    """Three steps with each ZeRO stage, one of them spoilt on the last rank; then back to a checkpoint."""
    results = {}
    for settings in inputs["settings"]:
        engine = TrainEngine(load_policy(inputs["policy"]), OptimiserSettings(**settings), total_steps=4)
        parts = [collate([s]) for s in inputs["samples"][rank::world]]
        reports = []
        for step in range(3):
            for part in parts:
                spoil = float("nan") if step == 1 and rank == world - 1 else 1.0
                engine.backward(spoil * engine.run(mean_loss, part, inputs["tokens"]))
            reports.append(engine.step())
            if step == 0:
                engine.save(folder / "checkpoint", f"z{settings['zero_stage']}")
                first = engine.weights()
        last = engine.weights()
        engine.load(folder / "checkpoint", f"z{settings['zero_stage']}")
        back = engine.weights()
        for part in parts:
            engine.backward(engine.run(mean_loss, part, inputs["tokens"]))
        again_report = engine.step()
        key = (settings["zero_stage"], settings["precision"])
        results[key] = {
            "reports": reports,
            "first": first,
            "last": last,
            "back": back,
            "again": engine.weights(),
            "again_report": again_report,
            "sum": engine.over_ranks([rank + 1.0, 2.0], "sum"),
            "max": engine.over_ranks([rank + 1.0], "max"),
        }
        engine.destroy()
    return results


def updates(inputs, rank, world, folder):
    """Updates from the given versions for each recipe with its learner settings, the groups divided over the ranks."""
    encoder = Encoder(inputs["policy"], 100)
    results = []
    for recipe, settings in inputs["recipes"]:
        settings = LearnerSettings(**({"lr": LR} | settings))
        engine = TrainEngine(trainable_policy(inputs["policy"], settings), settings)
        sampling = recipe.temperature, encoder.banned_ids
        reference = None
        if recipe.objective.kl_coef:
            reference = reference_policy(inputs["policy"], engine, settings, *sampling)
        work = prepare(inputs["groups"][world][rank], encoder, DEFAULT_VIEWS)
        outcomes = [update(engine, work, recipe, v, encoder.banned_ids, reference) for v in inputs["versions"]]
        results.append({"weights": engine.weights(), "outcomes": outcomes})
        engine.destroy()
    return results


def spoilt(inputs, rank, world, folder):
    """An update in which a group's image is not finite, and one in which no single trajectory is at fault."""
    encoder = Encoder(inputs["policy"], 100)
    results = []
    for zero_stage in (0, 2):
        settings = LearnerSettings(lr=LR, zero_stage=zero_stage, micro_batch_tokens=inputs["micro_batch_tokens"])
        engine = TrainEngine(trainable_policy(inputs["policy"], settings), settings)
        work = prepare(inputs["groups"][rank], encoder, DEFAULT_VIEWS)
        spoil_images(work, inputs["spoilt_group"])
        results.append(update(engine, work, inputs["recipe"], 3, encoder.banned_ids))
        work = prepare(inputs["groups"][rank], encoder, DEFAULT_VIEWS)
        engine.module.model.language_model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        results.append(update(engine, work, inputs["recipe"], 3, encoder.banned_ids))
        engine.destroy()
    return results


def spoil_images(work, number):
    for name, sample in zip(work.names, work.samples, strict=True):
        if name.startswith(f"group {number} "):
            sample.prompt.pixel_values.fill_(float("inf"))


def main() -> None:
    scenario, rank, world, port, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    init_process_group(rank, world, "127.0.0.1", int(port), 60)
    inputs = torch.load(Path(folder) / "inputs.pt", weights_only=False)
    scenarios = {"engines": engines, "updates": updates, "spoilt": spoilt}
    scenarios |= {name: getattr(rank_engine, name) for name in ("kinds", "train", "resume")}
    results = scenarios[scenario](inputs, rank, world, Path(folder))
    torch.save(results, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main()
