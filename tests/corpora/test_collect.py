"""The collection against a local endpoint that misbehaves: everything arrives, nothing is paid twice, no key leaks."""

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.collect import main
from prism_ray.config.collect import CollectSettings
from prism_ray.config.load import load_config
from prism_ray.config.models import TinyModelSettings
from prism_ray.corpora.collect import Collector
from prism_ray.corpora.collect_journal import CollectError, replay
from prism_ray.corpora.references import facts_of
from prism_ray.corpora.rows import prompt_from_row
from prism_ray.models.tiny import build_tiny
from prism_ray.stages.collect import collect, describe_estimate, estimate
from tests.corpora.teacher_server import TeacherServer, answer

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-this-must-show-nowhere-42"


@pytest.fixture
def start(monkeypatch):
    """Starts an endpoint with this behaviour."""
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def begin(behave=None) -> TeacherServer:
        servers.append(TeacherServer(behave))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def corpus(tmp_path, make):
    return make.write(tmp_path / "prompts.parquet", [make.row(i, teacher_response=None) for i in range(24)])


def arguments(server, corpus, *overrides: str) -> list[str]:
    return [
        f"prompts=[{corpus}]", f"output={corpus.parent / 'out'}", f"teacher.url={server.url}", "teacher.model=oracle",
        "teacher.key_variable=TEST_KEY", "asking.backoff_s=0.02", "asking.timeout_s=20", *overrides,
    ]  # fmt: skip


def settings(server, corpus, *overrides: str) -> CollectSettings:
    return load_config(CollectSettings, None, arguments(server, corpus, *overrides))


def references(corpus) -> list[dict]:
    return pq.read_table(corpus.parent / "out" / "references.parquet").to_pylist()


def lines(corpus, kind: str) -> list[dict]:
    path = corpus.parent / "out" / "answers.jsonl"
    return [line for line in map(json.loads, path.read_text().splitlines()) if kind in line]


def test_references_are_what_the_other_stages_read(start, corpus, make):
    server = start(lambda index, nth: "wrong" if index == 3 else "good")
    summary = collect(settings(server, corpus))
    assert summary["status"] == "completed"
    assert summary["agreement"] == {"references": 24, "known": 24, "agreeing": 23}
    assert summary["spent"] == {"input": 2400, "output": 1200, "money": 0.0}
    rows = references(corpus)
    assert [row["agrees"] for row in rows] == [index != 3 for index in range(24)]
    prompt = prompt_from_row(rows[5])
    assert prompt.reference == answer(5) and prompt.ground_truth == "5" and prompt.id == "row-5"
    assert prompt.images == (make.png(5),) and prompt.messages[1]["content"] == "<image>what is 5"
    assert rows[5]["teacher_caption"] + rows[5]["teacher_cot"] == rows[5]["teacher_response"]
    assert facts_of(corpus.parent / "out" / "references.parquet")["model"] == "oracle"
    assert server.keys == {f"Bearer {KEY}"}
    assert set(server.billed.values()) == {1}


def test_answers_that_disagree_can_be_left_out(start, corpus):
    collect(settings(start(lambda index, nth: "wrong" if index == 3 else "good"), corpus, "only_agreeing=true"))
    assert [row["id"] for row in references(corpus)] == [f"row-{i}" for i in range(24) if i != 3]


def test_every_fault_of_an_endpoint_is_survived(start, corpus):
    faults = ["malformed", "busy", "broken", "truncated", "reset", "hang", "drip", "html", "empty", "cut", "echo",
              "gateway", "silent_usage"]  # fmt: skip
    server = start(lambda index, nth: faults[index] if nth == 1 and index < len(faults) else "good")
    summary = collect(settings(server, corpus, "asking.timeout_s=1.5"))
    assert summary["status"] == "completed" and summary["unanswered"] == {}
    assert summary["answered"]["now"] == 24 == len(references(corpus))
    asked_again = set(range(len(faults))) - {faults.index("silent_usage")}
    assert {index for index, times in server.asked.items() if times == 2} == asked_again
    assert summary["malformed_answers"] == 4, "malformed, html, empty, cut"
    lost = {line["lost"]: line for line in lines(corpus, "lost")}
    assert len(lost) == 5, "truncated, reset, hang, drip, gateway"
    assert any('{"id"' in line["body"] for line in lost.values()), "what there was of a torn answer is kept"
    assert summary["perhaps_spent"]["output"] == 5 * 8192


def test_retry_after_holds_up_everything(start, corpus):
    server = start(lambda index, nth: "busy" if index == 0 and nth == 1 else "good")
    collect(settings(server, corpus, "asking.concurrency=1"))
    assert server.times[1] - server.times[0] >= 1.0


