"""Who waits for whom: how long nobody had anything to do at a place that groups pass through; pure bookkeeping."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable


class Idle:
    """Work in progress by place, and the time in which a place had none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._busy: Counter[str] = Counter()
        self._empty_since: dict[str, float] = {}
        self._empty: defaultdict[str, float] = defaultdict(float)
        self._asked = clock()

    def enter(self, place: str) -> None:
        """One thing more to do there."""
        if not self._busy[place]:
            self._empty[place] += self._clock() - self._empty_since.pop(place, self._asked)
        self._busy[place] += 1

    def leave(self, place: str) -> None:
        """One thing less."""
        self._busy[place] -= 1
        if not self._busy[place]:
            self._empty_since[place] = self._clock()

    def count(self, place: str) -> int:
        """How much there is to do."""
        return self._busy[place]

    def shares(self, *places: str) -> dict[str, float]:
        """Of the time since they were last asked for, the share (0..1) in which there was nothing to do."""
        now = self._clock()
        for place in places:
            if not self._busy[place]:
                self._empty[place] += now - self._empty_since.get(place, self._asked)
                self._empty_since[place] = now
        elapsed, self._asked = now - self._asked, now
        return {place: self._empty.pop(place, 0.0) / max(elapsed, 1e-9) for place in places}
