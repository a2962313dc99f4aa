"""The sections of a run's page, each from plain data to HTML; pure. Everything that a model wrote is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from prism_ray.report.incidents import Incident, kinds
from prism_ray.report.intervals import Interval, difference
from prism_ray.report.plots import interval_plot
from prism_ray.report.progress import duration

MOST_KINDS = 200
"""Kinds of incidents, and reasons of quarantine, that the page shows."""

LABELS = ("base", "sft", "sft+grpo", "prism", "prism+grpo", "sft+references+grpo")
"""The order of the evaluation's rows; other labels follow."""

COLUMNS = (
    ("format", "format"),
    ("caption_exact", "caption exact"),
    ("cell_accuracy", "cell accuracy"),
    ("reasoning_given_caption", "reasoning given caption"),
)


DRIFT = "drift from the references: caption / steps / length"
DRIFTS = ("caption_length", "steps", "response_length")
"""Total-variation distances, in the order of the column."""


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
    unseen, drifts = (any(name in numbers for numbers in evaluation.values()) for name in ("accuracy_unseen", "drift"))
    head += ["unseen question family (greedy)"] if unseen else []
    head += [DRIFT] if drifts else []
    body, marks = [], []
    for label in labels:
        numbers = evaluation[label]
        sampled, greedy = _interval(numbers, "accuracy"), _interval(numbers, "accuracy_greedy")
        shares = [fixed(numbers.get(name)) for name, _ in COLUMNS]
        cells = [_with_interval(sampled), _with_interval(greedy), *shares, fixed(numbers.get("mean_tokens"), 1)]
        cells += [_with_interval(_interval(numbers, "accuracy_unseen"))] if unseen else []
        cells += [" / ".join(fixed(numbers.get("drift", {}).get(name), 2) for name in DRIFTS)] if drifts else []
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


def changed_table(changed: Mapping[str, tuple[Any, Any]] | None) -> str:
    """The settings that differ from their defaults; None: the run's are not known."""
    if changed is None:
        return '<p class="none">The run has no config.yaml that can be read.</p>'
    if not changed:
        return '<p class="none">Every setting has its default.</p>'
    rows = [
        [f"<code>{escape(name)}</code>", escape(str(default)), f"<strong>{escape(str(value))}</strong>"]
        for name, (default, value) in changed.items()
    ]
    return table(["setting", "default", "this run"], rows)


def incident_table(incidents: Sequence[Incident]) -> str:
    """What failed and was recovered, by kind, the newest first."""
    rows = []
    for kind in kinds(incidents)[:MOST_KINDS]:
        level = str(kind.newest.get("level"))
        chip = f'<span class="chip {"warn" if level == "WARNING" else "bad"}">{escape(level.lower())}</span>'
        when = clock(kind.newest["time"])
        if kind.count > 1:
            when = f"{when}<br><small>{kind.count} times since {clock(kind.first)}</small>"
        stages = escape(", ".join(stage or "–" for stage in kind.stages))
        rows.append(
            [
                f'<span class="time">{when}</span>',
                chip,
                stages,
                escape(str(kind.newest.get("room"))),
                escape(kind.newest["what"]),
            ]
        )
    return table(["time (UTC)", "", "stage", "room", "what"], rows) if rows else ""


def failures(
    incidents: Sequence[Incident],
    quarantined: Mapping[str, int],
    stages: Sequence[Mapping[str, Any]],
    unread: list[str],
) -> str:
    """Stages that did not end well, incidents, rows left out by reason, and files of the run that could not be read."""
    parts = []
    bad = [s for s in stages if s.get("status") not in ("completed", "skipped")]
    if bad:
        names = ", ".join(f"{s.get('name')} ({s.get('status')})" for s in bad)
        parts.append(f"<p>Stages that did not end well: {escape(names)}</p>")
    parts += [f"<p>{escape(sentence)}</p>" for sentence in unread]
    parts.append(incident_table(incidents))
    if quarantined:
        counted = sorted(quarantined.items(), key=lambda item: -item[1])
        rows = [[escape(reason), str(n)] for reason, n in counted[:MOST_KINDS]]
        parts.append("<p>Rows that could not be used:</p>" + table(["reason", "rows"], rows))
    return "".join(parts) or '<p class="none">No failures, no quarantined rows, no warnings.</p>'


def clock(seconds: float) -> str:
    """Seconds since 1970 as a person reads them, in UTC; "–" where they are no time."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "–"


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


def fixed(value: Any, digits: int = 3) -> str:
    """A number with so many digits after the point; "–" for anything else."""
    return f"{value:.{digits}f}" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
