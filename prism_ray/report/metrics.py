"""A run's numbers: one JSON object a line in metrics.jsonl, and Weights & Biases if wanted."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from prism_ray.config.report import ReportSettings, WandbSettings

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


class MetricsLog:
    """Appends to `folder/metrics.jsonl`; each line is complete on disk when `write` returns."""

    def __init__(self, folder: Path, settings: ReportSettings | None = None, config: Mapping[str, Any] | None = None):
        """`config` is what Weights & Biases shows as the run's configuration; the run is named like the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._file = open_to_append(path)
        self._stages: set[str] = set()  # each has an axis of its own in Weights & Biases
        self._wandb = (
            _start_wandb(folder, settings.wandb, config) if settings and settings.wandb.mode != "off" else None
        )

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Note the numbers of one step of a stage; names are `room/quantity`. What is not finite is kept as null."""
        values = {name: float(value) for name, value in numbers.items()}
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            if stage not in self._stages:
                self._stages.add(stage)
                self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._wandb.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """End the file and the Weights & Biases run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_wandb(folder: Path, settings: WandbSettings, config: Mapping[str, Any] | None) -> Any:
    import wandb  # here, because a run without it should not pay for the import

    mode = "online" if settings.mode == "online" else "offline"
    return wandb.init(project=settings.project, name=folder.name, dir=folder, mode=mode, config=dict(config or {}))


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
