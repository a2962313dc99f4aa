import json
import math

import numpy as np
import pytest
import torch

from prism_ray.report.metrics import MetricsLog, read_metrics


def test_lines_are_as_the_contract_says(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("align", 1, {"policy/loss": np.float32(0.5), "correction/ess": torch.tensor(1.0), "staleness/max": 2})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row.pop("time") > 1e9
    assert row == {"stage": "align", "step": 1, "policy/loss": 0.5, "correction/ess": 1.0, "staleness/max": 2.0}


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("sft", 1, {"a/b": 1})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_values_that_are_not_finite_are_valid_json_and_read_back_as_nan(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("align", 1, {"policy/loss": math.nan, "x/y": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["policy/loss"]) and math.isnan(row["x/y"])


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path) as log:
        log.write("align", 1, {"a/b": 1})
        log.write("align", 2, {"a/b": 2})
    path.write_text(path.read_text()[:-9])
    with MetricsLog(tmp_path) as log:
        log.write("align", 3, {"a/b": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_what_a_resumed_stage_did_over_replaces_what_it_had_done(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write("align", step, {"a/b": step})
        log.write("rlvr", 4, {"a/b": 0})
        log.write("align", 3, {"a/b": 30})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"], row["a/b"]) for row in rows] == [
        ("align", 1, 1.0), ("align", 2, 2.0), ("rlvr", 4, 0.0), ("align", 3, 30.0),
    ]  # fmt: skip


def test_there_are_no_metrics_before_there_is_a_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


class Sink:
    """Keeps what it is told; one that is broken raises."""

    def __init__(self, broken=False):
        self.told, self.broken = [], broken

    def write(self, stage, step, numbers):
        if self.broken:
            raise OSError("gone")
        self.told.append((stage, step, dict(numbers)))

    def evaluated(self, label, numbers):
        self.told.append((label, dict(numbers)))

    def close(self, failed):
        self.told.append(failed)


def test_whoever_watches_hears_of_all_that_is_written_and_of_the_end(tmp_path):
    sink = Sink()
    with pytest.raises(RuntimeError), MetricsLog(tmp_path, sinks=[sink]) as log:
        log.write("align", 1, {"a/b": np.float32(2.0)})
        log.evaluated("prism", {"n": 8, "accuracy": {"mean": 0.5, "low": 0.25, "high": 0.75}, "drift": {"steps": 0.5}})
        raise RuntimeError
    assert sink.told == [
        ("align", 1, {"a/b": 2.0}),
        ("prism", {"n": 8.0, "accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "drift/steps": 0.5}),
        True,
    ]


def test_a_watcher_that_fails_is_given_up_and_the_run_goes_on(tmp_path, caplog):
    broken, sound = Sink(broken=True), Sink()
    with MetricsLog(tmp_path, sinks=[broken, sound]) as log:
        log.write("align", 1, {"a/b": 1})
        log.write("align", 2, {"a/b": 2})
    assert broken.told == [] and len(sound.told) == 3
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert [r.message for r in caplog.records] == ["Sink failed; the run goes on without it"]
