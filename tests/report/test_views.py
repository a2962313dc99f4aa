import math
import re

import pytest

from prism_ray.report.history import History
from prism_ray.report.views import (
    MOST_STEPS,
    judge_health,
    score_quantiles,
    shown_by_judge_health,
    spread,
    steps_of,
    views_of,
    warmup_table,
)


def rows(stage, steps, **numbers):
    return [{"stage": stage, "step": s, **{n: v(s) if callable(v) else v for n, v in numbers.items()}} for s in steps]


def judged(view, **more):
    """One view's figures as alignment notes them."""
    d = "discriminator"
    scores = {f"{d}/scores/{view}/{side}/q{q:02d}": base + q / 100 for side, base in (("reference", 2), ("rollout", 0))
              for q in (0, 10, 25, 50, 75, 90, 100)}  # fmt: skip
    loads = {f"{d}/router/load/{view}/{e}": 0.5 for e in (0, 1)}
    alarm = {f"{d}/alarm/separable/{view}": lambda step: float(step > 2)}
    gap = {f"{d}/gap/{view}": lambda step: 1 / step, f"{d}/pair_accuracy/{view}": 0.8}
    return gap | scores | loads | alarm | {f"{d}/watch/{view}/answer": 0.3} | more


def titles(html):
    return re.findall("<figcaption>(.*?)</figcaption>", html)


def test_every_view_that_the_metrics_name_gets_its_figures():
    numbers = judged("whole") | judged("a_third")
    history = History(rows("align", (1, 2, 3, 4), **numbers))
    assert views_of(history) == ["a_third", "whole"]
    html = judge_health(history)
    for view in ("a_third", "whole"):
        assert {
            f"Gap in {view}", f"Pair accuracy in {view}", f"Scores in {view}", f"Router load in {view}",
            f"Scores in {view}, first quarter of align", f"Scores in {view}, last quarter of align",
            f"Does {view} reward what is true?",
        } <= set(titles(html))  # fmt: skip
    assert html.count("separable: 2 of 4 steps of align, first 3, last 4") == 2
    assert html.count("expert 1, step 4: 0.5") == 2
    assert {name for name in history.names if "alarm" not in name} <= shown_by_judge_health(history)


def test_a_run_without_a_discriminator_has_no_such_figures():
    history = History(rows("rlvr", (1, 2), **{"reward/mean": 0.5}))
    assert judge_health(history) == "" and warmup_table(history, 0.05) == ""


def test_a_view_without_scores_router_or_truth_still_has_its_gap():
    html = judge_health(History(rows("align", (1, 2), **{"discriminator/gap/v": 1.0})))
    assert titles(html) == ["Gap in v"]


def test_nothing_but_nan_still_gives_figures():
    numbers = {name: math.nan for name in judged("v")}
    assert "no finite values" in judge_health(History(rows("align", (1, 2), **numbers)))


def test_held_out_scores_of_the_warm_up_are_told_apart_from_those_of_alignment():
    held_out = {f"{n}_held_out": v for n, v in judged("v").items() if "/scores/" in n}
    gap = {"discriminator/gap/v_held_out": 5.0}
    history = History([*rows("warmup", (12,), **held_out, **gap), *rows("align", (1, 2), **judged("v"))])
    assert views_of(history) == ["v"]
    assert set(score_quantiles(history, "warmup", "v", held_out=True)) == {"reference", "rollout"}
    assert score_quantiles(history, "warmup", "v") == {}
    assert "Scores in v after the warm-up" in titles(judge_health(history))


def test_a_step_that_lacks_a_quantile_does_not_shift_the_others():
    whole = rows("align", (1, 2), **judged("v"))
    torn = rows("align", (3,), **judged("v") | {"discriminator/scores/v/rollout/q50": math.nan})
    quantiles = score_quantiles(History([*whole, *torn]), "align", "v")["rollout"]
    assert steps_of(quantiles, 0.0, 1.0) == steps_of(score_quantiles(History(whole), "align", "v")["rollout"], 0.0, 1.0)


def test_a_part_of_a_run_is_that_part_and_a_long_one_is_thinned():
    quantiles = {level: [(step, step + level) for step in range(1000)] for level in (0.0, 1.0)}
    last = steps_of(quantiles, 0.75, 1.0)
    assert last[0] == [(0.0, 750.0), (1.0, 751.0)] and len(last) == MOST_STEPS
    thinned = steps_of(quantiles, 0.0, 1.0)
    assert len(thinned) == MOST_STEPS and thinned[-1][0][1] > 990


LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def test_quantiles_of_an_even_spread_give_even_bins():
    assert spread([[(q, 10 * q) for q in LEVELS]], 0, 10, 5) == pytest.approx([0.2] * 5)


def test_bins_hold_what_lies_between_the_quantiles():
    quantiles = [(0.0, 0.0), (0.5, 1.0), (1.0, 4.0)]
    assert spread([quantiles], 0, 4, 4) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_equal_scores_lie_in_one_bin_and_the_highest_in_the_last():
    assert spread([[(q, 2.5) for q in LEVELS]], 0, 4, 4) == pytest.approx([0, 0, 1, 0])
    assert spread([[(q, 4.0) for q in LEVELS]], 0, 4, 4) == pytest.approx([0, 0, 0, 1])


def test_steps_count_alike_and_nothing_is_lost():
    low, high = [(q, q) for q in LEVELS], [(q, 3 + q**3) for q in LEVELS]
    shares = spread([low, high], 0, 4, 16)
    assert sum(shares) == pytest.approx(1) and sum(shares[:4]) == pytest.approx(0.5)


def test_the_warm_up_is_told_with_what_shortcuts_would_be_worth():
    d = "discriminator"
    numbers = {
        f"{d}/gap/v_held_out": 3.0, f"{d}/pair_accuracy/v_held_out": 0.9, f"{d}/calibration_error/v_held_out": 0.02,
        f"{d}/probe/length/v": 0.87, f"{d}/probe/format/v": 0.7, f"{d}/probe/last_token/v": 0.5, f"{d}/loss": 0.3,
    }  # fmt: skip
    html = warmup_table(History(rows("warmup", (7,), **numbers)), margin=0.05)
    assert "after 7 steps" in html and "<td>0.900</td>" in html and "<td>0.020</td>" in html
    assert '<span class="warn">0.870 ⚠</span>' in html and html.count("⚠") == 1
    assert "⚠" not in warmup_table(History(rows("warmup", (7,), **numbers)), margin=0.02)
    assert "identical texts</th>" not in html, "nothing is said of what was not noted"
