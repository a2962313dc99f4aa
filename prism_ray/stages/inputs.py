"""The corpora of a run: the user's own, and the testbed's where there are none."""

from __future__ import annotations

import json
from pathlib import Path

from prism_ray.config.run import RunSettings
from prism_ray.corpora.files import Source
from prism_ray.testbed.corpora import write_corpora

_OPTIONAL = {"warmup"}
"""Corpora that a run can do without; the testbed makes none."""
COLUMNS_OF = {
    "sft": ("prompt", "teacher_response"),
    "align": ("prompt", "teacher_response"),
    "warmup": ("prompt", "teacher_response", "student_cot"),
    "rlvr": ("prompt",),
    "evaluate": ("prompt", "reward_model"),
}
"""What a corpus of the user's own must have, by what it is for; of RLVR also what its judge needs (`columns_for`)."""


def corpora_of(settings: RunSettings) -> dict[str, list[Source]]:
    """The user's corpora, and the testbed's where there are none."""
    own: dict[str, list[Source]] = {name: paths for name, paths in settings.data if paths}
    if set(own) >= set(COLUMNS_OF) - _OPTIONAL and settings.policy is not None:
        return own
    made: dict[str, list[Source]] = {name: [path] for name, path in _testbed_corpora(settings).items()}
    return made | own


def _testbed_corpora(settings: RunSettings) -> dict[str, Path]:
    """The testbed's corpora, written only where they are not there: a resumed stage knows its files by their time."""
    folder = (settings.runs / settings.name).resolve() / "corpora"
    stamp = folder / "made.json"
    wanted = {"testbed": settings.testbed.model_dump(mode="json"), "seed": settings.seed}
    if stamp.exists() and (made := json.loads(stamp.read_text()))["settings"] == wanted:
        return {name: Path(path) for name, path in made["files"].items()}
    stamp.unlink(missing_ok=True)
    files = write_corpora(folder, settings.testbed, settings.seed)
    stamp.write_text(json.dumps({"settings": wanted, "files": {name: str(path) for name, path in files.items()}}))
    return files
