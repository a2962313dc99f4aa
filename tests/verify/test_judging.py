"""What becomes of a group whatever its environment does, without Ray."""

import numpy as np
import pytest

from prism_ray.records import Group, Prompt, Rollout, Verdict
from prism_ray.response import render
from prism_ray.verify.judging import BrokenEnvironment, judge_group, judge_text, make_environment, refused, stats_of

OWN = "slow_environment:prism-test"
PROMPT = Prompt("p", ({"role": "user", "content": "how many?"},), ground_truth="5")


def judged(environment, text, prompt=PROMPT, **options):
    env = make_environment(environment, options)
    try:
        return judge_text(text, prompt, env)
    finally:
        env.close()


def test_an_environment_of_ones_own_is_made_with_its_options():
    assert judged(f"{OWN}/Strict-v0", "123", length=3).reward == 1.0
    assert judged(f"{OWN}/Strict-v0", "123", length=4).reward == 0.0


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ("prism/None-v0", {}),
        ("no_such_module:prism/X-v0", {}),
        ("no id at all", {}),
        (f"{OWN}/Strict-v0", {}),
        (f"{OWN}/Strict-v0", {"depth": 3}),
        ("prism/Answer-v0", {"limit_s": -1}),
    ],
)
def test_an_environment_that_cannot_be_made_is_named(environment, options):
    with pytest.raises(ValueError, match=rf"verify.environment: {environment} cannot be made \(.*verify.options"):
        make_environment(environment, options)


@pytest.mark.parametrize(
    "environment", ["prism/Answer-v0", "prism/Math-v0", "prism/MultipleChoice-v0", "prism/Number-v0"]
)
def test_the_ids_of_this_room_need_no_module(environment):
    make_environment(environment).close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "verifier failed: RuntimeError: no idea"),
        ("nan", "verifier gave reward nan"),
        ("inf", "verifier gave reward inf"),
    ],
)
def test_an_environment_that_raises_or_gives_no_number_costs_the_rollout(fault, reason):
    verdict = judged(f"{OWN}/Faulty-v0", fault)
    assert (verdict.reward, verdict.valid, verdict.reason) == (0.0, False, reason)
    assert verdict.parts == {"accuracy": 0.0, "format": 0.0, "failed": 1.0}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Silent", r"SilentEnvironment.step gives no info\['format'\]"),
        ("Wordy", "WordyEnvironment.step gives no number for reward, accuracy or format"),
        ("Lasting", "LastingEnvironment.step asks for another turn"),
    ],
)
def test_an_environment_that_breaks_its_promises_is_an_error_of_the_configuration(name, what):
    with pytest.raises(BrokenEnvironment, match=f"verify.environment: {what}.*; keep to the contract"):
        judged(f"{OWN}/{name}-v0", "x")


@pytest.mark.parametrize(
    ("truth", "extra", "what"),
    [
        ("", {}, "the ground truth is empty"),
        (" \n", {}, "the ground truth is empty"),
        (5, {}, "the ground truth must be text, it is int"),
        (None, {}, "the ground truth must be text, it is NoneType"),
        (["5"], {}, "the ground truth must be text, it is list"),
        ("7" * 2000, {}, "the ground truth is longer than 1023 characters"),
        ("5", {"equivalent_answers": "5"}, "equivalent_answers is no list"),
        ("5", {"equivalent_answers": [5]}, "must be text, it is int"),
    ],
)
def test_a_truth_that_cannot_be_used_is_named_and_never_right(truth, extra, what):
    verdict = judged("prism/Answer-v0", render("c", "t", "5"), Prompt("p7", (), ground_truth=truth, extra=extra))
    assert verdict.reward == 0.0 and verdict.parts["failed"] == 1.0
    assert what in verdict.reason and "prompt p7" in verdict.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing <caption>"),
        ("x" * 10_000_000, "longer than 1048576 characters"),
        ("<answer>" * 1_000_000, "longer than 1048576 characters"),
        ("(" * 10_000_000, "longer than 1048576 characters"),
    ],
)
def test_responses_that_are_no_responses_are_worth_nothing(text, reason):
    verdict = judged("prism/Answer-v0", text)
    assert (verdict.reward, verdict.valid, verdict.reason) == (0.0, False, reason)


@pytest.mark.parametrize("answer", ["", "(" * 1_000_000, "1" + ",111" * 50_000, "\x00" * 5000, "{" * 1024])
def test_answers_that_are_no_answers_are_worth_their_format(answer):
    verdict = judged("prism/Answer-v0", render("c", "t", answer))
    assert verdict.reward == pytest.approx(0.2) and verdict.valid


@pytest.mark.parametrize("source", ["", "mm_gad", "nobody-knows-it"])
def test_where_a_prompt_comes_from_plays_no_part(source):
    prompt = Prompt("p", (), ground_truth="5", data_source=source)
    assert judged("prism/Answer-v0", render("c", "t", "5.0"), prompt).reward == 1.0


def group(*texts):
    none = np.zeros(0, np.int32)
    rollouts = (Rollout("p", i, none, none, np.zeros(0, np.float32), none, t, "stop") for i, t in enumerate(texts))
    return Group(7, PROMPT, tuple(rollouts))


def test_verdicts_that_a_group_has_are_replaced():
    env = make_environment("prism/Answer-v0")
    first = group(render("c", "t", "5"), "5")
    again = judge_group(first.judged([refused("lost"), refused("lost")]), env)
    assert [v.reward for v in again.verdicts] == [1.0, 0.0]
    assert again.verdicts == judge_group(first, env).verdicts
    env.close()


def test_stats_are_means_and_ranges_of_every_part():
    judged_group = group("a", "b").judged([Verdict(1.0, True, parts={"accuracy": 1.0, "own": 4.0}), refused("lost")])
    stats = stats_of(judged_group)
    assert (stats["verify/reward"], stats["verify/own"], stats["verify/failed"]) == (0.5, 2.0, 0.5)
    assert stats["verify/accuracy"] == 0.5


def test_a_reason_is_kept_short():
    assert len(refused("x" * 10_000).reason) == 500
