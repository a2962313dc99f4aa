import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from prism_ray.weights import files

EXPERT = "model.layers.0.mlp.experts.gate_up_proj"
WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
SHAPES = {"a": (2, 3), "b": (4,)}


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "shared_folder", lambda: tmp_path)
    return tmp_path


def written(weights, shapes=SHAPES):
    """What an engine finds in the file, and the shapes in its header."""
    with files.SharedFile() as shared:
        shared.write(weights, shapes, "w")
        return load_file(shared.path), files.shapes_in([shared.path])


def test_weights_come_back_as_they_went_and_nothing_stays(memory):
    back, shapes = written(WEIGHTS)
    assert shapes == SHAPES and all((back[name] == WEIGHTS[name]).all() for name in WEIGHTS)
    assert not list(memory.iterdir())


def test_read_only_views_that_are_not_contiguous_are_written():
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    weight.flags.writeable = False
    assert (written(WEIGHTS | {"a": weight.T})[0]["a"] == weight.T).all()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(memory):
    program = f"""
import os, pathlib, signal
from prism_ray.weights import files
files.shared_folder = lambda: pathlib.Path({str(memory)!r})
shared = files.SharedFile().__enter__()
(shared.path.parent / ".half-written").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], timeout=120)
    assert len(list(memory.iterdir())) == 2
    other = memory / "sem.of_another_program"
    other.touch()
    with files.SharedFile() as shared:
        shared.write(WEIGHTS, SHAPES, "w")
        files.remove_orphans()
        assert shared.path.exists() and len(list(memory.iterdir())) == 3
    files.remove_orphans()
    assert list(memory.iterdir()) == [other]


@pytest.mark.parametrize(
    "weights, sentence",
    [
        ({"a": WEIGHTS["a"]}, "w: tensor b is missing"),
        (WEIGHTS | {"b": np.ones(5)}, r"w: tensor b has shape \(5,\), the engine expects \(4,\)"),
        (WEIGHTS | {"c": np.ones(1)}, r"w: tensor c has shape \(1,\), the engine does not know it"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(memory, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        written(weights)
    assert not list(memory.iterdir())


def test_a_tied_output_layer_may_be_given_or_left_out():
    head = {"lm_head.weight": np.ones((2, 3), np.float32)}
    assert written(WEIGHTS | head)[1] == SHAPES
    untied = SHAPES | {"lm_head.weight": (2, 3)}
    assert written(WEIGHTS | head, untied)[1] == untied


def test_experts_are_transposed_as_checkpoints_hold_them():
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert (written({EXPERT: weight}, {EXPERT: (2, 4, 3)})[0][EXPERT] == weight.transpose(0, 2, 1)).all()


def test_a_full_memory_says_where(memory, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=f"cannot write w to {memory}.*make room"):
        written(WEIGHTS)
    assert not list(memory.iterdir())


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no "):
        files.checkpoint_files(tmp_path)
