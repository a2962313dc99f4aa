"""A run at Weights & Biases: one run there for all stages and all starts of a run of ours."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_ray.config.report import WandbSettings

log = logging.getLogger(__name__)


class WandbError(ValueError):
    """Weights & Biases is asked for and cannot be had."""


class WandbSink:
    """Sends a run's numbers to Weights & Biases; `prism_ray.report.metrics.Sink`."""

    def __init__(self, folder: Path, settings: WandbSettings, config: Mapping[str, Any] | None, rows: int):
        """Begin the run there, or go on with it: its id lies in the run's folder, so that a folder that was removed and
        made anew is another run. It is named like the folder and shows `config` as its configuration.

        `rows` lines of metrics were written by earlier starts: what follows is counted on from there, because Weights &
        Biases drops (and `wandb sync` overwrites) what comes under a number that it has. Raises WandbError.
        """
        import wandb  # here, because a run without it should not pay for the import
        from wandb.errors import Error

        self._rows = rows
        self._stages: set[str] = set()  # each has an axis of its own
        try:
            self._run = wandb.init(
                project=settings.project, name=folder.name, dir=folder, mode=_mode(settings),
                id=_run_id(folder), resume="allow", config=dict(config or {}),
                # Its own lines, and its capture of ours, would tear the live panel.
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Error as error:
            raise WandbError(
                f"report.wandb.mode is {settings.mode}, but: {_sentence(error)}; log in (`wandb login`, or "
                "WANDB_API_KEY), or write offline and send it later with report.wandb.mode=offline"
            ) from error
        log.info("Weights & Biases: %s", self._run.url or self._run.dir)

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step of a stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._rows += 1
        self._run.log(
            {f"{stage}/{name}": value for name, value in numbers.items()} | {f"{stage}/step": step}, step=self._rows
        )

    def evaluated(self, label: str, numbers: Mapping[str, float]) -> None:
        """What a checkpoint is worth, for the run's summary."""
        self._run.summary.update({f"evaluate/{label}/{name}": value for name, value in numbers.items()})

    def close(self, failed: bool) -> None:
        """End the run there, as finished or failed; waits until what was written is sent."""
        self._run.finish(exit_code=int(failed))


def _mode(settings: WandbSettings) -> Any:
    return "online" if settings.mode == "online" else "offline"


def _run_id(folder: Path) -> str:
    path = folder / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
