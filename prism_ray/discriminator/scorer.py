"""From a group of rollouts to verdicts: every view of every rollout against the reference of their prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from prism_ray.config.discriminator import DiscriminatorSettings
from prism_ray.config.views import shares_of
from prism_ray.discriminator.model import Discriminator
from prism_ray.discriminator.objective import pair_accuracy
from prism_ray.discriminator.segments import (
    FAULTS,
    ResponseViews,
    ViewSequence,
    distinct,
    judged_batches,
    seen_prompts,
    view_sequences,
)
from prism_ray.models.encode import Encoder
from prism_ray.records import Group, Verdict


class BadReference(ValueError):
    """A prompt without a usable reference; the corpus should have held it back."""


@dataclass(frozen=True, eq=False)
class GroupViews:
    """A group cut into sequences: those of its reference and of each rollout, in the rollouts' order."""

    group: Group
    reference: ResponseViews
    rollouts: tuple[ResponseViews, ...]

    def identical(self, rollout: int, view: str) -> bool:
        """Whether the judge sees the same of the rollout as of the reference: text, and context if there is any."""
        return self.rollouts[rollout].sequences[view].key == self.reference.sequences[view].key


def group_views(groups: Sequence[Group], encoder: Encoder, settings: DiscriminatorSettings) -> list[GroupViews]:
    """Cut groups into sequences; raises BadReference, naming the prompt, if a reference cannot be judged."""
    done = []
    for group, prompt in zip(groups, seen_prompts([g.prompt for g in groups], encoder, settings), strict=True):
        reference = view_sequences(prompt, group.prompt.reference, encoder, settings)
        if not reference.valid:
            reason = f"its reference is malformed ({reference.reason})"
            raise BadReference(f"prompt {group.prompt.id}: {reason}; drop the row from the corpus")
        rollouts = tuple(view_sequences(prompt, r.text, encoder, settings, reference) for r in group.rollouts)
        done.append(GroupViews(group, reference, rollouts))
    return done


@torch.no_grad()
def score_sequences(model: Discriminator, sequences: Sequence[ViewSequence]) -> Tensor:
    """Scores [N] of these sequences, float32 on the CPU, without dropout; equal sequences are computed once."""
    if not sequences:
        return torch.zeros(0)
    was_training = model.training
    model.eval()
    unique, rows = distinct(sequences)
    scores = torch.empty(len(unique))
    for judged in judged_batches(unique, model.settings.micro_batch_tokens):
        scores[judged.batch.indices] = model(judged.to(model.device)).score_B.cpu()
    model.train(was_training)
    return scores[rows]


@dataclass(frozen=True, eq=False)
class Judged:
    """A group with its verdicts, and what metrics are made of: per view a row [P, 3] for each valid rollout, of the
    reference's score, the rollout's, and whether the judge saw the same text (and context) in both; and `seen`, by
    metric a value (0 or 1) for each response that it is about."""

    group: Group
    rows: dict[str, Tensor]
    seen: dict[str, list[float]] = field(default_factory=dict)


def judge(model: Discriminator, encoder: Encoder, groups: Sequence[Group], version: int) -> list[Judged]:
    """Every rollout's verdict by the discriminator of this `version`, all groups scored together.

    An invalid response is not scored: its verdict has reward 0, no scores, and the reason.
    """
    cut = group_views(groups, encoder, model.settings)
    responses = [r for views in cut for r in (views.reference, *views.rollouts)]
    scores = iter(score_sequences(model, [s for r in responses for s in r.sequences.values()]).tolist())
    by_response = iter([{view: next(scores) for view in r.sequences} for r in responses])
    return [_judged(views, by_response, model.settings, version) for views in cut]


def judged_metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """Share of valid rollouts, of invalid ones by their fault, of groups without a valid one, and of views that were
    cut; gap, share of identical texts and pair accuracy per view, over all pairs."""
    valid = [v.valid for j in judged for v in j.group.verdicts]
    metrics = {"discriminator/valid": fmean(valid)} if valid else {}
    for name in {name: None for j in judged for name in j.seen}:
        metrics[name] = fmean(value for j in judged for value in j.seen.get(name, ()))
    for view in judged[0].rows if judged else ():
        metrics |= pair_metrics("discriminator", view, torch.cat([j.rows[view] for j in judged]))
    return metrics


def _judged(
    views: GroupViews, scores: Iterator[dict[str, float]], settings: DiscriminatorSettings, version: int
) -> Judged:
    reference = next(scores)
    verdicts: list[Verdict] = []
    rows: dict[str, list[tuple[float, float, bool]]] = {view: [] for view in reference}
    for index, response in enumerate(views.rollouts):
        own = next(scores)
        verdicts.append(verdict_of(response, own, reference, settings, version))
        for view, score in own.items():
            rows[view].append((reference[view], score, views.identical(index, view)))
    tensors = {view: torch.tensor(r, dtype=torch.float32).reshape(-1, 3) for view, r in rows.items()}
    return Judged(views.group.judged(verdicts), tensors, _seen(views))


def _seen(views: GroupViews) -> dict[str, list[float]]:
    """What the judge met besides texts to judge: by metric, of which of the responses it is true."""
    valid = [r for r in views.rollouts if r.valid]
    seen = {f"discriminator/invalid/{fault}": [float(r.fault == fault) for r in views.rollouts] for fault in FAULTS}
    seen["discriminator/groups_without_valid"] = [float(not valid)]
    for view, sequence in views.reference.sequences.items():
        seen[f"discriminator/cut/{view}"] = [float(r.sequences[view].cut) for r in valid]
        seen[f"discriminator/cut_reference/{view}"] = [float(sequence.cut)]
    return {name: values for name, values in seen.items() if values}


def verdict_of(
    response: ResponseViews,
    own: dict[str, float],
    reference: dict[str, float],
    settings: DiscriminatorSettings,
    version: int,
) -> Verdict:
    """The verdict on a response by its scores and its reference's."""
    if not response.valid:
        return Verdict(0.0, False, response.reason, judge_version=version)
    parts = {view: _sigmoid((own[view] - reference[view]) / settings.temperature) for view in own}
    reward = sum(share * parts[view] for view, share in shares_of(settings.views).items())
    return Verdict(reward, True, "", own, dict(reference), parts, version)


def _sigmoid(x: float) -> float:
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def pair_metrics(prefix: str, view: str, rows_P3: Tensor) -> dict[str, float]:
    """Gap, share of identical texts and pair accuracy of a view, from rows (reference score, rollout score, identical).

    What cannot be said is left out: everything without pairs, the accuracy if all pairs are identical.
    """
    if not len(rows_P3):
        return {}
    reference_P, rollout_P, identical_P = rows_P3.unbind(1)
    accuracy, count = pair_accuracy(reference_P, rollout_P, identical_P)
    metrics = {
        f"{prefix}/gap/{view}": float((reference_P - rollout_P).mean()),
        f"{prefix}/identical/{view}": float(identical_P.float().mean()),
    }
    return metrics | ({f"{prefix}/pair_accuracy/{view}": accuracy} if count else {})
