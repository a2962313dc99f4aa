"""When the teacher may be asked, and when again: rate limits and back-off, without a clock of their own."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from prism_ray.config.collect import AskingSettings

_AGAIN = {408, 409, 425, 429}
_NEVER = {401, 402, 403, 404}
_EMPTY_ACCOUNT = "insufficient_quota"


def verdict_on(status: int, body: str) -> str:
    """What to do after an answer of this status: `good`, `again` (later), `refused` (this prompt) or `fatal` (every
    prompt would meet the same: a wrong key, a wrong model, an empty account)."""
    if 200 <= status < 300:
        return "good"
    if status in _NEVER or (status == 429 and _EMPTY_ACCOUNT in body):
        return "fatal"
    return "again" if status in _AGAIN or status >= 500 else "refused"


def backoff(attempt: int, settings: AskingSettings, rng: random.Random) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 1): exponential with jitter. What the endpoint asks
    for in `Retry-After` holds for all questions, see `Pace.pause`."""
    return min(settings.backoff_most_s, settings.backoff_s * 2.0 ** min(attempt - 1, 60)) * rng.uniform(0.5, 1.0)


def read_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date); None where it says nothing usable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None


class Pace:
    """Spreads requests evenly over time within the endpoint's limits. Times are seconds of any one clock.

    What a request will cost in tokens is known in full only afterwards; the difference is charged then and delays the
    next ones, so the limit is kept on average and overshot by at most what is under way.
    """

    def __init__(self, settings: AskingSettings) -> None:
        self._per_request = 60.0 / settings.requests_per_minute if settings.requests_per_minute else 0.0
        self._per_token = 60.0 / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
        self._requests = self._tokens = self._paused = float("-inf")

    def delay(self, now: float) -> float:
        """Seconds until the next request may go."""
        return max(0.0, self._requests - now, self._tokens - now, self._paused - now)

    def sent(self, now: float, tokens: int) -> None:
        """A request of so many tokens goes out."""
        self._requests = max(now, self._requests) + self._per_request
        self.charge(now, tokens)

    def charge(self, now: float, tokens: int) -> None:
        """So many more tokens (fewer, if negative) than were charged before."""
        self._tokens = max(now, self._tokens) + self._per_token * tokens

    def pause(self, until: float) -> None:
        """Nothing goes before this time."""
        self._paused = max(self._paused, until)
