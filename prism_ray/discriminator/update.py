"""One update of the discriminator: the backward passes of a rank's pairs, and the figures of all ranks' pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from statistics import fmean

import torch
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.discriminator.model import Discriminator, Scores
from prism_ray.discriminator.objective import (
    RouterCounts,
    ViewPairs,
    count_routing,
    fallback_loss,
    load_balancing_loss,
    view_information,
    weighted_view_loss,
)
from prism_ray.discriminator.pairs import Pack, PairUnit, Source, pack_units, sum_weights
from prism_ray.discriminator.scorer import GroupViews, pair_metrics
from prism_ray.discriminator.segments import JudgedBatch, judged_batch
from prism_ray.learner.engine import TrainEngine


@dataclass(frozen=True, eq=False)
class Sums:
    """What a pack, a rank or all ranks contribute to the figures of an update; they add up.

    `rows` are [P, 3] per view and source: the reference's score, the rollout's, identical or not;
    `clipped` says of every fresh head output whether it is at the clip; `load_E` is the experts' share of all tokens;
    `kept` are pairs in the replay buffers, `versions` the policy versions of replayed rollouts, `newest` that of fresh
    ones.
    """

    loss: float = 0.0
    balance_loss: float = 0.0
    fresh: int = 0
    replayed: int = 0
    kept: int = 0
    newest: int = 0
    versions: tuple[int, ...] = ()
    rows: Mapping[tuple[str, Source], Tensor] = field(default_factory=dict)
    clipped: Mapping[str, Tensor] = field(default_factory=dict)
    load_E: Tensor | None = None
    routed: RouterCounts | None = None

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.loss + other.loss,
            self.balance_loss + other.balance_loss,
            self.fresh + other.fresh,
            self.replayed + other.replayed,
            self.kept + other.kept,
            max(self.newest, other.newest),
            self.versions + other.versions,
            _joined(self.rows, other.rows),
            _joined(self.clipped, other.clipped),
            _sum(self.load_E, other.load_E),
            _sum(self.routed, other.routed),
        )

    def metrics(self, views: Sequence[str]) -> dict[str, float]:
        """The figures of an update; `views` in the order of the head's rows."""
        metrics = {"discriminator/loss": self.loss}
        for (view, source), rows in self.rows.items():
            metrics |= pair_metrics(f"discriminator/{source}", view, rows)
        for view, clipped in self.clipped.items():
            metrics[f"discriminator/train/saturated/{view}"] = float(clipped.mean())
        if self.load_E is not None and self.routed is not None:
            metrics["discriminator/balance_loss"] = self.balance_loss
            metrics["discriminator/router_load_max"] = float(self.load_E.max())
            metrics["discriminator/router_load_min"] = float(self.load_E.min())
            metrics |= _router_metrics(self.routed, views)
        return metrics

    def replay_metrics(self) -> dict[str, float]:
        """How full the buffers are, their share of this update, and the age of what came from them."""
        metrics = {
            "discriminator/replay/size": float(self.kept),
            "discriminator/replay/share": self.replayed / max(self.fresh + self.replayed, 1),
        }
        ages = [self.newest - version for version in self.versions]
        return metrics | ({"discriminator/replay/age": fmean(ages)} if ages else {})


