"""Quantiles of scores: what reaches the metrics of references and rollouts."""

import numpy as np
import pytest

from prism_ray.discriminator.spread import LEVELS, score_quantiles, scores_of
from prism_ray.records import Group, Prompt, Rollout, Verdict


def group(reference, *scores):
    none = np.zeros(0, np.int32)
    rollouts = tuple(Rollout("p", i, none, none, np.zeros(0, np.float32), none, "", "stop") for i in range(len(scores)))
    verdicts = [
        Verdict(0.0, False, "no caption") if s is None else Verdict(0.5, True, "", {"v": s}, {"v": reference})
        for s in scores
    ]
    return Group(0, Prompt("p", ()), rollouts).judged(verdicts)


def test_a_reference_counts_once_for_its_group_and_an_invalid_rollout_not_at_all():
    assert scores_of([group(5.0, 1.0, None, 2.0)]) == [
        ("v", "rollout", 1.0), ("v", "rollout", 2.0), ("v", "reference", 5.0),
    ]  # fmt: skip


def test_groups_without_scores_have_none():
    assert scores_of([group(5.0, None), Group(1, Prompt("p", ()), ())]) == []
    assert score_quantiles([]) == {}


def test_quantiles_of_each_side():
    scores = [("v", "rollout", float(x)) for x in range(101)] + [("v", "reference", 7.0)]
    found = score_quantiles(scores)
    assert len(found) == 2 * len(LEVELS)
    for level in LEVELS:
        assert found[f"discriminator/scores/v/rollout/q{level:02d}"] == pytest.approx(level)
        assert found[f"discriminator/scores/v/reference/q{level:02d}"] == 7.0