def test_the_rate_is_kept(start, corpus):
    server = start()
    collect(settings(server, corpus, "asking.requests_per_minute=1200", "limit=20"))
    times = [line["time"] for line in lines(corpus, "ask")]
    assert len(times) == 20 and times[-1] - times[0] >= 0.9 * 19 * 0.05


def test_no_more_questions_at_once_than_asked_for(start, corpus):
    server = start()
    server.slow_s = 0.02
    at_once, most = 0, 0
    plain = server.do_good

    def counted(handler, index):
        nonlocal at_once, most
        with server.lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        plain(handler, index)
        with server.lock:
            at_once -= 1

    server.do_good = counted
    collect(settings(server, corpus, "asking.concurrency=3"))
    assert 2 <= most <= 3


def test_malformed_answers_are_asked_again_a_bounded_number_of_times_over_all_runs(start, corpus):
    server = start(lambda index, nth: "malformed" if index == 7 else "good")
    wanted = settings(server, corpus, "asking.reasks=2")
    first = collect(wanted)
    assert server.billed[7] == 3 and first["unanswered"] == {"malformed": 1}
    assert "missing </think>" in json.dumps(server.requests) or "missing <think>" in json.dumps(server.requests)
    collect(wanted)
    assert server.billed[7] == 3, "another run must not pay for it again"
    left_out = (corpus.parent / "out" / "unanswered.jsonl").read_text()
    assert json.loads(left_out)["id"] == "row-7"
    collect(settings(server, corpus, "asking.reasks=3"))
    assert server.billed[7] == 4


def test_a_refused_prompt_costs_only_itself_and_may_be_tried_again(start, corpus):
    server = start(lambda index, nth: "refused" if index == 2 and nth == 1 else "good")
    first = collect(settings(server, corpus))
    assert first["unanswered"] == {"refused": 1} and first["answered"]["now"] == 23 and server.asked[2] == 1
    assert collect(settings(server, corpus))["answered"] == {"before": 23, "now": 1}


def test_an_endpoint_that_is_down_stops_the_run(start, corpus):
    server = start(lambda index, nth: "broken")
    summary = collect(settings(server, corpus, "asking.attempts=2", "asking.max_failures=5", "asking.concurrency=2"))
    assert summary["status"] == "stopped" and "5 prompts in a row got no answer" in summary["reason"]
    assert "HTTP 500: oops" in summary["reason"]
    assert sum(server.asked.values()) <= 2 * 7
    assert summary["spent"]["input"] == summary["perhaps_spent"]["input"] == 0


@pytest.mark.parametrize(("action", "words"), [("key", "Incorrect API key"), ("quota", "pay first")])
def test_what_every_prompt_would_meet_stops_at_once(start, corpus, action, words):
    server = start(lambda index, nth: action)
    summary = collect(settings(server, corpus, "asking.concurrency=2"))
    assert summary["status"] == "stopped" and words in summary["reason"] and KEY not in summary["reason"]
    assert sum(server.asked.values()) <= 2


def test_a_cap_is_never_passed_and_can_be_raised(start, corpus):
    server = start()
    prices = ["spending.input_price=10", "spending.output_price=20", "teacher.max_answer_tokens=60",
              "spending.tokens_per_image=80"]  # fmt: skip
    one = (100 * 10 + 50 * 20) / 1e6
    summary = collect(settings(server, corpus, *prices, f"spending.max_money={10 * one + 1e-9}"))
    assert summary["status"] == "stopped" and "spending cap is reached" in summary["reason"]
    assert 8 * one <= summary["spent"]["money"] <= 10 * one + 1e-9
    paid = sum(server.billed.values())
    assert len(references(corpus)) == paid, "what there is can be used"
    rest = collect(settings(server, corpus, *prices, "spending.max_money=1"))
    assert rest["status"] == "completed" and rest["answered"] == {"before": paid, "now": 24 - paid}
    assert set(server.billed.values()) == {1}


def test_a_cap_in_tokens(start, corpus):
    server = start()
    small = ["teacher.max_answer_tokens=60", "asking.concurrency=1"]
    summary = collect(settings(server, corpus, "spending.max_tokens=1500", "spending.tokens_per_image=20", *small))
    assert summary["status"] == "stopped"
    assert 1500 - 160 < summary["spent"]["input"] + summary["spent"]["output"] <= 1500, "the estimate learns"
    assert sum(server.billed.values()) == 9


