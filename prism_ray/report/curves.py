"""The training curves of a run's page: panels over steps, from a run's history to HTML; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from prism_ray.report.history import History, Points
from prism_ray.report.plots import COLOURS, Line, line_plot
from prism_ray.report.sections import table

STAGES = {
    "align": "align",
    "rlvr": "rlvr (prism+grpo)",
    "rlvr-sft": "rlvr-sft (sft+grpo)",
    "rlvr-references": "rlvr-references (sft+references+grpo)",
    "warmup": "warmup",
    "base": "base",
    "sft": "sft",
    "references": "references",
}
"""What stages are called in legends; their order fixes their colours, the same in every plot."""

MOST_OTHERS = 300
"""Metrics without a panel of their own that are drawn all the same; the rest is only counted."""


@dataclass(frozen=True)
class Panel:
    """A plot: its title, what it means, its metrics (solid, then dashed) and a reference level.

    `judged` restricts it to stages with a discriminator (True) or without one (False); `by` divides the metrics; of a
    `share` all from 0 to 1 is shown.
    """

    title: str
    meaning: str
    metrics: tuple[str, ...]
    reference: float | None = None
    judged: bool | None = None
    by: str | None = None
    share: bool = False


TRAINING = (
    Panel("Reward in alignment", "mean reward from the discriminator", ("reward/mean",), judged=True),
    Panel("Reward in RLVR", "mean reward from the verifier, all arms", ("reward/mean",), judged=False),
    Panel("Well-formed responses", "share that keeps the format", ("reward/format",)),
    Panel("Response length", "mean tokens of a response", ("rollout/response_tokens",)),
    Panel("Groups dropped", "share of judged groups in which all rollouts were alike", ("reward/dropped_share",)),
    Panel("Policy loss", "mean over tokens", ("policy/loss",)),
    Panel("Entropy of the policy", "mean over tokens, nats", ("policy/entropy",)),
    Panel("Supervised loss", "mean cross-entropy of the stages before the loop", ("supervised/loss",)),
)
ASYNCHRONY = (
    Panel("Staleness of the policy",
          "policy versions between a rollout's oldest token and its update; solid most, dashed mean",
          ("staleness/max", "staleness/mean")),
    Panel("Staleness of the judge",
          "judge versions between a group's verdicts and the update they teach; solid most, dashed mean",
          ("staleness/judge_max", "staleness/judge_mean")),
    Panel("Effective sample share", "of the off-policy correction's weights; 1 = on-policy", ("correction/ess",), 1.0),
    Panel("Learner waits for data", "share of a step's time; near 0 the learner is the bottleneck, near 1 it starves",
          ("learner/wait_share",), share=True),
    Panel("Engines wait for weights",
          "share of the time in which no group is being sampled, since the gate opens with new weights",
          ("rollout/wait_share",), share=True),
    Panel("Engines paused for weights", "share of a step's time in which decoding is paused to take new weights",
          ("weights/paused_s",), by="time/step_s"),
    Panel("Judge waits for rollouts", "share of the time in which the judge neither judges nor learns",
          ("judge/wait_share",), share=True),
    Panel("Groups under way", "groups at the start of a step; solid being sampled, dashed waiting for a verdict",
          ("loop/generating", "loop/judging")),
    Panel("Time of a step", "seconds", ("time/step_s",)),
    Panel("Tokens per second", "sampled by all engines, from one handing over of weights to the next",
          ("rollout/tokens_per_second",)),
    Panel("Sampled or judged again", "groups a step; solid verdicts too old, dashed (in all) tokens too old",
          ("staleness/judged_again", "staleness/given_back")),
)  # fmt: skip


def curves(panels: Sequence[Panel], history: History) -> str:
    """Those of the panels that have data, as a grid; "" if none has."""
    return grid(drawn(panels, history))


def drawn(panels: Sequence[Panel], history: History) -> list[str]:
    """Those of the panels that have data, as figures."""
    return [html for panel in panels if (html := _panel(panel, history))]


_WAITING = {
    "learner": "learner waits for data",
    "rollout": "engines wait for weights",
    "judge": "judge waits for rollouts",
}


def waiting_table(history: History) -> str:
    """A row for every stage of the loop: how its time was spent, and how stale what it trained on was; "" for none."""
    rows = []
    for stage, seconds in history.series("time/step_s").items():
        total = _sum(seconds)
        if total <= 0:
            continue
        waited = [_share(_product(seconds, history.of(stage, f"{who}/wait_share")), total) for who in _WAITING]
        oldest = [_largest(history.of(stage, f"staleness/{side}")) for side in ("max", "judge_max")]
        rows.append([
            escape(stage_name(stage)), f"{total / len(seconds):.2f} s", *waited,
            _share(history.of(stage, "weights/paused_s"), total), *oldest,
        ])  # fmt: skip
    head = ["stage", "mean step", *_WAITING.values(), "engines paused for weights",
            "staleness of the policy, most", "of the judge, most"]  # fmt: skip
    return table(head, rows) if rows else ""


def _share(seconds: Points, total: float) -> str:
    return f"{_sum(seconds) / total:.0%}" if seconds else "–"


def _sum(points: Points) -> float:
    return sum(value for _, value in points if math.isfinite(value))


def _product(first: Points, second: Points) -> Points:
    values = dict(second)
    return [(step, value * values[step]) for step, value in first if step in values]


def _largest(points: Points) -> str:
    return f"{max(finite):.0f}" if (finite := [value for _, value in points if math.isfinite(value)]) else "–"


def other_curves(history: History, shown: set[str]) -> str:
    """Every metric that is not among those `shown`, folded away."""
    names = [name for name in history.names if name not in shown]
    figures = [html for name in names[:MOST_OTHERS] if (html := _panel(Panel(name, "", (name,)), history, small=True))]
    more = f" and {len(names) - MOST_OTHERS} that are not drawn" if len(names) > MOST_OTHERS else ""
    if not figures:
        return ""
    return f"<details><summary>All other metrics ({len(figures)}{more})</summary>{grid(figures)}</details>"


def metrics_of(panels: Sequence[Panel]) -> set[str]:
    """Every metric that these panels draw."""
    return {name for panel in panels for name in panel.metrics}


def grid(figures: Sequence[str]) -> str:
    """Figures beside and under each other, as the page is wide; "" for none."""
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def figure(title: str, meaning: str, plot: str, keys: Mapping[str, int]) -> str:
    """A plot with its title, what it means, and a legend of colours by name."""
    said = f'<p class="meaning">{escape(meaning)}</p>'  # also without words, so that plots lie side by side
    legend = "".join(
        f'<span class="key"><i style="background:var(--c{colour % COLOURS})"></i>{escape(name)}</span>'
        for name, colour in keys.items()
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{said}{plot}<p>{legend}</p></figure>"


def stage_name(stage: str) -> str:
    """What a stage is called in legends."""
    return STAGES.get(stage, stage)


def stage_colour(stage: str, history: History) -> int:
    """Its colour, the same in every plot of the page."""
    return [*STAGES, *(s for s in history.stages if s not in STAGES)].index(stage)


def judged_stages(history: History) -> set[str]:
    """The stages with a discriminator."""
    names = [name for name in history.names if name.startswith("discriminator/")]
    return {stage for stage in history.stages if any(history.of(stage, name) for name in names)}


def _panel(panel: Panel, history: History, small: bool = False) -> str:
    judged = judged_stages(history) if panel.judged is not None else set()
    lines: list[Line] = []
    stages: dict[str, int] = {}
    for number, name in enumerate(panel.metrics):
        for stage, points in _series(panel, name, history).items():
            if panel.judged is None or (stage in judged) == panel.judged:
                stages[stage] = stage_colour(stage, history)
                label = stage_name(stage) + (f", {name}" if len(panel.metrics) > 1 else "")
                lines.append(Line(label, points, stages[stage], dashed=number > 0))
    if not lines:
        return ""
    plot = line_plot(lines, panel.reference, small=small, share=panel.share)
    return figure(panel.title, panel.meaning, plot, {stage_name(stage): colour for stage, colour in stages.items()})


def _series(panel: Panel, name: str, history: History) -> dict[str, Points]:
    return history.series(name) if panel.by is None else history.ratio(name, panel.by)
