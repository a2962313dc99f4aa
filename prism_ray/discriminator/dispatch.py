"""Which process judges which waiting groups; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_ray.runtime.supervision import Watched

MOST_GROUPS = 16
"""Groups in one batch: enough to fill the processor, few enough that the first of them does not wait long for the last
and that new weights, which are taken between two batches, do not either."""

UNKNOWN = -1
"""The version of a process whose weights nobody can vouch for."""


@dataclass(eq=False)
class Seat:
    """A process that judges: one batch at a time, so that what waits does so in the pool, for whoever is free first."""

    watched: Watched
    actor: Any
    version: int
    """That of the weights it is known to hold."""
    groups: int = 0
    """Groups it is judging now."""
    leaving: bool = False

    @property
    def name(self) -> str:
        return self.watched.name

    def may_work(self, version: int, most_lag: int) -> bool:
        """Whether it is free and its weights are at most `most_lag` updates behind `version`."""
        fit = self.version != UNKNOWN and 0 <= version - self.version <= most_lag
        return fit and not self.groups and not self.leaving and not self.watched.is_lost


def share_out(tokens: Sequence[int], seats: int, most: int = MOST_GROUPS) -> list[list[int]]:
    """The first waiting groups (indices of `tokens`) for each of `seats` free processes, at most `most` for each.

    Each group goes to the process with the fewest tokens so far, in the order in which they came; those for whom there
    is no place wait on.
    """
    batches: list[list[int]] = [[] for _ in range(seats)]
    load = [0] * seats
    for index, size in enumerate(tokens[: seats * most]):
        least = min((s for s in range(seats) if len(batches[s]) < most), key=lambda s: load[s])
        batches[least].append(index)
        load[least] += max(size, 1)
    return batches
