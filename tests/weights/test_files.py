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


def test_weights_come_back_as_they_went(memory):
    file = files.write_shared(WEIGHTS, SHAPES, "weights")
    assert file.parent == memory
    assert files.shapes_in([file]) == SHAPES
    back = load_file(file)
    assert all((back[name] == WEIGHTS[name]).all() for name in WEIGHTS)


def test_read_only_views_that_are_not_contiguous_are_written(memory):
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    weight.flags.writeable = False
    file = files.write_shared(WEIGHTS | {"a": weight.T}, SHAPES, "weights")
    assert (load_file(file)["a"] == weight.T).all()


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
        files.write_shared(weights, SHAPES, "w")
    assert not list(memory.iterdir())


def test_a_tied_output_layer_may_be_given_or_left_out():
    head = {"lm_head.weight": np.ones((2, 3), np.float32)}
    assert files.shapes_in([files.write_shared(WEIGHTS | head, SHAPES, "w")]) == SHAPES
    untied = SHAPES | {"lm_head.weight": (2, 3)}
    assert files.shapes_in([files.write_shared(WEIGHTS | head, untied, "w")]) == untied


def test_experts_are_transposed_as_checkpoints_hold_them():
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = files.write_shared({EXPERT: weight}, {EXPERT: (2, 4, 3)}, "w")
    assert (load_file(file)[EXPERT] == weight.transpose(0, 2, 1)).all()


def test_a_full_memory_says_where(memory, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=f"cannot write w to {memory}.*make room"):
        files.write_shared(WEIGHTS, SHAPES, "w")
    assert not list(memory.iterdir())


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no "):
        files.checkpoint_files(tmp_path)
