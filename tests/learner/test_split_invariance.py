"""However a global batch is cut into micro-batches and ranks, the sum of the parts is the whole."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from prism_ray.config.objective import Aggregation, CorrectionSettings, ObjectiveSettings
from prism_ray.learner.diagnostics import merge, summarise
from prism_ray.learner.objective import (
    Denominators,
    PolicyBatch,
    count_denominators,
    count_weights,
    policy_loss,
)

INPUTS = json.loads((Path(__file__).parent / "golden.json").read_text())["inputs"]
FIELDS = ("logp_current", "logp_behaviour", "advantages_token", "mask", "logp_proximal", "logp_ref")
CURRENT, BEHAVIOUR, ADVANTAGE, MASK, PROXIMAL, REFERENCE = (
    torch.tensor(INPUTS[n], dtype=torch.float64) for n in FIELDS
)
VERSIONS = torch.tensor(INPUTS["versions"])

# ranks -> micro-batches -> rows
SPLITS = {
    "two": [[[0, 1, 2], [3, 4, 5]]],
    "three": [[[5], [0, 4], [3, 2, 1]]],
    "two_ranks": [[[0, 2], [4]], [[1], [5, 3]]],
    "ranks_of_unequal_work": [[[2]], [[0, 1], [3], [4, 5]]],
    "a_rank_without_rows": [[[0, 1, 2, 3, 4, 5]], [[]]],
}

SETTINGS = {
    **{f"ppo_{how}": ({"aggregation": how, "kl_coef": 0.1}, {}) for how in get_args(Aggregation)},
    "gspo": ({"kind": "gspo", "clip_low": 0.2, "clip_high": 0.28}, {"kind": "tis_sequence"}),
    "gspo_token_mean": ({"kind": "gspo", "aggregation": "token_mean"}, {"kind": "geometric"}),
    "cispo": ({"kind": "cispo"}, {"kind": "icepop"}),
    "dppo": ({"kind": "dppo_tv", "behaviour_kl": 1e-3}, {"kind": "none"}),
    "normalised_weights": ({}, {"kind": "clamp", "normalise": True}),
    "interpolated": ({}, {"kind": "seq_mask_tis", "proximal": "loglinear"}),
    "bypass": ({}, {"kind": "none", "bypass": True}),
}


def pieces(rows: list[int], logp: torch.Tensor) -> PolicyBatch:
    index = torch.tensor(rows, dtype=torch.long)
    columns = int((MASK[index].sum(0) > 0).nonzero().max()) + 1 if rows and MASK[index].any() else 1
    cut = [t[index][:, :columns] for t in (logp, BEHAVIOUR, ADVANTAGE, MASK, VERSIONS)]
    return PolicyBatch(*cut, INPUTS["current_version"], PROXIMAL[index][:, :columns], REFERENCE[index][:, :columns])


def run(split: list[list[list[int]]], objective: ObjectiveSettings, correction: CorrectionSettings):
    logp = CURRENT.clone().requires_grad_()
    batches = [[pieces(rows, logp) for rows in rank] for rank in split]
    per_rank = [sum((count_denominators(b.mask_BT) for b in rank), Denominators()) for rank in batches]
    if correction.normalise:
        for rank, denominators in enumerate(per_rank):
            counted = (count_weights(b.proximal_BT, b.behaviour_BT, b.mask_BT, correction) for b in batches[rank])
            per_rank[rank] = sum(counted, denominators)
    everything = sum(per_rank, Denominators())
    results = [policy_loss(b, everything, objective, correction) for rank in batches for b in rank]
    total = torch.stack([loss for loss, _ in results]).sum()
    total.backward()
    return total.detach(), logp.grad, merge(sums for _, sums in results)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_parts_sum_to_the_whole(name, split):
    objective, correction = SETTINGS[name]
    objective = ObjectiveSettings(max_response_tokens=16, **objective)
    correction = CorrectionSettings(**({"proximal": "recompute"} | correction))
    loss, grad, sums = run([[[0, 1, 2, 3, 4, 5]]], objective, correction)
    parts = run(SPLITS[split], objective, correction)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(parts[0], loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts[1], grad, rtol=1e-12, atol=1e-14)
    assert list(parts[2]) == list(sums), "ranks must agree on the order of the sums for one all-reduce"
    assert summarise(parts[2]) == pytest.approx(summarise(sums), rel=1e-12, abs=1e-14)


def test_local_denominators_would_not_do():
    mean = ObjectiveSettings(aggregation="token_mean"), CorrectionSettings(proximal="recompute")
    whole, _, _ = run([[[0, 1, 2, 3, 4, 5]]], *mean)
    halves = [run([[rows]], *mean)[0] for rows in ([0, 1, 2], [3, 4, 5])]
    assert abs(sum(halves) / 2 - whole) > 1e-3
