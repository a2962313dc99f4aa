"""The damage of the "public" corpus: misread cells, truncated captions, wrong reasoning, terse thinks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prism_ray.config.testbed import NoiseSettings
from prism_ray.testbed.questions import Question, apply
from prism_ray.testbed.scene import Cells, random_cells
from prism_ray.testbed.teacher import (
    STYLES,
    Clause,
    Response,
    Style,
    reason,
    write_answer,
    write_caption,
    write_terse_think,
    write_think,
)
from prism_ray.testbed.words import DIGITS

WRONG_CELLS, TRUNCATED, WRONG_REASONING, TERSE = "wrong cells", "truncated caption", "wrong reasoning", "terse think"


def careless(
    cells: Cells, question: Question, noise: NoiseSettings, rng: np.random.Generator, style: Style = STYLES[0]
) -> tuple[Response, tuple[str, ...]]:
    """A careless annotator's response to a question about colours, and the kinds of damage it carries.

    The reasoning follows the misread cells, and the answer follows the reasoning, as people's mistakes do.
    """
    kinds = [
        kind
        for kind, share in (
            (WRONG_CELLS, noise.wrong_cells),
            (TRUNCATED, noise.truncated_caption),
            (WRONG_REASONING, noise.wrong_reasoning),
            (TERSE, noise.terse_think),
        )
        if rng.random() < share
    ]
    if WRONG_CELLS in kinds:
        cells = misread(cells, int(rng.integers(1, noise.most_wrong_cells + 1)), rng)
    clauses = reason(cells, question)
    if WRONG_REASONING in kinds:
        clauses = misjudge(clauses, question.operation, rng)
    length = int(rng.integers(1, len(cells))) if TRUNCATED in kinds and len(cells) > 1 else None
    think = write_terse_think(clauses) if TERSE in kinds else write_think(clauses, question.operation, style)
    return Response(write_caption(cells, style, length), think, write_answer(clauses)), tuple(kinds)


def misread(cells: Cells, count: int, rng: np.random.Generator) -> Cells:
    """`cells` with `count` of them (at most all) replaced by something else: another colour, digit, or both."""
    changed = list(cells)
    for index in rng.choice(len(cells), size=min(count, len(cells)), replace=False):
        while changed[index] == cells[index]:
            changed[index] = random_cells(rng, 1)[0]
    return tuple(changed)


def misjudge(clauses: list[Clause], operation: str, rng: np.random.Generator) -> list[Clause]:
    """`clauses` with one of them wrong: a cell forgotten (the result is that of the rest), or another result stated
    than the cells give."""
    index = int(rng.integers(len(clauses)))
    clause = clauses[index]
    if len(clause.listed) > 1 and rng.random() < 0.5:
        gone = int(rng.integers(len(clause.listed)))
        listed = tuple(cell for i, cell in enumerate(clause.listed) if i != gone)
        wrong = replace(clause, listed=listed, stated=apply(operation, [digit for _, digit in listed]))
    else:
        wrong = replace(clause, stated=int(rng.choice([d for d in DIGITS if d != clause.stated])))
    return [*clauses[:index], wrong, *clauses[index + 1 :]]
