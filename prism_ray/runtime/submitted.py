"""What is different inside `ray job submit`: a temporary working directory, a shorter grace, an environment given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from prism_ray.config.base import Settings

S = TypeVar("S", bound=Settings)

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the command of a submitted job, and for nothing else: what the job was submitted with."""
HOME = "PRISM_RAY_HOME"
"""The folder, on a file system that all nodes share, in which the relative paths of submitted jobs are."""
STOP_WAIT, RAYS_STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", 3.0
"""How long `ray job stop` waits between SIGTERM and SIGKILL: the variable, and what Ray takes where it is not set."""


def is_submitted() -> bool:
    """Whether this process was started by `ray job submit` (or a RayJob)."""
    return JOB_CONFIG in os.environ


def at_home(settings: S, output: str) -> S:
    """The settings with paths as they hold for a submitted job; elsewhere as they are.

    Such a job works in a copy of what was submitted, which Ray deletes afterwards. A relative path is therefore taken
    to be in `$PRISM_RAY_HOME` (or in `~/prism_ray` where that is not set): that of the field `output` always, others
    where what was submitted does not have them.
    """
    if not is_submitted():
        return settings
    home = Path(os.environ.get(HOME) or Path.home() / "prism_ray")
    moved = _moved(settings, home)
    return moved.model_copy(update={output: home / getattr(settings, output)})


def _moved(value: Any, home: Path) -> Any:
    if isinstance(value, Settings):
        return value.model_copy(update={name: _moved(getattr(value, name), home) for name in type(value).model_fields})
    if isinstance(value, list):
        return [_moved(item, home) for item in value]
    if isinstance(value, Path) and not value.exists():
        return home / value
    return value


def given_environment() -> Mapping[str, str]:
    """Environment variables that the job was submitted with; Ray refuses to have them set twice."""
    runtime_env = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    return runtime_env.get("env_vars") or {}


def short_grace(stop_grace_s: float) -> str | None:
    """A sentence if `ray job stop` kills this job before the `stop_grace_s` seconds in which it may save its state."""
    granted = float(os.environ.get(STOP_WAIT) or RAYS_STOP_WAIT_S)
    if not is_submitted() or granted >= stop_grace_s:
        return None
    return (
        f"`ray job stop` kills this job {granted:g} s after it asks it to stop, but cluster.stop_grace_s grants "
        f"{stop_grace_s:g} s to save the state: a stopped job may go on from an older checkpoint. Submit with "
        f"--runtime-env configs/job.yaml, or start the cluster with {STOP_WAIT} in its environment"
    )
