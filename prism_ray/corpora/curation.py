"""From judged rollouts to pass rates, and from pass rates to what each prompt is good for; plain functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from prism_ray.corpora.references import views_of
from prism_ray.corpora.rows import MARKER
from prism_ray.records import Group, Prompt
from prism_ray.response import parse

STATISTICS: tuple[tuple[str, pa.DataType], ...] = (
    ("position", pa.int64()),
    ("id", pa.string()),
    ("data_source", pa.string()),
    ("rollouts", pa.int32()),
    ("right", pa.int32()),
    ("failed", pa.int32()),
    ("pass_rate", pa.float64()),
    ("accuracy", pa.float64()),
    ("format", pa.float64()),
    ("tokens", pa.float64()),
    ("cut", pa.float64()),
)
"""Of each prompt: its place in the reading order; rollouts that were judged, those that were right, and those that the
verifier failed on (they count as neither); the share that was right (null where none was judged); means over the judged
of accuracy and format, over all of tokens, and the share that was cut at the longest response."""

RIGHT = 1 - 1e-9
"""Least accuracy of a rollout that counts as right."""


def statistics_of(group: Group, position: int) -> dict[str, Any]:
    """The row of `STATISTICS` of a judged group."""
    parts = [verdict.parts for verdict in group.verdicts if not verdict.parts.get("failed")]
    accuracy = [part["accuracy"] for part in parts]
    right = sum(value >= RIGHT for value in accuracy)
    return {
        "position": position,
        "id": group.prompt.id,
        "data_source": group.prompt.data_source,
        "rollouts": len(parts),
        "right": right,
        "failed": len(group.verdicts) - len(parts),
        "pass_rate": right / len(parts) if parts else None,
        "accuracy": _mean(accuracy),
        "format": _mean([part["format"] for part in parts]),
        "tokens": _mean([rollout.sampled for rollout in group.rollouts]),
        "cut": _mean([rollout.finish_reason == "length" for rollout in group.rollouts]),
    }


def pass_at_k(rollouts: int, right: int, k: int) -> float:
    """The chance that at least one of k of these rollouts, drawn at random, is right: 1 - C(n-c, k) / C(n, k), an
    unbiased estimate (Chen et al., arXiv 2107.03374). k must not exceed `rollouts`."""
    if k > rollouts:
        raise ValueError(f"pass@{k} cannot be told from {rollouts} rollouts; sample at least {k}")
    return 1.0 - math.comb(rollouts - right, k) / math.comb(rollouts, k)


def for_rl(rows: Sequence[Mapping[str, Any]], low: float, high: float) -> set[int]:
    """Positions of the prompts whose pass rate lies in [low, high]."""
    rated = [row for row in rows if row["pass_rate"] is not None]
    return {row["position"] for row in rated if low <= row["pass_rate"] <= high}


def unsolved(rows: Sequence[Mapping[str, Any]], most: int | None) -> dict[int, int]:
    """Position -> rank (0 the hardest) of at most so many prompts that no rollout solved.

    The least accurate first; among them those whose rollouts are well formed (a prompt that breaks the format is not
    known to be hard), then those that were thought about longest.
    """
    found = [row for row in rows if row["rollouts"] and not row["right"]]
    found.sort(key=lambda row: (row["accuracy"], -row["format"], -row["tokens"], row["position"]))
    return {row["position"]: rank for rank, row in enumerate(found[:most])}


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all prompts together come to: counts, pass@k for powers of two, a histogram of pass rates, by source."""
    rated = [row for row in rows if row["rollouts"]]
    fewest = min((row["rollouts"] for row in rated), default=0)
    ks = [2**power for power in range(fewest.bit_length())]
    return {
        "prompts": len(rows),
        "unjudged": len(rows) - len(rated),
        "never_right": sum(not row["right"] for row in rated),
        "always_right": sum(row["right"] == row["rollouts"] for row in rated),
        "mean_pass_rate": _mean([row["pass_rate"] for row in rated]),
        "format": _mean([row["format"] for row in rated]),
        "tokens": _mean([row["tokens"] for row in rows]),
        "cut": _mean([row["cut"] for row in rows]),
        "pass@k": {str(k): _mean([pass_at_k(row["rollouts"], row["right"], k) for row in rated]) for k in ks},
        "pass_rates": histogram([row["pass_rate"] for row in rated]),
        "sources": dict(Counter(row["data_source"] for row in rows)),
    }


def histogram(rates: Sequence[float]) -> dict[str, int]:
    """Pass rates by tenths; none and all have a bin of their own."""
    labels = ["0", *(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)), "1"]
    counts = dict.fromkeys(labels, 0)
    for rate in rates:
        inner = labels[1 + min(9, int(rate * 10))]
        counts["0" if rate <= 0 else "1" if rate >= 1 else inner] += 1
    return counts


def drawn(counts: Mapping[str, int], width: int = 40) -> str:
    """A histogram as lines of text."""
    most = max([1, *counts.values()])
    return "\n".join(f"{name:>8} {count:>7} {'#' * round(width * count / most)}" for name, count in counts.items())


def pairs_of(prompt: Prompt, texts: Sequence[str], most: int) -> Iterator[dict[str, str]]:
    """At most so many warm-up pairs of a prompt (without the image, which the caller knows the place of).

    Rollouts that break the format, repeat another or equal the reference make no pair; a prompt of several turns or
    images, or without a reference, makes none.
    """
    question = question_of(prompt)
    if question is None or not parse(prompt.reference).valid:
        return
    teacher = views_of(prompt.reference)
    usable = (views_of(text) for text in texts if parse(text).valid)
    different = [views for views in dict.fromkeys(usable) if views != teacher]
    for number, (caption, cot) in enumerate(different[:most]):
        yield {
            "id": f"{prompt.id}#{number}",
            "question": question,
            "teacher_caption": teacher[0],
            "teacher_cot": teacher[1],
            "student_caption": caption,
            "student_cot": cot,
        }


def question_of(prompt: Prompt) -> str | None:
    """The question of a prompt with one user turn and at most one image; None for another."""
    turns = [turn["content"] for turn in prompt.messages if turn["role"] != "system"]
    if len(turns) != 1 or len(prompt.images) > 1:
        return None
    return turns[0].replace(MARKER, "").strip()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
