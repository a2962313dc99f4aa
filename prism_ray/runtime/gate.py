"""The staleness gate: how many groups may be submitted, so that no rollout can be too old when it trains."""

from __future__ import annotations


def submission_limit(version: int, max_staleness: int, groups_per_step: int) -> int:
    """How many groups may ever have been submitted while the learner (and every engine) holds `version`.

    `(version + max_staleness + 1) * groups_per_step`: a group submitted now must train by `version + max_staleness`,
    and until then that many groups train in all. Together with the rule of `buffer.py` this bounds staleness
    strictly. The same bound as AReaL's staleness manager (golden `areal_capacity`).
    """
    return (version + max_staleness + 1) * groups_per_step
