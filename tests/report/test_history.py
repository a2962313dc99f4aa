import json
import math

import pytest

from prism_ray.report.history import History
from prism_ray.report.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write("align", step, {"a/b": step, "late/one": step})
        log.write("rlvr", 4, {"a/b": 0})
        log.write("align", 3, {"a/b": 30})
        log.write("align", 3, {"c/d": math.nan})
    return tmp_path / "metrics.jsonl"


def test_a_series_is_what_the_rows_that_count_say(path):
    history = History.read(path)
    assert history.series("a/b") == {"align": [(1, 1.0), (2, 2.0), (3, 30.0)], "rlvr": [(4, 0.0)]}
    assert history.of("align", "late/one") == [(1, 1.0), (2, 2.0)], "step 3 was done over and did not say it again"
    assert history.of("sft", "a/b") == [] and history.stages == ["align", "rlvr"]
    rows = read_metrics(path)
    assert {(r["stage"], r["step"], r["a/b"]) for r in rows if "a/b" in r} == {
        (stage, step, value) for stage, points in history.series("a/b").items() for step, value in points
    }


def test_rows_of_one_step_are_merged_and_the_last_value_counts():
    rows = [{"stage": "s", "step": 1, "a": 1}, {"stage": "s", "step": 1, "b": 5}, {"stage": "s", "step": 1, "a": 2}]
    history = History(rows)
    assert history.names == ["a", "b"] and history.of("s", "a") == [(1, 2.0)] and history.of("s", "b") == [(1, 5.0)]


def test_a_null_is_nan_and_the_last_finite_value_is_told(path):
    history = History.read(path)
    assert math.isnan(history.of("align", "c/d")[0][1])
    assert history.last("align", "c/d") is None and history.last("align", "a/b") == 30.0


def test_a_ratio_has_the_steps_of_both():
    rows = [{"stage": "s", "step": i, "a": 2.0 * i, **({"b": b} if b is not None else {})}
            for i, b in ((1, 4.0), (2, None), (3, 0.0))]  # fmt: skip
    ((first, half), (last, none)) = History(rows).ratio("a", "b")["s"]
    assert (first, half, last) == (1, 0.5, 3) and math.isnan(none)
    assert History(rows).ratio("a", "c") == {}


def test_lines_that_are_no_rows_cost_only_themselves(tmp_path):
    good = {"stage": "s", "step": 1, "a": 1.0, "word": "x"}
    lines = ["", "{", "[1]", '{"stage": "s"}', '{"stage": 1, "step": 1}', '{"stage": "s", "step": "2"}', "\x00"]
    (tmp_path / "m").write_text("\n".join([*lines, json.dumps(good), '{"stage": "s", "step": 2, "a"']))
    history = History.read(tmp_path / "m")
    assert history.names == ["a"] and history.of("s", "a") == [(1, 1.0)]


def test_there_is_no_history_before_there_is_a_file(tmp_path):
    assert History.read(tmp_path / "none").stages == []
