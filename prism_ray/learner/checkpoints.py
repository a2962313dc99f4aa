"""What a checkpoint holds besides DeepSpeed's own files: who wrote it, and where each rank's random numbers were."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_WRITER = "writer.json"


@dataclass(frozen=True)
class Writer:
    """The layout of the engine that wrote a checkpoint; DeepSpeed reads its files back into the same one only."""

    ranks: int
    zero_stage: int


def write_state(folder: Path, rank: int, writer: Writer) -> None:
    """Add to the checkpoint in `folder` what this rank knows; every rank calls it."""
    folder.mkdir(parents=True, exist_ok=True)  # a rank may have a folder of its own, to be merged later
    torch.save(random_state(), folder / _random_file(rank))
    if rank == 0:
        (folder / _WRITER).write_text(json.dumps(asdict(writer)))


def read_writer(folder: Path) -> Writer:
    """Who wrote the checkpoint in `folder`. Raises FileNotFoundError where there is none, or it is incomplete."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no checkpoint {folder.name}; name one that was saved there")
    if not (folder / _WRITER).is_file():
        raise FileNotFoundError(f"{folder / _WRITER} is missing: the checkpoint is incomplete; name another one")
    return Writer(**json.loads((folder / _WRITER).read_text()))


def restore_random_state(folder: Path, rank: int) -> None:
    """Go on with the random numbers where this rank was when it wrote the checkpoint."""
    set_random_state(torch.load(folder / _random_file(rank), weights_only=False))


def random_state() -> dict[str, Any]:
    """Where the generators of Python, numpy and torch (on the CPU and on this process's GPU) are."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them; a GPU's only where there was and is one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _random_file(rank: int) -> str:
    return f"random_{rank}.pt"
