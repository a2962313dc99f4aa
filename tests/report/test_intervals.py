import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_ray.report.intervals import difference, wilson


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