def test_an_estimate_that_is_far_too_low_is_learned_once_by_all_that_ask_together(start, corpus):
    server = start()
    server.slow_s = 0.1
    wanted = ("asking.concurrency=16", "spending.tokens_per_image=1", "spending.max_tokens=1000000")
    summary = collect(settings(server, corpus, *wanted))
    assert summary["status"] == "completed" and summary["agreement"]["references"] == 24
    state, _ = replay(corpus.parent / "out" / "answers.jsonl")
    raw = min(line["raw"] for line in lines(corpus, "ask"))
    assert state.excess == 100 / raw > 2
    assert max(line["input"] for line in lines(corpus, "ask")) <= 101


def test_what_is_refunded_shortens_the_wait_of_those_who_wait_already(start, corpus, monkeypatch):
    """Each question books 8,192 tokens of answer, or hours; only looking again shows that it took 50."""
    slept = []

    async def sleeping(self, seconds):
        slept.append(seconds)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(Collector, "_sleep", sleeping)
    wanted = ("asking.concurrency=4", "asking.tokens_per_minute=100000", "spending.tokens_per_image=1000000", "limit=8")
    assert collect(settings(start(), corpus, *wanted))["status"] == "completed"
    assert slept and max(slept) <= 1.0


def test_a_lost_answer_counts_as_paid_in_full(start, corpus):
    server = start(lambda index, nth: "reset" if nth == 1 else "good")
    small = ["teacher.max_answer_tokens=60", "spending.tokens_per_image=80", "asking.concurrency=1"]
    summary = collect(settings(server, corpus, "spending.max_tokens=1500", *small))
    assert summary["status"] == "stopped" and "on answers that were lost" in summary["reason"]
    assert sum(server.billed.values()) * 150 <= 1500


def test_a_dry_run_asks_and_writes_nothing(start, corpus):
    server = start()
    wanted = settings(server, corpus, "spending.input_price=1", "spending.max_money=0.001")
    found = estimate(wanted)
    assert (found.prompts, found.answered, found.unusable) == (24, 0, 0)
    assert found.tokens.output == 24 * 1000 and found.tokens.input > 24 * 1600
    assert "MORE than the caps allow" in describe_estimate(found, wanted)
    assert not server.asked and not (corpus.parent / "out").exists()
    collect(settings(server, corpus, "limit=4"))
    again = estimate(wanted)
    assert again.answered == 4 and again.spent.total == 600 and again.tokens.output == 20 * 50


def test_rows_that_cannot_be_used_are_not_asked(start, tmp_path, make):
    rows = [make.row(i) for i in range(24)]
    rows[5]["images"] = [{"bytes": b"no image", "path": None}]
    corpus = make.write(tmp_path / "prompts.parquet", rows)
    server = start()
    summary = collect(settings(server, corpus, "corpora.max_bad_share=0.1"))
    assert summary["unusable"] == {"images: does not decode": 1} and server.asked[5] == 0
    assert pq.read_table(tmp_path / "out" / "quarantine.parquet")["row"].to_pylist() == [5]


def test_an_answer_whose_truth_cannot_be_compared_with_is_kept_all_the_same(start, tmp_path, make):
    rows = [make.row(i) for i in range(4)]
    rows[2]["reward_model"] = {"ground_truth": "7" * 2000, "style": "rule"}
    rows[3]["extra_info"] = json.dumps({"id": "row-3", "equivalent_answers": "7"})
    corpus = make.write(tmp_path / "prompts.parquet", rows)
    summary = collect(settings(start(), corpus, "only_agreeing=true"))
    assert summary["agreement"] == {"references": 4, "known": 2, "agreeing": 2}
    assert [row["agrees"] for row in references(corpus)] == [True, True, None, None]


def test_an_id_is_paid_once_and_a_file_that_is_named_twice_too(start, tmp_path, make):
    rows = [make.row(i % 3, prompt=[{"role": "user", "content": f"<image>what is {i}"}]) for i in range(9)]
    corpus = make.write(tmp_path / "prompts.parquet", rows)
    server = start()
    server.slow_s = 0.1
    named_twice = ("asking.concurrency=4", f"prompts=[{corpus}, {corpus}]", "corpora.max_bad_share=0.7")
    summary = collect(settings(server, corpus, *named_twice))
    assert summary["agreement"]["references"] == 3 and summary["unusable"] == {"id: used before": 6}
    assert server.billed == {0: 1, 1: 1, 2: 1}
    assert [r["id"] for r in references(corpus)] == ["row-0", "row-1", "row-2"]
    assert pq.read_table(tmp_path / "out" / "quarantine.parquet")["row"].to_pylist() == list(range(3, 9))


