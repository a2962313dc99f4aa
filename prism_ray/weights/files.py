"""Policy weights as safetensors files: in shared memory on their way to an engine, or in a checkpoint folder."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from prism_ray.models.load import HEAD, as_filed

Shapes = dict[str, tuple[int, ...]]


def shared_folder() -> Path:
    """Where files live in memory: /dev/shm, or the temporary folder on systems without it."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The weight files of a Hugging Face folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors file; give the folder of a complete checkpoint")
    return files


def shapes_in(files: Iterable[Path]) -> Shapes:
    """Name and shape of every tensor, read from the files' headers."""
    shapes: Shapes = {}
    for file in files:
        with safe_open(file, "np") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def write_shared(weights: Mapping[str, np.ndarray], shapes: Shapes, label: str) -> Path:
    """Write a learner's weights (Hugging Face parameter names) into shared memory, as a checkpoint would hold them.

    `shapes` are those of the checkpoint the engine was started from. Fails before anything is written if a tensor is
    missing, unknown or misshapen, because an engine that got only a part of its weights would go on with the rest.
    The caller removes the file.
    """
    kept = {name: as_filed(name, weight) for name, weight in weights.items() if name in shapes or name != HEAD}
    tensors = {name: np.ascontiguousarray(weight) for name, weight in kept.items()}
    check_complete({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, label)
    file = shared_folder() / f"prism_ray_{os.getpid()}_{uuid.uuid4().hex}.safetensors"
    try:
        save_file(tensors, file)
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {label} to {file.parent}: {error}; make room there") from error
        raise
    return file


def check_complete(given: Shapes, expected: Shapes, label: str) -> None:
    """Raise a sentence that names the first tensor of `label` that is missing, unknown or of the wrong shape.

    A tied output layer may be given or left out.
    """
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) == expected.get(name) or (name == HEAD and name not in given):
            continue
        wrong = "is missing" if name not in given else f"has shape {given[name]}"
        wanted = f"the engine expects {expected[name]}" if name in expected else "the engine does not know it"
        raise ValueError(f"{label}: tensor {name} {wrong}, {wanted}; give all weights of its own policy")
