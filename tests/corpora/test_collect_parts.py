"""The pure parts of the collection: requests, replies, pace, retries, the journal and what it says was spent."""

import base64
import io
import json
import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prism_ray.config.collect import AskingSettings, CollectSettings, SpendingSettings, TeacherSettings
from prism_ray.config.load import ConfigError, load_config
from prism_ray.corpora.collect_client import Secret
from prism_ray.corpora.collect_journal import CollectError, Journal, Tokens, replay
from prism_ray.corpora.collect_pace import Pace, backoff, read_retry_after, verdict_on
from prism_ray.corpora.collect_request import (
    Reply,
    build_request,
    data_url,
    estimate_tokens,
    fault_of,
    key_of,
    read_reply,
)
from prism_ray.records import Prompt
from prism_ray.response import render

TEACHER = TeacherSettings(url="https://teacher.test/v1/", model="m")


def image(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(data, kind)
    return data.getvalue()


def prompt(*contents: str, images: tuple[bytes, ...] = (), system: str = "") -> Prompt:
    turns = [{"role": "user", "content": text} for text in contents]
    return Prompt("p", tuple([{"role": "system", "content": system}] * bool(system) + turns), images)


def body(**changes) -> str:
    message = {"role": "assistant", "content": changes.pop("content", "hello")}
    data = {"choices": [{"message": message, "finish_reason": "stop"}]} | changes
    return json.dumps(data)


# Requests


def test_images_stand_where_their_markers_stood():
    png, jpeg = image("PNG"), image("JPEG")
    request = build_request(prompt("first <image> then <image>?", "and now", images=(png, jpeg)), TEACHER)
    parts = request["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert parts[1]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(png).decode()
    assert parts[3]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert request["messages"][2]["content"] == "and now"


def test_a_kind_of_image_that_endpoints_do_not_take_becomes_png():
    url = data_url(image("BMP"))
    decoded = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
    assert url.startswith("data:image/png;") and decoded.format == "PNG" and decoded.getpixel((1, 1)) == (200, 10, 10)


def test_the_format_is_asked_for_only_where_the_prompt_has_no_system_turn():
    assert build_request(prompt("q"), TEACHER)["messages"][0] == {"role": "system", "content": TEACHER.system}
    own = build_request(prompt("q", system="mine"), TEACHER)["messages"]
    assert [turn["content"] for turn in own] == ["mine", "q"]


def test_what_was_wrong_is_told_when_asking_again_and_settings_reach_the_request():
    teacher = TeacherSettings(
        url="http://t", model="m", max_answer_tokens=7, max_tokens_field="max_completion_tokens", options={"seed": 3}
    )
    request = build_request(prompt("q"), teacher, fault="missing <think>")
    assert "missing <think>" in request["messages"][-1]["content"]
    assert (request["model"], request["max_completion_tokens"], request["seed"]) == ("m", 7, 3)
    assert "max_tokens" not in request


def test_a_changed_prompt_is_another_question():
    same = prompt("<image>q", images=(image("PNG"),))
    others = [prompt("<image>q", images=(image("JPEG"),)), prompt("<image>r", images=same.images)]
    assert key_of(same) == key_of(prompt("<image>q", images=(image("PNG"),)))
    assert len({key_of(same), *map(key_of, others)}) == 3


def test_estimates_grow_with_text_and_images():
    settings = CollectSettings(prompts=["x"], teacher=TEACHER, spending=SpendingSettings(tokens_per_image=1000))
    plain = estimate_tokens(prompt("q" * 300), settings)
    assert estimate_tokens(prompt("<image>" + "q" * 293, images=(image("PNG"),)), settings) == plain + 1000
    assert estimate_tokens(prompt("q" * 600), settings) == plain + 100


# Replies


def test_a_reply_is_read_with_what_it_cost():
    reply = read_reply(body(usage={"prompt_tokens": 5, "completion_tokens": 9}))
    assert reply == Reply("hello", "", "stop", 5, 9)
    assert read_reply(body(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text == "ab"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ("<html>", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no choices"),
        ('{"choices": []}', "no choices"),
        ('{"choices": [{"message": "x"}]}', "no choices"),
        (body(content=None), "empty"),
        (body(content=""), "empty"),
        (body(content=[3]), "empty"),
    ],
)
def test_a_body_that_is_no_answer_is_a_problem_and_no_error(text, problem):
    reply = read_reply(text)
    assert reply.text is None and problem in reply.problem and fault_of(reply) == reply.problem


NAMES = st.sampled_from(["choices", "message", "content", "usage", "text", "prompt_tokens", "finish_reason"])
PLAIN = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_no_body_raises(data):
    read_reply(json.dumps(data))


def test_faults_name_what_is_wrong_with_an_answer():
    assert fault_of(Reply(render("a", "b", "c"))) == ""
    assert "<think>" in fault_of(Reply("<caption>a</caption>"))
    assert "longest" in fault_of(Reply("<caption>a", finish_reason="length"))


# Retries and pace


@pytest.mark.parametrize(
    ("status", "text", "verdict"),
    [(200, "", "good"), (429, "", "again"), (500, "", "again"), (529, "", "again"), (408, "", "again"),
     (400, "", "refused"), (413, "", "refused"), (302, "", "refused"), (401, "", "fatal"), (404, "", "fatal"),
     (429, '{"error": {"code": "insufficient_quota"}}', "fatal")],
)  # fmt: skip
def test_what_a_status_means(status, text, verdict):
    assert verdict_on(status, text) == verdict


def test_back_off_doubles_with_jitter_up_to_a_limit():
    settings, rng = AskingSettings(backoff_s=1, backoff_most_s=10), random.Random(0)
    for attempt, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (5000, 10)):
        waits = [backoff(attempt, settings, rng) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert max(waits) - min(waits) > longest / 4


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("inf", None), ("nan", None),
     ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0), ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
     ("Wed, 21 Oct 2015 07:28:00 +99999999999999999", None), ("", None), ("9" * 400, None)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert read_retry_after(value, datetime(2026, 10, 21, 7, 28, tzinfo=UTC)) == seconds


def test_requests_are_spread_over_the_minute():
    pace, now, times = Pace(AskingSettings(requests_per_minute=30)), 0.0, []
    for _ in range(5):
        now += pace.delay(now)
        times.append(now)
        pace.sent(now, 10)
    assert times == [0, 2, 4, 6, 8]


def test_tokens_are_charged_when_they_are_known():
    pace = Pace(AskingSettings(tokens_per_minute=600))
    pace.sent(0.0, 100)
    assert pace.delay(0.0) == pytest.approx(10)
    pace.charge(1.0, 50)
    assert pace.delay(1.0) == pytest.approx(14)
    pace.charge(1.0, -120)
    assert pace.delay(1.0) == pytest.approx(2)
    pace.pause(30.0)
    assert pace.delay(1.0) == pytest.approx(29)


# Journal and spending


def test_spending_follows_the_endpoints_count_and_doubts_what_was_lost(tmp_path):
    journal = Journal(tmp_path)
    most = Tokens(100, 1000)
    good, lost, free, under_way = (journal.ask(f"k{i}", f"p{i}", most, 100) for i in range(4))
    assert journal.state.at_most == Tokens(400, 4000)
    journal.answered(good, "{}", Reply("x", input_tokens=70, output_tokens=30), "")
    journal.lost(lost, "timeout")
    journal.free(free, "busy")
    assert journal.state.paid == Tokens(70, 30)
    assert journal.state.at_most == Tokens(270, 2030)
    journal.close()
    again, _ = replay(journal.path)
    assert again.at_most == Tokens(270, 2030) and again.uncertain == Tokens(200, 2000) and not again.under_way


def test_an_answer_without_usage_is_estimated(tmp_path):
    journal = Journal(tmp_path)
    number = journal.ask("k", "p", Tokens(100, 1000), 100)
    assert journal.answered(number, "{}", Reply("x" * 300), "") == Tokens(100, 100)


def test_questions_that_were_under_way_together_teach_the_estimate_once(tmp_path):
    journal = Journal(tmp_path)
    asked = [journal.ask(f"k{i}", "p", Tokens(100, 10), 100) for i in range(16)]
    for number in asked:
        journal.answered(number, "{}", Reply("x", input_tokens=1000, output_tokens=5), "")
    assert journal.state.excess == 10
    later = journal.ask("later", "p", Tokens(1000, 10), 100)
    journal.answered(later, "{}", Reply("x", input_tokens=1200, output_tokens=5), "")
    journal.close()
    assert journal.state.excess == replay(journal.path)[0].excess == 12


def test_a_journal_without_raw_estimates_is_replayed(tmp_path):
    """Versions before wrote only what a question may cost, by what was learned until then."""
    lines = [{"ask": n, "key": f"k{n}", "id": "p", "input": n * 100, "most": 10, "time": 0.0} for n in (1, 2)]
    paid = {"body": "{}", "fault": "", "input_tokens": 200, "output_tokens": 5}
    lines += [{"answer": n} | paid for n in (1, 2)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state, _ = replay(tmp_path / "answers.jsonl")
    assert state.excess == 2 and state.paid == Tokens(400, 10)


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_torn_line_is_forgotten_and_the_journal_goes_on(tmp_path, left):
    journal = Journal(tmp_path)
    first = journal.ask("a", "a", Tokens(1, 1), 1)
    journal.answered(first, body(content="one"), read_reply(body(content="one")), "")
    second = journal.ask("b", "b", Tokens(1, 1), 1)
    whole = journal.path.stat().st_size
    journal.answered(second, body(content="two"), read_reply(body(content="two")), "")
    journal.close()
    with journal.path.open("r+b") as file:
        file.truncate(whole + left)
    again = Journal(tmp_path)
    assert set(again.state.answers) == {"a"} and again.path.stat().st_size == whole
    third = again.ask("b", "b", Tokens(1, 1), 1)
    again.answered(third, body(content="two"), read_reply(body(content="two")), "")
    again.close()
    last = Journal(tmp_path)
    assert (last.text("a"), last.text("b")) == ("one", "two")


def test_damage_inside_names_the_line(tmp_path):
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.ask("k", "p", Tokens(1, 1), 1)
    journal.close()
    lines = journal.path.read_bytes().split(b"\n")
    lines[1] = b"\x00" * 10
    journal.path.write_bytes(b"\n".join(lines))
    with pytest.raises(CollectError, match="line 2 is damaged"):
        Journal(tmp_path)


def test_two_collections_into_one_folder_would_pay_twice(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(CollectError, match="running already"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_caps():
    prices = SpendingSettings(input_price=2, output_price=10, max_money=1.0, max_tokens=300_000)
    assert Tokens(100_000, 80_000).money(prices) == pytest.approx(1.0)
    assert Tokens(100_000, 80_000).within(prices)
    assert not Tokens(100_000, 80_001).within(prices)
    assert not Tokens(300_001, 0).within(prices)
    assert Tokens(10**12, 10**12).within(SpendingSettings())


# Settings and the key


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teacher.url=https://me:sk-123@host/v1", "without user"),
        ("teacher.url=https://host/v1?key=sk-123", "without user"),
        ("teacher.url=host", "http"),
        ("teacher.options={stream: true}", "stream is set from elsewhere"),
        ("spending.max_money=3", "give the prices"),
    ],
)
def test_bad_settings_are_named_and_no_key_is_repeated(override, sentence):
    good = ["prompts=[x]", "teacher.url=http://t", "teacher.model=m"]
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(CollectSettings, None, [*good, override])
    assert "sk-123" not in str(caught.value)


def test_a_key_shows_nowhere_but_in_the_header():
    secret = Secret("K", {"K": " sk-123\n"})
    assert secret.headers == {"Authorization": "Bearer sk-123"}
    assert "sk-123" not in f"{secret!r} {secret} {secret.redact('wrong key sk-123!')}"
    assert Secret("", {}).headers == {}
    with pytest.raises(CollectError, match="K .teacher.key_variable. is not set"):
        Secret("K", {})
    with pytest.raises(CollectError, match="characters") as caught:
        Secret("K", {"K": "sk\x00-123"})
    assert "123" not in str(caught.value)
