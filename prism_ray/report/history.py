"""A run's metrics as series, read in one pass: a hundred thousand rows stay in compact arrays."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prism_ray.report.metrics import metric_rows

Points = list[tuple[int, float]]
"""(step, value) in order of the steps."""


class _Series:
    """One metric of one stage."""

    __slots__ = ("steps", "values")

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def put(self, step: int, value: float) -> None:
        """Several rows of a step: the last counts."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)

    def forget_from(self, step: int) -> None:
        keep = bisect_left(self.steps, step)
        del self.steps[keep:], self.values[keep:]


class History:
    """What metrics.jsonl tells, by stage and metric.

    A stage that was resumed or run again repeats steps: a row whose step lies before that of earlier rows of its stage
    replaces all of those from that step on. A null is NaN; what is not a number is left out.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._series: dict[str, dict[str, _Series]] = {}
        furthest: dict[str, int] = {}
        for row in rows:
            stage, step = row["stage"], row["step"]
            of_stage = self._series.setdefault(stage, {})
            if step < furthest.get(stage, step):
                for series in of_stage.values():
                    series.forget_from(step)
            furthest[stage] = step
            for name, value in _numbers(row):
                if name not in of_stage:
                    of_stage[name] = _Series()
                of_stage[name].put(step, value)

    @classmethod
    def read(cls, path: Path) -> History:
        """Of this file; lines that a kill has torn are left out. Empty where there is no file."""
        return cls(metric_rows(path))

    @property
    def stages(self) -> list[str]:
        """In order of appearance."""
        return list(self._series)

    @property
    def names(self) -> list[str]:
        """Every metric that occurs, sorted."""
        return sorted({name for of_stage in self._series.values() for name, s in of_stage.items() if s.steps})

    def of(self, stage: str, name: str) -> Points:
        """The points of one metric of one stage; [] where it has none."""
        series = self._series.get(stage, {}).get(name)
        return list(zip(series.steps, series.values, strict=True)) if series else []

    def series(self, name: str) -> dict[str, Points]:
        """The points of one metric by stage, without the stages that do not have it."""
        return {stage: points for stage in self._series if (points := self.of(stage, name))}

    def ratio(self, name: str, by: str) -> dict[str, Points]:
        """One metric divided by another, by stage, at the steps that have both; NaN where the divisor is 0."""
        found: dict[str, Points] = {}
        for stage, points in self.series(name).items():
            below = dict(self.of(stage, by))
            if both := [(s, v / below[s] if below[s] else math.nan) for s, v in points if s in below]:
                found[stage] = both
        return found

    def last(self, stage: str, name: str) -> float | None:
        """The newest finite value of a metric of a stage; None if there is none."""
        return next((value for _, value in reversed(self.of(stage, name)) if math.isfinite(value)), None)


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name in ("stage", "step", "time"):
            continue
        if value is None:
            yield name, math.nan
        elif isinstance(value, (int, float)):
            yield name, float(value)
