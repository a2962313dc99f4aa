"""Settings of the corpora room: how prompts and references are read and checked."""

from __future__ import annotations

from pydantic import Field

from prism_ray.config.base import Settings


class CorporaSettings(Settings):
    """Reading a corpus of Parquet files with Ray Data."""

    max_bad_share: float = Field(default=0.02, ge=0, le=1)
    """Share of a corpus's rows that may be unusable (quarantined) before the run stops: a few damaged rows are normal,
    many mean that the wrong files or columns are being read."""
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    """Pixels of an image above which its row is quarantined: a decompression bomb must not take a worker down."""
    look_ahead: int = Field(default=64, ge=1)
    """Prompts read ahead of the loop and held in the object store; a few optimiser steps' worth hides the reading."""
    readers: int = Field(default=1, ge=1)
    """Ray Data tasks of one stream that run at once. One keeps up with the testbed; full-size images want several."""
    reader_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray books for a reading task. Small, so that reading never waits for a CPU that an actor holds."""
    rows_per_task: int = Field(default=1024, ge=1)
    """Rows that one reading task works through, and, times `readers`, that are prepared at once: long enough to hide
    the cost of starting it, short enough that two lots of prepared rows fit the object store."""
    block_mb: float = Field(default=4.0, gt=0)
    """Size of the blocks in which a reading task hands over its rows: small, so that the first come early."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for the next prompts before the run fails and says what it waited for."""
