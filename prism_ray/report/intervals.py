"""95 % intervals, for shares and their differences; pure."""

from __future__ import annotations

import math
from typing import NamedTuple

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float


def wilson(successes: float, n: float) -> Interval:
    """Wilson's score interval (1927) of a share; unlike mean ± 2 se it is right near 0 and 1 and for small n.

    Takes fractions, for an effective number of independent observations. ValueError unless 0 <= successes <= n > 0.
    """
    slack = 1e-9 * n
    if not n > 0 or not -slack <= successes <= n + slack:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, not {successes} of {n}")
    share = min(max(successes / n, 0.0), 1.0)
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return Interval(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent shares from their own intervals (Newcombe 1998, method 10, where both are Wilson's).

    Two checkpoints evaluated on the same prompts are positively correlated; this is then too wide, never too narrow.
    """
    gap = a.mean - b.mean
    below = math.hypot(a.mean - a.low, b.high - b.mean)
    above = math.hypot(a.high - a.mean, b.mean - b.low)
    return Interval(gap, gap - below, gap + above)
