"""One update of the policy, from judged groups to gradients: pure, on tensors and records, whatever engine trains.

With `correction.proximal: current` (the default) the proximal log-probs are the current ones, detached. That is exact
because a batch gets exactly one optimiser step, and it saves a whole forward pass; `recompute` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prism_ray.config.objective import AdvantageSettings, CorrectionSettings, ObjectiveSettings, check_together
from prism_ray.learner.advantages import Judged, credit_tokens, estimate
from prism_ray.learner.correction import needs_proximal_forward
from prism_ray.learner.diagnostics import merge, summarise
from prism_ray.learner.objective import Denominators, PolicyBatch, count_denominators, count_weights, policy_loss
from prism_ray.models.batch import Batch, Sample, microbatches
from prism_ray.models.encode import EncodedPrompt, Encoder
from prism_ray.models.logprobs import response_logprobs
from prism_ray.records import Group, Rollout, Verdict
from prism_ray.response import locate

Means = dict[str, tuple[float, float]]
"""Metric name -> (sum, count), so that those of ranks add up."""


class Engine(Protocol):
    """What an update needs of `TrainEngine`."""

    device: Any

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> Any: ...
    def over_ranks(self, values: Sequence[float], how: str) -> list[float]: ...
    @property
    def equal_forwards(self) -> bool: ...


@dataclass(frozen=True)
class Recipe:
    """What the policy's loss is made of. `temperature` is the one the rollouts were sampled with."""

    advantage: AdvantageSettings
    objective: ObjectiveSettings
    correction: CorrectionSettings
    temperature: float = 1.0
    micro_batch_tokens: int = 4096

    def __post_init__(self) -> None:
        check_together(self.objective, self.correction)
        if self.objective.kl_coef:
            raise ValueError("objective.kl_coef: the learner holds no reference policy; set it to 0")


@dataclass(frozen=True, eq=False)
class Work:
    """N responses to learn from: their samples, and per response token [N, R] the behaviour log-prob, the advantage and
    the policy version that sampled it; `mask_NR` marks real tokens."""

    samples: list[Sample]
    behaviour_NR: Tensor
    advantage_NR: Tensor
    versions_NR: Tensor
    mask_NR: Tensor
    means: Means


@dataclass(frozen=True)
class Outcome:
    """What one rank's share of an update was: diagnostic sums, means, and the optimiser's report."""

    sums: dict[str, float]
    means: Means
    grad_norm: float
    lr: float
    skipped: bool


def prepare(groups: Sequence[Group], encoder: Encoder, advantage: AdvantageSettings, max_response_tokens: int) -> Work:
    """The groups' rollouts as samples with advantages.

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
    lengths = [len(r.token_ids) for r in rollouts]
    judged = _judged([g.id for g, *_ in rows], verdicts, lengths)
    spans = [locate([encoder.pieces[i] for i in r.token_ids]).spans for r in rollouts]
    advantage_NR = credit_tokens(estimate(judged, advantage, max_response_tokens), spans, lengths)
    return Work(
        samples=[Sample(p, torch.from_numpy(r.token_ids.astype(np.int64))) for _, p, r, _ in rows],
        behaviour_NR=_padded([r.logp.astype(np.float32) for r in rollouts]),
        advantage_NR=advantage_NR,
        versions_NR=_padded([r.versions.astype(np.int64) for r in rollouts]),
        mask_NR=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        means=_reward_means(groups, rollouts, verdicts),
    )


def update(engine: Engine, work: Work, recipe: Recipe, version: int, banned_ids: Sequence[int]) -> Outcome:
    """One optimiser step from `version`; every rank calls it with its own work.

    Losses are divided by denominators counted over all ranks, so neither the split into micro-batches nor that over
    ranks changes the result. `banned_ids` are the tokens that were never sampled.
    """
    batches = [b.to(engine.device) for b in microbatches(work.samples, recipe.micro_batch_tokens)]
    missing = int(engine.over_ranks([len(batches)], "max")[0]) - len(batches) if engine.equal_forwards else 0
    score = _Scorer(engine, recipe.temperature, banned_ids)
    mine = count_denominators(work.mask_NR)
    proximal: list[Tensor | None] = [None] * len(batches)
    if needs_proximal_forward(recipe.objective, recipe.correction):
        with torch.no_grad():
            proximal = [score(batch)[0] for batch in [*batches, *batches[:1] * missing]]
        if recipe.correction.normalise:
            mine = mine + _weight_sums(work, batches, proximal, recipe)
    denominators = _over_ranks(engine, mine)
    sums, entropy = [], 0.0
    for batch, proximal_BR in zip(batches, proximal, strict=False):
        logp_BR, entropy_BR = score(batch, entropy=True)
        inputs = _policy_batch(work, batch, logp_BR, proximal_BR, version)
        loss, part = policy_loss(inputs, denominators, recipe.objective, recipe.correction)
        engine.backward(loss)
        sums.append(part)
        entropy += float(entropy_BR.sum())
    for _ in range(missing):
        engine.backward(0.0 * score(batches[0])[0].sum())
    report = engine.step()
    tokens = float(work.mask_NR.sum())
    means = work.means | {"policy/entropy": (entropy, tokens), "staleness/mean": _staleness(work, version)}
    padded = sum(b.padded_tokens for b in batches)
    means["learner/padding"] = (padded - sum(s.length for s in work.samples), padded)
    flat = {name: float(value) for name, value in merge(sums).items()}
    return Outcome(flat, means, report.grad_norm, report.lr, report.skipped)


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The metrics of an update from the outcomes of all its ranks; a skipped step has no gradient norm."""
    totals: dict[str, float] = {}
    means: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        for name, value in outcome.sums.items():
            totals[name] = totals.get(name, 0.0) + value
        for name, (value, count) in outcome.means.items():
            before = means.get(name, (0.0, 0.0))
            means[name] = (before[0] + value, before[1] + count)
    first = outcomes[0]
    result = summarise({name: torch.tensor(value, dtype=torch.float64) for name, value in totals.items()})
    result |= {name: value / count for name, (value, count) in means.items() if count}
    result |= {"policy/lr": first.lr, "policy/skipped": float(first.skipped)}
    return result if first.skipped else result | {"policy/grad_norm": first.grad_norm}


