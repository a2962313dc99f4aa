"""Settings of the corpora room: how prompts and references are read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from prism_ray.config.base import Settings

Format = Literal["parquet", "jsonl", "json"]
FIELDS = (
    "id", "data_source", "prompt", "question", "conversations", "system", "image", "images", "answer", "reward_model",
    "extra_info", "teacher_caption", "teacher_cot", "teacher_response", "student_caption", "student_cot",
)  # fmt: skip
"""What a row may say, by the names that a corpus's own columns are mapped to."""


class SourceSettings(Settings):
    """A corpus whose files do not speak for themselves: its format, the names of its columns, where its images lie."""

    path: Path
    """File, folder, or glob pattern."""
    format: Format | None = None
    """How the files are written: `parquet`, `jsonl` (an object a line) or `json` (an array of objects). Unset: by their
    ending, `.parquet`, `.jsonl` or `.json`."""
    columns: dict[str, str] = {}
    """The file's name for what a row says, where it is another than ours, for instance `{question: problem, answer:
    solution.final}` (a dot goes into an object). Names of ours: `prompt` (chat list) or `question` (text) or
    `conversations` (ShareGPT), `system`, `image` or `images`, `answer`, `teacher_response` and so on."""
    images: Path | None = None
    """Folder that relative image paths start in, and that no image may lie outside of. Unset: the file's own folder."""
    system: str = ""
    """System turn of the prompts that have none: a judge should see the prompts that the policy is given."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(columns) - set(FIELDS)):
            raise ValueError(f"{', '.join(unknown)} is nothing that a row says; name some of {', '.join(FIELDS)}")
        return columns


class CorporaSettings(Settings):
    """Reading corpora with Ray Data."""

    max_bad_share: float = Field(default=0.02, ge=0, le=1)
    """Share of a corpus's rows that may be unusable (quarantined) before the run stops: a few damaged rows are normal,
    many mean that the wrong files or columns are being read."""
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    """Pixels of an image above which its row is quarantined: a decompression bomb must not take a worker down."""
    data_sources: list[str] = []
    """Accepted values of `data_source`; a row of another is quarantined, so that no verifier meets a kind of problem it
    was not meant for. Empty: any."""
    max_json_mb: float = Field(default=256.0, gt=0)
    """Largest `.json` array that is read. Where its rows lie is only known once the whole file was gone through (some
    seconds for so much); JSON Lines and Parquet need no such pass."""
    max_row_group_mb: float = Field(default=2048.0, gt=0)
    """Largest row group of a Parquet file, uncompressed. A reading worker holds one as a whole, and some writers
    (pandas is one) put up to a million rows with their images into one. A file with a larger one is refused with the
    command that writes smaller ones."""
    look_ahead: int = Field(default=64, ge=1)
    """Prompts read ahead of the loop and held in the object store; a few optimiser steps' worth hides the reading."""
    readers: int = Field(default=1, ge=1)
    """Ray Data tasks of one stream that run at once. One keeps up with the testbed; full-size images want several."""
    reader_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray books for a reading task. Small, so that reading never waits for a CPU that an actor holds."""
    rows_per_task: int = Field(default=1024, ge=1)
    """Rows that one reading task works through at most; long enough to hide the cost of starting it."""
    task_mb: float = Field(default=64.0, gt=0)
    """Prepared rows that one reading task makes, in MB, by the size of those before them. At most two tasks' times
    `readers` are held; with full-size images this bounds memory, and not `rows_per_task`."""
    block_mb: float = Field(default=4.0, gt=0)
    """Size of the blocks in which a reading task hands over its rows: small, so that the first come early."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for the next prompts before the run fails and says what it waited for. A run that goes on first
    reads the ids of all rows before; of JSON with images inside that may take minutes."""


def paths_of(sources: Sequence[Path | SourceSettings]) -> list[Path]:
    """Where corpora lie, and the folders of their images that are named."""
    found: list[Path] = []
    for source in sources:
        found.append(source.path if isinstance(source, SourceSettings) else source)
        if isinstance(source, SourceSettings) and source.images is not None:
            found.append(source.images)
    return found
