"""A run's page: `report.html`, one file that needs nothing else, made from what lies in the run's folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.config.base import Settings
from prism_ray.config.load import changed
from prism_ray.report import sections
from prism_ray.report.metrics import read_metrics
from prism_ray.report.summary import read_summary

_ALARM = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL)\b")

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
.meaning, .none, .facts, footer { color: var(--soft); margin: 2px 0 8px; font-size: 13px; }
.headline { font-size: 17px; margin: 10px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; } td small { color: var(--soft); white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 22px 26px; }
figure { margin: 0; } figure p { margin: 2px 0; } figcaption { font-weight: 600; }
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
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 16px; margin-top: 10px; }
article { display: flex; gap: 14px; background: var(--wash); border-radius: 8px; padding: 12px; }
article > div { min-width: 0; flex: 1; }
article img { width: 128px; align-self: flex-start; image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 6px 0; }
.question { margin: 0; font-weight: 600; }
"""


def write_report(run_folder: Path, settings: Settings | None = None) -> Path:
    """Write `report.html` from summary.json, metrics.jsonl, samples.jsonl, *quarantine.parquet and log.txt.

    Whatever of these is missing is left out, so that the page can be made at any time of a run. `settings` are the
    run's own, for what differs from the defaults. Returns the page's path.
    """
    path = run_folder / "report.html"
    path.write_text(page(run_folder, settings), encoding="utf-8")
    return path


def page(run_folder: Path, settings: Settings | None = None) -> str:
    """The page as text."""
    summary = read_summary(run_folder)
    rows = read_metrics(run_folder / "metrics.jsonl")
    stages, evaluation = summary.get("stages", []), summary.get("evaluation", {})
    samples = _samples(run_folder / "samples.jsonl")
    parts = [
        ("Evaluation", sections.headline(evaluation) + sections.evaluation_table(evaluation)),
        ("Training", sections.plots(rows) if rows else '<p class="none">No metrics yet.</p>'),
        ("Stages", sections.stage_table(stages)),
        ("Samples", sections.sample_cards(samples) if samples else ""),
        ("Failures", sections.failures(_quarantined(run_folder), _alarms(run_folder / "log.txt"), stages)),
        ("Settings", sections.changed_table(changed(settings)) if settings is not None else ""),
    ]
    name = escape(str(summary.get("run") or run_folder.name))
    body = "".join(f"<section><h2>{title}</h2>{html}</section>" for title, html in parts if html)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>prism_ray: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><header><h1>{name}</h1>{_facts(summary)}</header>{body}{_versions(summary)}</body></html>\n"
    )


def _facts(summary: dict[str, Any]) -> str:
    status = sections.status_chip(str(summary.get("status", "unknown")))
    times = [f"{word} {summary[key]}" for key, word in (("started", "from"), ("finished", "to")) if summary.get(key)]
    return f'<p class="facts">{status} {escape(" ".join(times))}</p>'


def _versions(summary: dict[str, Any]) -> str:
    found = " · ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return f"<footer><p>{escape(found)}</p></footer>"


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _quarantined(run_folder: Path) -> Counter[str]:
    """Rows by reason, over the quarantine files of all stages; a row that several stages met counts once."""
    reasons: dict[tuple[Any, ...], str] = {}
    for path in sorted(run_folder.glob("*quarantine.parquet")):
        try:
            found = pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowInvalid):
            found = [{"file": str(path), "reason": f"{path.name} cannot be read"}]
        for row in found:
            reasons[row.get("file"), row.get("row")] = str(row.get("reason"))
    return Counter(reasons.values())


def _alarms(log: Path) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if _ALARM.match(line)]
