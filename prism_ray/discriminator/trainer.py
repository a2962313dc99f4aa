"""Training the discriminator: pairs of a prompt's reference and its rollouts -> Bradley-Terry -> one optimiser step.

Used by warm-up (which adds the router's load-balancing loss) and by alignment. No Ray: a worker or a stage owns it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.model import Discriminator, Scores, save_discriminator
from prism_ray.discriminator.objective import ViewPairs, fallback_loss, load_balancing_loss, weighted_view_loss
from prism_ray.discriminator.scorer import GroupViews, Judged, group_views, judge, pair_metrics
from prism_ray.discriminator.segments import VIEW_NAMES, JudgedBatch, ViewSequence, distinct, judged_batch
from prism_ray.learner.engine import TrainEngine
from prism_ray.models.encode import Encoder
from prism_ray.records import Group

STATE_FILE = "discriminator_state.json"
TAG = "discriminator"


@dataclass(frozen=True, eq=False)
class PairUnit:
    """One view of one group: its reference (first) and the rollouts it is paired with, `identical` for each of them."""

    view: str
    sequences: tuple[ViewSequence, ...]
    identical: tuple[bool, ...]

    @property
    def width(self) -> int:
        return max(s.length for s in self.sequences)


def pair_units(groups: Sequence[GroupViews], rollouts_per_update: int) -> list[PairUnit]:
    """The pairs of an update: of every group the first valid rollouts by sampling index, which says nothing of content.

    Groups without a valid rollout contribute none.
    """
    units = []
    for views in groups:
        order = sorted(range(len(views.rollouts)), key=lambda i: views.group.rollouts[i].index)
        chosen = [i for i in order if views.rollouts[i].valid][:rollouts_per_update]
        for view in VIEW_NAMES if chosen else ():
            sequences = (views.reference.sequences[view], *(views.rollouts[i].sequences[view] for i in chosen))
            units.append(PairUnit(view, sequences, tuple(views.identical(i, view) for i in chosen)))
    return units


def pack_units(units: Sequence[PairUnit], token_budget: int) -> list[list[PairUnit]]:
    """Units of similar width together, at most `token_budget` padded tokens each; a unit is never split."""
    packs: list[list[PairUnit]] = []
    rows = 0
    for unit in sorted(units, key=lambda u: -u.width):
        rows += len(unit.sequences)
        if not packs or rows * packs[-1][0].width > token_budget:
            packs.append([])
            rows = len(unit.sequences)
        packs[-1].append(unit)
    return packs


class DiscriminatorTrainer:
    """A discriminator and its optimiser; `version` counts its updates."""

    def __init__(
        self,
        model: Discriminator,
        encoder: Encoder,
        settings: DiscriminatorSettings,
        total_steps: int | None = None,
        version: int = 0,
    ) -> None:
        """`total_steps` is what a cosine schedule needs. A process group must exist (learner/engine.py)."""
        self.model = model
        self.encoder = encoder
        self.settings = settings
        self.version = version
        self.engine = TrainEngine(model, settings.optimiser, total_steps)

    def judge(self, groups: Sequence[Group]) -> list[Judged]:
        """The groups with verdicts by the current weights; `judged_metrics` of them are gap and pair accuracy."""
        return judge(self.model, self.encoder, groups, self.version)

    def learn(self, groups: Sequence[Group], balance: bool = False) -> dict[str, float]:
        """One update on `rollouts_per_update` rollouts of each group; `balance` adds the load-balancing loss (warm-up).

        Returns metrics, measured before the update. Without any valid pair only the fallback loss is stepped on.
        """
        if not groups:
            raise ValueError("the discriminator was given no groups to learn from; skip the update instead")
        update = _Update(self, balance)
        self.model.train()
        update.run(group_views(groups, self.encoder, self.settings))
        report = self.engine.step()
        self.version += 1
        metrics = update.metrics()
        metrics["discriminator/grad_norm"] = report.grad_norm
        metrics["discriminator/lr"] = report.lr
        metrics["discriminator/skipped"] = float(report.skipped)
        metrics["discriminator/version"] = float(self.version)
        return metrics

    def save(self, folder: Path) -> None:
        """Write weights, optimiser and version, for `load`."""
        self.engine.save(folder, TAG)
        (folder / STATE_FILE).write_text(json.dumps({"version": self.version}))

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; raises FileNotFoundError if the folder holds no such state."""
        if not (folder / STATE_FILE).is_file():
            raise FileNotFoundError(f"{folder}: no {STATE_FILE}; give a folder written by the discriminator's save")
        self.engine.load(folder, TAG)
        self.version = json.loads((folder / STATE_FILE).read_text())["version"]

    def export(self, folder: str | Path, like: str | Path) -> None:
        """Write the discriminator as a Hugging Face folder; tokenizer and processor come from `like`."""
        save_discriminator(self.engine.weights(), self.model, folder, like)


