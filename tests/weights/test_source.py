"""The trainer's weights as vLLM's trainer-side engines read them."""

import pytest
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import ParamMeta

from prism_ray.weights.files import checkpoint_files, shapes_in
from prism_ray.weights.source import TrainerWeights

EXPERT = "model.layers.0.mlp.experts.gate_up_proj"
SHAPES = {"a": (2, 3), EXPERT: (2, 4, 3), "b": (4,)}


class Whole:
    """A trainer that holds its weights whole, and lends all of them from one buffer, as ZeRO-3 may."""

    def __init__(self, **changes):
        self.weights = {"a": torch.arange(6.0).view(2, 3), EXPERT: torch.arange(24.0).view(2, 3, 4)}
        self.weights |= {"b": torch.full((4,), 0.1)}
        self.declared = {name: (tuple(w.shape), w.dtype) for name, w in self.weights.items()}
        self.weights |= changes
        self.passes = 0

    def weight_shapes(self):
        return self.declared

    def stream_weights(self):
        self.passes += 1
        buffer = torch.zeros(24)
        for name, weight in self.weights.items():
            lent = buffer.to(weight.dtype) if weight.dtype != buffer.dtype else buffer
            lent = lent[: weight.numel()].view(weight.shape)
            yield name, lent.copy_(weight)


def test_metadata_tells_what_iteration_yields_without_iterating():
    trainer = Whole()
    source = TrainerWeights(trainer, SHAPES)
    metadata = source.metadata()
    assert not trainer.passes
    assert metadata == [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert [m.name for m in metadata] == list(SHAPES) and {m.name: m.shape for m in metadata} == SHAPES


def test_tensors_outlive_the_iteration_and_experts_are_transposed():
    trainer = Whole()
    sent = dict(TrainerWeights(trainer, SHAPES))
    expected = trainer.weights | {EXPERT: trainer.weights[EXPERT].transpose(1, 2)}
    for name, tensor in sent.items():
        assert torch.equal(tensor, expected[name]) and tensor.is_contiguous()


def test_every_iteration_is_a_fresh_one():
    trainer = Whole()
    source = TrainerWeights(trainer, SHAPES)
    dict(source)
    trainer.weights["b"] += 1
    assert torch.equal(dict(source)["b"], trainer.weights["b"]) and trainer.passes == 2


def test_another_type_on_the_wire_is_declared_and_kept():
    source = TrainerWeights(Whole(), SHAPES, torch.bfloat16)
    assert {m.dtype for m in source.metadata()} == {torch.bfloat16}
    assert torch.equal(dict(source)["b"], torch.full((4,), 0.1).bfloat16())


def test_a_tied_output_layer_is_left_out_and_another_is_sent():
    trainer = Whole()
    trainer.weights["lm_head.weight"] = torch.ones(4, 3)
    trainer.declared["lm_head.weight"] = ((4, 3), torch.float32)
    assert [name for name, _ in TrainerWeights(trainer, SHAPES)] == list(SHAPES)
    untied = TrainerWeights(trainer, SHAPES | {"lm_head.weight": (4, 3)})
    assert [m.name for m in untied.metadata()] == [name for name, _ in untied] == [*SHAPES, "lm_head.weight"]


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        (SHAPES | {"c": (1,)}, "tensor c is missing, the engine expects"),
        (SHAPES | {"b": (5,)}, r"tensor b has shape \(4,\), the engine expects \(5,\)"),
        ({"a": (2, 3), EXPERT: (2, 4, 3)}, r"tensor b has shape \(4,\), the engine does not know it"),
        (SHAPES | {EXPERT: (2, 3, 4)}, r"gate_up_proj has shape \(2, 4, 3\), the engine expects \(2, 3, 4\)"),
    ],
)
def test_weights_that_do_not_fit_the_engine_are_refused_before_any_rank_iterates(expected, sentence):
    trainer = Whole()
    with pytest.raises(ValueError, match=f"^weights of the trainer: .*{sentence}"):
        TrainerWeights(trainer, expected)
    assert not trainer.passes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"b": torch.ones(5)}, r"tensor b \[5\] torch.float32 came where tensor b \[4\] torch.float32 was declared"),
        ({"b": torch.ones(4).half()}, r"tensor b \[4\] torch.float16 came where tensor b \[4\] torch.float32 was"),
        ({"c": torch.ones(1)}, r"tensor c \[1\] torch.float32 came where no tensor was declared"),
        ({"b": None}, r"no tensor came where tensor b \[4\] torch.float32 was declared"),
        ({"a": None}, r"experts.gate_up_proj \[2, 3, 4\] torch.float32 came where tensor a \[2, 3\]"),
    ],
)
def test_a_stream_that_is_not_what_was_declared_is_an_error_that_names_the_tensor(changes, sentence):
    trainer = Whole(**changes)
    trainer.weights = {name: weight for name, weight in trainer.weights.items() if weight is not None}
    with pytest.raises(ValueError, match=sentence):
        list(TrainerWeights(trainer, SHAPES))


def test_two_ranks_under_zero_3_send_what_they_declared(seen, policies):
    """The sender's stream passed vLLM's own checks while the other rank iterated as vLLM's engine makes it do."""
    assert not seen["whole"], "nothing was divided among the ranks, so nothing had to be gathered"
    assert seen["declared"] == seen["yielded"]
    names = [name for name, _, _ in seen["declared"]]
    assert names == list(seen["weights"]) and "lm_head.weight" not in names
    changed = [name for name in names if not torch.equal(seen["weights"][name], seen["before"][name])]
    assert any(".mlp." in name for name in changed), "the step changed nothing"


def test_layers_come_one_after_the_other(seen):
    layers = [name.split(".layers.")[1].split(".")[0] for name, _, _ in seen["declared"] if ".layers." in name]
    assert layers == sorted(layers) and set(layers) == {"0", "1"}


def test_what_was_sent_is_the_policy_before_and_after_a_step(place, seen):
    sent, wire = (load_file(place / folder / "model.safetensors") for folder in ("source", "wire"))
    for tensors, weights in ((seen["first"], seen["before"]), (sent, seen["weights"])):
        assert tensors.keys() == weights.keys()
        for name, weight in weights.items():
            expected = weight.transpose(1, 2) if ".experts." in name else weight
            assert torch.equal(tensors[name], expected) and tensors[name].dtype == weight.dtype
    assert all(torch.equal(wire[name], tensor.bfloat16()) for name, tensor in sent.items())
    assert shapes_in(checkpoint_files(place / "source")) == shapes_in(checkpoint_files(place / "export"))
