"""What a served discriminator's answer means for a group, pure: verdicts as the run's own discriminator gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from prism_ray.config.runtime import HIGHEST, LOWEST
from prism_ray.config.served import ServedSettings
from prism_ray.config.views import ViewSettings
from prism_ray.discriminator.scorer import Judged, judged_metrics
from prism_ray.endpoint.wire import ModelAnswer, ScoreAnswer, Scored, ViewAnswer
from prism_ray.records import Group, Verdict


class OtherJudge(ValueError):
    """The endpoint serves a discriminator that this run cannot use."""


def check_model(model: ModelAnswer, settings: ServedSettings, views: Sequence[ViewSettings]) -> None:
    """Raise OtherJudge unless the endpoint judges the run's views, in the version it asks for."""
    ours, theirs = [(v.name, list(v.tags)) for v in views], [(v.name, v.tags) for v in model.views]
    if ours != theirs:
        named = ["; ".join(f"{name} ({' + '.join(tags)})" for name, tags in some) for some in (theirs, ours)]
        raise OtherJudge(f"{settings.url} judges {named[0]} but discriminator.views are {named[1]}; make them equal")
    if settings.version not in (None, model.model.version):
        raise OtherJudge(
            f"{settings.url} serves version {model.model.version} but served.version is {settings.version}; "
            "serve that one, or change the setting knowingly"
        )
    if model.sees_images and not settings.images:
        raise OtherJudge(f"{settings.url} looks at images but served.images is false; set it to true")


def not_taken(texts: Sequence[str], model: ModelAnswer) -> dict[int, Scored]:
    """What is said of the responses, by their index, that the endpoint would refuse for their length, and the whole
    request with them."""
    limit = model.limits.get("response_bytes", math.inf)
    sizes = enumerate(len(text.encode(errors="replace")) for text in texts)
    why = f"bytes, and the endpoint takes {limit:.0f} (its limits.response_bytes)"
    return {index: Scored(valid=False, reason=f"{size} {why}") for index, size in sizes if size > limit}


def judged_group(group: Group, answer: ScoreAnswer, model: ModelAnswer) -> tuple[Group, dict[str, float]]:
    """The group with its verdicts, and its metrics. OtherJudge if somebody else than `model` has answered."""
    if answer.model != model.model:
        raise OtherJudge(
            f"the endpoint went over from version {model.model.version} to {answer.model.version} while a phase was "
            "under way, which would mix two judges; serve the first again, or start the phase anew"
        )
    reference = answer.reference
    assert reference is not None, "a group is sent with its reference"
    verdicts = [_verdict(scored, reference, model) for scored in answer.results]
    texts = [rollout.text for rollout in group.rollouts]
    rows = {view.name: _rows(index, texts, group, answer, model) for index, view in enumerate(model.views)}
    judged = Judged(group.judged(verdicts), rows)
    return judged.group, judged_metrics([judged]) | _ranges(verdicts, list(rows))


def _ranges(verdicts: Sequence[Verdict], views: Sequence[str]) -> dict[str, float]:
    """What RLVR's dynamic sampling looks at: the reward's range in the group, and that of its part for each view."""
    columns = {"reward": [v.reward for v in verdicts]} | {n: [v.parts.get(n, 0.0) for v in verdicts] for n in views}
    lowest = {f"{LOWEST}{name}": min(values) for name, values in columns.items()}
    return lowest | {f"{HIGHEST}{name}": max(values) for name, values in columns.items()}


def _verdict(scored: Scored, reference: Scored, model: ModelAnswer) -> Verdict:
    if not scored.valid:
        return Verdict(0.0, False, scored.reason)
    gap = scored.gap or {}
    parts = {view: 1 / (1 + math.exp(min(gap[view] / model.temperature, 700.0))) for view in scored.scores}
    return Verdict(scored.reward or 0.0, True, "", dict(scored.scores), dict(reference.scores), parts)


def _rows(index: int, texts: Sequence[str], group: Group, answer: ScoreAnswer, model: ModelAnswer) -> torch.Tensor:
    """Of a view, for each valid response: the reference's score, its own, whether both read alike."""
    view, reference = model.views[index], answer.reference
    assert reference is not None
    rows = []
    for text, scored in zip(texts, answer.results, strict=True):
        if scored.valid:
            seen = _seen(index, text, scored, model.views)
            alike = seen == _seen(index, group.prompt.reference, reference, model.views)
            rows.append((reference.scores[view.name], scored.scores[view.name], alike))
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)


def _seen(index: int, text: str, scored: Scored, views: Sequence[ViewAnswer]) -> list[str]:
    """The parts of a response that its view is judged by."""
    first = 0 if views[index].context == "own" else index
    spans = [scored.spans[view.name] for view in views[first : index + 1]]
    return [text[span.start : span.stop] for span in spans]
