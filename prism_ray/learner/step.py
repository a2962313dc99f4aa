"""One update of the policy, from judged groups to gradients: pure, on tensors and records, whatever engine trains.

With `correction.proximal: current` (the default) the proximal log-probs are the current ones, detached. That is exact
because a batch gets exactly one optimiser step, and it saves a whole forward pass; `recompute` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from prism_ray.config.objective import (
    AdvantageSettings,
    CorrectionSettings,
    ObjectiveSettings,
    check_kl,
    check_together,
)
from prism_ray.config.views import DEFAULT_VIEWS, ViewSettings
from prism_ray.learner.advantages import open_share
from prism_ray.learner.correction import needs_proximal_forward, sequence_ratio, usable_tokens
from prism_ray.learner.diagnostics import merge, summarise
from prism_ray.learner.kl import kl_estimate
from prism_ray.learner.objective import Denominators, PolicyBatch, count_denominators, count_weights, policy_loss
from prism_ray.learner.work import Means, Work
from prism_ray.models.batch import Batch, shared_microbatch_count, shared_microbatches
from prism_ray.models.logprobs import response_logprobs
from prism_ray.records import Ratios

ReferencePolicy = Callable[[Batch], Tensor]
"""Log-probs [B, R] of a batch's responses under a frozen policy, sampled as ours; without gradient."""


class Engine(Protocol):
    """What an update needs of `TrainEngine`."""

    device: Any

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, part: float = 1.0) -> Any: ...
    def over_ranks(self, values: Sequence[float], how: str) -> list[float]: ...
    @property
    def equal_forwards(self) -> bool: ...


@dataclass(frozen=True)
class Recipe:
    """What the policy's loss is made of. `temperature` is the one the rollouts were sampled with, `views` are what the
    judge judges."""

    advantage: AdvantageSettings
    objective: ObjectiveSettings
    correction: CorrectionSettings
    temperature: float = 1.0
    micro_batch_tokens: int = 4096
    views: tuple[ViewSettings, ...] = DEFAULT_VIEWS

    def __post_init__(self) -> None:
        check_together(self.objective, self.correction)
        check_kl(self.objective, self.advantage)


@dataclass(frozen=True)
class Outcome:
    """What one rank's share of an update was: diagnostic sums, means, and the optimiser's report.

    `suspects` name the trajectories whose log-probs or their gradients were not finite; `ratios` are those of the
    groups before the step.
    """

    sums: dict[str, float]
    means: Means
    grad_norm: float
    lr: float
    skipped: bool
    suspects: tuple[str, ...] = ()
    ratios: Ratios = field(default_factory=dict)


def update(
    engine: Engine,
    work: Work,
    recipe: Recipe,
    version: int,
    banned_ids: Sequence[int],
    reference: ReferencePolicy | None = None,
) -> Outcome:
    """One optimiser step from `version`; every rank calls it with its own work.

    Losses are divided by denominators counted over all ranks, so neither the split into micro-batches nor that over
    ranks changes the result. `banned_ids` are the tokens that were never sampled; `reference` is needed where the
    objective has a `kl_coef`.
    """
    share = _Share(engine, work, recipe, version, banned_ids)
    share.look_ahead(reference)
    sums, entropy = [], 0.0
    for index in range(len(share.batches)):
        loss, part, entropy_sum = share.loss(index)
        engine.backward(loss)
        sums.append(part)
        entropy += entropy_sum
    for _ in range(share.missing):
        engine.backward(share.nothing())
    report = engine.step(share.open)
    tokens = float(work.mask_NR.sum())
    means = work.means | {"policy/entropy": (entropy, tokens), "staleness/mean": _staleness(work, version)}
    means["learner/packing_efficiency"] = share.efficiency()
    flat = {name: float(value) for name, value in merge(sums).items()}
    suspects = share.suspects() if report.skipped else ()
    return Outcome(flat, means, report.grad_norm, report.lr, report.skipped, suspects, share.ratios())


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


