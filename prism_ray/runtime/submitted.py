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


def home() -> Path:
    """The folder that relative paths of submitted jobs are in: `$PRISM_RAY_HOME`, or `~/prism_ray` without it."""
    return Path(os.environ.get(HOME) or Path.home() / "prism_ray")


def kept(path: Path) -> Path:
    """Where a job writes that is told to write to `path`. A submitted job works in a copy of what was submitted, which
    Ray deletes afterwards: there a relative path is at home."""
    return home() / path if is_submitted() else path


def found(path: Path) -> Path:
    """Where a job reads that is told to read `path`: in a submitted one at home, unless it came along."""
    return home() / path if is_submitted() and not path.exists() else path


def at_home(settings: S, output: str | None) -> S:
    """The settings with paths as they hold for a submitted job; elsewhere as they are.

    That of the field `output` (None: there is none) is where the job writes, all others where it reads.
    """
    if not is_submitted():
        return settings
    moved = _moved(settings)
    return moved.model_copy(update={output: kept(getattr(settings, output))} if output else {})


def _moved(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.model_copy(update={name: _moved(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, list):
        return [_moved(item) for item in value]
    return found(value) if isinstance(value, Path) else value


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
