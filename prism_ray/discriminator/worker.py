"""The actors that hold a discriminator: ranks that train it (and may judge), scorers that only judge.

All methods of an actor but `alive` run in one thread, one after the other: a scorer takes new weights between two
batches, and a batch is scored by one version.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.guards import Truth, gated, told_apart
from prism_ray.discriminator.model import Discriminator, load_discriminator
from prism_ray.discriminator.probes import Examination, check_canary, examine
from prism_ray.discriminator.scorer import judge, judged_metrics
from prism_ray.discriminator.trainer import DiscriminatorTrainer
from prism_ray.learner.engine import init_process_group
from prism_ray.models.encode import Encoder
from prism_ray.records import Group, Ratios
from prism_ray.runtime.supervision import HEALTH, HEALTH_GROUP


@dataclass(frozen=True)
class Said:
    """What is said of a batch of groups beside their verdicts: by which version, and for each group its metrics and
    how many of its pairs are told apart (`guards.told_apart`)."""

    version: int
    metrics: list[dict[str, float]]
    told_apart: list[dict[str, tuple[float, int]]]


class Judging:
    """What ranks and scorers have in common: a discriminator of some version, and what is asked of it."""

    model: Discriminator
    version: int

    def __init__(self, folder: str, settings: DiscriminatorSettings, max_prompt_tokens: int, truth: Truth | None):
        """`folder` holds a warmed-up discriminator (Hugging Face folder with head and card)."""
        self.folder, self.settings, self.truth = folder, settings, truth
        self.max_prompt_tokens = max_prompt_tokens

    @ray.method(concurrency_group=HEALTH)
    def alive(self) -> int:
        """The process id; answers also while the actor computes."""
        return os.getpid()

    def judge(self, gate: Mapping[str, float], *groups: Group) -> tuple[Any, ...]:
        """What is said of these groups, and then each with verdicts, whose parts carry the `gate`'s weights."""
        judged = judge(self.model, self.encoder, groups, self.version)
        said = Said(self.version, [judged_metrics([j]) for j in judged], [told_apart(j) for j in judged])
        return said, *(gated(j.group, gate) if gate else j.group for j in judged)

    def measure(self, *groups: Group) -> dict[str, float]:
        """Metrics of the current weights on these groups."""
        return judged_metrics(judge(self.model, self.encoder, groups, self.version))

    def examine(self, *groups: Group, worst: int) -> Examination:
        """What the current weights are worth on these groups, with the `worst` pairs of each view."""
        margin = self.settings.probe_margin
        return examine(self.model, self.encoder, groups, self.version, worst, margin, self.truth)

    def canary(self, group: Group) -> float:
        """0, or CanaryBreach if this judge does not score the group's reference and the same text alike."""
        return check_canary(self.model, self.encoder, group)

    def _load(self, cpus: float) -> Discriminator:
        torch.set_num_threads(max(1, math.ceil(cpus)))
        self.encoder = Encoder(self.folder, self.max_prompt_tokens)
        return load_discriminator(self.folder, self.settings)


class Rank(Judging):
    """One process of those that train: a part of every step's groups, and (by ZeRO stage) of the optimiser's state."""

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet: this machine, and a port that was free a moment ago."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def connect(self, rank: int, host: str, port: int, seed: int) -> None:
        """Join the process group and build the trainer."""
        model = self._load(self.settings.cpus_per_rank)
        init_process_group(rank, self.settings.ranks, host, port, self.settings.timeout_s)
        self.trainer = DiscriminatorTrainer(
            model,
            self.encoder,
            self.settings,
            seed=seed,
            truth=self.truth,
            warmed_up=lambda: load_discriminator(self.folder, self.settings),
        )

    @property
    def model(self) -> Discriminator:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.trainer.model

    @property
    def version(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.trainer.version

    def learn(self, warming: bool, ratios: Ratios | None, *groups: Group) -> tuple[dict[str, float], list[str]]:
        """Train on this rank's groups as a step of the policy, or (`warming`) of the warm-up, asks for; returns
        metrics, and sentences about alarms that have begun or ended."""
        metrics = self.trainer.learn(groups, warming, ratios)
        notices, self.trainer.notices = self.trainer.notices, []
        return metrics, notices

    def weights(self) -> tuple[dict[str, np.ndarray], bool]:
        """The weights for `Scorer.update` (of rank 0; the others take part and return nothing), and that they are
        there."""
        weights = self.trainer.engine.weights()
        return ({} if self.trainer.rank else as_arrays(weights)), True

    def save(self, folder: str) -> None:
        """Write what `load` needs to go on: weights, optimiser, version, replay buffer, what the alarms know."""
        self.trainer.save(Path(folder))

    def load(self, folder: str) -> int:
        """Go on from a folder written by `save`; returns the version."""
        self.trainer.load(Path(folder))
        return self.trainer.version

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder that others can start from."""
        self.trainer.export(folder, like=self.folder)


class Scorer(Judging):
    """A copy of the discriminator that only judges."""

    def start(self, version: int) -> None:
        """Load the folder's weights, which count as `version`, in the precision they are trained in."""
        model = self._load(self.settings.cpus_per_scorer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device, getattr(torch, self.settings.optimiser.precision)).eval()
        self.version = version

    def update(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Take these weights (see `Rank.weights`) as `version`."""
        own = dict(self.model.named_parameters())
        if own.keys() != weights.keys():
            raise ValueError(f"weights of version {version} are not those of this model: {own.keys() ^ weights.keys()}")
        with torch.no_grad():
            for name, weight in as_tensors(weights):
                own[name].copy_(weight)
        self.version = version


def as_arrays(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights as Ray's object store hands them out without a copy; numpy knows no bfloat16, which travels as int16."""
    plain = {n: w.detach().cpu().contiguous() for n, w in weights.items()}
    return {n: (w.view(torch.int16) if w.dtype == torch.bfloat16 else w).numpy() for n, w in plain.items()}


def as_tensors(weights: Mapping[str, np.ndarray]):
    """Name and tensor of each of `as_arrays`; copies, one at a time, for what the store holds is read-only."""
    for name, array in weights.items():
        tensor = torch.tensor(array)
        yield name, tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


RANK_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(Rank)
SCORER_ACTOR: Any = cast(Any, ray.remote)(concurrency_groups=HEALTH_GROUP)(Scorer)
