"""A run's numbers: one JSON object a line in metrics.jsonl, and whoever else is to hear of them."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from prism_ray.config.report import ReportSettings
from prism_ray.report.wandb_run import WandbSink

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""One line of metrics.jsonl: `stage`, `step`, `time` (seconds since 1970) and numbers by name."""


def open_to_append(path: Path) -> TextIO:
    """A file of lines to add to; half a line that a killed run may have left is ended, so that nothing gets glued to
    it."""
    torn = False
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            torn = written.read(1) != b"\n"
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


class Sink(Protocol):
    """Where a run's numbers go besides metrics.jsonl."""

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step of a stage; names are `room/quantity`."""
        ...

    def evaluated(self, label: str, numbers: Mapping[str, float]) -> None:
        """What the checkpoint of this label is worth."""
        ...

    def close(self, failed: bool) -> None:
        """The run ends."""
        ...


class MetricsLog:
    """Appends to `folder/metrics.jsonl`; each line is complete on disk when `write` returns.

    A run is worth more than who watches it: a sink that fails is given up with a warning, and the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        settings: ReportSettings | None = None,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[Sink] = (),
    ):
        """`config` is what Weights & Biases shows as the run's configuration, if the settings ask for it; `sinks` get
        what is written too."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._sinks = list(sinks)
        if settings is not None and settings.wandb.mode != "off":
            self._sinks.append(WandbSink(folder, settings.wandb, config, sum(1 for _ in metric_rows(path))))
        self._file = open_to_append(path)

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Note the numbers of one step of a stage; names are `room/quantity`. What is not finite is kept as null."""
        values = {name: float(value) for name, value in numbers.items()}
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._tell(lambda sink: sink.write(stage, step, values))

    def evaluated(self, label: str, metrics: Mapping[str, Any]) -> None:
        """Tell the sinks what an evaluated checkpoint is worth (the file is the summary's, not this one's); of an
        interval they get `name`, `name_low` and `name_high`, of other groups of numbers `name/part`."""
        flat: dict[str, float] = {}
        for name, value in metrics.items():
            if isinstance(value, Mapping) and "mean" in value:
                flat |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            elif isinstance(value, Mapping):
                flat |= {f"{name}/{part}": float(number) for part, number in value.items()}
            else:
                flat[name] = float(value)
        self._tell(lambda sink: sink.evaluated(label, flat))

    def close(self, failed: bool = False) -> None:
        """End the file and tell the sinks that the run has ended, and whether it failed."""
        self._file.close()
        self._tell(lambda sink: sink.close(failed))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                what(sink)
            except Exception:
                self._sinks.remove(sink)
                log.warning("%s failed; the run goes on without it", type(sink).__name__, exc_info=True)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def metric_rows(path: Path) -> Iterator[Row]:
    """The file's rows as they were written, one at a time; lines that a kill has torn are left out, and so are rows
    without a stage and a step."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
                yield row


def read_metrics(path: Path) -> list[Row]:
    """The rows that count, in order; lines that a kill has torn are left out, and so is what was done over.

    A stage that was resumed or run again repeats steps: a row whose step lies before that of earlier rows of its stage
    replaces all of those from that step on. A null is read as NaN.
    """
    rows: list[Row] = []
    furthest: dict[str, int] = {}
    for row in metric_rows(path):
        stage, step = row["stage"], row["step"]
        if step < furthest.get(stage, step):
            rows = [r for r in rows if r["stage"] != stage or r["step"] < step]
        furthest[stage] = step
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows
