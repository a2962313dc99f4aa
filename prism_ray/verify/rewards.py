"""Verifiable rewards, pure: 0.8 accuracy + 0.2 format, and 0 where the format is invalid (PRISM, arXiv 2604.28123)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism_ray.response import parse
from prism_ray.verify.rules import MAX_ANSWER

ACCURACY_WEIGHT = 0.8
FORMAT_WEIGHT = 0.2

MAX_RESPONSE = 1 << 20
"""A response of more characters is not even parsed: no policy writes it, and nothing may make a verifier slow."""


@dataclass(frozen=True)
class Reward:
    """A response's reward and its parts; `reason` says why it is not `valid`."""

    reward: float
    accuracy: float
    format: float
    valid: bool
    reason: str = ""


def judge_response(text: str, truth: str, accuracy: Callable[[str, str], float]) -> Reward:
    """The reward of a response whose right answer is `truth`; `accuracy(answer, truth)` says how right an answer is.

    An answer that is empty, or of `MAX_ANSWER` characters or more, is not compared and worth its format only.
    """
    if len(text) > MAX_RESPONSE:
        return Reward(0.0, 0.0, 0.0, False, f"longer than {MAX_RESPONSE} characters")
    parsed = parse(text)
    if not parsed.valid:
        return Reward(0.0, 0.0, 0.0, False, parsed.reason)
    answer = parsed.parts["answer"].strip()
    right = accuracy(answer, truth) if 0 < len(answer) < MAX_ANSWER else 0.0
    return Reward(ACCURACY_WEIGHT * right + FORMAT_WEIGHT, right, 1.0, True)
