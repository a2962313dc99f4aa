"""Watching a discriminator while it judges: alarms, the weight its signal deserves, and whether it is being gamed.

Noise that is normalised to full-size updates makes a policy worse, and a judge that tells every pair apart teaches it
nothing. Plain Python on a step's figures; the trainer owns one of each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from prism_ray.config.discriminator import GateSettings, GuardSettings
from prism_ray.discriminator.objective import pair_accuracy
from prism_ray.discriminator.scorer import Judged
from prism_ray.records import Group, Prompt

ALARMS = ("separable", "chance", "drift", "saturation")


@dataclass
class _Watch:
    """One alarm of one view: whether it rings, and for how many steps in a row the figures have said otherwise."""

    rings: bool = False
    against: int = 0


@dataclass
class _Course:
    """How the gap of a view has moved: in the first `patience` steps, and in the last two times `patience`."""

    patience: int
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def add(self, gap: float) -> float:
        """Take the gap of a step; returns how far it lies above that of the first steps (0 in those)."""
        self.last = [*self.last, gap][-2 * self.patience :]
        if len(self.first) < self.patience:
            self.first.append(gap)
            return 0.0
        return gap - fmean(self.first)

    @property
    def closed(self) -> float | None:
        """By what share of itself the gap has become smaller from the older to the newer half of the last steps; None
        while they are too few to tell."""
        if len(self.last) < max(2, self.patience):
            return None
        half = len(self.last) // 2
        before, after = fmean(self.last[:half]), fmean(self.last[half:])
        return (before - after) / max(abs(before), 1e-9)


class Alarms:
    """Per view: all pairs told apart while the gap does not close (`separable`), or none (`chance`), a gap that has
    grown since the start (`drift`), heads stuck at the clip (`saturation`).

    Telling every pair apart is no fault in itself: in healthy runs of the testbed the likelihood form did so for most
    of alignment, while its gap fell by two thirds and the policy improved. Where the gap stays, nothing is learned.

    An alarm begins after `patience` steps in a row that call for it, and ends after as many that do not; a step without
    the figure counts as neither.
    """

    def __init__(self, settings: GuardSettings, views: Sequence[str]) -> None:
        self.settings = settings
        self._watches = {f"{name}/{view}": _Watch() for name in ALARMS for view in views}
        self._courses = {view: _Course(settings.patience) for view in views}
        self.begun: set[str] = set()
        """The remedies of the alarms that began with the last update."""

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Take the figures of a step; returns a sentence for every alarm that begins or ends with it."""
        sentences = []
        self.begun = set()
        for view in self._courses:
            for name, (figure, called) in self._calls(view, metrics).items():
                watch = self._watches[f"{name}/{view}"]
                watch.against = watch.against + 1 if called != watch.rings else 0
                if watch.against >= self.settings.patience:
                    watch.rings, watch.against = called, 0
                    self.begun |= {self.settings.remedy(name)} if called else set()
                    sentences.append(self._sentence(name, view, figure, called))
        return sentences

    def metrics(self) -> dict[str, float]:
        """`discriminator/alarm/<name>/<view>`: 1 while it rings."""
        return {f"discriminator/alarm/{name}": float(watch.rings) for name, watch in self._watches.items()}

    def remedies(self) -> set[str]:
        """The remedies that the alarms which ring now call for."""
        return {self.settings.remedy(name.split("/")[0]) for name, watch in self._watches.items() if watch.rings}

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        watches = {name: [watch.rings, watch.against] for name, watch in self._watches.items()}
        return {"watches": watches, "gaps": {view: [c.first, c.last] for view, c in self._courses.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        self._watches |= {name: _Watch(*values) for name, values in state["watches"].items()}
        for view, (first, last) in state["gaps"].items():
            self._courses[view] = _Course(self.settings.patience, list(first), list(last))

    def _calls(self, view: str, metrics: Mapping[str, float]) -> dict[str, tuple[float, bool]]:
        """Figure of every alarm that this step says something of, and whether it calls for the alarm."""
        limits, calls, course = self.settings, {}, self._courses[view]
        gap = metrics.get(f"discriminator/train/gap/{view}")
        if gap is not None and math.isfinite(gap):
            drift = course.add(gap)
            calls["drift"] = (drift, drift > limits.gap_drift)
        accuracy = metrics.get(f"discriminator/train/pair_accuracy/{view}")
        if accuracy is not None:
            calls["separable"] = (accuracy, accuracy > limits.high_accuracy and self._stays(course))
            calls["chance"] = (accuracy, accuracy < limits.low_accuracy)
        stuck = metrics.get(f"discriminator/train/saturated/{view}")
        if stuck is not None:
            calls["saturation"] = (stuck, stuck > limits.saturation)
        return calls

    def _stays(self, course: _Course) -> bool:
        """Whether the gap is known not to close."""
        least = self.settings.gap_closing
        return least is None or (course.closed is not None and course.closed < least)

    def _sentence(self, name: str, view: str, figure: float, begins: bool) -> str:
        what = {
            "separable": "pair accuracy",
            "chance": "pair accuracy",
            "drift": "growth of the gap since the start",
            "saturation": "share of scores at the clip",
        }[name]
        remedy = self.settings.remedy(name)
        said = f"discriminator alarm {name} ({view}) {'begins' if begins else 'ends'}: {what} {figure:.3f}"
        cure = "" if remedy == "none" else f"; remedy {remedy} {'starts' if begins else 'stops'}"
        return f"{said} for {self.settings.patience} steps{cure}"


def frozen_views(metrics: Mapping[str, float], settings: GuardSettings) -> set[str]:
    """The views that an alarm with the remedy `freeze_policy` rings for, from the metrics of a step."""
    names = [name for name in ALARMS if settings.remedy(name) == "freeze_policy"]
    prefixes = tuple(f"discriminator/alarm/{name}/" for name in names)
    return {key.rsplit("/", 1)[1] for key, rings in metrics.items() if rings and key.startswith(prefixes)}


def gate_weight(accuracy: float, settings: GateSettings) -> float:
    """0 up to chance + tolerance, 1 from `full_accuracy`, linear between."""
    low = 0.5 + settings.tolerance
    return min(1.0, max(0.0, (accuracy - low) / (settings.full_accuracy - low)))


class Gate:
    """With which weight each view's signal deserves to move the policy, from its pair accuracy over the last groups.

    A group counts when it is judged, before the discriminator has trained on it: its pairs are held out. Until the
    first has come every weight is 1, for the warm-up's target has been reached.
    """

    def __init__(self, settings: GateSettings, views: Sequence[str]) -> None:
        self.settings = settings
        self._recent: dict[str, deque[tuple[float, int]]] = {v: deque(maxlen=settings.window) for v in views}

    def see(self, groups: Sequence[Mapping[str, tuple[float, int]]]) -> None:
        """Count these groups, each as `told_apart` gives it; one whose pairs are all identical says nothing."""
        for counts in groups:
            for view, recent in self._recent.items():
                if counts[view][1]:
                    recent.append(counts[view])

    def accuracy(self, view: str) -> float | None:
        """Over the pairs of the last groups; None before the first."""
        count = sum(pairs for _, pairs in self._recent[view])
        return sum(right for right, _ in self._recent[view]) / count if count else None

    def weights(self) -> dict[str, float]:
        """The weight of every view, in 0..1."""
        found = {view: self.accuracy(view) for view in self._recent}
        return {v: 1.0 if a is None else gate_weight(a, self.settings) for v, a in found.items()}

    def metrics(self) -> dict[str, float]:
        """`discriminator/gate/<view>` and the accuracy it comes from."""
        metrics = {f"discriminator/gate/{view}": weight for view, weight in self.weights().items()}
        known = {view: a for view in self._recent if (a := self.accuracy(view)) is not None}
        return metrics | {f"discriminator/gate_accuracy/{view}": a for view, a in known.items()}

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        return {view: [list(entry) for entry in recent] for view, recent in self._recent.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        for view, recent in self._recent.items():
            recent.clear()
            recent.extend((right, count) for right, count in state[view])


def told_apart(judged: Judged) -> dict[str, tuple[float, int]]:
    """Per view, of the pairs that differ: how many are ordered rightly (a tie is half of one), and their number."""
    counts = {}
    for view, rows in judged.rows.items():
        accuracy, count = pair_accuracy(*rows.unbind(1))
        counts[view] = (accuracy * count if count else 0.0, count)
    return counts


def gated(group: Group, weights: Mapping[str, float]) -> Group:
    """The judged group, with the gate's `weights` of the views among the parts of every verdict (`gate/<view>`)."""
    parts = {f"gate/{view}": weight for view, weight in weights.items()}
    return group.judged([replace(v, parts={**v.parts, **parts}) for v in group.verdicts])


Truth = Callable[[str, Prompt], Mapping[str, float]]
"""What of a response is right, given its text and prompt: numbers by name (`evaluate.truth`)."""


Told = list[tuple[dict[str, float], dict[str, float]]]
"""Of one prompt's rollouts: the scores by view, and what of each is right."""


def watch_metrics(groups: Sequence[Group], truth: Truth) -> dict[str, float]:
    """`discriminator/watch/<view>/<truth>`: rank correlation, within prompts, of score and truth over judged groups.

    It asks what the policy is taught: of the rollouts of one prompt, are the better ones liked better? A score that is
    gamed rises while this falls. Prompts without a ground truth, or of which `truth` cannot tell (KeyError,
    ValueError), are left out, and so is a correlation that nothing varies in.
    """
    return watch_figures([told(group, truth) for group in groups])


def watch_figures(groups: Sequence[Told]) -> dict[str, float]:
    """`watch_metrics` of what `told` found."""
    scores: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for rollouts in groups:
        for view in rollouts[0][0] if rollouts else ():
            for name in rollouts[0][1]:
                score_N = torch.tensor([score[view] for score, _ in rollouts], dtype=torch.float64)
                truth_N = torch.tensor([right[name] for _, right in rollouts], dtype=torch.float64)
                scores.setdefault((view, name), []).append((score_N, truth_N))
    found = {key: rank_correlation(pairs) for key, pairs in scores.items()}
    return {f"discriminator/watch/{view}/{name}": value for (view, name), value in found.items() if value is not None}


def told(group: Group, truth: Truth) -> Told:
    """Scores and truth of every valid rollout of a judged group; nothing of a group without verdicts."""
    if not group.prompt.ground_truth or not group.verdicts:
        return []
    scored = [(v.scores, r.text) for r, v in zip(group.rollouts, group.verdicts, strict=True) if v.scores]
    try:
        return [(scores, dict(truth(text, group.prompt))) for scores, text in scored]
    except (KeyError, ValueError):
        return []


def rank_correlation(groups: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Spearman's correlation within groups: of the ranks in each group, centred, over all groups together.

    Equal values share their mean rank. Groups in which either side does not vary say nothing; None if all are such.
    """
    centred = [(_centred_ranks(x), _centred_ranks(y)) for x, y in groups]
    telling = [(x, y) for x, y in centred if x.any() and y.any()]
    if not telling:
        return None
    x, y = (torch.cat(side) for side in zip(*telling, strict=True))
    return float((x @ y) / (x.norm() * y.norm()))


def _centred_ranks(values_N: Tensor) -> Tensor:
    below_N = (values_N[:, None] > values_N).double().sum(1)
    equal_N = (values_N[:, None] == values_N).double().sum(1)
    return below_N + equal_N / 2 - len(values_N) / 2
