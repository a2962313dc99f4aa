"""A run's page: `report.html`, one file that needs nothing else, made from what lies in the run's folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.config.load import ConfigError, changed, load_config
from prism_ray.config.run import RunSettings
from prism_ray.report import cards, curves, sections, views
from prism_ray.report.history import History
from prism_ray.report.incidents import Incident, read_incidents
from prism_ray.report.summary import read_summary

MOST_ROWS = 2000
"""Rows read of a file of samples or pairs."""

# Colours c0 to c7 in the order of sections.STAGES: the two arms (c1, c2) differ in more than red and green.
_STYLE = """
:root { color-scheme: light dark; --surface: #fcfcfb; --ink: #1d1d1b; --soft: #62625d; --line: #e2e2dd;
  --wash: #f1f1ed; --good: #0b6b35; --bad: #b3261e; --warn: #8a5a00; --c0: #2a78d6; --c1: #1baf7a; --c2: #eb6834;
  --c3: #4a3aa7; --c4: #eda100; --c5: #008300; --c6: #e87ba4; --c7: #e34948; }
@media (prefers-color-scheme: dark) {
  :root { --surface: #1a1a19; --ink: #ededea; --soft: #a5a59e; --line: #383835; --wash: #252523; --good: #5fce8d;
    --bad: #ff8a80; --warn: #f0b849; --c0: #3987e5; --c1: #199e70; --c2: #d95926; --c3: #9085e9; --c4: #c98500;
    --c5: #3fa53f; --c6: #d55181; --c7: #e66767; } }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--surface); color: var(--ink); max-width: 1180px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
.time { white-space: nowrap; }
.meaning, .none, .facts, footer { color: var(--soft); margin: 2px 0 8px; font-size: 13px; }
.headline { font-size: 17px; margin: 10px 0; }
.scroll { overflow-x: auto; } .scroll + .plots { margin-top: 22px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; } td small { color: var(--soft); white-space: nowrap; }
h3 { font-size: 16px; margin: 22px 0 8px; } h4 { font-size: 13px; margin: 6px 0 2px; color: var(--soft); }
nav { font-size: 13px; margin: 6px 0; display: flex; flex-wrap: wrap; gap: 0 14px; } nav a { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 22px 26px; }
figure { margin: 0; min-width: 0; display: grid; grid: subgrid / minmax(0, 1fr); grid-row: span 4; row-gap: 0; }
figure p { margin: 2px 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg.wide { max-width: 760px; display: block; margin-top: 8px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
svg text.label { font-size: 14px; fill: var(--ink); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.reference { stroke: var(--soft); stroke-dasharray: 2 3; }
.hit { fill: transparent; } .hit:hover { fill: var(--soft); fill-opacity: .35; }
.key { margin-right: 14px; font-size: 13px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; vertical-align: middle; margin-right: 5px; }
.chip { display: inline-block; border: 1px solid var(--line); border-radius: 9px; padding: 0 8px; margin: 0 5px 3px 0;
  font-size: 12px; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
details { margin: 12px 0; } summary { cursor: pointer; font-weight: 600; }
.area { fill-opacity: .3; } .band { fill-opacity: .22; }
.cards { display: grid; gap: 16px; margin-top: 10px; }
mark { background: var(--c4); color: var(--surface); border-radius: 3px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); gap: 4px 20px; }
article { display: flex; flex-wrap: wrap; gap: 14px; background: var(--wash); border-radius: 8px; padding: 12px; }
article > div { min-width: 0; flex: 1 1 260px; } .answers section { min-width: 0; }
article img { width: 160px; align-self: flex-start; image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 4px 0; }
pre b { display: block; color: var(--soft); font-weight: 500; }
.question { margin: 0; font-weight: 600; }
"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` from what the run's folder holds; returns the page's path.

    Whatever is missing there is left out, so that the page can be made at any time of a run, and of one that was
    killed; what cannot be read is named on the page. A page that is there is replaced whole.
    """
    path = run_folder / "report.html"
    new = path.with_name(path.name + ".new")
    new.write_text(page(run_folder), encoding="utf-8")
    new.replace(path)
    return path


@dataclass
class _Run:
    """All that the page tells, as the folder holds it; `unread` are sentences about what could not be read."""

    folder: Path
    unread: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.summary = self._summary()
        self.history = History.read(self.folder / "metrics.jsonl")
        self.samples = self._rows(self.folder / "samples.jsonl")
        self.worst = self._rows(self.folder / "warmup" / "worst_pairs.jsonl")
        self.judged = {p.parent.name: self._judged(p) for p in sorted(self.folder.glob("*/samples.jsonl"))}
        self.incidents: list[Incident] = read_incidents(self.folder)
        self.quarantined = self._quarantined()
        self.settings = self._settings()

    def _summary(self) -> dict[str, Any]:
        try:
            return read_summary(self.folder)
        except ValueError as error:
            self.unread.append(str(error))
            return {}

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        found, broken = [], 0
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    found.append(row)
                else:
                    broken += bool(line.strip())
                if len(found) == MOST_ROWS:
                    break
        if broken:
            self.unread.append(f"{path.relative_to(self.folder)}: {broken} lines cannot be read and are left out.")
        return found

    def _judged(self, path: Path) -> list[dict[str, Any]]:
        """The last row of every update: one that was done over replaces what it was before."""
        return list({str(row.get("version")): row for row in self._rows(path)}.values())

    def _quarantined(self) -> Counter[str]:
        """Rows by reason, over the quarantine files of all stages; a row that several stages met counts once."""
        reasons: dict[tuple[Any, ...], str] = {}
        for path in sorted(self.folder.glob("*quarantine.parquet")):
            try:
                found = pq.read_table(path).to_pylist()
            except (OSError, pa.ArrowInvalid):
                self.unread.append(f"{path.name} cannot be read.")
                continue
            for row in found:
                reasons[row.get("file"), row.get("row")] = str(row.get("reason"))
        return Counter(reasons.values())

    def _settings(self) -> RunSettings | None:
        path = self.folder / "config.yaml"
        if not path.exists():
            return None
        try:
            return load_config(RunSettings, path)
        except ConfigError as error:
            self.unread.append(f"config.yaml is not one of this version: {error.problems[0]}")
            return None


def page(run_folder: Path) -> str:
    """The page as text."""
    run = _Run(run_folder)
    stages, evaluation = run.summary.get("stages", []), run.summary.get("evaluation", {})
    parts = [
        ("Evaluation", sections.headline(evaluation) + sections.evaluation_table(evaluation)),
        ("Training", curves.curves(curves.TRAINING, run.history) or '<p class="none">No metrics yet.</p>'),
        ("The discriminator", views.judge_health(run.history)),
        ("Its warm-up", _warmup(run)),
        ("Who waits for whom", curves.waiting_table(run.history) + curves.curves(curves.ASYNCHRONY, run.history)),
        ("What failed and was recovered", sections.failures(run.incidents, run.quarantined, stages, run.unread)),
        ("Samples", _samples(run)),
        ("Stages", sections.stage_table(stages)),
        ("Settings", _settings(run)),
        ("More", curves.other_curves(run.history, _shown(run.history))),
    ]
    shown = [(title, html) for title, html in parts if html]
    name = escape(str(run.summary.get("run") or run_folder.name))
    links = "".join(f'<a href="#s{number}">{title}</a>' for number, (title, _) in enumerate(shown))
    body = "".join(
        f'<section id="s{number}"><h2>{title}</h2>{html}</section>' for number, (title, html) in enumerate(shown)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>prism_ray: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><header><h1>{name}</h1>{_facts(run.summary)}<nav>{links}</nav></header>{body}"
        f"{_versions(run.summary)}</body></html>\n"
    )


def _shown(history: History) -> set[str]:
    return curves.metrics_of((*curves.TRAINING, *curves.ASYNCHRONY)) | views.shown_by_judge_health(history)


def _warmup(run: _Run) -> str:
    margin = (run.settings or RunSettings()).discriminator.probe_margin
    pairs = cards.worst_pair_cards(run.worst)
    said = "<h3>Held-out pairs the discriminator is most wrong about</h3>" if pairs else ""
    return views.warmup_table(run.history, margin) + said + pairs


def _samples(run: _Run) -> str:
    parts = []
    if run.samples:
        questions = cards.sample_cards(run.samples)
        parts.append(f"<details><summary>Held-out questions, by checkpoint</summary>{questions}</details>")
    for stage, groups in run.judged.items():
        if groups:
            title = f"Judged rollouts of {escape(curves.stage_name(stage))} ({len(groups)} groups)"
            parts.append(f"<details><summary>{title}</summary>{cards.judged_cards(groups)}</details>")
    return "".join(parts)


def _settings(run: _Run) -> str:
    table = sections.changed_table(changed(run.settings) if run.settings is not None else None)
    path = run.folder / "config.yaml"
    if not path.exists():
        return table
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"{table}<details><summary>All settings</summary><pre>{text}</pre></details>"


def _facts(summary: dict[str, Any]) -> str:
    status = sections.status_chip(str(summary.get("status", "unknown")))
    times = [f"{word} {summary[key]}" for key, word in (("started", "from"), ("finished", "to")) if summary.get(key)]
    return f'<p class="facts">{status} {escape(" ".join(times))}</p>'


def _versions(summary: dict[str, Any]) -> str:
    found = " · ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return f"<footer><p>{escape(found)}</p></footer>"
