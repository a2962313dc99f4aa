"""One rank of a test: `python rank_program.py rank world port folder`; results go to folder/<world>-<rank>.pt.

folder/inputs.pt holds the model's folder, settings, and for each step the groups of every rank.
"""

import sys
from pathlib import Path

import torch

from prism_ray.discriminator.model import build_discriminator
from prism_ray.discriminator.trainer import DiscriminatorTrainer
from prism_ray.learner.engine import init_process_group
from prism_ray.models.encode import Encoder


def right(text, prompt):
    return {"length": float(len(text))}


def main() -> None:
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    init_process_group(rank, world, "127.0.0.1", port, 60)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    results = {}
    for name, settings in inputs["settings"].items():
        model = build_discriminator(inputs["model"], settings, seed=0)
        trainer = DiscriminatorTrainer(model, Encoder(inputs["model"], 128), settings, truth=right)
        metrics = [trainer.learn([g for part in step[rank::world] for g in part]) for step in inputs["steps"]]
        weights = trainer.engine.weights()
        trainer.save(folder / f"{name}-{world}")
        results[name] = {
            "metrics": metrics,
            "notices": trainer.notices,
            "weights": weights,
            "alarms": trainer.alarms.state(),
            "kept": len(trainer.replay),
        }
        if inputs["resume"]:
            trainer.load(inputs["resume"] / f"{name}-{3 - world}")
            results[name]["resumed"] = (trainer.version, trainer.engine.weights(), len(trainer.replay))
        trainer.engine.destroy()
    torch.save(results, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
