"""Verifiable rewards, pure: 0.8 accuracy + 0.2 format, and 0 where the format is invalid (PRISM, arXiv 2604.28123)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from prism_ray.response import parse

ACCURACY_WEIGHT = 0.8
FORMAT_WEIGHT = 0.2

MAX_ANSWER = 1024
"""An answer of this many characters or more is not compared: it is worth its format only, as published."""

RELATIVE_ERROR = 1e-6
"""Numbers closer than this are equal."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?")
_FRACTION = re.compile(r"(?:\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/]+)/([^/]+))")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_LATEX = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\left", ""), (r"\right", ""), ("$", ""))
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|boxed)\{([^{}]*)\}")


@dataclass(frozen=True)
class Reward:
    """A response's reward and its parts; `reason` says why it is not `valid`."""

    reward: float
    accuracy: float
    format: float
    valid: bool
    reason: str = ""


def judge_response(text: str, truth: str, accuracy: Callable[[str, str], float]) -> Reward:
    """The reward of a response whose right answer is `truth`; `accuracy(answer, truth)` says how right an answer is."""
    parsed = parse(text)
    if not parsed.valid:
        return Reward(0.0, 0.0, 0.0, False, parsed.reason)
    answer = parsed.parts["answer"].strip()
    right = accuracy(answer, truth) if 0 < len(answer) < MAX_ANSWER else 0.0
    return Reward(ACCURACY_WEIGHT * right + FORMAT_WEIGHT, right, 1.0, True)


def answers_agree(answer: str, truth: str) -> bool:
    """Whether an answer says the same as the truth: all of its values, in order, as text or as numbers."""
    if not truth.strip():
        return False
    if _same_value(answer, truth):
        return True
    given, wanted = split_values(answer), split_values(truth)
    return len(given) == len(wanted) > 1 and all(map(_same_value, given, wanted))


def split_values(text: str) -> list[str]:
    """The values of an answer: parts marked (1) (2) …, or separated by `;`, or by commas outside brackets."""
    text = normalise(text)
    marked = [part.strip(" ,;") for part in re.split(r"\(\d\)", text)]
    if len(marked) > 2 and not marked[0]:
        return marked[1:]
    if ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    if _THOUSANDS.fullmatch(text):
        return [text]
    return [part.strip() for part in _split_commas(text) if part.strip()]


def normalise(text: str) -> str:
    """Text without LaTeX dress, case, surplus spaces and the final full stop."""
    for old, new in _LATEX:
        text = text.replace(old, new)
    text = " ".join(_TEXT.sub(r"\1", text).split()).lower()
    return text[:-1].rstrip() if text.endswith(".") else text


def number(text: str) -> float | None:
    """The number a text is: integer, decimal, exponent, fraction, with or without thousands commas."""
    text = normalise(text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return float(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = (part.strip() for part in match.groups() if part is not None)
    if not (_NUMBER.fullmatch(above) and _NUMBER.fullmatch(below)) or float(below) == 0:
        return None
    return float(above) / float(below)


def _same_value(answer: str, truth: str) -> bool:
    if normalise(answer) == normalise(truth):
        return True
    given, wanted = number(answer), number(truth)
    return given is not None and wanted is not None and abs(given - wanted) <= RELATIVE_ERROR * abs(wanted)


def _split_commas(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts
