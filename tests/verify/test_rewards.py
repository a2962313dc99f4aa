import pytest

from prism_ray.response import render
from prism_ray.verify.rewards import judge_response


def equal(answer, truth):
    return float(answer == truth)


def never(answer, truth):
    pytest.fail("must not be compared")


def test_reward_is_published():
    right = judge_response(render("c", "t", " 7"), "7", equal)
    assert (right.reward, right.accuracy, right.format, right.valid) == (1.0, 1.0, 1.0, True)
    wrong = judge_response(render("c", "t", "8"), "7", equal)
    assert (wrong.reward, wrong.valid) == (pytest.approx(0.2), True)
    broken = judge_response("<think>t</think><answer>7</answer>", "7", never)
    assert (broken.reward, broken.format, broken.valid, broken.reason) == (0.0, 0.0, False, "missing <caption>")


@pytest.mark.parametrize("answer", ["", " ", "7" * 1024])
def test_empty_and_overlong_answers_are_worth_their_format(answer):
    assert judge_response(render("c", "t", answer), "7", never).reward == pytest.approx(0.2)


def test_the_longest_answer_that_is_compared():
    answer = "7" * 1023
    assert judge_response(render("c", "t", answer), answer, equal).reward == 1.0


def test_a_response_that_nobody_writes_is_not_even_parsed(monkeypatch):
    monkeypatch.setattr("prism_ray.verify.rewards.parse", never)
    judged = judge_response(render("c", "t", "7") + " " * (1 << 20), "7", never)
    assert (judged.reward, judged.valid, judged.reason) == (0.0, False, "longer than 1048576 characters")
