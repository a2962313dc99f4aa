"""A run's numbers as Ray metrics, which every Ray node offers to Prometheus.

`room/quantity` becomes the gauge `prism_ray_room_quantity`, to which Ray puts `ray_` in front; labels say the `run`,
the `stage` and what the number is `of` (a view, an engine; "" for most).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

import ray
from ray.util.metrics import Counter, Gauge

PREFIX = "prism_ray"
STEP, EVALUATION, INCIDENTS = f"{PREFIX}_step", f"{PREFIX}_evaluation", f"{PREFIX}_incidents"
"""Besides those of metrics.jsonl: the step a stage is at, what checkpoints are worth, and warnings and errors."""

REPEAT_S = 5.0
"""Seconds between two repetitions: well within what Ray remembers, and a millisecond of work."""


def exported(name: str) -> tuple[str, str]:
    """The gauge that a metric becomes, and the label `of` under which: `discriminator/gap/perception` is
    `prism_ray_discriminator_gap` of `perception`."""
    room, _, rest = name.partition("/")
    quantity, _, of = rest.partition("/")
    return re.sub(r"\W", "_", "_".join(filter(None, (PREFIX, room, quantity)))), of


class RayMetrics:
    """Sets a gauge for every number of a run; `prism_ray.report.metrics.Sink`. Ray must be running.

    Ray forgets a gauge that is not set anew for two of its reporting intervals (20 s), which a long update is between
    two rows: the numbers of the stage that runs are repeated until another one writes, or the run ends.
    """

    def __init__(self, run: str):
        self._run, self._stage = run, ""
        self._gauges: dict[str, Gauge] = {}
        self._now: dict[tuple[str, str, str], float] = {}
        """What is repeated, by gauge, stage and what it is of."""
        self._incidents = Counter(INCIDENTS, "Warnings and errors of the run's log.", ("run", "level", "room"))
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step of a stage."""
        with self._lock:
            if stage != self._stage:
                self._stage = stage
                self._now = {key: value for key, value in self._now.items() if key[0] == EVALUATION}
            self._set(STEP, "Step that the stage is at.", step, stage, "")
            for name, value in numbers.items():
                gauge, of = exported(name)
                self._set(gauge, f"{'/'.join(name.split('/')[:2])} of metrics.jsonl.", value, stage, of)

    def evaluated(self, label: str, numbers: Mapping[str, float]) -> None:
        """What a checkpoint is worth: `stage` is its label, `of` the measure."""
        with self._lock:
            for name, value in numbers.items():
                self._set(EVALUATION, "What a checkpoint is worth on held-out prompts.", value, label, name)

    def incident(self, level: str, room: str) -> None:
        """Something failed, or was mended."""
        self._incidents.inc(1, {"run": self._run, "level": level, "room": room})

    def close(self, failed: bool) -> None:
        """Repeat nothing more; Ray then forgets the numbers."""
        self._closed.set()

    def _set(self, name: str, description: str, value: float, stage: str, of: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description, ("run", "stage", "of"))
        self._gauges[name].set(value, {"run": self._run, "stage": stage, "of": of})
        self._now[name, stage, of] = value

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._lock:
                for (name, stage, of), value in self._now.items():
                    self._gauges[name].set(value, {"run": self._run, "stage": stage, "of": of})


def endpoints() -> list[str]:
    """Where Prometheus finds the metrics of each living node: `host:port`."""
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
