"""Who is let in under overload: refused before anything is read, by ingress and proxy, and what they say."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages, retry_after_headers
from starlette.testclient import TestClient

from prism_ray import codec
from prism_ray.endpoint.client import Client
from prism_ray.endpoint.wire import MSGPACK, SCORE
from prism_ray.serve.admission import Admission, Bound, Load, ProxyAdmission, in_proxy


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def scope(path: str = SCORE, method: str = "POST", **headers: str) -> dict:
    every = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": every}


async def unread() -> dict:
    raise AssertionError("something was read of a request that is refused")


def asked(app, **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the answer to a score request whose body must not be read."""
    sent: list = []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(app(scope(**headers), unread, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent)


def test_one_too_many_is_refused_before_its_body_is_sent_and_keeps_its_connection(listening, token, response):
    gate = threading.Event()
    with (
        listening(queue={"requests": 2}) as endpoint,
        Client(endpoint.url, token) as client,
        ThreadPoolExecutor(2) as callers,
    ):
        work = endpoint.service.batcher._work
        endpoint.service.batcher._work = lambda jobs: (gate.wait(60), work(jobs))[1]
        address = urlsplit(endpoint.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
        try:
            waiting = [callers.submit(client.score, "count red", response()) for _ in range(2)]
            deadline = time.monotonic() + 60
            while endpoint.service._open < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            connection.putrequest("POST", SCORE)
            connection.putheader("Authorization", f"Bearer {token}")
            connection.putheader("Content-Length", "5")
            connection.endheaders()
            refused = connection.getresponse()
            error = json.loads(refused.read())["error"]
            assert (refused.status, error["code"]) == (503, "overloaded") and "2 requests" in error["message"]
            assert int(refused.headers["Retry-After"]) >= 1
            connection.send(b"12345")
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ok"}', "health is no request for scores"
            gate.set()
            assert all(call.result().results[0].valid for call in waiting)
            assert client.score("count red", response()).results[0].valid, "there is room again"
        finally:
            gate.set()
            connection.close()


def test_one_that_is_given_up_makes_room():
    entered = asyncio.Event()

    async def forever(scope, receive, send) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def scenario() -> Load:
        admission = Admission(forever, Bound(1, 60.0))
        call = asyncio.create_task(admission(scope(), unread, unread))
        await entered.wait()
        assert admission.load.open == 1 and admission.load.refusal()
        call.cancel()
        await asyncio.wait({call})
        return admission.load

    load = asyncio.run(scenario())
    assert load.open == 0 and load.refusal() is None


def test_a_wait_beyond_the_time_of_an_answer_is_refused():
    """By the rate of those that were scored while there was work; time without any says nothing."""
    clock = Clock()
    load = Load(Bound(100, 10.0), clock)
    for _ in range(4):  # half a second of work for each, and long pauses
        load.enter()
        clock.now += 0.5
        load.leave(clock.now - 0.5)
        clock.now += 60
    assert load.per_s == pytest.approx(2.0)
    for _ in range(20):
        load.enter()
    assert load.refusal() is None, "20 take 10 s"
    load.enter()
    refusal = load.refusal()
    assert refusal and (refusal.status, refusal.code, refusal.retry_after) == (503, "overloaded", 6.0)
    assert "some 10 s" in refusal.message
    clock.now += 100
    load.leave(None)
    assert load.per_s == pytest.approx(2.0), "what was not scored says nothing of the rate"
    for _ in range(20):
        load.leave(clock.now - 100)
    assert load.per_s == pytest.approx(1.005) and load.refusal() is None, "what is idle refuses nobody"


def test_only_requests_that_are_scored_are_work_and_only_once_their_body_is_there():
    clock, bound = Clock(), Bound(100, 60.0)

    async def app(scope, receive, send) -> None:
        """Scores for a second what comes within a minute."""
        while (await receive())["more_body"]:
            if clock.now > scope["late"]:
                return await send({"type": "http.response.start", "status": 408, "headers": []})
        clock.now += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})

    admission = Admission(app, bound)
    admission.load = Load(bound, clock)

    async def sent(message) -> None:
        pass

    def ask(seconds: float, parts: int) -> None:
        """A request whose body takes so long to come, in so many parts."""
        left = iter(range(parts))

        async def receive() -> dict:
            clock.now += seconds / parts
            return {"type": "http.request", "body": b"x", "more_body": next(left) < parts - 1}

        asyncio.run(admission(scope() | {"late": clock.now + 58}, receive, sent))

    ask(59, 10)
    ask(0, 1)
    assert admission.load.per_s == pytest.approx(1.0), "an upload that was given up is no work"
    ask(50, 10)
    assert admission.load.per_s == pytest.approx(1.0), "nor is one that comes in time"
    admission.load.enter()
    admission.load.enter()
    assert admission.load.refusal() is None


def test_the_time_to_ask_again_follows_the_rate():
    load = Load(Bound(1000, 1e6))
    load.open = 1000
    assert [load.refusal().retry_after] == [1.0], "nothing is known yet"
    for per_s, after in ((100.0, 5.0), (1e9, 1.0), (0.1, 60.0)):
        load.per_s = per_s
        assert load.refusal().retry_after == after


def test_the_proxy_learns_the_bound_and_keeps_it_to_itself(serving, response):
    with serving(queue={"requests": 3}, replicas={"most": 2}, limits={"timeout_s": 30}) as client:
        [middleware] = in_proxy()
        proxy = middleware.cls(client.app)

        def ask(method: str, path: str, **more) -> httpx.Response:
            """On the event loop of the application."""

            async def one() -> httpx.Response:
                transport = httpx.ASGITransport(proxy)
                async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=client.headers) as made:
                    return await made.request(method, path, **more)

            return client.portal.call(one)

        assert proxy.load.bound is None and proxy.load.refusal() is None
        answer = ask("POST", SCORE, json={"prompt": "count red", "responses": [response()]})
        assert answer.status_code == 200 and "x-prism-bound" not in answer.headers
        assert proxy.load.bound == Bound(6, 30.0) and proxy.load.open == 0
        for _ in range(6):
            proxy.load.enter()
        status, headers, body = asked(proxy)
        assert status == 503 and json.loads(body)["error"]["code"] == "overloaded" and headers[b"retry-after"] == b"1"
        status, headers, body = asked(proxy, accept=MSGPACK)
        assert headers[b"content-type"] == MSGPACK.encode() and codec.decode(body)["error"]["code"] == "overloaded"
        assert {ask("GET", path).status_code for path in ("/v1/model", "/readyz", "/docs")} == {200}


@pytest.mark.parametrize(
    ("text", "status", "headers", "told"),
    [
        ("Request dropped due to backpressure", 503, retry_after_headers(7), (503, "unavailable", "7")),
        ("Traceback (most recent call last): …/secret.py", 500, None, (503, "unavailable", "5")),
        ("Path '/v1/score' not found", 404, None, (404, "http", None)),
    ],
)
def test_what_serve_says_in_its_own_words_is_said_in_ours(text, status, headers, told):
    """Messages as Serve's proxy makes them where no ingress answers."""

    async def serves(scope, receive, send) -> None:
        for message in convert_object_to_asgi_messages(text, status_code=status):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *(headers or [])]
            await send(message)

    answer = TestClient(ProxyAdmission(serves)).post(SCORE)
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers.get("retry-after")) == told
    assert len(answer.json()["error"]["message"]) > 10 and text not in answer.text
    assert TestClient(ProxyAdmission(serves)).get("/of/another/application").text == text
