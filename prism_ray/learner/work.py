"""From judged groups to what an update computes with: samples, the policies that sampled them, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prism_ray.config.objective import AdvantageSettings
from prism_ray.config.views import ViewSettings
from prism_ray.learner.advantages import Judged, credit_tokens, estimate
from prism_ray.models.batch import Sample
from prism_ray.models.encode import EncodedPrompt, Encoder
from prism_ray.records import Group, Rollout, Verdict
from prism_ray.response import locate

Means = dict[str, tuple[float, float]]
"""Metric name -> (sum, count), so that those of ranks add up."""


@dataclass(frozen=True, eq=False)
class Work:
    """N responses to learn from; of episodes of several turns, the tokens that the policy sampled in all of them.

    Per response token [N, R]: the behaviour log-prob, and the policy version that sampled it; `mask_NR` marks real
    tokens. `judged` is what the judge said of the `views`, `spans` where each response's lie; `names` say which
    trajectory a row is.
    """

    samples: list[Sample]
    names: list[str]
    behaviour_NR: Tensor
    versions_NR: Tensor
    mask_NR: Tensor
    judged: Judged
    views: tuple[ViewSettings, ...]
    spans: list[dict[str, tuple[int, int]]]
    means: Means

    def advantages(self, settings: AdvantageSettings, max_response_tokens: int, penalty_N: Tensor | None) -> Tensor:
        """The advantage of every response token [N, R]; `penalty_N` is taken off the rewards first."""
        judged = self.judged
        if penalty_N is not None:
            judged = replace(judged, rewards_N=judged.rewards_N - penalty_N.to(judged.rewards_N.dtype))
        advantages = estimate(judged, settings, max_response_tokens, self.views)
        return credit_tokens(advantages, self.spans, judged.lengths_N.tolist())


def prepare(groups: Sequence[Group], encoder: Encoder, views: Sequence[ViewSettings]) -> Work:
    """The groups' rollouts as samples, in the order of the groups; `views` are those that the judge judges.

    Raises ValueError for an empty batch, a group without verdicts, or one whose engine saw other prompt tokens than the
    learner will (then no log-prob would be comparable).
    """
    if not groups:
        raise ValueError("an update needs at least one group; the batch is empty")
    encoded = encoder.prompts([group.prompt for group in groups])
    rows = [(g, p, t.rollout, t.verdict) for g, p in zip(groups, encoded, strict=True) for t in g.trajectories]
    for group, prompt, rollout, _ in rows:
        _check(group, prompt, rollout)
    rollouts, verdicts = [r for _, _, r, _ in rows], [v for *_, v in rows]
    lengths = [r.sampled for r in rollouts]
    return Work(
        samples=[_sample(p, r, encoder) for _, p, r, _ in rows],
        names=[f"group {g.id} rollout {r.index} (prompt {g.prompt.id})" for g, _, r, _ in rows],
        behaviour_NR=_padded([_own(r, r.logp).astype(np.float32) for r in rollouts]),
        versions_NR=_padded([_own(r, r.versions).astype(np.int64) for r in rollouts]),
        mask_NR=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        judged=_judged([g.id for g, *_ in rows], verdicts, lengths, views),
        views=tuple(views),
        spans=[locate([encoder.pieces[i] for i in _own(r, r.token_ids)], views).spans for r in rollouts],
        means=_reward_means(groups, rollouts, verdicts),
    )


def _sample(prompt: EncodedPrompt, rollout: Rollout, encoder: Encoder) -> Sample:
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    mask = None if rollout.mask is None else torch.from_numpy(rollout.mask.copy())
    later = encoder.later(prompt, rollout.token_ids, rollout.images) if rollout.images else None
    return Sample(prompt, ids, mask, later)


def _own(rollout: Rollout, values: np.ndarray) -> np.ndarray:
    """Of one value for each token, those of the tokens that the policy sampled."""
    return values if rollout.mask is None else values[rollout.mask]


def _check(group: Group, prompt: EncodedPrompt, rollout: Rollout) -> None:
    if not np.array_equal(rollout.prompt_token_ids, prompt.token_ids.numpy()):
        raise ValueError(
            f"group {group.id}: the engine saw {len(rollout.prompt_token_ids)} prompt tokens that are not the "
            f"{len(prompt.token_ids)} of the learner's encoder; give both the same checkpoint folder"
        )
    if not len(rollout.token_ids) == len(rollout.logp) == len(rollout.versions):
        raise ValueError(f"group {group.id}: a rollout's token_ids, logp and versions differ in length")
    if rollout.mask is not None and not (len(rollout.mask) == len(rollout.token_ids) and rollout.mask.any()):
        raise ValueError(f"group {group.id}: the mask of a rollout has another length, or leaves it no token")


def _judged(
    group_ids: list[int], verdicts: list[Verdict], lengths: list[int], wanted: Sequence[ViewSettings]
) -> Judged:
    views = sorted({view for v in verdicts if v.valid for view in v.scores})
    if not any(v.valid for v in verdicts):  # nothing could be scored, which says nothing about the judge
        views = [view.name for view in wanted]

    def column(of: str, view: str) -> Tensor:
        return torch.tensor([getattr(v, of).get(view, float("nan")) if v.valid else 0.0 for v in verdicts])

    return Judged(
        rewards_N=torch.tensor([v.reward for v in verdicts], dtype=torch.float32),
        group_ids_N=torch.tensor(group_ids),
        valid_N=torch.tensor([v.valid for v in verdicts]),
        lengths_N=torch.tensor(lengths),
        scores={view: column("scores", view) for view in views},
        reference_scores={view: column("reference_scores", view) for view in views},
        gates={view: torch.tensor([v.parts.get(f"gate/{view}", 1.0) for v in verdicts]) for view in views},
    )


def _padded(rows: list[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


def _reward_means(groups: Sequence[Group], rollouts: list[Rollout], verdicts: list[Verdict]) -> Means:
    count = float(len(rollouts))
    rewards = [np.array([v.reward for v in g.verdicts]) for g in groups]
    means: Means = {
        "reward/mean": (sum(v.reward for v in verdicts), count),
        "reward/format": (float(sum(v.valid for v in verdicts)), count),
        "reward/group_std": (float(sum(r.std() for r in rewards)), len(rewards)),
        "reward/equal_groups": (float(sum(np.ptp(r) == 0 for r in rewards)), len(rewards)),
        "rollout/response_tokens": (float(sum(r.sampled for r in rollouts)), count),
        "rollout/truncated": (float(sum(r.finish_reason == "length" for r in rollouts)), count),
    }
    for part in sorted({name for v in verdicts for name in v.parts}):
        values = [v.parts[part] for v in verdicts if part in v.parts]
        means[f"reward/part/{part}"] = (sum(values), len(values))
    return means
