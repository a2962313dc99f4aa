"""Which rollouts an update pairs with their references, and how the pairs are packed into batches; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_ray.discriminator.scorer import GroupViews
from prism_ray.discriminator.segments import VIEW_NAMES, ViewSequence, distinct, judged_batch


@dataclass(frozen=True, eq=False)
class PairUnit:
    """One view of one group: its reference (first) and the rollouts it is paired with, `identical` for each of them."""

    view: str
    sequences: tuple[ViewSequence, ...]
    identical: tuple[bool, ...]
    replayed: bool = False

    @property
    def width(self) -> int:
        return max(s.length for s in self.sequences)


def pair_units(groups: Sequence[GroupViews], rollouts_per_update: int, turn: int = 0) -> list[PairUnit]:
    """The pairs of an update: of every group the first valid rollouts by sampling index, which says nothing of content.

    Each later `turn` at the same groups takes those that follow, and then begins anew. Groups without a valid rollout
    contribute none.
    """
    units = []
    for views in groups:
        order = sorted(valid_rollouts(views), key=lambda i: views.group.rollouts[i].index)
        first = turn * rollouts_per_update % max(len(order), 1)
        chosen = [*order[first:], *order[:first]][:rollouts_per_update]
        units += _units_of(views, chosen, replayed=False)
    return units


def replayed_units(groups: Sequence[GroupViews]) -> list[PairUnit]:
    """All pairs of groups that come from the replay buffer."""
    return [unit for views in groups for unit in _units_of(views, valid_rollouts(views), replayed=True)]


def valid_rollouts(views: GroupViews) -> list[int]:
    return [i for i, rollout in enumerate(views.rollouts) if rollout.valid]


def _units_of(views: GroupViews, chosen: Sequence[int], replayed: bool) -> list[PairUnit]:
    units = []
    for view in VIEW_NAMES if chosen else ():
        sequences = (views.reference.sequences[view], *(views.rollouts[i].sequences[view] for i in chosen))
        units.append(PairUnit(view, sequences, tuple(views.identical(i, view) for i in chosen), replayed))
    return units


def count_pairs(units: Sequence[PairUnit]) -> int:
    """How many rollouts are paired with their references; both views of a pair are one."""
    return sum(len(u.identical) for u in units) // len(VIEW_NAMES)


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
    """Units in one batch: the distinct sequences; per view, fresh and replayed pairs apart, rows of references, rows of
    rollouts, identical or not."""

    def __init__(self, units: Sequence[PairUnit]) -> None:
        unique, rows = distinct([s for u in units for s in u.sequences])
        self.judged = judged_batch(unique)
        self.tokens = int(self.judged.batch.real_mask_BT.sum())
        self.pairs: dict[tuple[str, bool], tuple[list[int], list[int], list[bool]]] = {}
        row = iter(rows)
        for unit in units:
            kind = (unit.view, unit.replayed)
            references, rollouts, identical = self.pairs.setdefault(kind, ([], [], []))
            references += [next(row)] * len(unit.identical)
            rollouts += [next(row) for _ in unit.identical]
            identical += unit.identical
