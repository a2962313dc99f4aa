"""Which stages a run needs, in what order, and which of them are up to date.

A stage's outputs are keyed by what they depend on: its own settings and the keys of the stages it reads from. A stage
whose key is unchanged and whose outputs are there is not run again; a changed setting re-runs that stage and those
after it, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_DONE = "done.json"


@dataclass(frozen=True)
class Outcome:
    """What a completed stage reports: its updates, and its checkpoint folder if it has one."""

    updates: int
    checkpoint: Path | None


@dataclass(frozen=True)
class Stage:
    """One stage: `needs` names the stages it reads from, `depends` every setting its outputs depend on."""

    name: str
    needs: tuple[str, ...]
    depends: Mapping[str, Any]
    run: Callable[[], Awaitable[Outcome]]


def plan(stages: Mapping[str, Stage], wanted: Iterable[str]) -> list[Stage]:
    """The wanted stages and all they need, in the order of `stages` (which lists each after its needs)."""
    required: set[str] = set()

    def require(name: str) -> None:
        if name not in required:
            required.add(name)
            for need in stages[name].needs:
                require(need)

    for name in wanted:
        require(name)
    return [stage for name, stage in stages.items() if name in required]


def key_of(stage: Stage, keys: Mapping[str, str]) -> str:
    """Digest of the stage's settings and of the keys of what it reads from."""
    content = {"name": stage.name, "settings": _plain(stage.depends), "needs": [keys[n] for n in stage.needs]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def prepare(folder: Path, key: str, journal: Path | None = None) -> bool:
    """Whether the stage's folder holds finished outputs of this key.

    Outputs of another key, finished or not, are removed, and the stage's `journal` with them: they belong to other
    settings. So are those whose checkpoint somebody has removed. Unfinished ones of this key stay, for the stage to
    resume.
    """
    done = _read(folder / _DONE)
    if done and done["key"] == key and (done["checkpoint"] is None or Path(done["checkpoint"]).exists()):
        return True
    started = _read(folder / "key.json")
    if not started or started["key"] != key or done:
        for old in (folder, journal):
            if old is not None and old.exists():
                shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_text(json.dumps({"key": key}))
    return False


def finish(folder: Path, key: str, outcome: Outcome, seconds: float) -> None:
    """Mark the stage's outputs as complete."""
    checkpoint = str(outcome.checkpoint) if outcome.checkpoint else None
    done = {"key": key, "updates": outcome.updates, "seconds": seconds, "checkpoint": checkpoint}
    temporary = folder / (_DONE + ".new")
    temporary.write_text(json.dumps(done))
    temporary.replace(folder / _DONE)


def finished(folder: Path) -> dict[str, Any] | None:
    """What `finish` wrote: key, updates, seconds, checkpoint; None if the stage is not complete."""
    return _read(folder / _DONE)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _plain(value: Any) -> Any:
    """Settings as JSON data."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
