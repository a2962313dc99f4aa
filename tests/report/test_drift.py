import numpy as np
import pytest

from prism_ray.records import Group, Prompt, Rollout
from prism_ray.report.drift import MOST_BINS, drift, lengths, total_variation
from prism_ray.response import render


def rollout(text):
    none = np.zeros(0, np.int32)
    return Rollout("p", 0, none, none, none.astype(np.float32), none, text, "stop")


def group(reference, *texts):
    return Group(0, Prompt("p", (), reference=reference), tuple(map(rollout, texts)))


def test_lengths_count_words_and_steps():
    text = render(" A red 8 B blue 2", " red : A 8 . max 8 ; blue : B 2 . max 2", " 8 2")
    assert lengths(text) == {"caption_length": 6, "steps": 2, "response_length": 6 + 15 + 2}


def test_steps_of_prose_end_with_sentences_and_lines():
    think = "First, x is 3.5 metres. Then y follows!\nSo the sum is 7.\n\n"
    found = lengths(render("c", think, "7"))
    assert found and found["steps"] == 3


def test_a_broken_format_has_no_lengths():
    assert lengths("<caption>a</caption><think>b</think>") is None


def test_no_drift_where_policy_and_teacher_write_alike():
    same = [group(render("a b", "c ; d", "1"), render("x y", "z ; w", "2"))] * 3
    assert drift(same) == {"caption_length": 0.0, "steps": 0.0, "response_length": 0.0}


def test_drift_is_the_share_of_responses_of_other_lengths():
    reference = render("a b", "c ; d", "1")
    groups = [group(reference, reference), group(reference, render("a", "c ; d", "1")), group(reference, "broken")]
    assert drift(groups) == {"caption_length": 0.5, "steps": 0.0, "response_length": 0.5}


def test_no_drift_is_told_without_references_or_valid_rollouts():
    reference = render("a", "b", "c")
    assert drift([group(reference, reference), group("", reference)]) == {}
    assert drift([group(reference, "broken")]) == {} and drift([]) == {}


def test_total_variation_of_few_values_is_exact():
    assert total_variation([1, 1, 2, 3], [1, 2, 2, 4]) == pytest.approx(0.5)
    assert total_variation([1], [2]) == 1.0 and total_variation([5], [5]) == 0.0


def test_total_variation_of_many_values_goes_by_bins_of_the_references():
    rng = np.random.default_rng(0)
    theirs, ours = rng.integers(0, 1000, 4000), rng.integers(0, 1000, 4000)
    assert len(np.unique(theirs)) > MOST_BINS
    assert total_variation(ours, theirs) < 0.05, "two samples of one distribution"
    assert total_variation(ours // 2, theirs) == pytest.approx(0.5, abs=0.03), "half of the mass has moved"
