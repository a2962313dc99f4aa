"""Values and gradients of every golden vector: what the peers' own code computes on the same tensors, in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prism_ray.config.objective import CorrectionSettings, ObjectiveSettings
from prism_ray.learner import advantages as adv
from prism_ray.learner.correction import LOG_CLAMP, correction_weights, interpolated_proximal, normalised
from prism_ray.learner.diagnostics import correction_sums, summarise
from prism_ray.learner.kl import kl_estimate
from prism_ray.learner.objective import PolicyBatch, aggregate, count_denominators, policy_loss

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
INPUTS, EXPECTED = GOLDEN["inputs"], GOLDEN["expected"]

ELSEWHERE = {
    "prism_disc_loss": "discriminator",
    "prism_disc_loss_noclip_noreg": "discriminator",
    "prism_disc_loss_all_invalid": "discriminator",
    "bt_pair_loss_caption": "discriminator",
    "areal_capacity": "runtime",
}
"""Entries of other rooms, and the folder of tests that has them."""


def tensor(name: str, of: dict = INPUTS) -> torch.Tensor:
    return torch.tensor(of[name], dtype=torch.float64)


MASK = tensor("mask")
CURRENT, PROXIMAL, BEHAVIOUR = (tensor(f"logp_{n}") for n in ("current", "proximal", "behaviour"))
GROUPS, VALID = torch.tensor(INPUTS["group_ids"]), torch.tensor(INPUTS["format_valid"]).bool()
WIDTH, LONGEST = MASK.shape[1], INPUTS["max_completion_length"]


def assert_close(actual: torch.Tensor, expected, entry: dict, atol: float = 1e-12) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=entry["rtol"], atol=entry.get("atol", atol))


# Losses, all through the one entry point. -------------------------------------------------------------------------

PLAIN = {"kind": "none", "proximal": "recompute"}
ASYMMETRIC = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}
DUAL = ASYMMETRIC | {"dual_clip": 3.0}
NARROW, WIDE = {"low": 0.99, "high": 1.01}, {"low": 0.5, "high": 5.0}


def weighted(kind: str, **bounds: float) -> dict:
    return {"kind": kind, "proximal": "recompute", **bounds}


LOSSES: dict[str, tuple[dict, dict]] = {
    "ppo_clip_token_mean": (ASYMMETRIC, PLAIN),
    "ppo_dual_clip_c3_token_mean": (DUAL, PLAIN),
    "ppo_dual_clip_c10_token_mean": (ASYMMETRIC | {"dual_clip": 10.0}, PLAIN),
    "ppo_dual_clip_c3_token_adv": (DUAL, PLAIN),
    "ppo_clip_seq_mean_token_mean": (ASYMMETRIC | {"aggregation": "seq_mean_token_mean"}, PLAIN),
    "ppo_clip_seq_mean_token_sum": (ASYMMETRIC | {"aggregation": "seq_mean_token_sum"}, PLAIN),
    "ppo_clip_seq_mean_token_sum_norm": (
        ASYMMETRIC | {"aggregation": "seq_mean_token_sum_norm", "max_response_tokens": WIDTH},
        PLAIN,
    ),
    "dr_grpo_loss": (ASYMMETRIC | {"aggregation": "dr_grpo", "max_response_tokens": LONGEST}, PLAIN),
    "gspo": ({"kind": "gspo"}, PLAIN),
    "gspo_areal_token_denominator": ({"kind": "gspo", "aggregation": "token_mean"}, PLAIN),
    "cispo": ({"kind": "cispo"}, PLAIN),
    "dppo_tv": ({"kind": "dppo_tv"}, PLAIN),
    "dppo_tv_logprob_surrogate_c20": ({"kind": "dppo_tv", "ratio_cap": 20.0}, PLAIN),
    "dppo_tv_kl": ({"kind": "dppo_tv", "behaviour_kl": 1e-3}, PLAIN),
    "loss_tis_token_c2": (DUAL, weighted("tis_token")),
    "loss_tis_sequence_c5": (ASYMMETRIC, weighted("tis_sequence")),
    "loss_tis_sequence_c5_logclamp20": (ASYMMETRIC, weighted("tis_sequence", high=5.0)),
    "loss_geometric_mask": (DUAL, weighted("geometric_mask")),
    "loss_icepop_05_5": (DUAL, weighted("icepop")),
    "loss_seq_mask_tis_05_5": (DUAL, weighted("seq_mask_tis")),
    "loss_seq_mask_tis_099_101": (DUAL, weighted("seq_mask_tis", **NARROW)),
    "decoupled_ppo_clamp5": (ASYMMETRIC, weighted("clamp", low=0.0, high=5.0)),
    "decoupled_ppo_mask5": (ASYMMETRIC, weighted("mask")),
    "decoupled_ppo_seq_geo_mask_05_5": (ASYMMETRIC, weighted("geometric")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name):
    objective, correction = LOSSES[name]
    logp = CURRENT.clone().requires_grad_()
    token_level = name == "ppo_dual_clip_c3_token_adv"
    advantage = tensor("advantages_token") if token_level else tensor("advantages")[:, None].expand_as(MASK)
    batch = PolicyBatch(
        logp, BEHAVIOUR, advantage, MASK, torch.tensor(INPUTS["versions"]), INPUTS["current_version"], PROXIMAL
    )
    loss, _ = policy_loss(
        batch, count_denominators(MASK), ObjectiveSettings(**objective), CorrectionSettings(**correction)
    )
    loss.backward()
    assert_close(loss, EXPECTED[name]["value"], EXPECTED[name])
    assert_close(logp.grad, EXPECTED[name]["grad_logp_current"], EXPECTED[name])


KLS = {
    "kl_k1": "k1",
    "kl_k2": "k2",
    "kl_k3": "k3",
    "kl_k3_clamped": "k3_clamped",
    "kl_k3_plus": "k3_plus",
    "kl_k3_token_mean": "k3",
}


@pytest.mark.parametrize("name", KLS)
def test_kl(name):
    logp = CURRENT.clone().requires_grad_()
    kl = kl_estimate(logp, tensor("logp_ref"), MASK, KLS[name])
    mean = aggregate(kl, MASK, "token_mean", count_denominators(MASK), LONGEST)
    mean.backward()
    value = mean if name == "kl_k3_token_mean" else kl
    assert_close(value, EXPECTED[name]["value"], EXPECTED[name], atol=1e-9)
    assert_close(logp.grad, EXPECTED[name]["grad_logp_current"], EXPECTED[name], atol=1e-9)


# Everything without a gradient. -----------------------------------------------------------------------------------


def weight(kind: str, **bounds: float) -> torch.Tensor:
    settings = CorrectionSettings(kind=kind, **bounds)
    return correction_weights(PROXIMAL, BEHAVIOUR, MASK, settings).weight_BT


def batch_normalised() -> torch.Tensor:
    raw = weight("tis_token")
    return normalised(raw, float(raw.sum()), float(MASK.sum()))


def reduced(how: str, longest: int = LONGEST) -> torch.Tensor:
    return aggregate(tensor("advantages_token"), MASK, how, count_denominators(MASK), longest)


def proximal(log_space: bool) -> torch.Tensor:
    versions, current = torch.tensor(INPUTS["versions"]), INPUTS["current_version"]
    return interpolated_proximal(CURRENT, BEHAVIOUR, MASK, versions, current, log_space)


def clamped_probe() -> torch.Tensor:
    """A raw token ratio, as seq_mask_tis lets it through: one response of one token per probe."""
    probe = tensor("log_ratio_probe")[:, None]
    settings = CorrectionSettings(kind="seq_mask_tis", low=0.0, high=1e12)
    return correction_weights(probe, torch.zeros_like(probe), torch.ones_like(probe), settings).weight_BT[:, 0]


def figure(metric: str, kind: str = "tis_token") -> torch.Tensor:
    weights = correction_weights(PROXIMAL, BEHAVIOUR, MASK, CorrectionSettings(kind=kind))
    staleness = INPUTS["current_version"] - torch.tensor(INPUTS["versions"])
    return torch.tensor(summarise(correction_sums(PROXIMAL, BEHAVIOUR, MASK, weights, staleness))[metric])


SCORES = {"perception": tensor("caption_scores"), "reasoning": tensor("cot_scores")}
EQUAL = {"perception": 0.5, "reasoning": 0.5}


def traced(gamma: float) -> adv.VTrace:
    of = INPUTS["vtrace"]
    steps = [tensor(n, of) for n in ("logp_target", "logp_behaviour", "rewards", "values", "bootstrap_values")]
    return adv.vtrace(*steps, torch.tensor(of["lengths"]), torch.tensor(of["terminated"]), gamma)


def overlong(lengths: list[int]) -> torch.Tensor:
    return adv.overlong_penalty(torch.tensor(lengths), 8192, 4096, 1.0)


VALUES: dict[str, Callable[[], torch.Tensor]] = {
    "adv_grpo": lambda: adv.grpo(tensor("rewards"), GROUPS),
    "adv_dr_grpo": lambda: adv.dr_grpo(tensor("rewards"), GROUPS),
    "adv_prism_paper": lambda: adv.prism_paper(SCORES, EQUAL, GROUPS, torch.ones_like(VALID)),
    "adv_prism_paper_invalid": lambda: adv.prism_paper(SCORES, EQUAL, GROUPS, VALID),
    "adv_prism_code": lambda: adv.prism_code(SCORES, EQUAL, GROUPS, VALID),
    "agg_token_mean": lambda: reduced("token_mean"),
    "agg_seq_mean_token_mean": lambda: reduced("seq_mean_token_mean"),
    "agg_seq_mean_token_sum": lambda: reduced("seq_mean_token_sum"),
    "agg_seq_mean_token_sum_norm": lambda: reduced("seq_mean_token_sum_norm"),
    "agg_seq_mean_token_sum_norm_default": lambda: reduced("seq_mean_token_sum_norm", WIDTH),
    "w_tis_token_c2": lambda: weight("tis_token"),
    "w_tis_token_c2_batch_norm": batch_normalised,
    "w_tis_sequence_c5": lambda: weight("tis_sequence"),
    "w_tis_sequence_c5_logclamp20": lambda: weight("tis_sequence", high=5.0),
    "w_geometric": lambda: weight("geometric", low=0.0, high=float("inf")),
    "mask_geometric_099_101": lambda: weight("geometric_mask"),
    "w_icepop_05_5": lambda: weight("icepop", **WIDE),
    "prox_loglinear": lambda: proximal(log_space=True),
    "prox_linear": lambda: proximal(log_space=False),
    "is_weight_log_clamp20": clamped_probe,
    "diag_ess_token_tis_c2": lambda: figure("correction/ess"),
    "diag_ess_sequence_tis_c5": lambda: figure("correction/ess", "tis_sequence"),
    "diag_chi2_token": lambda: figure("correction/chi2_token"),
    "diag_chi2_seq": lambda: figure("correction/chi2_sequence"),
    "diag_kl_direct": lambda: figure("correction/kl_direct"),
    "diag_k3_kl": lambda: figure("correction/kl_k3"),
    "diag_log_ppl_diff": lambda: figure("correction/log_ppl_gap"),
    "diag_log_ppl_abs_diff": lambda: figure("correction/log_ppl_abs_gap"),
    "diag_ppl_ratio": lambda: figure("correction/ppl_ratio"),
    "vtrace_vs_gamma099": lambda: traced(0.99).vs_BT,
    "vtrace_vs_gamma1": lambda: traced(1.0).vs_BT,
    "vtrace_pg_gamma099": lambda: traced(0.99).advantage_BT,
    "vtrace_pg_gamma1": lambda: traced(1.0).advantage_BT,
    "overlong_soft_penalty": lambda: overlong(INPUTS["overlong_lengths"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name):
    assert_close(VALUES[name](), EXPECTED[name]["value"], EXPECTED[name])


def test_overlong_beyond_max():
    entry = EXPECTED["overlong_beyond_max"]
    assert_close(overlong(entry["params"]["lengths"]), entry["value"]["capped(openrlhf)"], entry)


def test_every_entry_is_covered():
    covered = {*LOSSES, *KLS, *VALUES, "overlong_beyond_max", *ELSEWHERE}
    assert covered == set(EXPECTED)
    assert EXPECTED["is_weight_log_clamp20"]["params"]["log_clamp"] == LOG_CLAMP
