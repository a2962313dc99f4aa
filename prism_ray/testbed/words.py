"""Every word the testbed writes; each is one token of the tiny model when a space precedes it."""

from __future__ import annotations

COLOURS = ("red", "green", "blue")
DIGITS = tuple(range(1, 10))
LETTERS = tuple("ABCDEFGHI")
"""Names of the cells in reading order."""

EACH_OPERATIONS = ("max", "min", "count")
OPERATIONS = (*EACH_OPERATIONS, "range")
ASPECTS = ("digit", "colour")

NONE, MARK, CONCLUDE, NEXT = "none", ":", ".", ";"
SYNONYMS = {"has": MARK, "so": CONCLUDE, "then": NEXT}
"""Wordings of a second teacher style, and what they stand for."""
FILLERS = ("and",)
"""Words that carry no meaning in a think."""


def vocabulary() -> list[str]:
    """All words and numbers of prompts and responses, without duplicates, in a fixed order."""
    numbers = [str(n) for n in range(10)]
    marks = [NONE, MARK, CONCLUDE, NEXT, *SYNONYMS, *FILLERS]
    words = [*COLOURS, *numbers, *LETTERS, *OPERATIONS, *ASPECTS, *marks, "of", "at"]
    return list(dict.fromkeys(words))