def test_the_teacher_sees_images_at_the_size_that_the_policy_will(start, tmp_path, make):
    build_tiny(tmp_path / "policy", ["red"], TinyModelSettings(layers=1), seed=0)
    rows = [make.row(i, images=[{"bytes": make.png(i, size), "path": None}]) for i, size in SIZES.items()]
    corpus = make.write(tmp_path / "prompts.parquet", rows)
    plain, server = start(), start()
    collect(settings(plain, corpus, f"output={tmp_path / 'plain'}"))
    seeing = settings(server, corpus, f"policy={tmp_path / 'policy'}")
    collect(seeing)
    assert shown_sizes(plain) == SIZES
    assert shown_sizes(server) == {0: (64, 64), 1: (288, 192), 2: (64, 64)}
    collect(settings(server, corpus))
    assert set(server.billed.values()) == {1}, "an answer is known by the prompt, not by how it was shown"
    assert [r["images"][0]["bytes"] for r in references(corpus)] == [r["images"][0]["bytes"] for r in rows]
    with pytest.raises(CollectError, match="policy: .*nowhere: no config.json"):
        collect(settings(server, corpus, "policy=nowhere"))


SIZES = {0: (64, 64), 1: (400, 300), 2: (50, 70)}


def shown_sizes(server):
    """Width and height of the image in each question."""
    sizes = {}
    for request in server.requests:
        image, text = request["messages"][-1]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition("base64,")[2])
        sizes[int(text["text"].split()[-1])] = Image.open(io.BytesIO(data)).size
    return sizes


def test_another_teacher_wants_another_folder(start, corpus):
    server = start()
    collect(settings(server, corpus, "limit=1"))
    with pytest.raises(CollectError, match="holds answers of oracle, and teacher.model is other"):
        collect(settings(server, corpus, "teacher.model=other"))


# The job as a process


def launch(server, corpus, *overrides: str, log=subprocess.PIPE) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / "collect.py"), *arguments(server, corpus, *overrides)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_collection_pays_for_no_recorded_answer_twice(start, corpus):
    server = start()
    server.slow_s = 0.1
    process = launch(server, corpus, "asking.concurrency=3")
    wait_for(lambda: sum(server.billed.values()) >= 9, process)
    process.kill()
    process.communicate()
    state, _ = replay(corpus.parent / "out" / "answers.jsonl")
    recorded, under_way = len(state.answers), sum(server.asked.values()) - len(state.answers)
    assert recorded >= 5 and under_way <= 3
    with (corpus.parent / "out" / "answers.jsonl").open("ab") as file:
        file.write(b'{"answer": 99, "bo')  # as if the kill had come in the middle of a line
    summary = collect(settings(server, corpus))
    assert summary["answered"] == {"before": recorded, "now": 24 - recorded}
    assert len(references(corpus)) == 24
    assert sum(server.billed.values()) <= 24 + 3, "only what was under way may be paid again"
    assert summary["perhaps_spent"]["output"] <= 3 * 8192


def test_a_signal_ends_it_with_what_was_under_way(start, corpus):
    server = start(lambda index, nth: "hang" if index == 8 else "good")
    process = launch(server, corpus, "asking.concurrency=2", "asking.stop_grace_s=0.5")
    wait_for(lambda: server.asked[8] and server.asked[12], process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on" in errors
    assert json.loads((corpus.parent / "out" / "summary.json").read_text())["status"] == "interrupted"
    server.behave = lambda index, nth: "good"
    collect(settings(server, corpus))
    assert len(references(corpus)) == 24
    assert {index for index, times in server.billed.items() if times > 1} <= {8}


def test_the_key_is_in_no_output_whatever_the_endpoint_says(start, corpus):
    server = start(lambda index, nth: "echo" if nth == 1 else "key" if index == 20 else "good")
    process = launch(server, corpus)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Incorrect API key provided: Bearer [key]" in errors.splitlines()[-1]
    written = [path for path in corpus.parent.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "summary.json", "log.txt"} <= {path.name for path in written}
    assert "[key]" in (corpus.parent / "out" / "answers.jsonl").read_text()
    for text in (output, errors, *(path.read_bytes().decode(errors="replace") for path in written)):
        assert KEY not in text


def test_bad_input_is_one_sentence_and_exit_code_2(start, corpus, monkeypatch, capsys):
    server = start()
    process = launch(server, corpus, "prompts=[nowhere.parquet]")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "nowhere.parquet" in errors.splitlines()[-1], errors
    with pytest.raises(SystemExit) as ended:
        main(arguments(server, corpus, "teacher.modell=x"))
    assert ended.value.code == 2 and "did you mean teacher.model?" in capsys.readouterr().err
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(CollectError, match="TEST_KEY .* is not set"):
        collect(settings(server, corpus))


def test_help_and_a_dry_run_from_the_command_line(start, corpus, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--dry-run" in said and "spending.max_money" in said
    assert main([*arguments(start(), corpus), "--dry-run"]) == 0
    assert "24 usable" in capsys.readouterr().out
