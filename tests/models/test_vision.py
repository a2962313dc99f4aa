"""The batched vision tower equals Hugging Face's, gradients included; the pre-training probe learns from it."""

import pytest
import torch

from prism_ray.config.models import TinyModelSettings
from prism_ray.models.pretrain import CellProbe
from prism_ray.models.tiny import build_model, build_tokenizer
from prism_ray.models.vision import encode_images


@pytest.fixture
def visual():
    return build_model(build_tokenizer(["red"]), TinyModelSettings(), seed=0).model.visual


def patches(grid: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 1536, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "grids",
    [
        [[1, 4, 6]],
        [[1, 4, 6]] * 3,
        [[1, 2, 2]] * 2,
        [[1, 4, 6], [1, 6, 4]],
        [[1, 4, 6], [1, 2, 2], [1, 4, 6]],
        [[2, 4, 4], [2, 4, 4]],
    ],
)
def test_it_equals_hugging_face(visual, grids: list[list[int]]):
    grid = torch.tensor(grids)
    pixels = patches(grid)
    merged, deepstack = encode_images(visual, pixels, grid)
    expected = visual(pixels, grid_thw=grid)
    torch.testing.assert_close(merged, expected.pooler_output, atol=1e-5, rtol=0)
    assert len(deepstack) == len(expected.deepstack_features) == 1
    torch.testing.assert_close(deepstack[0], expected.deepstack_features[0], atol=1e-5, rtol=0)


def test_its_gradients_equal_hugging_faces(visual):
    grid = torch.tensor([[1, 4, 6]] * 3)
    pixels = patches(grid)
    merged, deepstack = encode_images(visual, pixels, grid)
    (merged.square().sum() + deepstack[0].square().sum()).backward()
    ours = {name: p.grad.clone() for name, p in visual.named_parameters()}
    visual.zero_grad()
    output = visual(pixels, grid_thw=grid)
    (output.pooler_output.square().sum() + output.deepstack_features[0].square().sum()).backward()
    for name, parameter in visual.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_an_image_does_not_see_its_neighbours(visual):
    grid = torch.tensor([[1, 4, 6]] * 2)
    pixels = patches(grid)
    changed = pixels.clone()
    changed[24:] = 0
    first, _ = encode_images(visual, pixels, grid)
    second, _ = encode_images(visual, changed, grid)
    torch.testing.assert_close(first[:6], second[:6])
    assert (first[6:] - second[6:]).abs().max() > 0.1


def test_the_probe_learns_what_the_tokens_show(visual):
    torch.manual_seed(0)
    probe = CellProbe(96, levels=1, classes=(3, 9))
    grid = torch.tensor([[1, 4, 6]] * 4)
    pixels = patches(grid)
    labels = torch.stack((torch.randint(3, (24,)), torch.randint(9, (24,))), dim=1)
    optimiser = torch.optim.AdamW([*visual.parameters(), *probe.parameters()], lr=3e-3)
    first, before = probe(visual, pixels, grid, labels)
    for _ in range(30):
        optimiser.zero_grad()
        loss, accuracy = probe(visual, pixels, grid, labels)
        loss.backward()
        optimiser.step()
    assert before < 0.5 < 0.99 < accuracy
    assert loss < first / 10


def test_the_probe_counts_a_token_only_if_all_its_labels_are_right(visual):
    probe = CellProbe(96, levels=1, classes=(2, 2))
    grid = torch.tensor([[1, 4, 6]] * 2)
    with torch.no_grad():
        for head in probe.heads:
            head.weight.zero_()
            head.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    labels = torch.zeros(12, 2, dtype=torch.long)
    labels[:6, 1] = 1
    labels[3:9, 0] = 1
    _, accuracy = probe(visual, patches(grid), grid, labels)
    assert float(accuracy) == pytest.approx(3 / 12)
