"""Training the discriminator: pairs of a prompt's reference and its rollouts -> Bradley-Terry -> one optimiser step.

Used by warm-up and by alignment, which replays older pairs. No Ray: a worker or a stage owns it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.guards import Alarms, Gate, Truth, watch_metrics
from prism_ray.discriminator.model import Discriminator, Scores, save_discriminator
from prism_ray.discriminator.objective import (
    RouterCounts,
    ViewPairs,
    count_routing,
    fallback_loss,
    load_balancing_loss,
    view_information,
    weighted_view_loss,
)
from prism_ray.discriminator.pairs import (
    Pack,
    PairUnit,
    count_pairs,
    pack_units,
    pair_units,
    replayed_units,
    valid_rollouts,
)
from prism_ray.discriminator.probes import Examination, check_canary, examine
from prism_ray.discriminator.replay import Replay
from prism_ray.discriminator.scorer import GroupViews, Judged, group_views, judge, pair_metrics
from prism_ray.discriminator.segments import VIEW_NAMES, JudgedBatch, judged_batch
from prism_ray.learner.engine import StepReport, TrainEngine
from prism_ray.models.encode import Encoder
from prism_ray.records import Group

STATE_FILE = "discriminator_state.json"
TAG = "discriminator"


class SlowableEngine(TrainEngine):
    """A training engine of which single steps can be made at a part of the learning rate."""

    def step_at(self, part: float) -> StepReport:
        """`step` at `part` of the learning rate that the schedule gives it."""
        groups = self._engine.optimizer.param_groups
        usual = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= part
        report = self.step()
        if report.skipped:  # then the schedule has not set the next rate either
            for group, lr in zip(groups, usual, strict=True):
                group["lr"] = lr
        return report


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
    ) -> None:
        """`total_steps` is what a cosine schedule needs, `seed` decides what is replayed; `truth` tells what is right
        in a response, so that scores can be compared with it. A process group must exist (learner/engine.py)."""
        self.model = model
        self.encoder = encoder
        self.settings = settings
        self.version = version
        self.truth = truth
        self.engine = SlowableEngine(model, settings.optimiser, total_steps)
        self.replay = Replay(settings.replay.pairs, seed)
        self.alarms = Alarms(settings.guard)
        self.gate = Gate(settings.gate) if settings.gate else None
        self.notices: list[str] = []
        self._steps = 0

    def judge(self, groups: Sequence[Group]) -> list[Judged]:
        """The groups with verdicts by the current weights; `judged_metrics` of them are gap and pair accuracy.

        With a gate, the parts of every verdict say with which weight each view should count (`gate/<view>`).
        """
        judged = judge(self.model, self.encoder, groups, self.version)
        if self.gate is None:
            return judged
        weights = {f"gate/{view}": weight for view, weight in self.gate.weights().items()}
        self.gate.see(judged)
        return [replace(j, group=_with_parts(j.group, weights)) for j in judged]

    def examine(self, groups: Sequence[Group], worst: int) -> Examination:
        """What the current weights are worth on these groups, with the `worst` pairs of each view."""
        margin = self.settings.probe_margin
        return examine(self.model, self.encoder, groups, self.version, worst, margin, self.truth)

    def learn(self, groups: Sequence[Group], warming: bool = False) -> dict[str, float]:
        """What a step of the policy asks for: `updates_per_step` updates on these groups, with older pairs among them.

        In warm-up (`warming`) it is one update without replay, and warm-up's load balancing. Returns metrics, measured
        before the first update; without any valid pair only the fallback loss is stepped on. Raises CanaryBreach if
        the two sides are not scored alike, which is looked at every `canary_every` calls.
        """
        if not groups:
            raise ValueError("the discriminator was given no groups to learn from; skip the update instead")
        canary = self._canary(groups[0])
        cut = group_views(groups, self.encoder, self.settings)
        turns = 1 if warming else self.settings.updates_per_step
        updates = [self._update(cut, turn, warming) for turn in range(turns)]
        if not warming and (self._share or self.settings.guard.may_replay):
            self.replay.add([_with(views.group, valid_rollouts(views)) for views in cut])
        metrics = updates[-1] | updates[0] | canary
        metrics["discriminator/skipped"] = sum(u["discriminator/skipped"] for u in updates)
        metrics["discriminator/version"] = float(self.version)
        return metrics if warming else metrics | self._watched(groups, metrics)

    def _watched(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> dict[str, float]:
        """What the guards say after a step of alignment."""
        self.notices += self.alarms.update(metrics)
        found = self.alarms.metrics()
        if self.gate is not None:
            found |= self.gate.metrics()
        if self.truth is not None:
            found |= watch_metrics([g for g in groups if g.verdicts], self.truth)
        return found

    def _canary(self, group: Group) -> dict[str, float]:
        due = self._steps % self.settings.canary_every == 0
        self._steps += 1
        if not due:
            return {}
        return {"discriminator/canary_gap": check_canary(self.model, self.encoder, group, self.version)}

    @property
    def _share(self) -> float:
        """Share of replayed pairs in an update, now."""
        raised = "raise_replay" in self.alarms.remedies()
        return self.settings.guard.raised_replay if raised else self.settings.replay.share

    def _update(self, cut: Sequence[GroupViews], turn: int, warming: bool) -> dict[str, float]:
        settings = self.settings
        units = pair_units(cut, settings.rollouts_per_update, turn)
        old = [] if warming else self.replay.draw(count_pairs(units), self._share, self.version)
        replayed = replayed_units(group_views(old, self.encoder, settings))
        update = _Update(self, settings.balance_coefficient if warming else settings.alignment_balance_coefficient)
        self.model.train()
        update.run(cut, [*units, *replayed])
        report = self.engine.step_at(0.5 if "lower_rate" in self.alarms.remedies() else 1.0)
        self.version += 1
        metrics = update.metrics()
        if not warming and self._share:
            metrics |= self._replay_metrics(cut, old, count_pairs(units), count_pairs(replayed))
        metrics["discriminator/grad_norm"] = report.grad_norm
        metrics["discriminator/lr"] = report.lr
        metrics["discriminator/skipped"] = float(report.skipped)
        return metrics

    def _replay_metrics(
        self, cut: Sequence[GroupViews], old: Sequence[Group], fresh: int, replayed: int
    ) -> dict[str, float]:
        """How full the buffer is, its share of this update, and the age of what came from it in policy versions."""
        newest = max(views.group.newest_version for views in cut)
        ages = [newest - rollout.oldest_version for group in old for rollout in group.rollouts]
        metrics = {
            "discriminator/replay/size": float(len(self.replay)),
            "discriminator/replay/share": replayed / max(fresh + replayed, 1),
        }
        return metrics | ({"discriminator/replay/age": fmean(ages)} if ages else {})

    def save(self, folder: Path) -> None:
        """Write weights, optimiser, version, replay buffer and what the guards know, for `load`."""
        self.engine.save(folder, TAG)
        self.replay.save(folder)
        state = {"version": self.version, "alarms": self.alarms.state(), "gate": self.gate and self.gate.state()}
        (folder / STATE_FILE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; raises FileNotFoundError if the folder holds no such state."""
        if not (folder / STATE_FILE).is_file():
            raise FileNotFoundError(f"{folder}: no {STATE_FILE}; give a folder written by the discriminator's save")
        self.engine.load(folder, TAG)
        self.replay.load(folder)
        state = json.loads((folder / STATE_FILE).read_text())
        self.version = state["version"]
        self.alarms.restore(state["alarms"])
        if self.gate is not None and state["gate"] is not None:
            self.gate.restore(state["gate"])

    def export(self, folder: str | Path, like: str | Path) -> None:
        """Write the discriminator as a Hugging Face folder; tokenizer and processor come from `like`."""
        save_discriminator(self.engine.weights(), self.model, folder, like)


