import json
import math
import platform
from pathlib import Path

import numpy as np
import pytest

from prism_ray.report.summary import Summary, read_summary

EVALUATION = {"n": 8, "accuracy": {"mean": 0.5, "low": 0.2, "high": 0.8}, "format": 1.0}


def test_a_whole_run_is_as_the_contract_says(tmp_path):
    summary = Summary(tmp_path, "tiny")
    summary.stage("sft", "completed", 12.34, 100, tmp_path / "sft" / "checkpoint")
    summary.evaluation("sft", EVALUATION)
    summary.finish("completed")
    data = json.loads((tmp_path / "summary.json").read_text())
    assert list(data) == ["run", "status", "started", "finished", "versions", "stages", "evaluation"]
    assert data["run"] == "tiny" and data["status"] == "completed" and data["started"] <= data["finished"]
    assert data["versions"]["python"] == platform.python_version() and "torch" in data["versions"]
    checkpoint = str(tmp_path / "sft" / "checkpoint")
    assert data["stages"] == [
        {"name": "sft", "status": "completed", "seconds": 12.3, "updates": 100, "checkpoint": checkpoint}
    ]
    assert data["evaluation"] == {"sft": EVALUATION}


def test_a_killed_run_counts_as_interrupted_and_the_next_goes_on_from_its_notes(tmp_path):
    first = Summary(tmp_path, "tiny")
    first.stage("sft", "completed", 1, 1, None)
    first.stage("align", "failed", 1, 0, None)
    assert read_summary(tmp_path)["status"] == "interrupted"
    started = read_summary(tmp_path)["started"]
    second = Summary(tmp_path, "tiny")
    second.stage("align", "completed", 2, 25, Path("a"))
    data = read_summary(tmp_path)
    assert data["started"] == started
    assert [(s["name"], s["status"]) for s in data["stages"]] == [("sft", "completed"), ("align", "completed")]


def test_a_run_after_a_completed_one_starts_anew_but_keeps_its_results(tmp_path, monkeypatch):
    first = Summary(tmp_path, "tiny")
    first.evaluation("sft", EVALUATION)
    first.finish("completed")
    monkeypatch.setattr("prism_ray.report.summary._now", lambda: "2999-01-01T00:00:00+00:00")
    Summary(tmp_path, "tiny")
    data = read_summary(tmp_path)
    assert data["started"].startswith("2999") and data["finished"] is None and data["evaluation"] == {"sft": EVALUATION}


def test_numpy_numbers_are_written_and_what_is_not_finite_becomes_null(tmp_path):
    Summary(tmp_path, "tiny").evaluation("sft", {"n": np.int64(3), "format": np.float32(0.5), "mean_tokens": math.nan})
    assert read_summary(tmp_path)["evaluation"]["sft"] == {"n": 3, "format": 0.5, "mean_tokens": None}


def test_the_file_is_never_half_written(tmp_path, monkeypatch):
    summary = Summary(tmp_path, "tiny")
    before = (tmp_path / "summary.json").read_text()

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        summary.finish("completed")
    assert (tmp_path / "summary.json").read_text() == before


def test_a_summary_that_is_none_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ValueError, match="summary.json is not a JSON object; remove it"):
        Summary(tmp_path, "tiny")


def test_a_stage_that_runs_anew_takes_its_old_results_away(tmp_path):
    summary = Summary(tmp_path, "r")
    for name in ("sft", "align"):
        summary.stage(name, "completed", 1.0, 1, None)
        summary.evaluation(name, {"n": 1})
    summary.discard("align", "align")
    summary.discard("warmup", None)
    data = read_summary(tmp_path)
    assert [stage["name"] for stage in data["stages"]] == ["sft"]
    assert list(data["evaluation"]) == ["sft"]
