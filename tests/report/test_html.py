import base64
import io
import json
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray.config.load import to_yaml
from prism_ray.config.run import RunSettings
from prism_ray.report.html import page, write_report
from prism_ray.report.metrics import MetricsLog
from prism_ray.report.summary import Summary

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed; collects addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("data:", "#"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # closes itself, as SVG elements may

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def lines(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            gap = {"discriminator/gap/perception": 1 / step, "discriminator/pair_accuracy/reasoning": 0.7}
            log.write("warmup", step, {f"{name}_held_out": value for name, value in gap.items()})
            log.write("align", step, {"reward/mean": 0.4, "staleness/max": 1, "staleness/judge_max": 2, **gap})
            log.write("rlvr", step, {"reward/mean": 0.6, "strange/metric": step})
            log.write("rlvr-sft", step, {"reward/mean": 0.5})
    summary = Summary(tmp_path, "a <b> run")
    summary.stage("align", "completed", 62, 3, "runs/x/align/checkpoint")
    summary.stage("rlvr", "failed", 5, 0, None)
    for label, mean in (("prism+grpo", 0.7), ("sft+grpo", 0.5)):
        accuracy = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        summary.evaluation(label, {"n": 512, "accuracy": accuracy, "accuracy_greedy": accuracy, "mean_tokens": 61.25})
    summary.finish("completed")
    settings = RunSettings.model_validate({"report": {"wandb": {"mode": "offline"}}, "align": {"updates": 7}})
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    sample = {"label": "sft", "image": png(), "question": "<image>How many?", "response": "<script>alert(1)</script>"}
    lines(tmp_path / "samples.jsonl", sample | {"truth": {"answer": 1.0, "cell_accuracy": 0.5}})
    pair = {"view": "perception", "gap": -1.0, "reference": "a", "response": "b", "image": png(), "question": "why"}
    lines(tmp_path / "warmup" / "worst_pairs.jsonl", pair)
    rollout = {"index": 0, "response": "seen", "reward": 0.5, "scores": {"perception": 1.25}}
    judged = {"group": 1, "version": 0, "question": "judged", "reference": "r", "rollouts": [rollout]}
    lines(tmp_path / "align" / "samples.jsonl", judged | {"group": 99}, judged)
    died = {"time": 1.8e9, "stage": "align", "level": "WARNING", "room": "rollout", "what": "engine <1> died"}
    lines(tmp_path / "incidents.jsonl", *[died] * 3)
    bad = [{"file": "a", "row": 1, "reason": "image does not decode"}, {"file": "a", "row": 2, "reason": "no prompt"}]
    for stage in ("sft", "align"):
        pq.write_table(pa.Table.from_pylist(bad), tmp_path / f"{stage}.quarantine.parquet")
    return tmp_path


def test_the_page_is_balanced_html_that_fetches_nothing(run):
    parser = Balanced()
    parser.feed(page(run).replace("<!doctype html>", ""))
    assert parser.open == [] and parser.fetched == []


def test_the_page_tells_everything_that_the_folder_holds(run):
    text = write_report(run).read_text()
    for told in (
        "a &lt;b&gt; run",
        "+0.200 accuracy (95 %: +0.129 to +0.271)",
        "<strong>0.700</strong> <small>0.650–0.750</small>",
        "Reward in alignment", "Reward in RLVR", "Gap in perception", "Pair accuracy in reasoning",
        "Staleness of the policy", "Staleness of the judge", "strange/metric",
        "rlvr (prism+grpo)", "rlvr-sft (sft+grpo)",
        "1:02",
        "Stages that did not end well: rlvr (failed)",
        "<td>image does not decode</td><td>1</td>",
        "engine &lt;1&gt; died", "3 times since 2027-01-15",
        "<code>report.wandb.mode</code></td><td>off</td><td><strong>offline</strong>",
        "<code>align.updates</code>",
        "data:image/png;base64,",
        "✓ answer", "cell_accuracy 0.50",
        "gap -1.000: the rollout is preferred",
        "Judged rollouts of align (1 groups)", "perception 1.250",
        "<td>perception</td>", "Held-out pairs",
    ):  # fmt: skip
        assert told in text, told
    assert "group 99" not in text, "the update was done over"


def test_links_lead_to_sections_that_are_there(run):
    text = page(run)
    links = [part.split('"')[0] for part in text.split('href="#')[1:]]
    assert len(links) > 6 and all(f'<section id="{link}">' in text for link in links)


def test_what_a_model_wrote_is_never_markup(run):
    assert "<script" not in page(run)


def test_an_empty_folder_still_gives_a_page(tmp_path):
    text = write_report(tmp_path).read_text()
    assert "No metrics yet" in text and "Nothing has been evaluated yet" in text and "No stage has ended yet" in text
    assert "No failures" in text and "no config.yaml" in text


@pytest.mark.parametrize(
    "name",
    ["summary.json", "metrics.jsonl", "samples.jsonl", "warmup/worst_pairs.jsonl", "incidents.jsonl", "config.yaml",
     "align/samples.jsonl", "align.quarantine.parquet"],
)  # fmt: skip
@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\x00nonsense\n[1]\n3\n", None])
def test_no_file_is_needed_and_no_broken_one_costs_the_page(run, name, content):
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    parser = Balanced()
    text = page(run)
    parser.feed(text.replace("<!doctype html>", ""))
    assert parser.open == []
    if content not in (None, b"") and name not in ("metrics.jsonl", "incidents.jsonl"):
        assert name.split("/")[-1] in text, "what could not be read is named"


def test_a_run_that_was_killed_in_a_stage_shows_what_there_is(run):
    summary = Summary(run, "a <b> run")
    summary.stage("rlvr-sft", "interrupted", 3, 0, None)
    assert "rlvr-sft (interrupted)" in page(run)


def test_a_configuration_of_another_version_is_shown_as_it_is(run):
    (run / "config.yaml").write_text("align:\n  no_such_setting: 5\n")
    text = page(run)
    assert "config.yaml is not one of this version" in text and "no_such_setting: 5" in text


def test_an_evaluation_without_intervals_is_shown_as_unknown(tmp_path):
    Summary(tmp_path, "x").evaluation("sft", {"n": 3, "accuracy": {"mean": None, "low": None, "high": None}})
    assert "<td>sft</td><td>3</td><td>–</td>" in page(tmp_path)


def test_a_run_of_many_steps_gives_a_light_page(tmp_path):
    views = [f"discriminator/{what}/{view}" for what in ("gap", "pair_accuracy") for view in ("a", "b")]
    names = [*views, *(f"other/{i}" for i in range(6)), "reward/mean"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            row = {"stage": "align", "step": step, **dict.fromkeys(names, step % 7)}
            file.write(json.dumps(row | {"reward/mean": None if step % 3 else 0.5}) + "\n")
    assert len(page(tmp_path)) < 300_000


def test_a_page_is_replaced_whole_or_not_at_all(run, monkeypatch):
    before = write_report(run).read_text()

    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("prism_ray.report.html.page", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        write_report(run)
    assert (run / "report.html").read_text() == before