class _Update:
    """The backward passes of one update, and what is to be said of it (of this rank's share, where there are several).

    Losses are divided by counts over all ranks, because the engine sums gradients.
    """

    def __init__(self, trainer: DiscriminatorTrainer, balance: float) -> None:
        """`balance` weighs the load-balancing loss."""
        self.trainer = trainer
        self.balance = balance
        self.loss = 0.0
        self.balance_loss = 0.0
        self.load_E: Tensor | float = 0.0
        self.routed: list[RouterCounts] = []
        self.rows: dict[tuple[str, bool], list[Tensor]] = {}
        self.clipped: dict[str, list[Tensor]] = {}

    def run(self, groups: Sequence[GroupViews], units: Sequence[PairUnit]) -> None:
        """Bradley-Terry on all pairs: each micro-batch adds its share of the mean over the update's pairs.

        `groups` give the references for the fallback where `units` are none.
        """
        packs = [Pack(some) for some in pack_units(units, self.trainer.settings.micro_batch_tokens)]
        pairs, tokens, ranks = _over_ranks(count_pairs(units), sum(p.tokens for p in packs), 1)
        for pack in packs:
            self._backward(self._pack_loss(pack, int(pairs), pack.tokens / tokens))
        if not packs:
            self._backward(self._fallback_loss(groups) * (0.0 if pairs else 1 / ranks))

    def _backward(self, loss: Tensor) -> None:
        self.trainer.engine.backward(loss)
        self.loss += float(loss.detach())

    def _fallback_loss(self, groups: Sequence[GroupViews]) -> Tensor:
        """No valid rollout here: the nearly weightless loss that keeps the ranks in step, on one micro-batch of
        references."""
        units = [PairUnit(v, (g.reference.sequences[v],), ()) for g in groups for v in VIEW_NAMES]
        chosen = pack_units(units, self.trainer.settings.micro_batch_tokens)[0]
        judged = judged_batch([u.sequences[0] for u in chosen]).to(self.trainer.model.device)
        heads = self.trainer.engine.run(_forward, judged, None).head_B
        rows = {u.view: [i for i, other in enumerate(chosen) if other.view == u.view] for u in chosen}
        return fallback_loss({view: heads[of_view] for view, of_view in rows.items()})

    def _pack_loss(self, pack: Pack, pairs: int, share: float) -> Tensor:
        """The pack's part of the loss: its pairs among all `pairs` of the update, its `share` of the tokens."""
        settings = self.trainer.settings
        judged = pack.judged.to(self.trainer.model.device)
        router_logits: list[Tensor] = []
        scores = self.trainer.engine.run(_forward, judged, router_logits)
        loss = scores.score_B.new_zeros(())
        for (view, replayed), (reference, rollout, identical) in pack.pairs.items():
            score, head = scores.score_B, scores.head_B
            of_view = ViewPairs(score[reference], score[rollout], head[reference], head[rollout])
            weight_P = torch.full_like(of_view.reference_P, 1 / pairs)
            square_P = weight_P * settings.score_reg / (2 * len(VIEW_NAMES))
            loss = loss + weighted_view_loss(of_view, weight_P, square_P, settings.margin, settings.label_smoothing)
            rows = (of_view.reference_P, of_view.rollout_P, torch.tensor(identical, device=score.device))
            table = torch.stack([r.detach().float() for r in rows], dim=1).cpu()
            self.rows.setdefault((view, replayed), []).append(table)
            if settings.score_clip is not None and not replayed:
                heads = torch.cat((of_view.reference_head_P, of_view.rollout_head_P)).detach()
                self.clipped.setdefault(view, []).append((heads.abs() >= settings.score_clip).float().cpu())
        balance = self._balance(judged, router_logits, share)
        return loss + self.balance * share * balance if self.balance else loss

    def _balance(self, judged: JudgedBatch, router_logits: list[Tensor], share: float) -> Tensor:
        top_k = self.trainer.model.backbone.config.get_text_config().num_experts_per_tok
        loss, load_E = load_balancing_loss(router_logits, judged.batch.real_mask_BT.flatten(), top_k)
        self.load_E = self.load_E + share * load_E.cpu()
        self.balance_loss += share * float(loss.detach())
        self.routed.append(count_routing(router_logits, _view_of_tokens(judged), len(VIEW_NAMES), top_k))
        return loss

    def metrics(self) -> dict[str, float]:
        metrics = {"discriminator/loss": self.loss}
        for (view, replayed), rows in self.rows.items():
            prefix = "discriminator/replay" if replayed else "discriminator/train"
            metrics |= pair_metrics(prefix, view, torch.cat(rows))
        for view, clipped in self.clipped.items():
            metrics[f"discriminator/train/saturated/{view}"] = float(torch.cat(clipped).mean())
        if isinstance(self.load_E, Tensor):
            metrics["discriminator/balance_loss"] = self.balance_loss
            metrics["discriminator/router_load_max"] = float(self.load_E.max())
            metrics["discriminator/router_load_min"] = float(self.load_E.min())
            metrics |= _router_metrics(self.routed)
        return metrics


