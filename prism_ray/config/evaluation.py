"""Settings of the evaluation of one checkpoint on corpora of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prism_ray.config.corpora import SourceSettings
from prism_ray.config.run import RunSettings


class EvaluationSettings(RunSettings):
    """A run of `jobs/evaluate.py`.

    Every setting of a run is allowed, so that its own `config.yaml` says how its checkpoints are evaluated: `rollout`,
    `verify`, `evaluate`, `corpora`, `seed` and `cluster` are used, and the rest is left alone.
    """

    checkpoint: Path
    """Hugging Face folder of the policy to evaluate; any stage's, or one from elsewhere."""
    prompts: list[Path | SourceSettings] = []
    """Corpora with verifiable prompts. Unset: `data.evaluate`."""
    output: Path = Path("runs/evaluation")
    """Folder for what comes of it; the same folder again goes on where the evaluation ended."""
    n: int = Field(default=1, ge=1)
    """Sampled responses of each prompt, beside the greedy one. More of them narrow the interval and give pass@k."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many rows, drawn from all files. Unset: all. Raise it to go on."""
    by: Literal["truth", "verifier"] = "truth"
    """What says whether a response is right: the function `evaluate.truth`, or the environment `verify.environment`,
    which also plays episodes of `verify.max_turns`."""
    batch: int = Field(default=64, ge=1)
    """Prompts that are sampled together and noted together: what a killed job does again is one batch."""
