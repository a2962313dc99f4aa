"""The programmatic teacher: writes a caption, the reasoning and the answer for a scene and a question.

A think is a sequence of clauses, one per colour asked about, e.g. `blue : A 6 B 1 . max 6 ; green : none ; …`. Every
word is written with a leading space, so that each is one token; nothing precedes a closing tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_ray.response import render
from prism_ray.testbed.questions import CELL, Question, apply
from prism_ray.testbed.scene import Cells
from prism_ray.testbed.words import CONCLUDE, FILLERS, LETTERS, MARK, NEXT, NONE, SYNONYMS


@dataclass(frozen=True)
class Style:
    """One way of writing: the words for the three marks, a filler between cells, and which way cells are listed."""

    mark: str = MARK
    conclude: str = CONCLUDE
    following: str = NEXT
    filler: str = ""
    backwards: bool = False


_WORDS = {meaning: word for word, meaning in SYNONYMS.items()}
STYLES = (
    Style(),
    Style(_WORDS[MARK], _WORDS[CONCLUDE], _WORDS[NEXT], FILLERS[0]),
    Style(backwards=True),
)
"""The teacher's styles; `TestbedSettings.teacher_styles` says how many of them it mixes."""


@dataclass(frozen=True)
class Clause:
    """What a think says of one colour: the cells it lists as (cell index, digit), and the result it states.

    `stated` is None where the clause says `none`.
    """

    colour: str
    listed: tuple[tuple[int, int], ...]
    stated: int | None


@dataclass(frozen=True)
class Response:
    """The three parts of a response, without tags."""

    caption: str
    think: str
    answer: str

    @property
    def text(self) -> str:
        """The whole response in the format."""
        return render(self.caption, self.think, self.answer)


def teach(cells: Cells, question: Question, style: Style = STYLES[0]) -> Response:
    """The teacher's response, right in every part."""
    caption = write_caption(cells, style)
    if question.family == CELL:
        colour, digit = cells[question.cell]
        think = f" {LETTERS[question.cell]} {colour} {digit}"
        return Response(caption, think, f" {colour if question.operation == 'colour' else digit}")
    clauses = reason(cells, question)
    return Response(caption, write_think(clauses, question.operation, style), write_answer(clauses))


def reason(cells: Cells, question: Question) -> list[Clause]:
    """The clauses that answer `question`, in the order of its colours."""
    clauses = []
    for colour in question.colours:
        listed = tuple((i, digit) for i, (c, digit) in enumerate(cells) if c == colour)
        stated = apply(question.operation, [d for _, d in listed]) if listed else None
        clauses.append(Clause(colour, listed, stated))
    return clauses


def write_caption(cells: Cells, style: Style = STYLES[0], length: int | None = None) -> str:
    """` A red 8 B blue 2 …`; `length` keeps the first cells only."""
    parts = [f" {LETTERS[i]} {colour} {digit}" for i, (colour, digit) in enumerate(cells)]
    return "".join((parts[::-1] if style.backwards else parts)[:length])


def write_think(clauses: Sequence[Clause], operation: str, style: Style = STYLES[0]) -> str:
    """The clauses in words; a range is derived in two steps (`max 8 min 5 range 3`)."""
    return f" {style.following}".join(_write_clause(clause, operation, style) for clause in clauses)


def write_terse_think(clauses: Sequence[Clause]) -> str:
    """Results only, e.g. ` blue 6 ; green none ; red 2`: what a careless annotator leaves of a think."""
    return f" {NEXT}".join(f" {c.colour} {NONE if c.stated is None else c.stated}" for c in clauses)


def write_answer(clauses: Sequence[Clause]) -> str:
    """The stated results, 0 where a colour is absent, e.g. ` 6 0 2`."""
    return "".join(f" {clause.stated or 0}" for clause in clauses)


def _write_clause(clause: Clause, operation: str, style: Style) -> str:
    if clause.stated is None:
        return f" {clause.colour} {style.mark} {NONE}"
    listed = clause.listed[::-1] if style.backwards else clause.listed
    between = f" {style.filler}" if style.filler else ""
    cells = between.join(f" {LETTERS[i]} {digit}" for i, digit in listed)
    steps = ""
    if operation == "range":
        digits = [d for _, d in clause.listed]
        steps = f" max {max(digits, default=0)} min {min(digits, default=0)}"
    return f" {clause.colour} {style.mark}{cells} {style.conclude}{steps} {operation} {clause.stated}"
