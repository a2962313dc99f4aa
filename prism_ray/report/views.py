"""What the discriminator does, view by view: the figures of a run's page a person judges the judge by; pure.

Views are whatever the metrics name; nothing here knows how many there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from prism_ray.report.curves import Panel, curves, drawn, figure, grid, stage_name
from prism_ray.report.history import History
from prism_ray.report.plots import Band, Bars, Line, histogram_plot, line_plot
from prism_ray.report.sections import fixed, table

HELD_OUT = "_held_out"
SIDES = {"reference": ("references", 0), "rollout": ("rollouts", 2)}
"""The two sides of a pair, with their names in legends and their colours."""
BINS = 32
MOST_STEPS = 250
"""Steps, evenly spaced, that one histogram is made of."""
_OF_VIEW = re.compile(r"^discriminator/(?:train/)?(?:gap|pair_accuracy)/(.+)$")
_QUANTILE = re.compile(r"^discriminator/scores/(.+)/(reference|rollout)/q(\d+)(_held_out)?$")
_ALARMS = ("separable", "chance", "drift", "saturation")


def views_of(history: History) -> list[str]:
    """The views that the metrics name, sorted."""
    found = {match[1].removesuffix(HELD_OUT) for name in history.names if (match := _OF_VIEW.match(name))}
    return sorted(found)


def judge_health(history: History) -> str:
    """Per view the curves and histograms of its scores and of the router; "" for a run without a discriminator."""
    parts = [f"<h3>View {escape(view)}</h3>{_view(view, history)}" for view in views_of(history)]
    common = curves(_COMMON, history) if parts else ""
    return "".join(parts) + (f"<h3>All views together</h3>{common}" if common else "")


def shown_by_judge_health(history: History) -> set[str]:
    """The metrics that `judge_health` and `warmup_table` draw or tell."""
    own = re.compile(r"^discriminator/(gap|pair_accuracy|scores|router/load|router/entropy|gate|watch|probe)/")
    return {name for name in history.names if own.match(name)} | {m for panel in _COMMON for m in panel.metrics}


_COMMON = (
    Panel("What the router makes of the view", "mutual information of view and expert, nats; 0 = experts take all "
          "views alike", ("discriminator/router/view_information",), 0.0),
    Panel("Load of the experts", "solid the busiest, dashed the idlest; the share each has if all are alike is 1 / "
          "experts", ("discriminator/router_load_max", "discriminator/router_load_min")),
    Panel("Judge's loss", "Bradley-Terry, with what is added to it", ("discriminator/loss",)),
    Panel("Replayed pairs", "share of an update's pairs that come from the buffer", ("discriminator/replay/share",)),
)  # fmt: skip


def _view(view: str, history: History) -> str:
    """All figures of one view."""
    held_out = "dashed: held out, in the warm-up"
    panels = (
        Panel(f"Gap in {view}", f"score(reference) − score(rollout); 0 = indistinguishable; {held_out}",
              _both("gap", view), 0.0),
        Panel(f"Pair accuracy in {view}", f"pairs the discriminator orders rightly; 0.5 = chance; {held_out}",
              _both("pair_accuracy", view), 0.5),
        Panel(f"Gate of {view}", "weight with which its signal moves the policy", (f"discriminator/gate/{view}",)),
    )  # fmt: skip
    figures = [*drawn(panels, history), _scores_over_time(view, history), *_histograms(view, history)]
    figures += [_router(view, history), _watch(view, history)]
    return _alarms(view, history) + grid([html for html in figures if html])


def _both(what: str, view: str) -> tuple[str, str]:
    return f"discriminator/{what}/{view}", f"discriminator/{what}/{view}{HELD_OUT}"


def _judged(history: History, name: str) -> str:
    """The stage whose figures of this metric count most: alignment where it has any, else the last that has."""
    stages = list(history.series(name))
    return "align" if "align" in stages else stages[-1] if stages else ""


def _alarms(view: str, history: History) -> str:
    chips = []
    for alarm in _ALARMS:
        name = f"discriminator/alarm/{alarm}/{view}"
        for stage, points in history.series(name).items():
            rings = [step for step, value in points if value > 0]
            if rings:
                text = f"{alarm}: {len(rings)} of {len(points)} steps of {stage}, first {rings[0]}, last {rings[-1]}"
                chips.append(f'<span class="chip warn">{escape(text)}</span>')
    return f'<p class="meaning">Alarms: {"".join(chips)}</p>' if chips else ""


def _router(view: str, history: History) -> str:
    prefix = f"discriminator/router/load/{view}/"
    experts = sorted((n for n in history.names if n.startswith(prefix)), key=lambda n: (len(n), n))
    if not experts:
        return ""
    stage = _judged(history, experts[0])
    keys = {f"expert {name.removeprefix(prefix)}": i for i, name in enumerate(experts)}
    lines = [Line(label, history.of(stage, experts[i]), i) for label, i in keys.items()]
    meaning = f"share of the view's tokens by expert, mean over layers ({stage}); dotted: all alike"
    plot = line_plot(lines, 1 / len(experts))
    return figure(f"Router load in {view}", meaning, plot, keys)


def _watch(view: str, history: History) -> str:
    prefix = f"discriminator/watch/{view}/"
    names = [n for n in history.names if n.startswith(prefix) and not n.endswith(HELD_OUT)]
    if not names:
        return ""
    stage = _judged(history, names[0])
    lines = [Line(name.removeprefix(prefix), history.of(stage, name), i) for i, name in enumerate(names)]
    meaning = "rank correlation of score and truth within prompts; falling while the reward rises: the judge is gamed"
    keys = {line.label: line.colour for line in lines}
    return figure(f"Does {view} reward what is true?", meaning, line_plot(lines, 0.0), keys)


Quantiles = dict[float, list[tuple[int, float]]]
"""Level (0 to 1) -> (step, quantile) points."""


def score_quantiles(history: History, stage: str, view: str, held_out: bool = False) -> dict[str, Quantiles]:
    """Per side the quantiles of a view's scores that a stage has noted."""
    found: dict[str, Quantiles] = {}
    for name in history.names:
        match = _QUANTILE.match(name)
        if match and match[1] == view and bool(match[4]) == held_out and (points := history.of(stage, name)):
            found.setdefault(match[2], {})[int(match[3]) / 100] = points
    return found


