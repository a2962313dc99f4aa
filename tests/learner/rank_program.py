"""One rank of a test: `python rank_program.py scenario rank world port folder`; results go to folder/rank.pt.

The inputs lie in folder/inputs.pt.
"""

import sys
from pathlib import Path

import torch

from prism_ray.config.learner import OptimiserSettings
from prism_ray.learner.engine import TrainEngine, init_process_group
from prism_ray.learner.step import prepare, update
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
    """One policy update for each recipe, the groups divided over the ranks as given."""
    encoder = Encoder(inputs["policy"], 100)
    results = []
    for recipe, zero_stage in inputs["recipes"]:
        engine = TrainEngine(load_policy(inputs["policy"]), OptimiserSettings(lr=LR, zero_stage=zero_stage))
        work = prepare(inputs["groups"][world][rank], encoder, recipe.advantage, recipe.objective.max_response_tokens)
        outcome = update(engine, work, recipe, 3, encoder.banned_ids)
        results.append({"weights": engine.weights(), "outcome": outcome})
        engine.destroy()
    return results


def main() -> None:
    scenario, rank, world, port, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    init_process_group(rank, world, "127.0.0.1", int(port), 60)
    inputs = torch.load(Path(folder) / "inputs.pt", weights_only=False)
    results = {"engines": engines, "updates": updates}[scenario](inputs, rank, world, Path(folder))
    torch.save(results, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main()