class _Update:
    """The backward passes of one update, and what is to be said of it (of this rank's share, where there are several).

    Losses are divided by counts over all ranks, because the engine sums gradients.
    """

    def __init__(self, trainer: DiscriminatorTrainer, balance: bool) -> None:
        self.trainer = trainer
        self.balance = balance
        self.loss = 0.0
        self.balance_loss = 0.0
        self.load_E: Tensor | float = 0.0
        self.rows: dict[str, list[Tensor]] = {view: [] for view in VIEW_NAMES}

    def run(self, groups: Sequence[GroupViews]) -> None:
        """Bradley-Terry on all pairs: each micro-batch adds its share of the mean over the update's pairs."""
        settings = self.trainer.settings
        units = pair_units(groups, settings.rollouts_per_update)
        packs = [_Pack(some) for some in pack_units(units, settings.micro_batch_tokens)]
        pairs = sum(len(u.identical) for u in units) // len(VIEW_NAMES)
        pairs, tokens, ranks = _over_ranks(pairs, sum(p.tokens for p in packs), 1)
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

    def _pack_loss(self, pack: _Pack, pairs: int, share: float) -> Tensor:
        """The pack's part of the loss: its pairs among all `pairs` of the update, its `share` of the tokens."""
        settings = self.trainer.settings
        judged = pack.judged.to(self.trainer.model.device)
        router_logits: list[Tensor] = []
        scores = self.trainer.engine.run(_forward, judged, router_logits)
        loss = scores.score_B.new_zeros(())
        for view, (reference, rollout, identical) in pack.pairs.items():
            score, head = scores.score_B, scores.head_B
            of_view = ViewPairs(score[reference], score[rollout], head[reference], head[rollout])
            weight_P = torch.full_like(of_view.reference_P, 1 / pairs)
            square_P = weight_P * settings.score_reg / (2 * len(VIEW_NAMES))
            loss = loss + weighted_view_loss(of_view, weight_P, square_P)
            rows = (of_view.reference_P, of_view.rollout_P, torch.tensor(identical, device=score.device))
            self.rows[view].append(torch.stack([r.detach().float() for r in rows], dim=1).cpu())
        balance = self._balance(judged, router_logits, share)
        return loss + settings.balance_coefficient * share * balance if self.balance else loss

    def _balance(self, judged: JudgedBatch, router_logits: list[Tensor], share: float) -> Tensor:
        top_k = self.trainer.model.backbone.config.get_text_config().num_experts_per_tok
        loss, load_E = load_balancing_loss(router_logits, judged.batch.real_mask_BT.flatten(), top_k)
        self.load_E = self.load_E + share * load_E.cpu()
        self.balance_loss += share * float(loss.detach())
        return loss

    def metrics(self) -> dict[str, float]:
        metrics = {"discriminator/loss": self.loss}
        if isinstance(self.load_E, Tensor):
            metrics["discriminator/balance_loss"] = self.balance_loss
            metrics["discriminator/router_load_max"] = float(self.load_E.max())
            metrics["discriminator/router_load_min"] = float(self.load_E.min())
        for view, rows in self.rows.items():
            if rows:
                metrics |= pair_metrics("discriminator/train", view, torch.cat(rows))
        return metrics


class _Pack:
    """Units in one batch: the distinct sequences; per view, rows of references, rows of rollouts, identical or not."""

    def __init__(self, units: Sequence[PairUnit]) -> None:
        unique, rows = distinct([s for u in units for s in u.sequences])
        self.judged = judged_batch(unique)
        self.tokens = sum(s.length for s in unique)
        self.pairs: dict[str, tuple[list[int], list[int], list[bool]]] = {}
        row = iter(rows)
        for unit in units:
            references, rollouts, identical = self.pairs.setdefault(unit.view, ([], [], []))
            references += [next(row)] * len(unit.identical)
            rollouts += [next(row) for _ in unit.identical]
            identical += unit.identical


def _forward(model: Discriminator, judged: JudgedBatch, router_logits: list[Tensor] | None) -> Scores:
    return model(judged, router_logits)


def _over_ranks(*counts: float) -> list[float]:
    """These numbers, summed over all ranks."""
    total = torch.tensor(counts, dtype=torch.float64)
    if dist.get_world_size() > 1:
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()