def _scores_over_time(view: str, history: History) -> str:
    stage = _judged(history, f"discriminator/scores/{view}/rollout/q50")
    sides = score_quantiles(history, stage, view)
    lines, bands, keys = [], [], {}
    for side, (name, colour) in SIDES.items():
        quantiles = sides.get(side, {})
        if {0.1, 0.5, 0.9} <= set(quantiles):
            high = dict(quantiles[0.9])
            bands.append(Band([(x, low, high[x]) for x, low in quantiles[0.1] if x in high], colour))
            lines.append(Line(f"{name}, median", quantiles[0.5], colour))
            keys[name] = colour
    if not lines:
        return ""
    meaning = f"median, and the middle eight tenths as a band ({stage})"
    return figure(f"Scores in {view}", meaning, line_plot(lines, bands=bands), keys)


def _histograms(view: str, history: History) -> list[str]:
    """Scores of both sides after the warm-up, and in the first and the last quarter of alignment."""
    found = []
    after = score_quantiles(history, "warmup", view, held_out=True)
    found.append(_histogram(f"Scores in {view} after the warm-up", "held-out pairs", after, 0.0, 1.0))
    stage = _judged(history, f"discriminator/scores/{view}/rollout/q50")
    sides = score_quantiles(history, stage, view)
    for word, low, high in (("first", 0.0, 0.25), ("last", 0.75, 1.0)):
        title = f"Scores in {view}, {word} quarter of {stage_name(stage)}"
        found.append(_histogram(title, "as the policy was taught by them", sides, low, high))
    return found


