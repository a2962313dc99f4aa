"""Every setting changes something, and contradictions are refused with a sentence."""

import pytest
import torch
from pydantic import ValidationError

from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings, check_together
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.learner.advantages import Judged, credit_tokens, estimate
from prism_ray.learner.correction import needs_proximal_forward
from prism_ray.learner.objective import PolicyBatch, count_denominators, count_weights, policy_loss

DRAW = torch.Generator().manual_seed(0)
LOGP, PROXIMAL, BEHAVIOUR, REFERENCE = (
    -1 - torch.rand(5, 7, generator=DRAW, dtype=torch.float64) * 3 for _ in range(4)
)
ADVANTAGE = torch.randn(5, 7, generator=DRAW, dtype=torch.float64)
MASK = torch.arange(7) < torch.tensor([7, 5, 3, 6, 0])[:, None]
VERSIONS = torch.randint(0, 5, (5, 7), generator=DRAW)


def gradient(objective: dict, correction: dict) -> torch.Tensor:
    logp = LOGP.clone().requires_grad_()
    batch = PolicyBatch(logp, BEHAVIOUR, ADVANTAGE, MASK, VERSIONS, 5, PROXIMAL, REFERENCE, -logp * logp.exp())
    settings = CorrectionSettings(**correction)
    denominators = count_denominators(MASK)
    if settings.normalise:
        denominators += count_weights(PROXIMAL, BEHAVIOUR, MASK, settings)
    loss, _ = policy_loss(batch, denominators, ObjectiveSettings(**objective), settings)
    loss.backward()
    assert logp.grad is not None
    return logp.grad


RECOMPUTE, NONE = {"proximal": "recompute"}, {"kind": "none", "proximal": "recompute"}
DPPO = {"kind": "dppo_tv"}
KL = {"kl_coef": 0.5}

LOSS_FIELDS = {
    "kind": [({"kind": k}, NONE) for k in ("ppo", "gspo", "cispo", "dppo_tv")],
    "clip_low": [({"clip_low": v}, RECOMPUTE) for v in (0.1, 0.5)],
    "clip_high": [({"clip_high": v}, RECOMPUTE) for v in (0.01, 5.0)],
    "clip_low of dppo": [(DPPO | {"clip_low": v}, NONE) for v in (0.01, 0.5)],
    "clip_high of dppo": [(DPPO | {"clip_high": v}, NONE) for v in (0.01, 0.5)],
    "clip_low of cispo": [({"kind": "cispo", "clip_low": v}, NONE) for v in (0.1, 0.9)],
    "dual_clip": [({"dual_clip": v}, RECOMPUTE) for v in (None, 1.5)],
    "aggregation": [
        ({"aggregation": how}, RECOMPUTE)
        for how in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "dr_grpo")
    ],
    "max_response_tokens": [({"aggregation": "dr_grpo", "max_response_tokens": v}, RECOMPUTE) for v in (7, 100)],
    "ratio_cap": [(DPPO | {"ratio_cap": v}, NONE) for v in (None, 1.5)],
    "behaviour_kl": [(DPPO | {"behaviour_kl": v}, NONE) for v in (0.0, 1e-2)],
    "kl_coef": [({"kl_coef": v}, RECOMPUTE) for v in (0.0, 0.5)],
    "kl_estimator": [(KL | {"kl_estimator": v}, RECOMPUTE) for v in ("k1", "k2", "k3")],
    "kl_in": [(KL | {"kl_in": v}, RECOMPUTE) for v in ("loss", "reward")],
    "entropy_coef": [({"entropy_coef": v}, RECOMPUTE) for v in (0.0, 0.1)],
    "correction kind": [
        ({}, RECOMPUTE | {"kind": k})
        for k in ("none", "tis_token", "tis_sequence", "geometric", "icepop", "seq_mask_tis", "clamp", "mask")
    ],
    "geometric_mask": [({}, RECOMPUTE | {"kind": k, "low": 0.9}) for k in ("geometric", "geometric_mask")],
    "low": [({}, RECOMPUTE | {"kind": "icepop", "low": v}) for v in (0.1, 0.9)],
    "high": [({}, RECOMPUTE | {"high": v}) for v in (1.1, 3.0)],
    "normalise": [({}, RECOMPUTE | {"normalise": v}) for v in (False, True)],
    "bypass": [({}, NONE | {"bypass": v}) for v in (False, True)],
    "proximal": [({}, {"proximal": v}) for v in ("current", "recompute", "loglinear", "linear")],
}


@pytest.mark.parametrize("field", LOSS_FIELDS)
def test_every_setting_of_the_loss_matters(field):
    grads = [gradient(*case) for case in LOSS_FIELDS[field]]
    for i, one in enumerate(grads):
        for other in grads[:i]:
            assert (one - other).abs().max() > 1e-6


def test_the_tests_name_every_field():
    loss = set(ObjectiveSettings.model_fields) | set(CorrectionSettings.model_fields)
    assert loss <= set(LOSS_FIELDS)
    assert set(AdvantageSettings.model_fields) == set(ADVANTAGE_FIELDS)


