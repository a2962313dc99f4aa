import json
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_ray.config.report import ReportSettings
from prism_ray.report.html import page, write_report
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary

VOID = {"meta", "img"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed; collects addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # closes itself, as SVG elements may

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            gap = {"discriminator/gap/perception": 1 / step, "discriminator/pair_accuracy/reasoning": 0.7}
            log.write("align", step, {"reward/mean": 0.4, "staleness/max": 1, "staleness/mean": 0.5, **gap})
            log.write("rlvr", step, {"reward/mean": 0.6, "strange/metric": step})
            log.write("rlvr-sft", step, {"reward/mean": 0.5})
    summary = Summary(tmp_path, "a <b> run")
    summary.stage("align", "completed", 62, 3, "runs/x/align/checkpoint")
    summary.stage("rlvr", "failed", 5, 0, None)
    for label, mean in (("prism+grpo", 0.7), ("sft+grpo", 0.5)):
        accuracy = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        summary.evaluation(label, {"n": 512, "accuracy": accuracy, "accuracy_greedy": accuracy, "mean_tokens": 61.25})
    summary.finish("completed")
    sample = {
        "label": "sft",
        "image": "aGVsbG8=",
        "question": "<image>How many?",
        "response": "<script>alert(1)</script>",
    }
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(sample | {"truth": {"answer": 1.0, "cell_accuracy": 0.5}}) + "\n"
    )
    bad = [{"file": "a", "row": 1, "reason": "image does not decode"}, {"file": "a", "row": 2, "reason": "no prompt"}]
    for stage in ("sft", "align"):
        pq.write_table(pa.Table.from_pylist(bad), tmp_path / f"{stage}.quarantine.parquet")
    log_lines = "2026-01-01 10:00:00 INFO    a: fine\n2026-01-01 10:00:01 WARNING a: engine <1> died\n"
    (tmp_path / "log.txt").write_text(log_lines)
    return tmp_path


def test_the_page_is_balanced_html_that_fetches_nothing(run):
    parser = Balanced()
    parser.feed(page(run).replace("<!doctype html>", ""))
    assert parser.open == [] and parser.fetched == []


def test_the_page_tells_everything_that_the_folder_holds(run):
    settings = ReportSettings.model_validate({"wandb": {"mode": "offline"}})
    text = write_report(run, settings).read_text()
    for told in (
        "a &lt;b&gt; run",
        "+0.200 accuracy (95 %: +0.129 to +0.271)",
        "<strong>0.700</strong> <small>0.650–0.750</small>",
        "Reward in alignment", "Reward in RLVR", "Gap in perception", "Pair accuracy in reasoning", "Staleness",
        "strange/metric",
        "rlvr (prism+grpo)", "rlvr-sft (sft+grpo)",
        "1:02",
        "Stages that did not end well: rlvr (failed)",
        "<td>image does not decode</td><td>1</td>",
        "engine &lt;1&gt; died",
        "<code>wandb.mode</code></td><td>off</td><td><strong>offline</strong>",
        "data:image/png;base64,aGVsbG8=",
        "✓ answer", "cell_accuracy 0.50",
    ):  # fmt: skip
        assert told in text, told


def test_what_a_model_wrote_is_never_markup(run):
    assert "<script" not in page(run)


def test_the_arms_share_a_plot_in_different_colours_apart_from_alignment(run):
    text = page(run)
    panels = {p.split("</figcaption>")[0]: p for p in text.split("<figcaption>")[1:]}
    rlvr = panels["Reward in RLVR"]
    assert 'stroke="var(--c1)"' in rlvr and 'stroke="var(--c2)"' in rlvr and 'stroke="var(--c0)"' not in rlvr
    assert 'stroke="var(--c0)"' in panels["Reward in alignment"]


def test_an_empty_folder_still_gives_a_page(tmp_path):
    text = write_report(tmp_path).read_text()
    assert "No metrics yet" in text and "Nothing has been evaluated yet" in text and "No stage has ended yet" in text


def test_a_broken_quarantine_file_does_not_cost_the_page(run):
    (run / "base.quarantine.parquet").write_text("not parquet")
    assert "base.quarantine.parquet cannot be read" in page(run)


def test_an_evaluation_without_intervals_is_shown_as_unknown(tmp_path):
    Summary(tmp_path, "x").evaluation("sft", {"n": 3, "accuracy": {"mean": None, "low": None, "high": None}})
    assert "<td>sft</td><td>3</td><td>–</td>" in page(tmp_path)
