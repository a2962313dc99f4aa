"""What can be asked about a scene, and the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_ray.testbed.scene import Cells
from prism_ray.testbed.words import ASPECTS, COLOURS, EACH_OPERATIONS, LETTERS, OPERATIONS

EACH, EACH_RANGE, ONE_COLOUR, CELL = "each", "each range", "one colour", "cell"
FAMILIES = (EACH, EACH_RANGE, ONE_COLOUR, CELL)
EVALUATION_ONLY = (EACH_RANGE,)
"""Families that no training split contains."""


@dataclass(frozen=True)
class Question:
    """One question. `operation` is max, min, count, range, or, for the family `cell`, the aspect digit or colour;
    `colours` are those asked about, in the order asked (empty for `cell`); `cell` is an index in reading order."""

    family: str
    operation: str
    colours: tuple[str, ...] = ()
    cell: int = 0

    @property
    def text(self) -> str:
        """The question in words, beginning with a space so that each word is one token."""
        if self.family == CELL:
            return f" {self.operation} at {LETTERS[self.cell]}"
        return f" {self.operation} of {' '.join(self.colours)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `question_from` is the inverse."""
        return {
            "family": self.family,
            "operation": self.operation,
            "colours": list(self.colours),
            "cell": self.cell,
        }


def question_from(extra: dict[str, Any]) -> Question:
    """The question stored in a row's extra information."""
    return Question(extra["family"], extra["operation"], tuple(extra["colours"]), int(extra["cell"]))


def random_question(rng: np.random.Generator, family: str, cells: int) -> Question:
    """A question of `family` about a scene of `cells` cells."""
    if family == EACH:
        return Question(family, str(rng.choice(EACH_OPERATIONS)), _shuffled(rng))
    if family == EACH_RANGE:
        return Question(family, "range", _shuffled(rng))
    if family == ONE_COLOUR:
        return Question(family, str(rng.choice(OPERATIONS)), (str(rng.choice(COLOURS)),))
    if family == CELL:
        return Question(family, str(rng.choice(ASPECTS)), (), int(rng.integers(cells)))
    raise ValueError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")


def _shuffled(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(COLOURS[i] for i in rng.permutation(len(COLOURS)))


def digits_of(colour: str, cells: Cells) -> list[int]:
    """The digits on cells of `colour`, in reading order."""
    return [digit for c, digit in cells if c == colour]


def apply(operation: str, digits: Sequence[int]) -> int:
    """max, min, count or range (largest minus smallest) of `digits`; 0 where there are none."""
    if not digits:
        return 0
    results = {"max": max(digits), "min": min(digits), "count": len(digits), "range": max(digits) - min(digits)}
    return results[operation]


def answer(question: Question, cells: Cells) -> str:
    """The true answer, e.g. `5 0 2` for three colours."""
    if question.family == CELL:
        colour, digit = cells[question.cell]
        return colour if question.operation == "colour" else str(digit)
    return " ".join(str(apply(question.operation, digits_of(c, cells))) for c in question.colours)
