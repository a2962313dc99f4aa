"""Questions, the teacher and the truth: the teacher is right in every part, and every kind of damage is seen."""

import numpy as np
import pytest

from prism_ray.config.testbed import NoiseSettings
from prism_ray.response import parse
from prism_ray.testbed.noise import careless, misread
from prism_ray.testbed.questions import EACH, EVALUATION_ONLY, FAMILIES, Question, answer, random_question
from prism_ray.testbed.scene import Cells, random_cells
from prism_ray.testbed.teacher import STYLES, teach
from prism_ray.testbed.truth import Truth, truth_of
from prism_ray.testbed.words import vocabulary

CELLS: Cells = (("red", 8), ("blue", 2), ("red", 5), ("blue", 2), ("red", 1), ("red", 8))
QUESTION = Question(EACH, "max", ("blue", "green", "red"))
RIGHT = Truth(True, True, 1.0, True, True)
QUIET = {"wrong_cells": 0, "truncated_caption": 0, "wrong_reasoning": 0, "terse_think": 0}


def extra_of(cells: Cells, question: Question) -> dict:
    return {**question.as_dict(), "cells": [list(cell) for cell in cells]}


def damaged(kind: str, index: int) -> tuple[Cells, Question, Truth]:
    rng = np.random.default_rng(index)
    cells, question = random_cells(rng, 6), random_question(rng, EACH, 6)
    response, kinds = careless(cells, question, NoiseSettings(**(QUIET | {kind: 1})), rng)
    assert len(kinds) == 1
    return cells, question, truth_of(response.text, extra_of(cells, question))


def test_the_default_response_reads_as_documented():
    assert teach(CELLS, QUESTION).text == (
        "<caption> A red 8 B blue 2 C red 5 D blue 2 E red 1 F red 8</caption>"
        "<think> blue : B 2 D 2 . max 2 ; green : none ; red : A 8 C 5 E 1 F 8 . max 8</think>"
        "<answer> 2 0 8</answer>"
    )
    assert QUESTION.text == " max of blue green red"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
def test_every_teacher_response_is_right_in_every_part(family: str, style):
    rng = np.random.default_rng(0)
    for _ in range(100):
        cells = random_cells(rng, 6)
        question = random_question(rng, family, 6)
        assert truth_of(teach(cells, question, style).text, extra_of(cells, question)) == RIGHT


def test_the_styles_differ_and_use_known_words_only():
    texts = [teach(CELLS, QUESTION, style).text for style in STYLES]
    assert len(set(texts)) == len(STYLES)
    for text in texts:
        assert set(" ".join(parse(text).parts.values()).split()) <= set(vocabulary())


def test_no_word_lacks_its_leading_space():
    for part in parse(teach(CELLS, QUESTION).text).parts.values():
        assert part == "".join(f" {word}" for word in part.split())


def test_range_questions_are_answered_in_two_steps_and_reserved():
    text = teach(CELLS, Question("each range", "range", ("red", "green", "blue"))).text
    assert "red : A 8 C 5 E 1 F 8 . max 8 min 1 range 7" in text
    assert EVALUATION_ONLY == ("each range",)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown family 'sum'"):
        random_question(np.random.default_rng(0), "sum", 6)


@pytest.mark.parametrize("index", range(20))
def test_misread_cells_are_seen(index: int):
    cells, _, truth = damaged("wrong_cells", index)
    assert truth.format and not truth.caption_exact
    assert 2 / 6 <= truth.cell_accuracy <= 5 / 6
    assert truth.reasoning_given_caption, "the reasoning follows what was misread"


@pytest.mark.parametrize("index", range(20))
def test_truncated_captions_are_seen(index: int):
    _, _, truth = damaged("truncated_caption", index)
    assert truth.format and truth.answer and not truth.caption_exact
    assert truth.cell_accuracy <= 5 / 6
    assert not truth.reasoning_given_caption, "it lists cells that the caption does not have"


@pytest.mark.parametrize("index", range(20))
def test_wrong_reasoning_is_seen(index: int):
    _, _, truth = damaged("wrong_reasoning", index)
    assert truth.caption_exact and not truth.reasoning_given_caption


def test_wrong_reasoning_that_states_another_result_gives_a_wrong_answer():
    outcomes = [damaged("wrong_reasoning", index)[2].answer for index in range(100)]
    assert sum(outcomes) < 30


@pytest.mark.parametrize("index", range(20))
def test_terse_thinks_are_no_derivation(index: int):
    _, _, truth = damaged("terse_think", index)
    assert truth.caption_exact and truth.answer and not truth.reasoning_given_caption


def test_without_noise_the_careless_annotator_is_the_teacher():
    noise = NoiseSettings(**QUIET)
    response, kinds = careless(CELLS, QUESTION, noise, np.random.default_rng(0))
    assert (response, kinds) == (teach(CELLS, QUESTION), ())


def test_a_wrong_caption_usually_means_a_wrong_answer():
    rng = np.random.default_rng(0)
    wrong = 0
    for index in range(400):
        cells, question = random_cells(rng, 6), random_question(rng, EACH, 6)
        wrong += answer(question, misread(cells, 1 + index % 4, rng)) != answer(question, cells)
    assert wrong > 300


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (" F red 8</caption>", " F red 8 A red 8</caption>", Truth(True, False, 1.0, True, True)),
        (" B blue 2 C", " B blue 3 C", Truth(True, False, 5 / 6, False, True)),
        ("green : none", "green : A 8 . max 8", Truth(True, True, 1.0, False, True)),
        ("A 8 C 5 E 1 F 8", "F 8 E 1 C 5 A 8", RIGHT),
        ("A 8 C 5 E 1 F 8", "A 8 C 5 E 1", Truth(True, True, 1.0, False, True)),
        ("A 8 C 5 E 1 F 8", "A 8 C 5 E 1 F 8 F 8", Truth(True, True, 1.0, False, True)),
        (" 2 0 8</answer>", " 2 0 7</answer>", Truth(True, True, 1.0, False, False)),
        (" 2 0 8</answer>", " 2 0 8 8</answer>", Truth(True, True, 1.0, False, False)),
        ("</think>", "", Truth(False)),
        ("</answer>", "</answer> so", Truth(False)),
    ],
)
def test_a_single_change_is_judged_for_what_it_is(old: str, new: str, expected: Truth):
    text = teach(CELLS, QUESTION).text
    assert old in text
    assert truth_of(text.replace(old, new, 1), extra_of(CELLS, QUESTION)) == expected


@pytest.mark.parametrize("text", ["", "<caption>", "A A A", "<caption></caption><think></think><answer></answer>"])
def test_odd_output_is_judged_without_an_error(text: str):
    truth = truth_of(text, extra_of(CELLS, QUESTION))
    assert not truth.answer and truth.cell_accuracy == 0.0


@pytest.mark.parametrize("text", ["", teach(CELLS, QUESTION).text])
def test_a_row_that_is_not_the_testbeds_is_refused_whatever_was_answered(text: str):
    with pytest.raises(KeyError):
        truth_of(text, {"id": "theirs"})
