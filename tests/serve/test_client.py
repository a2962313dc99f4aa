"""The Python client against a real HTTP server."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from prism_ray.serve.client import AsyncClient, Client, EndpointError

ROOT = Path(__file__).resolve().parents[2]


def test_the_client_asks_and_reads(endpoint, token, png, response, monkeypatch):
    monkeypatch.setenv("PRISM_SERVE_TOKEN", token)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    question = {"prompt": "<image> count red", "images": [pixels]}
    with Client(endpoint.url) as client:
        answer = client.score(responses=[response(), "broken"], reference=response(" red"), **question)
        preference = client.compare(first=response(), second=response(" blue"), **question).preference
        many = client.score_many([{**question, "responses": response()} for _ in range(5)])
        model = client.model()
    assert answer.array.shape == (2, 2) and answer.results[0].gap and answer.results[1].reward == 0
    assert preference.combined is not None and 0 < preference.combined < 1
    combined = pytest.approx(answer.results[0].combined, rel=1e-5)
    assert [a.results[0].combined for a in many] == [combined] * 5
    assert model.model == answer.model

    async def ask():
        async with AsyncClient(endpoint.url + "/") as client:
            return await client.score(responses=response(), **question)

    assert asyncio.run(ask()).results[0].combined == combined


def test_threads_and_running_loops_may_share_a_client(endpoint, token, response):
    async def within_a_loop(client):
        return client.score("count red", response())

    with Client(endpoint.url, token) as client, ThreadPoolExecutor(4) as threads:
        answers = [a.result() for a in [threads.submit(client.score, "count red", response()) for _ in range(8)]]
        answers.append(asyncio.run(within_a_loop(client)))
    client.close()
    assert {len(a.results) for a in answers} == {1} and len(answers) == 9


@pytest.fixture
def of_the_readme(endpoint, token, monkeypatch):
    """Runs the block of README's Python in which a word stands, against the endpoint; what it has defined."""
    monkeypatch.setenv("PRISM_SERVE_TOKEN", token)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)

    def run(word: str, **names):
        [block] = [block for block in blocks if word in block]
        assert "http://localhost:8000" in block
        exec(block.replace("http://localhost:8000", endpoint.url), names)
        return names

    return run


def test_the_hooks_of_other_trainers_get_the_reward_of_training(of_the_readme, png, response):
    """The functions that README gives for TRL and verl."""
    texts, reference = [response(), "broken", response(" blue")], response(" red")
    trl, verl = of_the_readme("GRPOTrainer"), of_the_readme("compute_score")

    async def every():
        extra = {"prompt": "count red", "images": [png()], "reference": reference}
        async with verl["client"]:
            return await asyncio.gather(*(verl["compute_score"]("x", text, "", extra) for text in texts))

    chats = [[{"role": "assistant", "content": text}] for text in texts]
    with trl["client"]:
        rewards = trl["discriminator"](["count red"] * 3, chats, [[png()]] * 3, [reference] * 3)
    assert 0 < rewards[0] < 1 and rewards[1] == 0 and rewards[2] != rewards[0]
    assert asyncio.run(every()) == pytest.approx(rewards, rel=1e-4)


def test_the_readmes_client_prints_scores_and_reasons(of_the_readme, png, response, tmp_path, monkeypatch, capsys):
    (tmp_path / "square.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    answer = of_the_readme("square.png", responses=[response(), "broken"])["answer"]
    assert answer.array.shape == (2, 2) and np.isnan(answer.array[1]).all()
    assert capsys.readouterr().out == f"{answer.array} {['', answer.results[1].reason]}\n"


def test_the_curl_lines_of_the_readme_are_answered(endpoint, token, png, tmp_path):
    """As a shell reads them; they are sent from here, so that no curl is needed."""
    [lines] = re.findall(r"```\n(curl .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "square.png").write_bytes(png())
    shell = 'curl() { printf "%s\\0" "$@" end; }\n' + lines
    said = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    asked = [call.strip("\0").split("\0") for call in said.split("\0end\0") if call]
    assert len(asked) == 2
    for silent, address, *options in asked:
        given = dict(zip(options[::2], options[1::2], strict=True))
        headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
        answer = httpx.request(
            "POST" if "-d" in given else "GET",
            address.replace("localhost:8000", endpoint.url),
            content=given.get("-d"),
            headers=headers | {"Authorization": f"Bearer {token}"},
        )
        assert silent == "-s" and answer.status_code == 200, answer.text
    assert [result["valid"] for result in answer.json()["results"]] == [True, False]


def test_a_refusal_is_an_error_with_its_code_and_sentence(endpoint, token, response):
    with Client(endpoint.url, "wrong") as client, pytest.raises(EndpointError, match="not one that this endpoint") as e:
        client.model()
    assert (e.value.status, e.value.code) == (401, "wrong_token")
    with Client(endpoint.url, token) as client, pytest.raises(EndpointError, match="1000 responses; the limit is 64"):
        client.score("red", [response()] * 1000)


class _Busy(BaseHTTPRequestHandler):
    """Turns the first calls away, hangs up on the next, then says what is no answer of the endpoint."""

    calls: list[float] = []

    def do_GET(self) -> None:  # noqa: N802
        self.calls.append(time.monotonic())
        if len(self.calls) == 2:
            return self.connection.close()
        busy = len(self.calls) < 4
        self.send_response(503 if busy else 200)
        if busy:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(b"an error page of a load balancer")

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def busy():
    _Busy.calls = []
    server = HTTPServer(("127.0.0.1", 0), _Busy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_endpoint_is_asked_again_when_it_says_so(busy):
    with Client(busy, "") as client, pytest.raises(EndpointError, match="load balancer") as caught:
        client.model()
    assert caught.value.status == 200 and len(_Busy.calls) == 4
    assert _Busy.calls[1] - _Busy.calls[0] >= 1 and _Busy.calls[3] - _Busy.calls[2] >= 1


def test_patience_ends(busy):
    with Client(busy, "", patience_s=0.5) as client, pytest.raises(EndpointError, match="HTTP 503"):
        client.model()
    assert len(_Busy.calls) == 1
    with Client("http://127.0.0.1:9", "", patience_s=0.1) as client, pytest.raises(EndpointError, match="no answer"):
        client.model()


def test_the_client_needs_neither_ray_nor_torch():
    code = "import sys, prism_ray.serve.client; print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
