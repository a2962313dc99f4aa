import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.report.intervals import Interval, bootstrap, difference, wilson


def test_wilson_equals_published_values():
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, score method without continuity correction.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson(successes, n)
        assert interval == pytest.approx((successes / n, low, high), abs=5e-5)


def test_difference_equals_published_values():
    # Newcombe 1998 (Statistics in Medicine 17:873), table II, method 10: 56/70 - 48/80.
    gap = difference(wilson(56, 70), wilson(48, 80))
    assert gap == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_contains_its_share_and_stays_within_0_and_1(n, share):
    interval = wilson(share * n, n)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5), (math.nan, 5), (1, math.nan)])
def test_wilson_refuses_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_the_bootstrap_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(list(rng.normal(2.0, 1.0, size=60))) for _ in range(300)]
    assert 0.90 <= np.mean([i.low <= 2.0 <= i.high for i in intervals]) <= 0.98


def test_one_value_has_no_width_and_none_is_refused():
    assert bootstrap([3.0]) == Interval(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_the_bootstrap_is_deterministic_in_its_seed():
    values = list(np.random.default_rng(0).normal(size=50))
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
