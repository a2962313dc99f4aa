"""What could fool one about a discriminator: shortcuts that explain it, and sides that are not scored alike.

A judge that tells references from rollouts by their length, their last token or their layout has a high pair accuracy
and teaches a policy nothing else. Each shortcut gets a logistic regression of its own that sees nothing but it; where
that orders held-out pairs about as well as the discriminator does, the discriminator may be doing the same.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.guards import Truth, watch_metrics
from prism_ray.discriminator.model import Discriminator
from prism_ray.discriminator.objective import calibration_error, pair_accuracy
from prism_ray.discriminator.scorer import GroupViews, Judged, group_views, judge, judged_metrics, score_sequences
from prism_ray.discriminator.segments import ViewSequence
from prism_ray.discriminator.spread import score_quantiles, scores_of
from prism_ray.models.encode import Encoder
from prism_ray.records import Group, Rollout
from prism_ray.response import parse

FOLDS = 4
"""A probe is tested on the prompts of one fold and fitted on those of the others, in turn."""

RIDGE = 1.0
"""Weight of |w|² / 2 against the summed loss of the pairs a probe is fitted on: what a pair or two show is no rule."""


class CanaryBreach(RuntimeError):
    """A reference and a rollout of the same text got different scores."""


@dataclass(frozen=True)
class Side:
    """All that probes see of one view of one response: its tokens, those of the end included, and its text."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ProbePair:
    """A reference and a rollout that differ; `fold` is the same for all pairs of a prompt."""

    fold: int
    reference: Side
    rollout: Side


Features = Callable[[Side], dict[str, float]]


def length_features(side: Side) -> dict[str, float]:
    """How long the view is in tokens, and in which quarter of an octave: too short and too long can both be told."""
    size = math.log2(1 + len(side.tokens))
    return {"octaves": size, f"about {round(4 * size)}": 1.0}


def last_token_features(side: Side) -> dict[str, float]:
    """Which token the head reads, and which one stands before it."""
    return {f"{back} {token}": 1.0 for back, token in enumerate(reversed(side.tokens[-2:]))}


_LAYOUT = {
    "newlines": r"\n",
    "bullets": r"(?m)^\s*(?:[-*•]|\d+[.)])\s",
    "markdown": r"[*_#`|\\$]",
    "digits": r"\d",
    "capitals": r"[A-Z]",
    "punctuation": r"[.,;:!?]",
    "double spaces": r"  ",
    "spaces": r" ",
}
_EDGES = {"space after a tag": r"<\w+>\s", "space before a tag": r"\s</", "full stop before a tag": r"\.\s*</"}


def format_features(side: Side) -> dict[str, float]:
    """Layout without words: how often its marks come per character (so that length is left out), and what stands
    beside the tags."""
    size = max(len(side.text), 1)
    shares = {name: len(re.findall(pattern, side.text)) / size for name, pattern in _LAYOUT.items()}
    return shares | {name: float(bool(re.search(pattern, side.text))) for name, pattern in _EDGES.items()}


PROBES: dict[str, tuple[Features, str]] = {
    "length": (
        length_features,
        "compare how long references and rollouts are, or raise discriminator.length_debias",
    ),
    "last_token": (last_token_features, "look at how references and rollouts end"),
    "format": (format_features, "give references the layout that the policy was taught"),
}
"""Name -> what the probe sees, and what to do where it explains the discriminator."""


def probe_pairs(groups: Sequence[GroupViews], view: str) -> list[ProbePair]:
    """The pairs of a view that the judge does not see as the same text in the same context."""
    pairs = []
    for fold, views in enumerate(groups):
        reference = _side(views.reference.sequences[view])
        for index, response in enumerate(views.rollouts):
            if response.valid and not views.identical(index, view):
                pairs.append(ProbePair(fold, reference, _side(response.sequences[view])))
    return pairs


def _side(sequence: ViewSequence) -> Side:
    return Side(sequence.token_ids[sequence.start :], sequence.text)


