"""The actor that holds the discriminator: it trains it and scores with it, so scores are by the newest weights."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import ray
import torch

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.guards import Truth
from prism_ray.discriminator.model import load_discriminator
from prism_ray.discriminator.probes import Examination
from prism_ray.discriminator.scorer import judged_metrics
from prism_ray.discriminator.trainer import DiscriminatorTrainer
from prism_ray.learner.engine import init_process_group
from prism_ray.models.encode import Encoder
from prism_ray.records import Group


@ray.remote
class DiscriminatorWorker:
    """One discriminator with its optimiser. Calls are served one after the other, in the order they were made."""

    def __init__(
        self,
        folder: str,
        settings: DiscriminatorSettings,
        max_prompt_tokens: int,
        threads: int,
        seed: int,
        truth: Truth | None,
    ) -> None:
        """`folder` holds a warmed-up discriminator (Hugging Face folder with head and card)."""
        torch.set_num_threads(threads)
        self.folder = folder
        model = load_discriminator(folder, settings)
        host = ray.util.get_node_ip_address()
        init_process_group(0, 1, host, _free_port(), settings.timeout_s)
        encoder = Encoder(folder, max_prompt_tokens)
        self.trainer = DiscriminatorTrainer(model, encoder, settings, seed=seed, truth=truth)

    def version(self) -> int:
        return self.trainer.version

    def judge(self, *groups: Group) -> tuple[Any, ...]:
        """Metrics of each group, as a list, and then the groups with verdicts: one return value more than groups."""
        judged = self.trainer.judge(groups)
        return [judged_metrics([j]) for j in judged], *(j.group for j in judged)

    def learn(self, *groups: Group, warming: bool = False) -> tuple[dict[str, float], list[str]]:
        """Train on these groups as a step of the policy, or (`warming`) of the warm-up, asks for; returns metrics, and
        sentences about alarms that have begun or ended."""
        metrics = self.trainer.learn(groups, warming)
        notices, self.trainer.notices = self.trainer.notices, []
        return metrics, notices

    def measure(self, *groups: Group) -> dict[str, float]:
        """Metrics of the current weights on these groups."""
        return judged_metrics(self.trainer.judge(groups))

    def examine(self, *groups: Group, worst: int) -> Examination:
        """What the current weights are worth on these groups, with the `worst` pairs of each view."""
        return self.trainer.examine(groups, worst)

    def save(self, folder: str) -> None:
        """Write what `load` needs to go on: weights, optimiser, version, replay buffer, what the guards know."""
        self.trainer.save(Path(folder))

    def load(self, folder: str) -> int:
        """Go on from a folder written by `save`; returns the version."""
        self.trainer.load(Path(folder))
        return self.trainer.version

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder that a new worker can start from."""
        self.trainer.export(folder, like=self.folder)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
