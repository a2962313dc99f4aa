"""Policy weights as safetensors files: in shared memory on their way to an engine, or in a checkpoint folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from prism_ray.models.load import HEAD, as_filed

Shapes = dict[str, tuple[int, ...]]
PREFIX, LOCK = "prism_ray_", ".lock"


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


class SharedFile:
    """A file in shared memory for one learner's weights (`path`), removed on leaving the context.

    `remove_orphans` removes those of processes that were killed. A lock tells whether the writer lives: the number of
    a process would not, where containers share the memory but not the numbers.
    """

    def __enter__(self) -> SharedFile:
        self._folder = shared_folder() / f"{PREFIX}{os.getpid()}_{uuid.uuid4().hex}"
        self._lock = _locked(self._folder.with_suffix(LOCK))
        self._folder.mkdir()  # of its own, because safetensors writes to a neighbour first
        self.path = self._folder / "weights.safetensors"
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._folder.with_suffix(LOCK))
        os.close(self._lock)

    def write(self, weights: Mapping[str, np.ndarray], shapes: Shapes, label: str) -> None:
        """Write weights (Hugging Face parameter names) as a checkpoint would hold them.

        `shapes` are those of the checkpoint the engine was started from. Fails before anything is written if a tensor
        is missing, unknown or misshapen, because an engine that got only a part of its weights would go on with the
        rest.
        """
        kept = {name: as_filed(name, weight) for name, weight in weights.items() if name in shapes or name != HEAD}
        tensors = {name: np.ascontiguousarray(weight) for name, weight in kept.items()}
        check_complete({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, label)
        try:
            save_file(tensors, self.path)
        except OSError as error:
            raise OSError(f"cannot write {label} to {shared_folder()}: {error}; make room there") from error


def remove_orphans() -> None:
    """Remove from shared memory what processes left there that were killed."""
    for lock in shared_folder().glob(f"{PREFIX}*{LOCK}"):
        try:
            handle = os.open(lock, os.O_RDWR)
        except OSError:  # removed meanwhile, or another user's
            continue
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
        os.close(handle)


def _remove(lock: Path) -> None:
    """Remove a writer's folder, then its lock, which must be held."""
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    """An open, locked file at `path`, which another process may have removed before the lock was there."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


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