def probe_metrics(groups: Sequence[GroupViews]) -> dict[str, float]:
    """Held-out pair accuracy of every probe, `discriminator/probe/<probe>/<view>`; left out where a view has pairs of
    fewer than two prompts."""
    metrics = {}
    for view in groups[0].reference.sequences if groups else ():
        pairs = probe_pairs(groups, view)
        for name, (features, _) in PROBES.items() if len({p.fold for p in pairs}) > 1 else ():
            metrics[f"discriminator/probe/{name}/{view}"] = probe_accuracy(pairs, features)
    return metrics


def probe_accuracy(pairs: Sequence[ProbePair], features: Features) -> float:
    """Share of pairs, of at least two prompts, that a logistic regression on `features` alone orders rightly, each by
    one that was fitted on other prompts. A tie counts one half."""
    names = {prompt: rank % FOLDS for rank, prompt in enumerate(sorted({p.fold for p in pairs}))}
    fold_P = torch.tensor([names[p.fold] for p in pairs])
    difference_PF = _differences(pairs, features)
    gap_P = torch.zeros(len(pairs), dtype=torch.float64)
    for fold in range(min(FOLDS, len(names))):
        weight_F = fit_logistic(difference_PF[fold_P != fold])
        gap_P[fold_P == fold] = difference_PF[fold_P == fold] @ weight_F
    return pair_accuracy(gap_P, torch.zeros_like(gap_P), torch.zeros(len(pairs)))[0]


def _differences(pairs: Sequence[ProbePair], features: Features) -> Tensor:
    """Features of the reference minus those of the rollout, [P, F], each in units of its root mean square."""
    rows = [(features(p.reference), features(p.rollout)) for p in pairs]
    columns = sorted({name for pair in rows for side in pair for name in side})
    table = [[left.get(c, 0.0) - right.get(c, 0.0) for c in columns] for left, right in rows]
    difference_PF = torch.tensor(table, dtype=torch.float64)
    scale_F = difference_PF.square().mean(0).sqrt()
    return difference_PF / torch.where(scale_F > 0, scale_F, 1.0)


def fit_logistic(difference_PF: Tensor) -> Tensor:
    """The w [F] that minimises Σ −log σ(difference · w) + RIDGE · |w|² / 2; convex, so it depends on nothing else.

    There is no intercept: which side of a pair is the reference is known, and its differences point from it.
    """
    weight_F = torch.zeros(difference_PF.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight_F], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.softplus(-difference_PF @ weight_F).sum() + RIDGE / 2 * weight_F.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]
    return weight_F.detach()


def shortcut_warnings(metrics: Mapping[str, float], margin: float) -> list[str]:
    """A sentence for every probe that comes within `margin` of the discriminator's pair accuracy, and is itself by more
    than `margin` better than chance. `metrics` hold both."""
    found = []
    for name, (_, cure) in PROBES.items():
        prefix = f"discriminator/probe/{name}/"
        for view in [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]:
            probe = metrics[prefix + view]
            accuracy = metrics.get(f"discriminator/pair_accuracy/{view}", 1.0)
            if probe >= accuracy - margin and probe > 0.5 + margin:
                found.append(
                    f"{name.replace('_', ' ')} alone orders {probe:.2f} of the held-out {view} pairs, the "
                    f"discriminator {accuracy:.2f}: it may see nothing else; {cure}"
                )
    return found


def check_canary(model: Discriminator, encoder: Encoder, group: Group) -> float:
    """The gap between the group's reference and the same text as a rollout: exactly 0 in every view, which it returns.

    Each side is computed by itself (together, equal sequences would be computed once), so that a score that depends on
    more than its text is seen, too. Raises CanaryBreach otherwise: whatever then tells the sides apart is not in the
    text, and pays in every pair.
    """
    none, logp = np.zeros(0, np.int32), np.zeros(0, np.float32)
    same = Rollout(group.prompt.id, 0, none, none, logp, none, group.prompt.reference, "stop")
    (cut,) = group_views([Group(group.id, group.prompt, (same,))], encoder, model.settings)
    (copy,) = cut.rollouts
    if not copy.valid:
        raise CanaryBreach(f"prompt {group.prompt.id}: its reference, taken as a rollout, is refused: {copy.reason}")
    scores, again = (score_sequences(model, list(side.sequences.values())).tolist() for side in (cut.reference, copy))
    for view, score, other in zip(copy.sequences, scores, again, strict=True):
        if score != other:
            raise CanaryBreach(
                f"prompt {group.prompt.id}: the {view} of its reference scores {score:.4f} and the same text as a "
                f"rollout {other:.4f}; both sides must be tokenised, cut, ended and scored alike"
            )
    return 0.0


