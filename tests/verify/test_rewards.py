import pytest

from prism_ray.response import render
from prism_ray.verify.rewards import answers_agree, judge_response, number, split_values


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("5 0 2", " 5  0 2 "),
        ("Blue", "blue."),
        ("0.5", "1/2"),
        (r"$\dfrac{1}{2}$", "0.5"),
        ("1,234", "1234"),
        ("3.0000001", "3"),
        ("-2e3", "-2000"),
        (r"\boxed{7}", "7"),
        (r"\text{north}", "North"),
        ("1, 2.0", "1,2"),
        ("(1) red (2) 4.0", "(1) red (2) 4"),
        ("3; 4", "3;4.0"),
        ("(1, 2)", "(1,  2)"),
        ("0.0", "0"),
    ],
)
def test_same_answers(answer, truth):
    assert answers_agree(answer, truth)
    assert answers_agree(truth, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("5 0 2", "5 2 0"),
        ("3.00001", "3"),
        ("1, 2", "1, 2, 3"),
        ("1, 2", "2, 1"),
        ("1/0", "1"),
        ("nan", "0"),
        ("10", "1"),
        ("", ""),
        ("", "0"),
        ("0.0001", "0"),
        ("A", "a b"),
        ("(1, 2)", "(1, 3)"),
    ],
)
def test_different_answers(answer, truth):
    assert not answers_agree(answer, truth)


def test_reward_is_published():
    agree = lambda a, t: float(answers_agree(a, t))  # noqa: E731
    right = judge_response(render("c", "t", " 7"), "7", agree)
    assert (right.reward, right.accuracy, right.format, right.valid) == (1.0, 1.0, 1.0, True)
    wrong = judge_response(render("c", "t", "8"), "7", agree)
    assert (wrong.reward, wrong.valid) == (pytest.approx(0.2), True)
    broken = judge_response("<think>t</think><answer>7</answer>", "7", agree)
    assert (broken.reward, broken.format, broken.valid, broken.reason) == (0.0, 0.0, False, "missing <caption>")


@pytest.mark.parametrize("answer", ["", " ", "7" * 1024])
def test_empty_and_overlong_answers_are_worth_their_format(answer):
    never = lambda a, t: pytest.fail("must not be compared")  # noqa: E731
    assert judge_response(render("c", "t", answer), "7", never).reward == pytest.approx(0.2)


@pytest.mark.parametrize("hostile", ["(" * 100_000, "1" + ",111" * 50_000, "10**10**10", "\x00" * 1000, "{" * 10**5])
def test_hostile_answers_are_only_wrong(hostile):
    assert not answers_agree(hostile, "7")
    assert number("1e999") is None or number("1e999") == float("inf")


def test_values_are_split_at_the_top_level_only():
    assert split_values("f(1, 2), [3, 4]") == ["f(1, 2)", "[3, 4]"]
    assert split_values("(1) 5 (2) 6") == ["5", "6"]
