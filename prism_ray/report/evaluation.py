"""From rollouts to the evaluation's numbers; pure.

Several rollouts of one prompt are not independent, so the interval of the sampled accuracy counts prompts, not
rollouts: the variance of the mean is that of the prompts' own means (cluster-robust), turned into an effective number
of rollouts, between the number of prompts (rollouts of a prompt all alike) and that of rollouts (all independent), for
Wilson's interval. Greedy decoding gives one rollout a prompt, where this is Wilson's interval itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prism_ray.records import Group, Prompt
from prism_ray.report.drift import drift
from prism_ray.report.intervals import wilson

Truth = Callable[[str, Prompt], Mapping[str, float]]
"""What is true of a response's text: `answer` and `format` (0..1), and, where they can be known, `caption_exact`,
`cell_accuracy` and `reasoning_given_caption`."""

SHARES = ("format", "caption_exact", "cell_accuracy", "reasoning_given_caption")


def evaluation_metrics(sampled: Sequence[Group], greedy: Sequence[Group], truth: Truth) -> dict[str, Any]:
    """The metrics of one checkpoint; ValueError where there is nothing to evaluate.

    `n` is the number of prompts; `accuracy` (from `sampled`) and `accuracy_greedy` are `{"mean", "low", "high"}` with
    95 % intervals; the shares (only those the truth knows) and `mean_tokens` are means over `sampled`, in which every
    prompt weighs the same. `drift` (where every prompt has a reference) says how far lengths are from the references'.
    """
    metrics = metrics_of(
        [_truths(group, truth) for group in sampled],
        [_truths(group, truth) for group in greedy],
        [[r.sampled for r in group.rollouts] for group in sampled],
    )
    drifted = drift(sampled)
    return metrics | ({"drift": drifted} if drifted else {})


def metrics_of(
    truths: Sequence[Sequence[Mapping[str, float]]],
    greedy: Sequence[Sequence[Mapping[str, float]]],
    tokens: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """`evaluation_metrics` from what is true of each prompt's sampled and greedy responses, and the sampled lengths."""
    if not truths or not greedy:
        raise ValueError("nothing to evaluate: sampled and greedy rollouts of at least one prompt are needed")
    known = [name for name in SHARES if all(name in t for of_prompt in truths for t in of_prompt)]
    return {
        "n": len(truths),
        "accuracy": clustered_interval([[t["answer"] for t in of_prompt] for of_prompt in truths]),
        "accuracy_greedy": clustered_interval([[t["answer"] for t in of_prompt] for of_prompt in greedy]),
        **{name: float(np.mean([np.mean([t[name] for t in of_prompt]) for of_prompt in truths])) for name in known},
        "mean_tokens": float(np.mean([np.mean(of_prompt) for of_prompt in tokens])),
    }


def accuracy(groups: Sequence[Group], truth: Truth) -> dict[str, float]:
    """Share of right answers over these groups, with its 95 % interval."""
    return clustered_interval([[t["answer"] for t in _truths(group, truth)] for group in groups])


def clustered_interval(values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean of a share and its 95 % interval; `values` are one list (0..1 each) for every prompt."""
    means = np.array([np.mean(of_prompt) for of_prompt in values])
    total, mean = sum(len(of_prompt) for of_prompt in values), float(means.mean())
    effective = float(len(means))
    if len(means) > 1 and means.var() > 0:
        effective = float(np.clip(mean * (1 - mean) * len(means) / means.var(ddof=1), len(means), total))
    mean, low, high = wilson(mean * effective, effective)
    return {"mean": mean, "low": low, "high": high}


def _truths(group: Group, truth: Truth) -> list[Mapping[str, float]]:
    if not group.rollouts:
        raise ValueError(f"prompt {group.prompt.id}: no rollouts to evaluate")
    return [truth(rollout.text, group.prompt) for rollout in group.rollouts]
