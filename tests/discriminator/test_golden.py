"""The discriminator's loss against golden vectors: values and gradients of the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prism_ray.discriminator.objective import ViewPairs, clip_head, discriminator_loss, pair_losses

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
NAMES = ["prism_disc_loss", "prism_disc_loss_noclip_noreg", "prism_disc_loss_all_invalid"]


def tensors() -> dict[str, torch.Tensor]:
    names = ("student_caption", "student_cot", "teacher_caption", "teacher_cot")
    return {n: torch.tensor(GOLDEN["inputs"][n], dtype=torch.float64, requires_grad=True) for n in names}


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_equals_the_published_one_in_value_and_gradient(name):
    expected = GOLDEN["expected"][name]
    params = expected["params"]
    scores = tensors()
    clipped = {n: clip_head(s, params["score_clip"]) for n, s in scores.items()}
    views = {
        view: ViewPairs(*(clipped[f"{side}_{key}"] for _ in range(2) for side in ("teacher", "student")))
        for view, key in (("perception", "caption"), ("reasoning", "cot"))
    }
    loss = discriminator_loss(views, torch.tensor(params["valid"]), params["score_reg_coef"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["value"], rel=expected["rtol"])
    for n, score in scores.items():
        wanted = torch.tensor(expected["grad_scores"][n], dtype=torch.float64)
        torch.testing.assert_close(score.grad, wanted, rtol=1e-9, atol=1e-12)


def test_the_pair_loss_equals_the_published_one():
    scores = tensors()
    expected = GOLDEN["expected"]["bt_pair_loss_caption"]
    loss = pair_losses(scores["teacher_caption"], scores["student_caption"]).mean()
    assert loss.item() == pytest.approx(expected["value"], rel=expected["rtol"])
