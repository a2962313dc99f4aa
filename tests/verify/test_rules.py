import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prism_ray.verify.choice import picked
from prism_ray.verify.normalise import clean, split_values
from prism_ray.verify.quantity import quantity
from prism_ray.verify.rules import MAX_ANSWER, judge
from prism_ray.verify.symbolic import SymbolicChecker
from prism_ray.verify.units import split_unit, unit_of

with (Path(__file__).parent / "cases.csv").open(encoding="utf-8", newline="") as file:
    CASES = list(csv.DictReader(file))
"""Labelled by hand: `correct` is what a person says. `published` says where PRISM's published rules say otherwise
(`right` or `wrong`), `miss` why ours do."""


@pytest.fixture(scope="module")
def symbolic():
    checker = SymbolicChecker(limit_s=5)
    yield lambda truth, answer: checker.compare(truth, answer).same
    checker.close()


@pytest.mark.timeout(180)
def test_rules_say_what_a_person_says(symbolic):
    wrong = []
    for case in CASES:
        expected = (case["correct"] == "yes") != bool(case["miss"])
        judged = judge(case["answer"], case["truth"], symbolic)
        if judged.right != expected:
            wrong.append(f"{case['type']}: {case['answer']!r} for {case['truth']!r} is {judged}, {case['note']}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_what_it_promises():
    kinds = Counter(case["type"] for case in CASES)
    assert len(CASES) >= 300 and len({(c["truth"], c["answer"]) for c in CASES}) == len(CASES)
    assert kinds.keys() == {"number", "unit", "choice", "values", "coordinates", "text", "math"}
    assert min(kinds.values()) >= 30
    for kind in kinds:
        assert {c["correct"] for c in CASES if c["type"] == kind} == {"yes", "no"}, kind
    assert sum(bool(c["miss"]) for c in CASES) <= 5


@pytest.mark.parametrize(
    ("answer", "truth", "rule"),
    [
        ("(1) 5 (2) 6", "5, 6.0", "values"),
        ("the answer is B", "B", "choice"),
        ("(1,2)", "(1, 2.0)", "coordinates"),
        ("Blue", "blue.", "text"),
        ("5 kg", "5.0 kilograms", "number"),
        ("x+1", "1+x", "symbolic"),
        ("red", "blue", "none"),
    ],
)
def test_each_rule_has_its_turn(answer, truth, rule, symbolic):
    assert judge(answer, truth, symbolic).rule == rule


def test_without_symbolic_mathematics_the_other_rules_stand():
    assert judge("1/2", "0.5").right and not judge("1+x", "x+1").right


def test_without_letters_there_is_no_multiple_choice():
    assert judge("the answer is B", "B", letters="A").rule != "choice"
    assert not judge("B. because", "B", letters="").right and judge("B. because", "B").right


@pytest.mark.parametrize("answer", ["", "  ", "7" * MAX_ANSWER, "7" + " " * 5 + "7" * MAX_ANSWER])
def test_empty_and_overlong_answers_are_wrong(answer):
    never = lambda truth, answer: pytest.fail("must not be compared")  # noqa: E731
    assert not judge(answer, answer, never).right and not judge("7", answer, never).right


PIECES = [
    "(", ")", "{", "}", "[", "]", "\\", "\\frac{", "\\text{", "\\boxed{", "\\left(", "sqrt(", "√(", "$", "**", "^{",
    "1", ",111", ",", ", ", ";", " ", ".", "-", "1/", "e9", "\\times 10^", "x=", "= ", " is ", ": ", " and ", "(1) ",
    "(A)", "A. ", "answer is ", "cm", "cm^2 ", "km/", "square ", "apples ", "°", "$1", "%", "\x00", "\ud800", "ab",
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("truth", ["7", "(B) red", r"(1, 2\sqrt{3} cm)"])
def test_no_repetition_hangs_a_rule(truth):
    """What makes a pattern backtrack is repetition: each piece, and each pair of them, as often as an answer holds."""
    for one in PIECES:
        for other in PIECES:
            text = ((one + other) * MAX_ANSWER)[: MAX_ANSWER - 1]
            assert not judge(text, truth).right
        assert not judge("7"[: truth == "red"] + one * 300 + "?!", truth).right


def test_deep_nesting_is_compared_as_text_only():
    nested = "(" * 250 + "1" + ",1)" * 250
    assert judge(nested, nested).right and not judge(nested, nested.replace("1", "2")).right


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join))
@example("(A)square (B)")
def test_every_text_equals_itself(text):
    assert judge(text, text).right == bool(text.strip())


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_makes_a_rule_fail(answer, truth):
    judge(answer, truth)


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12).map(lambda x: float(f"{x:.9g}"))
)
def test_numbers_are_read_as_python_writes_them(value):
    assert quantity(clean(repr(value))).value == value
    assert judge(f"${value!r}$", f"{value!r} cm").right


@given(st.integers(min_value=0, max_value=10**12))
def test_thousands_commas_do_not_matter(value):
    assert judge(f"{value:,}", str(value)).right
    assert judge(str(value), f"{value:,}").right


@given(st.fractions(max_denominator=999).filter(lambda f: f != 0), st.sampled_from([1.001, 0.999, -1.0]))
def test_fractions_are_numbers(fraction, factor):
    text = rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"
    assert judge(text, repr(float(fraction))).right
    assert not judge(text, repr(float(fraction) * factor)).right


def test_values_are_split_at_the_top_level_only():
    assert list(split_values("f(1, 2), [3, 4]")) == [["f(1, 2)", "[3, 4]"]]
    assert list(split_values("(1) 5 (2) 6")) == [["5", "6"]]
    assert list(split_values("1,234")) == [["1,234"], ["1", "234"]]


def test_units_have_one_name():
    assert unit_of("meters per second") == unit_of("m/s") == unit_of("m s^{-1}") == "*".join(sorted(["m", "-s"]))
    assert unit_of("square cm") == unit_of("cm2") == "cm^2"
    assert unit_of("x") is None and unit_of("") == ""
    assert split_unit(r"2\sqrt{3} cm") == (r"2\sqrt{3}", "cm")
    assert split_unit(r"\cos A") == (r"\cos A", "")


def test_an_answer_that_names_two_options_picks_none():
    assert picked("(A) or (B)") == "" and picked("(A), (A)") == "A" and picked("J") == "" and picked("J", "IJ") == "J"