class _Share:
    """One rank's share of an update while it is computed: micro-batches that compute a common prompt once, and what is
    known of each."""

    def __init__(self, engine: Engine, work: Work, recipe: Recipe, version: int, banned_ids: Sequence[int]) -> None:
        self.engine, self.work, self.recipe, self.version = engine, work, recipe, version
        self._options: dict[str, Any] = {"temperature": recipe.temperature, "banned_ids": banned_ids}
        count, most = None, 0
        if engine.equal_forwards:
            most = shared_microbatch_count(work.samples, recipe.micro_batch_tokens)
            most = int(engine.over_ranks([most], "max")[0])
            count = min(most, len(work.samples))
        cut = shared_microbatches(work.samples, recipe.micro_batch_tokens, count)
        self.batches = [batch.to(engine.device) for batch in cut]
        self.missing = max(0, most - len(cut))
        """Forward passes without samples that this rank owes the others."""
        self._not_finite: list[tuple[list[int], Tensor]] = []
        self._ratios: list[tuple[list[int], Tensor]] = []

    def score(self, batch: Batch, **more: Any) -> tuple[Tensor, Any]:
        """Log-probs of a batch under the engine's module, as the rollouts' sampling defines them."""
        return self.engine.run(response_logprobs, batch, **self._options, **more)

    def look_ahead(self, reference: ReferencePolicy | None) -> None:
        """Everything that must be known before the first loss: proximal and reference log-probs, advantages and the
        global denominators."""
        recipe, work = self.recipe, self.work
        self._proximal: list[Any] = [None] * len(self.batches)
        self._reference: list[Any] = [None] * len(self.batches)
        if needs_proximal_forward(recipe.objective, recipe.correction):
            self._proximal = self._without_gradient(lambda batch: self.score(batch)[0])
        if recipe.objective.kl_coef:
            if reference is None:
                raise ValueError("objective.kl_coef is set but the learner holds no reference policy; set it to 0")
            self._reference = self._without_gradient(reference)
        off_reward = recipe.objective.kl_coef and recipe.objective.kl_in == "reward"
        penalty_N = self._kl_penalty() if off_reward else None
        self._advantage_NR = work.advantages(recipe.advantage, recipe.objective.max_response_tokens, penalty_N)
        open_N = open_share(work.judged, recipe.advantage, work.views)
        mine = count_denominators(work.mask_NR)
        if recipe.correction.normalise:
            mine = mine + self._weight_sums()
        names = list(vars(mine))
        totals = [*(getattr(mine, name) for name in names), float(open_N.sum()), float(len(open_N))]
        *totals, opened, responses = self.engine.over_ranks(totals, "sum")
        self._denominators = Denominators(**dict(zip(names, totals, strict=True)))
        self.open = opened / responses
        """Part of a step that gates leave: the step is made at this part of the learning rate, and the advantages are
        as large as ever, since AdamW would make up for smaller ones within some steps."""
        self._advantage_NR /= self.open or 1.0

    def loss(self, index: int) -> tuple[Tensor, Any, float]:
        """The loss of one micro-batch, its metric sums, and the sum of its entropies."""
        logp_BR, entropy_BR = self._score_with_entropy(self.batches[index])
        self._watch(logp_BR, self.batches[index].indices)
        inputs = self._policy_batch(index, logp_BR, entropy_BR)
        ratio_B = sequence_ratio(logp_BR.detach(), inputs.behaviour_BT, inputs.mask_BT)
        self._ratios.append((self.batches[index].indices, ratio_B))
        loss, sums = policy_loss(inputs, self._denominators, self.recipe.objective, self.recipe.correction)
        return loss, sums, float(entropy_BR.detach().sum())

    def nothing(self) -> Tensor:
        """A loss of 0 through the same graph as any other: the ranks' backward passes must match, step for step."""
        logp_BR, entropy_BR = self._score_with_entropy(self.batches[0])
        return 0.0 * (logp_BR.sum() + entropy_BR.sum())

    def suspects(self) -> tuple[str, ...]:
        """The trajectories whose log-probs, or the gradients with respect to them, were not finite."""
        rows = {indices[i] for indices, bad_B in self._not_finite for i in bad_B.nonzero().flatten().tolist()}
        return tuple(self.work.names[row] for row in sorted(rows))

    def ratios(self) -> Ratios:
        """How much likelier each rollout is under the policy before this step than under what sampled it."""
        ratio_N = torch.ones(len(self.work.samples))
        for indices, ratio_B in self._ratios:
            ratio_N[indices] = ratio_B.cpu()
        by_group: dict[int, list[float]] = {}
        for group, ratio in zip(self.work.judged.group_ids_N.tolist(), ratio_N.tolist(), strict=True):
            by_group.setdefault(group, []).append(ratio)
        return by_group

    def efficiency(self) -> tuple[float, float]:
        """Tokens this rank computed, and those it could have computed while it was kept busy or waiting: the largest
        share of any rank, forward by forward where the ranks go in step, else over the whole update."""
        sizes = [float(batch.computed_tokens) for batch in self.batches] + [0.0] * self.missing
        steps = sizes if self.engine.equal_forwards else [sum(sizes)]
        return sum(sizes), sum(self.engine.over_ranks(steps, "max"))

    def _score_with_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.score(batch, entropy=True, entropy_gradient=self.recipe.objective.entropy_coef > 0)

    def _without_gradient(self, function: Callable[[Batch], Tensor]) -> list[Any]:
        with torch.no_grad():
            values = [function(batch) for batch in [*self.batches, *self.batches[:1] * self.missing]]
        return values[: len(self.batches)]

    def _watch(self, logp_BR: Tensor, indices: list[int]) -> None:
        """Keep what tells which rows are not finite; nothing is read here, so the device is not waited for."""

        def note(values_BR: Tensor) -> None:
            self._not_finite.append((indices, ~torch.isfinite(values_BR).all(dim=1)))

        note(logp_BR.detach())
        logp_BR.register_hook(note)

    def _policy_batch(self, index: int, logp_BR: Tensor, entropy_BR: Tensor | None = None) -> PolicyBatch:
        batch = self.batches[index]

        def rows(values_NR: Tensor) -> Tensor:
            return values_NR[batch.indices, : logp_BR.shape[1]].to(logp_BR.device)

        return PolicyBatch(
            logp_BT=logp_BR,
            behaviour_BT=rows(self.work.behaviour_NR),
            advantage_BT=rows(self._advantage_NR),
            mask_BT=batch.response_mask_BR,
            versions_BT=rows(self.work.versions_NR),
            version=self.version,
            proximal_BT=self._proximal[index],
            reference_BT=self._reference[index],
            entropy_BT=entropy_BR,
        )

    def _kl_penalty(self) -> Tensor:
        """[N]: the coefficient times the KL of what sampled each response from the reference, summed over tokens."""
        objective, work = self.recipe.objective, self.work
        penalty_N = torch.zeros(len(work.samples))
        for batch, reference_BR in zip(self.batches, self._reference, strict=True):
            behaviour_BR = work.behaviour_NR[batch.indices, : reference_BR.shape[1]]
            mask_BR = usable_tokens(behaviour_BR, batch.response_mask_BR.cpu())
            kl_BR = kl_estimate(behaviour_BR, reference_BR.cpu(), mask_BR, objective.kl_estimator)
            penalty_N[batch.indices] = objective.kl_coef * kl_BR.sum(dim=1)
        return penalty_N

    def _weight_sums(self) -> Denominators:
        total = Denominators()
        for index, proximal_BR in enumerate(self._proximal):
            inputs = self._policy_batch(index, proximal_BR)
            total = total + count_weights(proximal_BR, inputs.behaviour_BT, inputs.mask_BT, self.recipe.correction)
        return total


def _staleness(work: Work, version: int) -> tuple[float, float]:
    """Over rollouts: learner version minus the version of the oldest token."""
    oldest_N = torch.where(work.mask_NR, work.versions_NR, version).amin(dim=1)
    return float((version - oldest_N).sum()), float(len(oldest_N))
