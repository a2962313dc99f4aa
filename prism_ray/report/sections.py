"""The sections of a run's page, each from plain data to HTML; pure. Everything that a model wrote is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from prism_ray.report.intervals import Interval, difference
from prism_ray.report.metrics import Row, metric_names, series
from prism_ray.report.plots import COLOURS, Line, interval_plot, line_plot
from prism_ray.report.progress import duration

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

LABELS = ("base", "sft", "sft+grpo", "prism", "prism+grpo", "sft+references+grpo")
"""The order of the evaluation's rows; other labels follow."""

COLUMNS = (
    ("format", "format"),
    ("caption_exact", "caption exact"),
    ("cell_accuracy", "cell accuracy"),
    ("reasoning_given_caption", "reasoning given caption"),
)


@dataclass(frozen=True)
class Panel:
    """A plot: its title, what it means, its metrics (solid, then dashed) and a reference level.

    `judged` restricts it to stages with a discriminator (True) or without one (False).
    """

    title: str
    meaning: str
    metrics: tuple[str, ...]
    reference: float | None = None
    judged: bool | None = None


PANELS = (
    Panel("Reward in alignment", "mean reward from the discriminator", ("reward/mean",), judged=True),
    Panel("Reward in RLVR", "mean reward from the verifier, both arms", ("reward/mean",), judged=False),
    Panel("Gap in perception", "score(reference) − score(rollout); 0 = indistinguishable",
          ("discriminator/gap/perception",), 0.0),
    Panel("Gap in reasoning", "score(reference) − score(rollout); 0 = indistinguishable",
          ("discriminator/gap/reasoning",), 0.0),
    Panel("Pair accuracy in perception", "pairs the discriminator orders rightly; 0.5 = chance; dashed: held out",
          ("discriminator/pair_accuracy/perception", "discriminator/pair_accuracy/perception_held_out"), 0.5),
    Panel("Pair accuracy in reasoning", "pairs the discriminator orders rightly; 0.5 = chance; dashed: held out",
          ("discriminator/pair_accuracy/reasoning", "discriminator/pair_accuracy/reasoning_held_out"), 0.5),
    Panel("Staleness", "policy versions between a rollout's oldest token and its update; solid most, dashed mean",
          ("staleness/max", "staleness/mean")),
    Panel("Response length", "mean tokens of a response", ("rollout/response_tokens",)),
    Panel("Policy loss", "mean over tokens", ("policy/loss",)),
    Panel("Supervised loss", "mean cross-entropy of the stages before the loop", ("supervised/loss",)),
    Panel("Effective sample share", "of the off-policy correction's weights; 1 = on-policy", ("correction/ess",), 1.0),
)  # fmt: skip


def plots(rows: Sequence[Row]) -> str:
    """The panels that have data, then every other metric, folded away."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    order = [*STAGES, *(s for s in stages if s not in STAGES)]
    judged = {r["stage"] for r in rows if any(name.startswith("discriminator/") for name in r)}
    shown = [html for panel in PANELS if (html := _panel(panel, rows, order, judged))]
    used = {name for panel in PANELS for name in panel.metrics}
    others = [Panel(name, "", (name,)) for name in metric_names(rows) if name not in used]
    more = [html for panel in others if (html := _panel(panel, rows, order, judged))]
    folded = (
        f'<details><summary>All other metrics ({len(more)})</summary><div class="plots">{"".join(more)}</div></details>'
    )
    return f'<div class="plots">{"".join(shown)}</div>' + (folded if more else "")


def _panel(panel: Panel, rows: Sequence[Row], order: Sequence[str], judged: set[str]) -> str:
    lines = []
    for number, name in enumerate(panel.metrics):
        for stage, points in series(rows, name).items():
            if panel.judged is None or (stage in judged) == panel.judged:
                label = _name(stage) + (f", {name}" if len(panel.metrics) > 1 else "")
                lines.append((stage, Line(label, points, order.index(stage), dashed=number > 0)))
    if not lines:
        return ""
    colours = {stage: line.colour % COLOURS for stage, line in lines}
    legend = "".join(
        f'<span class="key"><i style="background:var(--c{colour})"></i>{escape(_name(stage))}</span>'
        for stage, colour in colours.items()
    )
    meaning = f'<p class="meaning">{escape(panel.meaning)}</p>' if panel.meaning else ""
    plot = line_plot([line for _, line in lines], panel.reference)
    return f"<figure><figcaption>{escape(panel.title)}</figcaption>{meaning}{plot}<p>{legend}</p></figure>"


def _name(stage: str) -> str:
    return STAGES.get(stage, stage)


def headline(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    """What alignment was worth, in one sentence for each comparison that the run allows."""
    comparisons = (
        ("prism+grpo", "sft+grpo", "Aligning before GRPO, against GRPO straight from SFT (same number of updates)"),
        ("prism+grpo", "sft+references+grpo", "Aligning before GRPO, against SFT on the references before GRPO"),
    )
    said = []
    for ours, other, words in comparisons:
        a, b = _interval(evaluation.get(ours, {}), "accuracy"), _interval(evaluation.get(other, {}), "accuracy")
        if a and b:
            gap = difference(a, b)
            numbers = f"{gap.mean:+.3f} accuracy (95 %: {gap.low:+.3f} to {gap.high:+.3f})"
            said.append(f'<p class="headline">{words}: <strong>{numbers}</strong></p>')
    return "".join(said)


def evaluation_table(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for every evaluated checkpoint, and the accuracies as a plot."""
    if not evaluation:
        return '<p class="none">Nothing has been evaluated yet.</p>'
    labels = [label for label in LABELS if label in evaluation] + [n for n in evaluation if n not in LABELS]
    head = [
        "checkpoint",
        "n",
        "accuracy (T = 1)",
        "accuracy (greedy)",
        *(title for _, title in COLUMNS),
        "mean tokens",
    ]
    unseen = any("accuracy_unseen" in numbers for numbers in evaluation.values())
    head += ["unseen question family (greedy)"] if unseen else []
    body, marks = [], []
    for label in labels:
        numbers = evaluation[label]
        sampled, greedy = _interval(numbers, "accuracy"), _interval(numbers, "accuracy_greedy")
        shares = [_fixed(numbers.get(name)) for name, _ in COLUMNS]
        cells = [_with_interval(sampled), _with_interval(greedy), *shares, _fixed(numbers.get("mean_tokens"), 1)]
        cells += [_with_interval(_interval(numbers, "accuracy_unseen"))] if unseen else []
        body.append([escape(label), escape(str(numbers.get("n", "–"))), *cells])
        if sampled:
            marks.append((label, sampled, greedy))
    plot = interval_plot(marks, ("sampled at T = 1", "greedy"))
    note = "Shares of held-out prompts with 95 % intervals; filled: sampled at T = 1, hollow: greedy."
    return f'{table(head, body)}<p class="meaning">{note}</p>{plot}'


def stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """What ran, how long and with which result."""
    if not stages:
        return '<p class="none">No stage has ended yet.</p>'
    rows = [
        [
            escape(str(stage.get("name"))),
            status_chip(str(stage.get("status"))),
            duration(float(stage.get("seconds") or 0)),
            escape(str(stage.get("updates", "–"))),
            f"<code>{escape(str(stage.get('checkpoint') or '–'))}</code>",
        ]
        for stage in stages
    ]
    return table(["stage", "status", "time", "updates", "checkpoint"], rows)


def changed_table(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The settings that differ from their defaults."""
    if not changed:
        return '<p class="none">Every setting has its default.</p>'
    rows = [
        [f"<code>{escape(name)}</code>", escape(str(default)), f"<strong>{escape(str(value))}</strong>"]
        for name, (default, value) in changed.items()
    ]
    return table(["setting", "default", "this run"], rows)


def failures(quarantined: Mapping[str, int], alarms: Sequence[str], stages: Sequence[Mapping[str, Any]]) -> str:
    """Rows left out by reason, stages that did not end well, and the log's warnings and errors."""
    parts = []
    bad = [s for s in stages if s.get("status") not in ("completed", "skipped")]
    if bad:
        names = ", ".join(f"{s.get('name')} ({s.get('status')})" for s in bad)
        parts.append(f"<p>Stages that did not end well: {escape(names)}</p>")
    if quarantined:
        rows = [[escape(reason), str(n)] for reason, n in sorted(quarantined.items(), key=lambda item: -item[1])]
        parts.append("<p>Rows that could not be used:</p>" + table(["reason", "rows"], rows))
    if alarms:
        shown = escape("\n".join(alarms[-30:]))
        parts.append(
            f"<details><summary>Warnings and errors in the log ({len(alarms)})</summary><pre>{shown}</pre></details>"
        )
    return "".join(parts) or '<p class="none">No failures, no quarantined rows, no warnings.</p>'


def sample_cards(samples: Sequence[Mapping[str, Any]]) -> str:
    """Some responses of each checkpoint with image, question and what is true of them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("label", "")), []).append(sample)
    return "".join(
        f"<details><summary>{escape(label)} ({len(cards)})</summary>"
        f'<div class="cards">{"".join(_card(card) for card in cards)}</div></details>'
        for label, cards in groups.items()
    )


def _card(sample: Mapping[str, Any]) -> str:
    image = str(sample.get("image") or "")
    picture = f'<img alt="the image of the question" src="data:image/png;base64,{escape(image)}">' if image else ""
    truth = sample.get("truth")
    items = truth.items() if isinstance(truth, Mapping) else [("truth", truth)] if truth is not None else []
    chips = "".join(_truth_chip(str(name), value) for name, value in items)
    question = str(sample.get("question", "")).replace("<image>", "").strip()
    wanted = sample.get("ground_truth")
    answer = f'<p class="meaning">right answer: {escape(str(wanted))}</p>' if wanted else ""
    return (
        f'<article>{picture}<div><p class="question">{escape(question)}</p>{answer}'
        f"<pre>{escape(str(sample.get('response', '')))}</pre><p>{chips}</p></div></article>"
    )


def _truth_chip(name: str, value: Any) -> str:
    if value in (0, 1):  # also True, False and 0.0, 1.0
        return f'<span class="chip {"good" if value else "bad"}">{"✓" if value else "✗"} {escape(name)}</span>'
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f'<span class="chip">{escape(name)} {escape(shown)}</span>'


def status_chip(status: str) -> str:
    """A status as a coloured word."""
    kind = {"completed": "good", "failed": "bad", "interrupted": "warn"}.get(status, "")
    return f'<span class="chip {kind}">{escape(status)}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    top = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _interval(numbers: Mapping[str, Any], name: str) -> Interval | None:
    found = numbers.get(name)
    if not isinstance(found, Mapping) or any(not _is_number(found.get(k)) for k in Interval._fields):
        return None
    return Interval(*(float(found[k]) for k in Interval._fields))


def _with_interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"<strong>{interval.mean:.3f}</strong> <small>{interval.low:.3f}–{interval.high:.3f}</small>"


def _fixed(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
