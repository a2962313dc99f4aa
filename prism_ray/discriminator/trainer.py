"""Training the discriminator: pairs of a prompt's reference and its rollouts -> Bradley-Terry -> one optimiser step.

Used by warm-up and by alignment, which replays older pairs. No Ray: a worker owns it. Every rank of a process group has
one and gives it its share of the groups; what they say and what alarms do is the same on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.guards import Alarms, Truth, told, watch_figures
from prism_ray.discriminator.model import Discriminator, save_discriminator
from prism_ray.discriminator.pairs import all_units, count_pairs, foreign_groups, pair_units, valid_rollouts
from prism_ray.discriminator.probes import Examination, check_canary, examine
from prism_ray.discriminator.replay import Replay
from prism_ray.discriminator.scorer import GroupViews, Judged, group_views, judge
from prism_ray.discriminator.spread import score_quantiles, scores_of
from prism_ray.discriminator.update import Sums, Update
from prism_ray.learner.engine import StepReport, TrainEngine
from prism_ray.models.encode import Encoder
from prism_ray.records import Group, Ratios

STATE_FILE = "discriminator_state.json"
TAG = "discriminator"


class DiscriminatorTrainer:
    """A discriminator and its optimiser; `version` counts its updates.

    `notices` are sentences about alarms that have begun or ended, for whoever logs to take away.
    """

    def __init__(
        self,
        model: Discriminator,
        encoder: Encoder,
        settings: DiscriminatorSettings,
        total_steps: int | None = None,
        version: int = 0,
        seed: int = 0,
        truth: Truth | None = None,
        warmed_up: Callable[[], Discriminator] | None = None,
    ) -> None:
        """`total_steps` is what a cosine schedule needs, `seed` decides what is replayed; `truth` tells what is right
        in a response, so that scores can be compared with it; `warmed_up` loads what training began with, for the
        remedy `restore`. A process group must exist (learner/engine.py)."""
        if warmed_up is None and settings.guard.may("restore"):
            raise ValueError("discriminator.guard asks for the remedy restore; say how to load what it restores")
        self._warmed_up, self._total_steps = warmed_up, total_steps
        self.model = model
        self.encoder = encoder
        self.settings = settings
        self.version = version
        self.truth = truth
        self.engine = self._engine_of(model)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.replay = Replay(max(1, settings.replay.pairs // self.ranks), seed + self.rank)
        self.alarms = Alarms(settings.guard, settings.view_names)
        self.notices: list[str] = []
        self._steps = 0

    def judge(self, groups: Sequence[Group]) -> list[Judged]:
        """The groups with verdicts by the current weights; `judged_metrics` of them are gap and pair accuracy."""
        return judge(self.model, self.encoder, groups, self.version)

    def examine(self, groups: Sequence[Group], worst: int) -> Examination:
        """What the current weights are worth on these groups, with the `worst` pairs of each view."""
        margin = self.settings.probe_margin
        return examine(self.model, self.encoder, groups, self.version, worst, margin, self.truth)

    def learn(self, groups: Sequence[Group], warming: bool = False, ratios: Ratios | None = None) -> dict[str, float]:
        """What a step of the policy asks for: `updates_per_step` updates on the groups of all ranks (these are this
        one's), with older pairs among them. With `ratios` a new pair weighs its rollout's, up to `importance_cap`.

        In warm-up (`warming`) it is one update without replay, and warm-up's load balancing. Returns metrics, measured
        before the first update; without any valid pair only the fallback loss is stepped on. Raises CanaryBreach if
        the two sides are not scored alike, which rank 0 looks at every `canary_every` calls unless there are scorers.
        """
        if not groups:
            raise ValueError("the discriminator was given no groups to learn from; skip the update instead")
        canary = self._canary(groups[0])
        cut = group_views(groups, self.encoder, self.settings)
        turns = 1 if warming else self.settings.updates_per_step
        updates = [self._update(cut, turn, warming, ratios) for turn in range(turns)]
        replaying = not warming and self._share > 0
        if not warming and (self._share or self.settings.guard.may("raise_replay")):
            self.replay.add([_with(views.group, valid_rollouts(views)) for views in cut])
        seen = [] if warming or self.truth is None else [told(g, self.truth) for g in groups]
        parts = _over_ranks((updates[0][0], updates[-1][0], seen, scores_of(groups)))
        first, last = (reduce(add, (part[i] for part in parts)) for i in (0, 1))
        metrics = {} if turns == 1 else _figures(last, updates[-1][1], replaying, self.settings)
        metrics |= _figures(first, updates[0][1], replaying, self.settings) | canary
        metrics["discriminator/skipped"] = float(sum(report.skipped for _, report in updates))
        metrics["discriminator/version"] = float(self.version)
        if warming:
            return metrics
        self.notices += self.alarms.update(metrics)
        if "restore" in self.alarms.begun:
            self._restore()
        metrics |= score_quantiles([score for part in parts for score in part[3]])
        return metrics | self.alarms.metrics() | watch_figures([rollouts for part in parts for rollouts in part[2]])

    def _engine_of(self, model: Discriminator) -> TrainEngine:
        if self.settings.gradient_checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        return TrainEngine(model, self.settings.optimiser, self._total_steps)

    def _restore(self) -> None:
        """Begin anew from the warmed-up discriminator; its weights are those of a new version."""
        assert self._warmed_up is not None
        self.engine.destroy()
        del self.engine, self.model  # two of them might not fit
        self.model = self._warmed_up()
        self.engine = self._engine_of(self.model)

    def _canary(self, group: Group) -> dict[str, float]:
        due = self._steps % self.settings.canary_every == 0
        self._steps += 1
        if not due or self.rank or self.settings.scorers:
            return {}
        return {"discriminator/canary_gap": check_canary(self.model, self.encoder, group)}

    @property
    def _share(self) -> float:
        """Share of replayed pairs in an update, now."""
        raised = "raise_replay" in self.alarms.remedies()
        return self.settings.guard.raised_replay if raised else self.settings.replay.share

    def _update(
        self, cut: Sequence[GroupViews], turn: int, warming: bool, ratios: Ratios | None
    ) -> tuple[Sums, StepReport]:
        settings = self.settings
        units = pair_units(cut, settings.rollouts_per_update, turn, ratios, settings.importance_cap or 1.0)
        old = [] if warming else self.replay.draw(count_pairs(units), self._share, self.version)
        replayed = all_units(group_views(old, self.encoder, settings), "replay")
        others = foreign_groups([views.group for views in cut], settings.foreign_references, turn)
        foreign = all_units(group_views(others, self.encoder, settings), "foreign")
        sums = Sums(
            fresh=count_pairs(units),
            replayed=count_pairs(replayed),
            kept=len(self.replay),
            newest=max(views.group.newest_version for views in cut),
            versions=tuple(rollout.oldest_version for group in old for rollout in group.rollouts),
        )
        balance = settings.balance_coefficient if warming else settings.alignment_balance_coefficient
        self.model.train()
        sums += Update(self.engine, settings, balance).run(cut, [*units, *replayed, *foreign])
        report = self.engine.step(0.5 if "lower_rate" in self.alarms.remedies() else 1.0)
        self.version += 1
        return sums, report

    def save(self, folder: Path) -> None:
        """Write weights, optimiser, version, replay buffer and what the alarms know, for `load`; on every rank."""
        self.engine.save(folder, TAG)
        self.replay.save(folder, self.rank)
        if self.rank == 0:
            state = {"version": self.version, "alarms": self.alarms.state()}
            (folder / STATE_FILE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; raises FileNotFoundError if the folder holds no such state."""
        if not (folder / STATE_FILE).is_file():
            raise FileNotFoundError(f"{folder}: no {STATE_FILE}; give a folder written by the discriminator's save")
        self.engine.load(folder, TAG)
        self.replay.load(folder, self.rank, self.ranks)
        state = json.loads((folder / STATE_FILE).read_text())
        self.version = state["version"]
        self.alarms.restore(state["alarms"])

    def export(self, folder: str | Path, like: str | Path) -> None:
        """Write the discriminator as a Hugging Face folder, on rank 0; tokenizer and processor come from `like`."""
        weights = self.engine.weights()
        if self.rank == 0:
            save_discriminator(weights, self.model, folder, like)


def _figures(sums: Sums, report: StepReport, replaying: bool, settings: DiscriminatorSettings) -> dict[str, float]:
    """The metrics of an update of all ranks."""
    metrics = sums.metrics(settings.view_names) | (sums.replay_metrics() if replaying else {})
    return metrics | {"discriminator/grad_norm": report.grad_norm, "discriminator/lr": report.lr}


def _with(group: Group, chosen: Sequence[int]) -> Group:
    """The group with these of its rollouts alone, unjudged."""
    return Group(group.id, group.prompt, tuple(group.rollouts[i] for i in chosen))


def _over_ranks(part: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks."""
    parts = [part] * dist.get_world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return parts