@dataclass(frozen=True)
class Examination:
    """What a discriminator is worth on prompts that it was not trained on.

    `metrics` are gap, pair accuracy, calibration error and probes per view, `warnings` sentences about shortcuts,
    `worst` the pairs of each view that it is most wrong about, as JSON-able rows, the worst first.
    """

    metrics: dict[str, float]
    warnings: list[str]
    worst: list[dict[str, Any]]


def examine(
    model: Discriminator,
    encoder: Encoder,
    groups: Sequence[Group],
    version: int,
    worst: int,
    margin: float,
    truth: Truth | None = None,
) -> Examination:
    """Examine on these groups; `worst` pairs of each view are named, a probe warns from `margin` below the accuracy.

    With a `truth` the metrics also say whether scores agree with it.
    """
    judged = judge(model, encoder, groups, version)
    metrics = judged_metrics(judged) | calibration_metrics(judged)
    metrics |= probe_metrics(group_views(groups, encoder, model.settings))
    metrics |= score_quantiles(scores_of(j.group for j in judged))
    if truth is not None:
        metrics |= watch_metrics([j.group for j in judged], truth)
    rows = [row for view in model.settings.views for row in worst_pairs(judged, view, worst)]
    return Examination(metrics, shortcut_warnings(metrics, margin), rows)


def calibration_metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """Expected calibration error of σ(gap) per view over pairs that are not identical; left out if there are none."""
    metrics = {}
    for view in judged[0].rows if judged else ():
        reference_P, rollout_P, identical_P = torch.cat([j.rows[view] for j in judged]).unbind(1)
        gap_P = (reference_P - rollout_P)[~identical_P.bool()]
        if len(gap_P):
            metrics[f"discriminator/calibration_error/{view}"] = calibration_error(gap_P)
    return metrics


def worst_pairs(judged: Sequence[Judged], view: ViewSettings, count: int) -> list[dict[str, Any]]:
    """The `count` pairs of a view with the lowest gap, of those that are not identical: ids, scores, the view's two
    texts, question and image (as the corpus has it, base64). Where the gap is above 0 even these are ordered rightly.
    """
    found = []
    for each in judged:
        valid = [i for i, verdict in enumerate(each.group.verdicts) if verdict.valid]
        for index, (reference, rollout, identical) in zip(valid, each.rows[view.name].tolist(), strict=True):
            if not identical:
                found.append((reference - rollout, each.group, index, reference, rollout))
    found.sort(key=lambda row: (row[0], row[1].id, row[2]))
    return [_row(view, *row) for row in found[:count]]


def _row(view: ViewSettings, gap: float, group: Group, index: int, reference: float, rollout: float) -> dict[str, Any]:
    prompt, sampled = group.prompt, group.rollouts[index]
    return {
        "view": view.name,
        "prompt_id": prompt.id,
        "group_id": group.id,
        "rollout": sampled.index,
        "gap": gap,
        "reference_score": reference,
        "rollout_score": rollout,
        "question": prompt.messages[-1]["content"],
        "image": base64.b64encode(prompt.images[0]).decode() if prompt.images else "",
        "reference": _text_of(view, prompt.reference),
        "response": _text_of(view, sampled.text),
    }


def _text_of(view: ViewSettings, text: str) -> str:
    low, high = parse(text, [view]).spans[view.name]
    return text.encode(errors="replace")[low:high].decode(errors="replace")