class Update:
    """The backward passes of one update, for this rank's share of its pairs.

    Losses are divided by counts over all ranks, because the engine sums gradients: the result depends neither on how
    many ranks there are nor on how pairs are packed (but for the load-balancing loss, which is computed pack by pack).
    """

    def __init__(self, engine: TrainEngine, settings: DiscriminatorSettings, balance: float) -> None:
        """`balance` weighs the load-balancing loss."""
        self.engine, self.settings, self.balance = engine, settings, balance
        self._sums = [Sums()]

    def run(self, groups: Sequence[GroupViews], units: Sequence[PairUnit]) -> Sums:
        """Bradley-Terry on all pairs: each micro-batch adds its share of the weighted mean over the update's pairs.

        `groups` (at least one) give references where this rank has fewer passes than it owes the others: none of its
        pairs is valid, or gradients are exchanged pass by pass.
        """
        packs = [Pack(some) for some in pack_units(units, self.settings.micro_batch_tokens)]
        counts = (sum_weights(units), sum(pack.tokens for pack in packs), 1)
        pairs, tokens, ranks = self.engine.over_ranks(counts, "sum")
        most = int(self.engine.over_ranks([len(packs)], "max")[0]) if self.engine.equal_forwards else 1
        for pack in packs:
            self._backward(self._pack_loss(pack, pairs, pack.tokens / tokens))
        for _ in range(most - len(packs) if pairs else 0):
            self._backward(self._nothing(groups))
        if not pairs:
            self._backward(self._fallback_loss(groups) / ranks)
        return reduce(add, self._sums)

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self._sums.append(Sums(loss=float(loss.detach())))

    def _references(self, groups: Sequence[GroupViews]) -> tuple[list[PairUnit], Scores]:
        """One micro-batch of references, and their scores."""
        units = [PairUnit(v, (g.reference.sequences[v],), (), ()) for g in groups for v in g.reference.sequences]
        chosen = pack_units(units, self.settings.micro_batch_tokens)[0]
        judged = judged_batch([u.sequences[0] for u in chosen]).to(self.engine.device)
        return chosen, self.engine.run(_forward, judged, None)

    def _nothing(self, groups: Sequence[GroupViews]) -> Tensor:
        """A loss of 0 through the same graph as any pack's: the ranks' backward passes must match."""
        _, scores = self._references(groups)
        return 0.0 * (scores.score_B.sum() + scores.head_B.sum())

    def _fallback_loss(self, groups: Sequence[GroupViews]) -> Tensor:
        """No rank has a valid rollout: a nearly weightless loss, so that an update is one."""
        chosen, scores = self._references(groups)
        rows = {u.view: [i for i, other in enumerate(chosen) if other.view == u.view] for u in chosen}
        return fallback_loss({view: scores.head_B[of_view] for view, of_view in rows.items()})

    def _pack_loss(self, pack: Pack, pairs: float, share: float) -> Tensor:
        """The pack's part of the loss: its pairs' share of what all of the update weigh, its `share` of the tokens."""
        settings = self.settings
        judged = pack.judged.to(self.engine.device)
        router_logits: list[Tensor] = []
        scores = self.engine.run(_forward, judged, router_logits)
        loss = scores.score_B.new_zeros(())
        for (view, source), (reference, rollout, identical, weights) in pack.pairs.items():
            score, head = scores.score_B, scores.head_B
            of_view = ViewPairs(score[reference], score[rollout], head[reference], head[rollout])
            weight_P = torch.tensor(weights).to(of_view.reference_P) / pairs
            square_P = weight_P * settings.score_reg / (2 * len(settings.views))
            loss = loss + weighted_view_loss(of_view, weight_P, square_P, settings.margin, settings.label_smoothing)
            self._note(view, source, of_view, identical)
        balance = self._balance(judged, router_logits, share)
        return loss + self.balance * share * balance if self.balance else loss

    def _note(self, view: str, source: Source, pairs: ViewPairs, identical: Sequence[bool]) -> None:
        rows = (pairs.reference_P, pairs.rollout_P, torch.tensor(identical, device=pairs.rollout_P.device))
        clipped = {}
        if self.settings.score_clip is not None and source == "train":
            heads = torch.cat((pairs.reference_head_P, pairs.rollout_head_P)).detach()
            clipped = {view: (heads.abs() >= self.settings.score_clip).float().cpu()}
        table = torch.stack([r.detach().float() for r in rows], dim=1).cpu()
        self._sums.append(Sums(rows={(view, source): table}, clipped=clipped))

    def _balance(self, judged: JudgedBatch, router_logits: list[Tensor], share: float) -> Tensor:
        if not router_logits:  # a dense judge
            return torch.zeros((), device=judged.batch.input_ids_BT.device)
        top_k = self.engine.module.backbone.config.get_text_config().num_experts_per_tok
        loss, load_E = load_balancing_loss(router_logits, judged.batch.real_mask_BT.flatten(), top_k)
        routed = count_routing(router_logits, view_of_tokens(judged), len(self.settings.views), top_k)
        self._sums.append(Sums(balance_loss=share * float(loss.detach()), load_E=share * load_E.cpu(), routed=routed))
        return loss


def view_of_tokens(judged: JudgedBatch) -> Tensor:
    """Of every flat token of the batch the index of the view it is scored for; -1 for prompts, context and padding.

    A token lies where the next one is predicted, and there is always one: the end token, which is not scored.
    """
    row_S, step_S = judged.scored_BR.nonzero(as_tuple=True)
    view_N = torch.full_like(judged.batch.input_ids_BT.flatten(), -1)
    view_N[judged.batch.predictor_BR[row_S, step_S + 1]] = judged.view_B[row_S]
    return view_N


def _router_metrics(total: RouterCounts, views: Sequence[str]) -> dict[str, float]:
    """Per view the load of every expert (mean over layers, 1 in all) and the router's entropy (1: undecided); and what
    the expert says of the view, in nats."""
    tokens_V = total.routed_LVE.mean(0).sum(1).clamp(min=1)
    load_VE = total.routed_LVE.mean(0) / tokens_V[:, None]
    metrics = {"discriminator/router/view_information": view_information(total.routed_LVE)}
    for v, view in enumerate(views):
        metrics[f"discriminator/router/entropy/{view}"] = float(total.entropy_V[v] / tokens_V[v])
        for expert, load in enumerate(load_VE[v].tolist()):
            metrics[f"discriminator/router/load/{view}/{expert}"] = load
    return metrics


def _forward(model: Discriminator, judged: JudgedBatch, router_logits: list[Tensor] | None) -> Scores:
    return model(judged, router_logits)


def _joined(one, other):
    """Tables by key, those of the same key below each other."""
    both = one.keys() & other.keys()
    return {**one, **other, **{key: torch.cat((one[key], other[key])) for key in both}}


def _sum(one, other):
    return other if one is None else one if other is None else one + other