def _histogram(title: str, meaning: str, sides: dict[str, Quantiles], first: float, last: float) -> str:
    """Both sides' histograms over the steps of a part (0 to 1) of those there are."""
    chosen = {side: steps_of(quantiles, first, last) for side, quantiles in sides.items()}
    values = [v for steps in chosen.values() for step in steps for _, v in step]
    if not values or set(chosen) != set(SIDES):
        return ""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    bars = [Bars(SIDES[side][0], spread(chosen[side], low, high, BINS), SIDES[side][1]) for side in SIDES]
    keys = {name: colour for name, colour in SIDES.values()}
    return figure(title, meaning, histogram_plot(bars, low, high, "score"), keys)


def steps_of(quantiles: Quantiles, first: float, last: float) -> list[list[tuple[float, float]]]:
    """Per step of a part of the run the (level, quantile) pairs, in order; steps that lack one are left out."""
    levels = sorted(quantiles)
    by_step: dict[int, list[tuple[float, float]]] = {}
    for level in levels:
        for step, value in quantiles[level]:
            if math.isfinite(value):
                by_step.setdefault(step, []).append((level, value))
    whole = [pairs for _, pairs in sorted(by_step.items()) if len(pairs) == len(levels)]
    part = whole[math.floor(first * len(whole)) : math.ceil(last * len(whole))]
    return part[:: math.ceil(len(part) / MOST_STEPS) or 1]


def spread(steps: Sequence[Sequence[tuple[float, float]]], low: float, high: float, bins: int) -> list[float]:
    """The mean over steps of a distribution known by its quantiles, as shares of equal bins from `low` to `high`.

    Between two neighbouring quantiles the mass is spread evenly; where they are equal it all lies there.
    """
    shares, width = [0.0] * bins, (high - low) / bins
    for pairs in steps:
        for (level, start), (next_level, end) in zip(pairs, pairs[1:], strict=False):
            mass = (next_level - level) / len(steps)
            first = min(bins - 1, int((start - low) / width))
            last = min(bins - 1, int((end - low) / width))
            for b in range(first, last + 1):
                inside = min(end, low + (b + 1) * width) - max(start, low + b * width)
                shares[b] += mass if first == last else mass * max(0.0, inside) / (end - start)
    return shares


def warmup_table(history: History, margin: float) -> str:
    """What the warmed-up discriminator is worth on held-out pairs, and what shortcuts alone would be worth: one within
    `margin` of the discriminator is marked."""
    views = views_of(history)
    told = [(title, name) for title, name in _FIGURES if any(_warm(history, name, view) is not None for view in views)]
    if not told:
        return ""
    probes = [name for title, name in told if title.endswith("alone")]
    rows = []
    for view in views:
        cells = [_warm(history, name, view) for _, name in told]
        judge = _warm(history, "pair_accuracy/{view}" + HELD_OUT, view)
        marks = [name in probes and _near(cell, judge, margin) for cell, (_, name) in zip(cells, told, strict=True)]
        rows.append([escape(view), *(_marked(cell, mark) for cell, mark in zip(cells, marks, strict=True))])
    steps = [step for step, _ in history.of("warmup", "discriminator/loss")]
    said = f" after {steps[-1]} steps" if steps else ""
    note = (
        f"Held-out pairs{said}, identical texts left out. A shortcut is a logistic regression that sees nothing else; "
        "one that orders pairs about as well as the discriminator (marked) may be all it sees."
    )
    return table(["view", *(title for title, _ in told)], rows) + f'<p class="meaning">{note}</p>'


_FIGURES = (
    ("pair accuracy", "pair_accuracy/{view}" + HELD_OUT),
    ("gap", "gap/{view}" + HELD_OUT),
    ("calibration error", "calibration_error/{view}" + HELD_OUT),
    ("identical texts", "identical/{view}" + HELD_OUT),
    ("length alone", "probe/length/{view}"),
    ("last token alone", "probe/last_token/{view}"),
    ("format alone", "probe/format/{view}"),
)


def _warm(history: History, name: str, view: str) -> float | None:
    return history.last("warmup", f"discriminator/{name.format(view=view)}")


def _near(probe: float | None, judge: float | None, margin: float) -> bool:
    return probe is not None and judge is not None and probe >= judge - margin and probe > 0.5 + margin


def _marked(value: float | None, mark: bool) -> str:
    return f'<span class="warn">{fixed(value)} ⚠</span>' if mark else fixed(value)
