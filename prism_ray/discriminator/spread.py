"""How scores are spread: quantiles of references and rollouts per view, from which a report draws histograms.

Quantiles have no bins to choose, so they fit scores near 0 and scores in the hundreds alike, and a few numbers a step
are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from prism_ray.records import Group

LEVELS = (0, 10, 25, 50, 75, 90, 100)
"""Per cent."""

Score = tuple[str, str, float]
"""View, side (`reference` or `rollout`), score."""


def scores_of(groups: Iterable[Group]) -> list[Score]:
    """Every score in the verdicts of these groups; a reference's once for its group, whatever the number of rollouts.

    Rollouts that were not scored (invalid ones) have none, and neither has the reference of a group of such alone.
    """
    found: list[Score] = []
    for group in groups:
        scored = [verdict for verdict in group.verdicts if verdict.scores]
        found += [(view, "rollout", score) for verdict in scored for view, score in verdict.scores.items()]
        for verdict in scored[:1]:
            found += [(view, "reference", score) for view, score in verdict.reference_scores.items()]
    return found


def score_quantiles(scores: Sequence[Score]) -> dict[str, float]:
    """`discriminator/scores/<view>/<side>/q<level>` for every view and side, with levels of two digits or more."""
    sides: dict[tuple[str, str], list[float]] = {}
    for view, side, score in scores:
        sides.setdefault((view, side), []).append(score)
    return {
        f"discriminator/scores/{view}/{side}/q{level:02d}": value
        for (view, side), values in sides.items()
        for level, value in zip(LEVELS, np.percentile(values, LEVELS).tolist(), strict=True)
    }
