"""What is right and what is wrong in a response, part by part: the testbed knows its scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prism_ray.records import Prompt
from prism_ray.response import parse
from prism_ray.testbed.questions import CELL, Question, answer, apply, question_from
from prism_ray.testbed.scene import Cells
from prism_ray.testbed.words import COLOURS, CONCLUDE, DIGITS, FILLERS, LETTERS, MARK, NEXT, NONE, SYNONYMS

_DIGIT = {str(d): d for d in DIGITS}


@dataclass(frozen=True)
class Truth:
    """What is true of one response.

    `caption_exact`: every cell named once, with its colour and digit, and nothing else. `cell_accuracy`: share of the
    scene's cells whose colour and digit the caption states. `reasoning_given_caption`: the think is a complete
    derivation from the response's own caption (right or wrong), and the answer is what it concludes. `answer`: the
    answer is the true one. All are False or 0 where `format` is False.
    """

    format: bool
    caption_exact: bool = False
    cell_accuracy: float = 0.0
    reasoning_given_caption: bool = False
    answer: bool = False


def truth_of(text: str, extra: dict[str, Any]) -> Truth:
    """Judge a response's text; `extra` is the row's extra information (question and `cells`). KeyError where it is no
    row of the testbed, whatever the response is: else malformed responses to it would count as wrong."""
    cells: Cells = tuple((str(colour), int(digit)) for colour, digit in extra["cells"])
    question = question_from(extra)
    parsed = parse(text)
    if not parsed.valid:
        return Truth(False)
    caption, think = parsed.parts["caption"].split(), parsed.parts["think"].split()
    stated = parsed.parts["answer"].split()
    named = read_cells(caption)
    right = sum(named.get(index) == cell for index, cell in enumerate(cells))
    return Truth(
        format=True,
        caption_exact=right == len(cells) and len(caption) == 3 * len(cells),
        cell_accuracy=right / len(cells),
        reasoning_given_caption=_follows(think, stated, named, question),
        answer=stated == answer(question, cells).split(),
    )


def truth_of_prompt(text: str, prompt: Prompt) -> dict[str, float]:
    """`truth_of` as the evaluation wants it: numbers by name."""
    return {name: float(value) for name, value in asdict(truth_of(text, prompt.extra)).items()}


def read_cells(words: Sequence[str]) -> dict[int, tuple[str, int]]:
    """The cells a caption names, by index, as (colour, digit); of a cell named twice the first counts."""
    named: dict[int, tuple[str, int]] = {}
    for letter, colour, digit in zip(words, words[1:], words[2:], strict=False):
        if letter in LETTERS and colour in COLOURS and digit in _DIGIT:
            named.setdefault(LETTERS.index(letter), (colour, _DIGIT[digit]))
    return named


def _follows(think: list[str], stated: list[str], named: dict[int, tuple[str, int]], question: Question) -> bool:
    """Whether think and answer are what a perfect reasoner would write who saw nothing but the caption."""
    if question.family == CELL:
        if question.cell not in named:
            return False
        colour, digit = named[question.cell]
        conclusion = colour if question.operation == "colour" else str(digit)
        return think == [LETTERS[question.cell], colour, str(digit)] and stated == [conclusion]
    clauses = _clauses(think)
    if len(clauses) != len(question.colours) or len(stated) != len(clauses):
        return False
    return all(
        _clause_follows(clause, value, colour, named, question.operation)
        for clause, value, colour in zip(clauses, stated, question.colours, strict=True)
    )


def _clauses(think: list[str]) -> list[list[str]]:
    clauses: list[list[str]] = [[]]
    for word in think:
        word = SYNONYMS.get(word, word)
        if word == NEXT:
            clauses.append([])
        elif word not in FILLERS:
            clauses[-1].append(word)
    return clauses


def _clause_follows(
    clause: list[str], stated: str, colour: str, named: dict[int, tuple[str, int]], operation: str
) -> bool:
    """`colour : A 6 B 1 . max 6` lists just the caption's cells of that colour, in any order, and concludes right."""
    cells = {LETTERS[i]: digit for i, (c, digit) in named.items() if c == colour}
    if clause[:2] != [colour, MARK]:
        return False
    if not cells:
        return clause[2:] == [NONE] and stated == "0"
    digits = list(cells.values())
    result = apply(operation, digits)
    steps = ["max", str(max(digits)), "min", str(min(digits))] if operation == "range" else []
    end = 2 + 2 * len(cells)
    listed = list(zip(clause[2:end:2], clause[3:end:2], strict=False))
    return (
        sorted(listed) == sorted((letter, str(digit)) for letter, digit in cells.items())
        and clause[end:] == [CONCLUDE, *steps, operation, str(result)]
        and stated == str(result)
    )
