"""From groups to samples, and the rows that no update may see."""

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from prism_ray.config.objective import AdvantageSettings
from prism_ray.config.views import DEFAULT_VIEWS
from prism_ray.learner.work import prepare
from prism_ray.models.batch import collate, collate_shared


@pytest.fixture(scope="module")
def groups(make_group):
    return [make_group(0, version=3), make_group(1, image=2, version=2), make_group(2, size=2, image=0, version=1)]


def test_samples_carry_what_was_sampled(groups, encoder):
    work = prepare(groups, encoder, DEFAULT_VIEWS)
    rollouts = [r for g in groups for r in g.rollouts]
    assert len(work.samples) == len(rollouts) == 10
    for row, rollout in enumerate(rollouts):
        size = len(rollout.token_ids)
        assert work.samples[row].response_ids.tolist() == rollout.token_ids.tolist()
        assert np.array_equal(work.behaviour_NR[row, :size], rollout.logp)
        assert work.versions_NR[row, :size].tolist() == rollout.versions.tolist()
        assert work.mask_NR[row].sum() == size
    assert work.samples[0].prompt is work.samples[3].prompt


def test_ids_that_travelled_with_the_prompts_give_the_same_batches(groups, encoder):
    travelled = [replace(g, prompt=encoder.tokenised(g.prompt)) for g in groups]
    before, after = (prepare(g, encoder, DEFAULT_VIEWS) for g in (groups, travelled))
    assert before.names == after.names and before.spans == after.spans
    for make in (collate_shared, collate):
        assert same(make(before.samples), make(after.samples))
    for name in ("behaviour_NR", "versions_NR", "mask_NR", "judged"):
        assert same(getattr(before, name), getattr(after, name)), name


def same(one, other):
    """Whether these are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_views_carry_their_own_advantages(groups, encoder):
    work = prepare(groups[:1], encoder, DEFAULT_VIEWS)
    advantage_NR = work.advantages(AdvantageSettings(), 128, None)
    ends = encoder.tokenizer.convert_tokens_to_ids("</caption>")
    for row in range(3):
        ids = work.samples[row].response_ids
        caption = int((ids == ends).nonzero()) + 1
        values = advantage_NR[row, : len(ids)]
        assert len(values[:caption].unique()) == len(values[caption:].unique()) == 1
        assert values[0] != values[-1]
    invalid = advantage_NR[3, : len(work.samples[3].response_ids)]
    assert len(invalid.unique()) == 1 and invalid[0] < 0


def test_an_engine_that_saw_another_prompt_is_an_error(groups, encoder):
    other = replace(groups[0].rollouts[1], prompt_token_ids=groups[0].rollouts[1].prompt_token_ids[1:])
    broken = replace(groups[0], rollouts=(groups[0].rollouts[0], other, *groups[0].rollouts[2:]))
    with pytest.raises(ValueError, match="group 0: the engine saw .* prompt tokens"):
        prepare([broken], encoder, DEFAULT_VIEWS)


def test_ragged_rollouts_are_an_error(groups, encoder):
    other = replace(groups[0].rollouts[0], logp=groups[0].rollouts[0].logp[1:])
    broken = replace(groups[0], rollouts=(other, *groups[0].rollouts[1:]))
    with pytest.raises(ValueError, match="group 0: a rollout's token_ids, logp and versions differ in length"):
        prepare([broken], encoder, DEFAULT_VIEWS)


def test_an_empty_batch_is_an_error(encoder):
    with pytest.raises(ValueError, match="at least one group"):
        prepare([], encoder, DEFAULT_VIEWS)


def test_an_empty_response_does_no_harm(groups, encoder):
    none = np.zeros(0, np.int32)
    empty = replace(groups[0].rollouts[3], token_ids=none, versions=none, logp=np.zeros(0, np.float32), text="")
    work = prepare([replace(groups[0], rollouts=(*groups[0].rollouts[:3], empty))], encoder, DEFAULT_VIEWS)
    assert work.mask_NR[3].sum() == 0
    assert torch.isfinite(work.advantages(AdvantageSettings(), 128, None)).all()


def test_a_penalty_comes_off_the_reward_before_groups_are_compared(groups, encoder):
    work, grpo = (
        prepare(groups[:1], encoder, DEFAULT_VIEWS),
        AdvantageSettings(estimator="dr_grpo", credit="all_tokens"),
    )
    penalty_N = torch.tensor([0.0, 0.0, 4.0, 0.0])
    plain, penalised = (work.advantages(grpo, 128, p)[:, 0] for p in (None, penalty_N))
    torch.testing.assert_close(penalised - plain, torch.tensor([1.0, 1.0, -3.0, 1.0]))


def test_the_gates_of_verdicts_reach_the_advantages(groups, encoder):
    shut = [replace(v, parts={**v.parts, "gate/perception": 0.0}) for v in groups[0].verdicts]
    config = AdvantageSettings()
    plain, gated = (prepare([g], encoder, DEFAULT_VIEWS) for g in (groups[0], groups[0].judged(shut)))
    assert gated.judged.gates["perception"].tolist() == [0.0] * 4
    assert gated.judged.gates["reasoning"].tolist() == [1.0] * 4
    one, other = (w.advantages(config, 128, None) for w in (plain, gated))
    assert bool(((one != 0) & (other == 0)).any(dim=1)[:3].all()), "perception's tokens of every valid response"


def test_a_share_without_any_valid_response_has_no_scores_and_no_signal(groups, encoder):
    """A rank may get one group, and none of its responses may have the format: no fault of the judge."""
    verdicts = tuple(replace(v, valid=False, scores={}, reference_scores={}) for v in groups[0].verdicts)
    work = prepare([replace(groups[0], verdicts=verdicts)], encoder, DEFAULT_VIEWS)
    advantage_NR = work.advantages(AdvantageSettings(), 128, None)
    assert torch.isfinite(advantage_NR).all()
    assert len(advantage_NR[:, 0].unique()) == 1, "no response of the group is preferred to another"