class _Scorer:
    """Log-probs of a batch under the engine's module, as the rollouts' sampling defines them."""

    def __init__(self, engine: Engine, temperature: float, banned_ids: Sequence[int]) -> None:
        self.engine, self.temperature, self.banned_ids = engine, temperature, banned_ids

    def __call__(self, batch: Batch, entropy: bool = False) -> tuple[Tensor, Any]:
        options = {"temperature": self.temperature, "entropy": entropy, "banned_ids": self.banned_ids}
        return self.engine.run(response_logprobs, batch, **options)


def _policy_batch(work: Work, batch: Batch, logp_BR: Tensor, proximal_BR: Tensor | None, version: int) -> PolicyBatch:
    def rows(values_NR: Tensor) -> Tensor:
        return values_NR[batch.indices, : logp_BR.shape[1]].to(logp_BR.device)

    return PolicyBatch(
        logp_BT=logp_BR,
        behaviour_BT=rows(work.behaviour_NR),
        advantage_BT=rows(work.advantage_NR),
        mask_BT=batch.response_mask_BR,
        versions_BT=rows(work.versions_NR),
        version=version,
        proximal_BT=proximal_BR,
    )


def _weight_sums(work: Work, batches: list[Batch], proximal: list[Tensor | None], recipe: Recipe) -> Denominators:
    total = Denominators()
    for batch, proximal_BR in zip(batches, proximal, strict=False):
        assert proximal_BR is not None
        inputs = _policy_batch(work, batch, proximal_BR, proximal_BR, 0)
        total = total + count_weights(proximal_BR, inputs.behaviour_BT, inputs.mask_BT, recipe.correction)
    return total


def _over_ranks(engine: Engine, mine: Denominators) -> Denominators:
    names = list(vars(mine))
    return Denominators(**dict(zip(names, engine.over_ranks([getattr(mine, n) for n in names], "sum"), strict=True)))


def _check(group: Group, prompt: EncodedPrompt, rollout: Rollout) -> None:
    if not np.array_equal(rollout.prompt_token_ids, prompt.token_ids.numpy()):
        raise ValueError(
            f"group {group.id}: the engine saw {len(rollout.prompt_token_ids)} prompt tokens that are not the "
            f"{len(prompt.token_ids)} of the learner's encoder; give both the same checkpoint folder"
        )
    if not len(rollout.token_ids) == len(rollout.logp) == len(rollout.versions):
        raise ValueError(f"group {group.id}: a rollout's token_ids, logp and versions differ in length")


def _judged(group_ids: list[int], verdicts: list[Verdict], lengths: list[int]) -> Judged:
    views = sorted({view for v in verdicts if v.valid for view in v.scores})

    def column(of: str, view: str) -> Tensor:
        return torch.tensor([getattr(v, of).get(view, float("nan")) if v.valid else 0.0 for v in verdicts])

    return Judged(
        rewards_N=torch.tensor([v.reward for v in verdicts], dtype=torch.float32),
        group_ids_N=torch.tensor(group_ids),
        valid_N=torch.tensor([v.valid for v in verdicts]),
        lengths_N=torch.tensor(lengths),
        scores={view: column("scores", view) for view in views},
        reference_scores={view: column("reference_scores", view) for view in views},
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
        "rollout/response_tokens": (float(sum(len(r.token_ids) for r in rollouts)), count),
        "rollout/truncated": (float(sum(r.finish_reason == "length" for r in rollouts)), count),
    }
    for part in sorted({name for v in verdicts for name in v.parts}):
        values = [v.parts[part] for v in verdicts if part in v.parts]
        means[f"reward/part/{part}"] = (sum(values), len(values))
    return means


def _staleness(work: Work, version: int) -> tuple[float, float]:
    """Over rollouts: learner version minus the version of the oldest token."""
    oldest_N = torch.where(work.mask_NR, work.versions_NR, version).amin(dim=1)
    return float((version - oldest_N).sum()), float(len(oldest_N))