def _view_of_tokens(judged: JudgedBatch) -> Tensor:
    """Of every flat token of the batch the index of the view it is scored for; -1 for prompts, context and padding.

    A token lies where the next one is predicted, and there is always one: the end token, which is not scored.
    """
    row_S, step_S = judged.scored_BR.nonzero(as_tuple=True)
    view_N = torch.full_like(judged.batch.input_ids_BT.flatten(), -1)
    view_N[judged.batch.predictor_BR[row_S, step_S + 1]] = judged.view_B[row_S]
    return view_N


def _router_metrics(routed: Sequence[RouterCounts]) -> dict[str, float]:
    """Per view the load of every expert (mean over layers, 1 in all) and the router's entropy (1: undecided); and what
    the expert says of the view, in nats."""
    total = sum(routed[1:], routed[0])
    tokens_V = total.routed_LVE.mean(0).sum(1).clamp(min=1)
    load_VE = total.routed_LVE.mean(0) / tokens_V[:, None]
    metrics = {"discriminator/router/view_information": view_information(total.routed_LVE)}
    for v, view in enumerate(VIEW_NAMES):
        metrics[f"discriminator/router/entropy/{view}"] = float(total.entropy_V[v] / tokens_V[v])
        for expert, load in enumerate(load_VE[v].tolist()):
            metrics[f"discriminator/router/load/{view}/{expert}"] = load
    return metrics


def _with(group: Group, chosen: Sequence[int]) -> Group:
    """The group with these of its rollouts alone, unjudged."""
    return Group(group.id, group.prompt, tuple(group.rollouts[i] for i in chosen))


def _with_parts(group: Group, parts: Mapping[str, float]) -> Group:
    return group.judged([replace(v, parts={**v.parts, **parts}) for v in group.verdicts])


def _forward(model: Discriminator, judged: JudgedBatch, router_logits: list[Tensor] | None) -> Scores:
    return model(judged, router_logits)


def _over_ranks(*counts: float) -> list[float]:
    """These numbers, summed over all ranks."""
    total = torch.tensor(counts, dtype=torch.float64)
    if dist.get_world_size() > 1:
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()
