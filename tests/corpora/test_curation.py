"""Pass rates, and what they decide: plain functions on judged groups."""

import itertools
import math

import numpy as np
import pytest

from prism_ray.corpora.curation import (
    drawn,
    for_rl,
    histogram,
    pairs_of,
    pass_at_k,
    question_of,
    statistics_of,
    summary_of,
    unsolved,
)
from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.response import render


def prompt(content: str = "<image>how many?", reference: str = "", **changes) -> Prompt:
    return Prompt(
        "p", ({"role": "user", "content": content},), (b"x",) * content.count("<image>"), reference, **changes
    )


def rollout(index: int, tokens: int = 3, finish: str = "stop") -> Rollout:
    ids, logp = np.zeros(tokens, np.int32), np.zeros(tokens, np.float32)
    return Rollout("p", index, ids, ids, logp, ids, "text", finish)


def verdict(accuracy: float, form: float = 1.0, **parts) -> Verdict:
    return Verdict(accuracy, True, parts={"accuracy": accuracy, "format": form, **parts})


def row(position: int, right: int, rollouts: int = 10, **changes) -> dict:
    rate = right / rollouts if rollouts else None
    plain = {
        "position": position, "id": f"p{position}", "data_source": "s", "rollouts": rollouts, "right": right,
        "failed": 0, "pass_rate": rate, "accuracy": rate or 0.0, "format": 1.0, "tokens": 5.0, "cut": 0.0,
    }  # fmt: skip
    return plain | changes


def test_statistics_count_right_rollouts_and_leave_out_what_the_verifier_failed_on():
    verdicts = [verdict(1.0), verdict(0.5), verdict(0.0, 0.0), verdict(0.0, 0.0, failed=1.0)]
    rollouts = tuple(rollout(i, 2 + i, "length" if i == 3 else "stop") for i in range(4))
    group = Group(0, prompt(data_source="s"), rollouts).judged(verdicts)
    assert statistics_of(group, 7) == {
        "position": 7, "id": "p", "data_source": "s", "rollouts": 3, "right": 1, "failed": 1, "pass_rate": 1 / 3,
        "accuracy": 0.5, "format": pytest.approx(2 / 3), "tokens": 3.5, "cut": 0.25,
    }  # fmt: skip


def test_a_group_that_could_not_be_judged_has_no_pass_rate():
    group = Group(0, prompt(), (rollout(0),)).judged([verdict(0.0, failed=1.0)])
    found = statistics_of(group, 0)
    assert found["pass_rate"] is None
    assert not for_rl([found], 0, 1) and not unsolved([found], None)
    assert summary_of([found])["unjudged"] == 1


@pytest.mark.parametrize("rollouts", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(rollouts):
    for right, k in itertools.product(range(rollouts + 1), range(1, rollouts + 1)):
        draws = list(itertools.combinations([i < right for i in range(rollouts)], k))
        assert pass_at_k(rollouts, right, k) == pytest.approx(sum(map(any, draws)) / math.comb(rollouts, k))


def test_pass_at_more_than_was_sampled_is_refused():
    with pytest.raises(ValueError, match="pass@5 cannot be told from 4 rollouts"):
        pass_at_k(4, 1, 5)


def test_both_ends_of_the_range_belong_to_it():
    rows = [row(i, i) for i in range(11)]
    assert for_rl(rows, 0.2, 0.8) == set(range(2, 9))
    assert for_rl(rows, 0.3, 0.7) == set(range(3, 8))
    assert for_rl(rows, 0.0, 0.0) == {0}


def test_the_hardest_are_wrong_throughout_well_formed_and_long():
    rows = [row(0, 1), row(1, 0, accuracy=0.4), row(2, 0, format=0.5), row(3, 0, tokens=50.0), row(4, 0)]
    assert unsolved(rows, None) == {3: 0, 4: 1, 2: 2, 1: 3}
    assert unsolved(rows, 2) == {3: 0, 4: 1}


def test_the_histogram_has_bins_of_their_own_for_none_and_all():
    counts = histogram([0.0, 0.05, 0.1, 3 / 10, 0.35, 9 / 10, 0.95, 1.0, 1.0])
    assert {name: count for name, count in counts.items() if count} == {
        "0": 1, "0.0-0.1": 1, "0.1-0.2": 1, "0.3-0.4": 2, "0.9-1.0": 2, "1": 2,
    }  # fmt: skip
    lines = drawn(counts, width=4).splitlines()
    assert len(lines) == 12 and lines[-1].split() == ["1", "2", "####"] and lines[0].split() == ["0", "1", "##"]


def test_the_summary_tells_pass_at_k_for_as_many_rollouts_as_every_prompt_has():
    told = summary_of([row(0, 0), row(1, 10), row(2, 5), row(3, 2, rollouts=5)])
    assert set(told["pass@k"]) == {"1", "2", "4"}
    assert told["pass@k"]["1"] == pytest.approx((0 + 1 + 0.5 + 0.4) / 4) == told["mean_pass_rate"]
    assert (told["never_right"], told["always_right"], told["sources"]) == (1, 1, {"s": 4})
    assert summary_of([])["pass@k"] == {}


def test_pairs_hold_what_differs_from_the_reference_once_each():
    reference = render("a cat", "one", "1")
    texts = [
        render("a dog", "two", "2"),
        "no format",
        render("a dog", "two", "2"),
        reference,
        render("a cat", "x", "1"),
    ]
    found = list(pairs_of(prompt(reference=reference), texts, 16))
    assert [pair["student_caption"] for pair in found] == ["<caption>a dog</caption>", "<caption>a cat</caption>"]
    assert found[0] == {
        "id": "p#0", "question": "how many?", "teacher_caption": "<caption>a cat</caption>",
        "teacher_cot": "<think>one</think><answer>1</answer>", "student_caption": "<caption>a dog</caption>",
        "student_cot": "<think>two</think><answer>2</answer>",
    }  # fmt: skip
    assert len(list(pairs_of(prompt(reference=reference), texts, 1))) == 1
    assert not list(pairs_of(prompt(reference="broken"), texts, 16))


def test_a_prompt_of_several_turns_or_images_makes_no_pairs():
    assert question_of(prompt("<image> and <image>?")) is None
    turns = tuple({"role": role, "content": "q"} for role in ("user", "assistant", "user"))
    assert question_of(Prompt("p", turns)) is None
    assert question_of(Prompt("p", ({"role": "system", "content": "s"}, {"role": "user", "content": "q"}))) == "q"
