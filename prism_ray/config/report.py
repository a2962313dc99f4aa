"""Settings of the report room: where a run's numbers go besides its own folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism_ray.config.base import Settings


class WandbSettings(Settings):
    """Weights & Biases; metrics.jsonl is written either way."""

    mode: Literal["off", "online", "offline"] = "off"
    """`off` writes nothing and needs no account; `offline` writes into the run's folder, to be sent later with
    `wandb sync`."""
    project: str = Field(default="prism_ray", min_length=1)
    """Project the run appears in, under the name of its folder."""


class ReportSettings(Settings):
    """What a run tells while it goes on and afterwards."""

    wandb: WandbSettings = WandbSettings()
    """Weights & Biases, off unless asked for."""
