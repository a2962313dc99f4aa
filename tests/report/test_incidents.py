import json
import logging

import pytest

from prism_ray.report.incidents import FILE, IncidentLog, kind_of, kinds, read_incidents, reason, thinned

log = logging.getLogger("prism_ray.rollout.pool")


def row(what, time=0.0, **more):
    return {"time": time, "stage": "align", "level": "WARNING", "room": "rollout", "what": what, **more}


def test_warnings_and_errors_are_kept_with_stage_and_room_and_nothing_else_is(tmp_path):
    stage = ["align"]
    with IncidentLog(tmp_path, lambda: stage[0]):
        log.info("fine")
        log.warning("engine %d died; a new one has taken its place", 3)
        stage[0] = ""
        logging.getLogger("prism_ray").error("failed")
        logging.getLogger("elsewhere").warning("not ours")
    log.warning("after the run")
    assert not any(isinstance(handler, IncidentLog) for handler in logging.getLogger("prism_ray").handlers)
    first, second = read_incidents(tmp_path)
    assert first.pop("time") > 1e9
    assert first == {
        "stage": "align",
        "level": "WARNING",
        "room": "rollout",
        "what": "engine 3 died; a new one has taken its place",
    }
    assert (second["stage"], second["level"], second["room"], second["what"]) == ("", "ERROR", "prism_ray", "failed")


def test_an_exception_is_told_in_its_own_words(tmp_path):
    with IncidentLog(tmp_path, str):
        try:
            raise ValueError("first line\nthe reason itself")
        except ValueError:
            log.exception("no report")
    assert read_incidents(tmp_path)[0]["what"] == "no report: ValueError: the reason itself"


def test_an_error_in_an_actor_is_told_by_its_cause():
    outer = RuntimeError("ray's traceback")
    outer.cause = KeyError("weights")
    assert reason(outer) == "KeyError: 'weights'"
    assert reason(TimeoutError()) == "TimeoutError: "


def test_an_incident_is_on_disk_at_once_and_the_next_run_goes_on_after_half_a_line(tmp_path):
    handler = IncidentLog(tmp_path, str)
    with handler:
        log.warning("one")
        assert len(read_incidents(tmp_path)) == 1
    path = tmp_path / FILE
    path.write_text(path.read_text() + '{"time": 1, "wh')
    with IncidentLog(tmp_path, str):
        log.warning("two")
    assert [incident["what"] for incident in read_incidents(tmp_path)] == ["one", "two"]


def test_lines_that_are_no_incidents_are_left_out(tmp_path):
    lines = ["", "nonsense", "[]", '{"time": 1}', '{"what": "x", "time": "y"}', json.dumps(row("good"))]
    (tmp_path / FILE).write_text("\n".join(lines))
    assert read_incidents(tmp_path) == [row("good")]


def test_the_file_does_not_grow_without_bound_and_what_is_rare_stays(tmp_path):
    with IncidentLog(tmp_path, str, most_rows=50):
        log.warning("the one engine died")
        for number in range(1000):
            log.warning("step %d was skipped", number)
    found = read_incidents(tmp_path)
    assert len(found) <= 50
    assert found[0]["what"] == "the one engine died" and found[-1]["what"] == "step 999 was skipped"
    skipped, engine = kinds(found)
    assert skipped.count == 1000 and engine.count == 1


def test_one_sentence_does_not_fill_the_disk(tmp_path):
    with IncidentLog(tmp_path, str):
        log.warning("x" * 1_000_000)
    assert (tmp_path / FILE).stat().st_size < 2000


def test_a_disk_that_is_gone_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    handler = IncidentLog(tmp_path, str)
    with handler:
        handler._file.close()
        log.warning("nowhere to write this")
    assert "I/O operation on closed file" in capsys.readouterr().err


def test_incidents_that_differ_in_numbers_are_one_kind():
    assert kind_of(row("engine-1 waited 2.5 s")) == kind_of(row("engine-12 waited -3 s"))
    assert kind_of(row("engine-1 died")) != kind_of(row("engine-1 waits"))
    assert kind_of(row("a")) != kind_of(row("a", level="ERROR"))


def test_kinds_tell_how_often_since_when_and_where_the_newest_first():
    listed = kinds([row("a 1", 1.0), row("b", 2.0), row("a 2", 3.0, stage="rlvr"), row("a 3", 4.0, before=7)])
    assert [kind.newest["what"] for kind in listed] == ["a 3", "b"]
    assert (listed[0].count, listed[0].first, listed[0].stages) == (10, 1.0, ("align", "rlvr"))


@pytest.mark.parametrize("most", [1, 7, 40])
def test_thinning_keeps_to_its_bound_and_loses_no_count_of_what_it_keeps(most):
    many = [row(f"{name}{'!' * i}" if name == "x" else f"{name} {i}", float(i)) for i in range(60) for name in "abx"]
    kept = thinned(many, most)
    assert len(kept) <= most and kept == sorted(kept, key=lambda r: r["time"])
    for kind in kinds(kept):
        if not kind.newest["what"].startswith("x"):
            assert kind.count == 60


def test_who_wants_to_know_hears_of_each_incident(tmp_path):
    told = []
    with IncidentLog(tmp_path, str, lambda level, room: told.append((level, room))):
        logging.getLogger("prism_ray.rollout.pool").warning("engine 0 died")
        logging.getLogger("prism_ray.learner.group").info("all is well")
        logging.getLogger("prism_ray.stages.run").error("align failed")
    assert told == [("WARNING", "rollout"), ("ERROR", "stages")]
