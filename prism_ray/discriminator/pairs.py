"""Which rollouts an update pairs with their references, and how the pairs are packed into batches; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prism_ray.discriminator.scorer import GroupViews
from prism_ray.discriminator.segments import ViewSequence, distinct, judged_batch
from prism_ray.records import Group, Prompt, Ratios, Rollout

Source = Literal["train", "replay", "foreign"]
"""Where an update's pairs come from: new rollouts, the replay buffer, references of other prompts."""


@dataclass(frozen=True, eq=False)
class PairUnit:
    """One view of one group: its reference (first) and the rollouts it is paired with; for each of them whether it is
    `identical` and what the pair weighs."""

    view: str
    sequences: tuple[ViewSequence, ...]
    identical: tuple[bool, ...]
    weights: tuple[float, ...]
    source: Source = "train"

    @property
    def width(self) -> int:
        return max(s.length for s in self.sequences)


def pair_units(
    groups: Sequence[GroupViews],
    rollouts_per_update: int,
    turn: int = 0,
    ratios: Ratios | None = None,
    cap: float = 1.0,
) -> list[PairUnit]:
    """The pairs of an update: of every group the first valid rollouts by sampling index, which says nothing of content.

    Each later `turn` at the same groups takes those that follow, and then begins anew. Groups without a valid rollout
    contribute none. A pair weighs 1, or with `ratios` its rollout's, at most `cap`.
    """
    units = []
    for views in groups:
        order = sorted(valid_rollouts(views), key=lambda i: views.group.rollouts[i].index)
        first = turn * rollouts_per_update % max(len(order), 1)
        chosen = [*order[first:], *order[:first]][:rollouts_per_update]
        weights = [min(cap, ratios[views.group.id][i]) if ratios else 1.0 for i in chosen]
        units += _units_of(views, chosen, weights, "train")
    return units


def all_units(groups: Sequence[GroupViews], source: Source) -> list[PairUnit]:
    """All pairs of these groups; each weighs 1."""
    chosen = [(views, valid_rollouts(views)) for views in groups]
    return [unit for views, rows in chosen for unit in _units_of(views, rows, [1.0] * len(rows), source)]


def foreign_groups(groups: Sequence[Group], each: int, turn: int = 0) -> list[Group]:
    """Of every group a twin whose rollouts are the references of up to `each` other prompts of the batch: well written,
    and not true of this image, so none of a prompt that shows the same images. A later `turn` takes others. A group
    of which there is no other such prompt has no twin."""
    twins = []
    for index, group in enumerate(groups):
        around = [*groups[index + 1 :], *groups[:index]]
        others = [g.prompt for g in around if _shows(g.prompt) != _shows(group.prompt)]
        first = turn * each % max(len(others), 1)
        chosen = [*others[first:], *others[:first]][:each]
        if chosen:
            twins.append(Group(group.id, group.prompt, tuple(_written(p, i) for i, p in enumerate(chosen))))
    return twins


def _shows(prompt: Prompt) -> Any:
    """What tells whether a response to another prompt may be true of this one: its images, else what it asks."""
    return prompt.images or prompt.messages


def _written(prompt: Prompt, index: int) -> Rollout:
    """The prompt's reference as if it had been sampled."""
    ids = np.zeros(0, np.int32)
    return Rollout(prompt.id, index, ids, ids, np.zeros(0, np.float32), ids, prompt.reference, "stop")


def valid_rollouts(views: GroupViews) -> list[int]:
    return [i for i, rollout in enumerate(views.rollouts) if rollout.valid]


def _units_of(views: GroupViews, chosen: Sequence[int], weights: Sequence[float], source: Source) -> list[PairUnit]:
    units = []
    for view in views.reference.sequences if chosen else ():
        sequences = (views.reference.sequences[view], *(views.rollouts[i].sequences[view] for i in chosen))
        identical = tuple(views.identical(i, view) for i in chosen)
        units.append(PairUnit(view, sequences, identical, tuple(weights), source))
    return units


def count_pairs(units: Sequence[PairUnit]) -> int:
    """How many rollouts are paired with their references; all views of a pair are one."""
    return sum(len(u.identical) for u in units) // max(len({u.view for u in units}), 1)


def sum_weights(units: Sequence[PairUnit]) -> float:
    """What all pairs weigh together; all views of a pair count once."""
    return sum(sum(u.weights) for u in units) / max(len({u.view for u in units}), 1)


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


class Pack:
    """Units in one batch: the distinct sequences; per view and source, rows of references, rows of
    rollouts, identical or not, and what each pair weighs."""

    def __init__(self, units: Sequence[PairUnit]) -> None:
        unique, rows = distinct([s for u in units for s in u.sequences])
        self.judged = judged_batch(unique)
        self.tokens = int(self.judged.batch.real_mask_BT.sum())
        self.pairs: dict[tuple[str, Source], tuple[list[int], list[int], list[bool], list[float]]] = {}
        row = iter(rows)
        for unit in units:
            kind = (unit.view, unit.source)
            references, rollouts, identical, weights = self.pairs.setdefault(kind, ([], [], [], []))
            references += [next(row)] * len(unit.identical)
            rollouts += [next(row) for _ in unit.identical]
            identical += unit.identical
            weights += unit.weights
