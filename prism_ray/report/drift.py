"""How far a policy has drifted from its teacher in form: total-variation distances of lengths; pure.

PRISM (arXiv 2604.28123) tells drift by caption length, number of reasoning steps and response length. Total variation
is half the sum of the differences of two histograms: 0 where the distributions are the same, 1 where they share
nothing. It is estimated from finite samples and so never quite 0 for two samples of one distribution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from prism_ray.records import Group
from prism_ray.response import parse

_STEP = re.compile(r"[;\n]+|(?<=[^\W\d])[.!?]\s+")
"""Where one step of a reasoning ends: at a semicolon, a new line, or a sentence's end (none after a number)."""

MOST_BINS = 20
"""More different values than this are put into bins with equally many references each: sparse histograms of long
responses would differ by chance alone."""


def lengths(text: str) -> dict[str, int] | None:
    """Words of the caption, steps of the reasoning and words of the whole response; None where the format is broken."""
    parsed = parse(text)
    if not parsed.valid:
        return None
    caption, think, answer = (parsed.parts[tag].split() for tag in ("caption", "think", "answer"))
    steps = sum(bool(step.strip()) for step in _STEP.split(parsed.parts["think"]))
    return {
        "caption_length": len(caption),
        "steps": steps,
        "response_length": len(caption) + len(think) + len(answer),
    }


def drift(groups: Sequence[Group]) -> dict[str, float]:
    """Total-variation distance of each of `lengths` between the valid rollouts of these groups and their references.

    Nothing where a prompt has no usable reference, or no rollout is valid: there is no distribution to compare.
    """
    references = [lengths(group.prompt.reference) for group in groups]
    rollouts = [found for group in groups for r in group.rollouts if (found := lengths(r.text)) is not None]
    if not rollouts or not references or any(found is None for found in references):
        return {}
    return {name: _distance(rollouts, [r for r in references if r], name) for name in rollouts[0]}


def _distance(ours: Sequence[Mapping[str, int]], theirs: Sequence[Mapping[str, int]], name: str) -> float:
    return total_variation([o[name] for o in ours], [t[name] for t in theirs])


def total_variation(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Half the sum of the differences of the two histograms, in 0..1; neither side may be empty."""
    values = np.unique(np.concatenate([ours, theirs]))
    edges = values[1:]
    if len(values) > MOST_BINS:
        edges = np.unique(np.quantile(theirs, np.linspace(0, 1, MOST_BINS + 1)[1:-1]))
    shares = [np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1) / len(x)
              for x in (np.asarray(ours), np.asarray(theirs))]  # fmt: skip
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