JUDGED = Judged(
    torch.tensor([1.0, 0.0, 0.5, 0.0]),
    torch.zeros(4, dtype=torch.long),
    torch.tensor([True, True, False, True]),
    torch.tensor([4, 30, 100, 128]),
    {"perception": torch.tensor([1.0, -1.0, 0.0, 3.0]), "reasoning": torch.tensor([0.0, 2.0, 0.0, -8.0])},
    {"perception": torch.tensor([2.0, 2.0, 2.0, 2.0]), "reasoning": torch.tensor([1.0, 1.0, 1.0, 1.0])},
)
SPANS = [{"perception": (0, 2), "reasoning": (2, 4)}, {"perception": (0, 9), "reasoning": (9, 29)}, {}, {}]

ADVANTAGE_FIELDS = {
    "estimator": [{"estimator": e} for e in ("grpo", "dr_grpo", "rloo", "prism_paper", "prism_code", "bounded_views")],
    "credit": [{"credit": "per_view"}, {"credit": "all_tokens"}],
    "temperature": [{}, {"temperature": 0.5}],
    "by_std": [{}, {"by_std": False}],
    "invalid_offset": [{}, {"invalid_offset": 0.7}],
    "invalid_penalty": [{}, {"invalid_penalty": 0.7}],
    "overlong_share": [{"estimator": "grpo", "overlong_share": v} for v in (0.0, 0.5)],
    "overlong_factor": [{"estimator": "grpo", "overlong_share": 0.5, "overlong_factor": v} for v in (1.0, 0.5)],
}


@pytest.mark.parametrize("field", ADVANTAGE_FIELDS)
def test_every_setting_of_the_advantage_matters(field):
    found = [
        credit_tokens(estimate(JUDGED, AdvantageSettings(**case), 128, DEFAULT_VIEWS), SPANS, JUDGED.lengths_N.tolist())
        for case in ADVANTAGE_FIELDS[field]
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other).abs().max() > 1e-4


REFUSED = [
    (AdvantageSettings, {"estimator": "grpo", "credit": "per_view"}, "set credit: all_tokens"),
    (AdvantageSettings, {"estimator": "grpo", "invalid_penalty": 1.0}, "remove them"),
    (AdvantageSettings, {"estimator": "grpo", "by_std": False}, "rewards have estimator: dr_grpo"),
    (AdvantageSettings, {"overlong_share": 0.5}, "set it to 0"),
    (ObjectiveSettings, {"kind": "gspo", "ratio_cap": 20.0}, "belong to kind dppo_tv"),
    (CorrectionSettings, {"kind": "tis_token", "low": 0.5}, "has no lower bound"),
    (CorrectionSettings, {"kind": "none", "high": 2.0}, "which correction none does not have"),
    (CorrectionSettings, {"bypass": True}, "set kind: none"),
    (CorrectionSettings, {"normalise": True}, "set proximal: recompute"),
    (CorrectionSettings, {"kind": "clamp", "low": 3.0, "high": 2.0}, "is above high"),
]


@pytest.mark.parametrize("cls, values, sentence", REFUSED)
def test_contradictions_are_refused(cls, values, sentence):
    with pytest.raises(ValidationError, match=sentence):
        cls(**values)


def test_dppo_refuses_a_second_correction():
    with pytest.raises(ValueError, match="set correction.kind: none"):
        check_together(ObjectiveSettings(kind="dppo_tv"), CorrectionSettings())


def test_resolved_settings_read_back():
    for settings in (AdvantageSettings(estimator="grpo"), ObjectiveSettings(kind="gspo"), CorrectionSettings()):
        assert type(settings)(**settings.model_dump()) == settings


def test_only_recompute_needs_a_forward_and_missing_log_probs_are_named():
    recompute = CorrectionSettings(proximal="recompute")
    assert needs_proximal_forward(ObjectiveSettings(), recompute)
    assert not needs_proximal_forward(ObjectiveSettings(), CorrectionSettings(proximal="loglinear"))
    assert not needs_proximal_forward(ObjectiveSettings(kind="dppo_tv"), CorrectionSettings(**NONE))
    assert not needs_proximal_forward(ObjectiveSettings(), CorrectionSettings(**NONE, bypass=True))
    batch = PolicyBatch(LOGP, BEHAVIOUR, ADVANTAGE, MASK, VERSIONS, 5)
    with pytest.raises(ValueError, match="compute them, or set it to current"):
        policy_loss(batch, count_denominators(MASK), ObjectiveSettings(), recompute)
    with pytest.raises(ValueError, match="kl_coef is set but the batch has no reference"):
        policy_loss(batch, count_denominators(MASK), ObjectiveSettings(**KL), CorrectionSettings())


RECIPES = {
    "grpo": ({"estimator": "grpo"}, {}),
    "dapo": (
        {"estimator": "grpo", "overlong_share": 0.5},
        {"clip_high": 0.28, "dual_clip": 10.0, "max_response_tokens": 8192},
    ),
    "gspo": ({"estimator": "grpo"}, {"kind": "gspo"}),
    "cispo": ({"estimator": "grpo"}, {"kind": "cispo"}),
    "dr_grpo": ({"estimator": "dr_grpo"}, {"aggregation": "dr_grpo", "dual_clip": None}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_settings(recipe):
    advantage, objective = RECIPES[recipe]
    assert torch.isfinite(estimate(JUDGED, AdvantageSettings(**advantage), 8192, DEFAULT_VIEWS).combined_N).all()
    assert torch.isfinite(gradient(objective, {})).all()
