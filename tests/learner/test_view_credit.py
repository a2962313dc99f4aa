"""What views the run has decides how advantages are combined and which tokens get them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prism_ray.config.objective import AdvantageSettings
from prism_ray.config.views import ViewSettings
from prism_ray.learner.advantages import Judged, credit_tokens, estimate, grpo
from prism_ray.response import locate

PIECES = [b"<caption>", b" a</caption>", b"\n", b"<think> b</think>", b"<answer>", b" c</answer>", b""]
TAGS: Any = ("caption", "think", "answer")
WHOLE = [ViewSettings(name="whole", tags=TAGS)]
THREE = [ViewSettings(name=f"{tag}_view", tags=(tag,), weight=w) for tag, w in zip(TAGS, (1.0, 2.0, 1.0), strict=True)]


def judged(views) -> Judged:
    count = 3
    scores = {v.name: torch.tensor([1.0, -2.0, 0.5]) * (i + 1) for i, v in enumerate(views)}
    zero = torch.zeros(count)
    return Judged(
        zero,
        zero.long(),
        torch.ones(count, dtype=torch.bool),
        torch.full((count,), len(PIECES)),
        scores,
        {v.name: zero for v in views},
    )


def credited(views, settings: AdvantageSettings | None = None):
    case = judged(views)
    advantages = estimate(case, settings or AdvantageSettings(), 128, views)
    spans = [locate(PIECES, views).spans] * 3
    return case, advantages, credit_tokens(advantages, spans, case.lengths_N.tolist())


def test_one_view_of_the_whole_response_gives_all_its_tokens_one_advantage():
    case, advantages, adv_NT = credited(WHOLE)
    expected_N = grpo(torch.sigmoid(case.scores["whole"] / 3), case.group_ids_N)
    torch.testing.assert_close(advantages.combined_N, expected_N)
    torch.testing.assert_close(adv_NT, expected_N[:, None].expand(-1, len(PIECES)))


def test_three_views_give_each_its_tokens_by_its_share_and_the_end_to_the_last():
    case, advantages, adv_NT = credited(THREE)
    own = [grpo(torch.sigmoid(case.scores[v.name] / 3), case.group_ids_N) for v in THREE]
    shares = (0.25, 0.5, 0.25)
    combined_N = torch.stack([share * own_N for share, own_N in zip(shares, own, strict=True)]).sum(0)
    torch.testing.assert_close(advantages.combined_N, combined_N)
    seen, thought, said = (3 * share * own_N for share, own_N in zip(shares, own, strict=True))
    expected_NT = torch.stack([seen, seen, combined_N, thought, said, said, said], dim=1)
    torch.testing.assert_close(adv_NT, expected_NT)


@pytest.mark.parametrize("estimator", ["prism_paper", "prism_code", "bounded_views"])
def test_the_weight_reaches_the_advantage_of_every_estimator(estimator):
    settings = AdvantageSettings(estimator=estimator, credit="all_tokens")
    heavier = [THREE[0].model_copy(update={"weight": 9.0}), *THREE[1:]]
    scores = dict(judged(THREE).scores) | {"caption_view": torch.tensor([-1.0, 1.0, 3.0])}
    case = replace(judged(THREE), scores=scores)
    one, other = (estimate(case, settings, 128, views).combined_N for views in (THREE, heavier))
    assert (one - other).abs().min() > 1e-2


def test_what_no_view_judges_gets_the_combined_advantage_between_views_and_the_last_ones_after_them():
    _, advantages, adv_NT = credited([THREE[0], THREE[2]])
    torch.testing.assert_close(adv_NT[:, 3], advantages.combined_N)
    _, advantages, adv_NT = credited(THREE[:2])
    torch.testing.assert_close(adv_NT[:, 4:], advantages.views["think_view"][:, None].expand(-1, 3))
