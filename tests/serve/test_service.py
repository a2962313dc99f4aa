"""What a replica does with its discriminator: batches, deadlines, new weights, memory of prompts, fetched images."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from prism_ray.config.serve import ServeSettings
from prism_ray.discriminator.model import CARD_FILE
from prism_ray.endpoint.wire import EndpointError, ScoreRequest
from prism_ray.records import Prompt
from prism_ray.serve.intake import Intake, Query
from prism_ray.serve.scoring import Served, version_of
from prism_ray.serve.service import Service


@pytest.fixture
def query(png, response):
    def make(seed: int = 0, caption: str = " red one", reference: str = "") -> Query:
        messages = ({"role": "user", "content": "<image> count red"},)
        return Query(Prompt(f"p{seed}", messages, (png(seed),), reference), (response(caption),))

    return make


def run(folder, scenario, **settings):
    """What a scenario with a service on this discriminator returns."""

    async def whole():
        service = Service(ServeSettings(**settings))
        await service.load(folder)
        try:
            return await scenario(service)
        finally:
            await service.close()

    return asyncio.run(whole())


def test_requests_are_scored_together_and_get_what_they_get_alone(folder, query):
    async def together(service):
        answers = await asyncio.gather(*(service.score(query(i % 3, f" red {w}"), 30) for i, w in enumerate(words)))
        return [a.results[0].scores for a in answers], service.batcher.batches

    async def alone(service):
        return [(await service.score(query(i % 3, f" red {w}"), 30)).results[0].scores for i, w in enumerate(words)]

    words = ["one", "two", "three", "four", "blue", "green"]
    (ours, batches), theirs = run(folder, together), run(folder, alone)
    assert ours == [pytest.approx(t, rel=1e-5) for t in theirs] and batches < len(words)


def test_equal_prompts_are_encoded_once_and_forgotten_beyond_the_memory(folder, query):
    served = Served(folder, 512, 1024, cache_bytes=100_000)
    first = served.cut(query(0)).responses[0].sequences["perception"].prompt
    assert served.cut(query(0, " blue")).responses[0].sequences["perception"].prompt is first
    assert served.cut(query(1)).responses[0].sequences["perception"].prompt is not first
    for seed in range(10):
        served.cut(query(seed))
    assert served.cut(query(0)).responses[0].sequences["perception"].prompt is not first
    without = Served(folder, 512, 1024, cache_bytes=0)
    assert without.cut(query(0)).cost == without.cut(query(0)).cost > 0


def test_a_request_that_is_late_is_refused_and_not_computed(folder, query):
    async def scenario(service):
        with pytest.raises(EndpointError) as caught:
            await service.score(query(), 1e-6)
        await service.score(query(), 30)
        return caught.value, service.batcher.batches, service._open

    error, batches, still_open = run(folder, scenario)
    assert (error.status, error.code, batches, still_open) == (503, "deadline", 1, 0)


def test_a_replica_takes_so_many_requests_and_no_more(folder, query):
    async def scenario(service):
        return await asyncio.gather(*(service.score(query(i), 30) for i in range(5)), return_exceptions=True)

    answers = run(folder, scenario, queue={"requests": 3})
    refused = [a for a in answers if isinstance(a, EndpointError)]
    assert len(refused) == 2 and {e.code for e in refused} == {"overloaded"}


def test_nothing_is_encoded_for_who_cannot_be_answered(folder, query):
    """Neither for a caller who hung up or whose time is over before its turn, nor where too much waits already."""

    async def scenario(service):
        encoded, reading, computing = [], threading.Event(), threading.Event()
        cut, work = service._served.cut, service.batcher._work
        service._served.cut = lambda q: (encoded.append(q.prompt.id), reading.wait(60), cut(q))[2]
        service.batcher._work = lambda jobs: (computing.wait(60), work(jobs))[1]

        async def until(condition):
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.sleep(0.01)

        first = asyncio.create_task(service.score(query(0), 60))
        await until(lambda: encoded)
        late, gone = (asyncio.create_task(service.score(query(i), left)) for i, left in ((1, 0.02), (2, 60)))
        with pytest.raises(EndpointError, match="within the time"):
            await late
        gone.cancel()
        reading.set()
        await until(lambda: service.batcher._running and not service.batcher._queue)  # the first is being computed
        second = asyncio.create_task(service.score(query(3), 60))
        await until(lambda: service.batcher._queue)
        with pytest.raises(EndpointError, match="tokens wait to be scored") as refused:
            await service.score(query(4), 60)
        computing.set()
        await asyncio.gather(first, second)
        return encoded, refused.value

    encoded, refused = run(folder, scenario, queue={"waiting_tokens": 1})
    assert encoded == ["p0", "p3"] and (refused.status, refused.code) == (503, "overloaded")


def test_new_weights_take_over_while_requests_wait(folder, other_folder, query):
    """What waits together is answered by whom it was read for, never by the other."""

    async def scenario(service):
        gate, work = threading.Event(), service.batcher._work
        service.batcher._work = lambda jobs: (gate.wait(60), work(jobs))[1]

        async def asked(waiting: int):
            task = asyncio.create_task(service.score(query(0), 60))
            while service._open <= waiting or (waiting and len(service.batcher._queue) < waiting):
                await asyncio.sleep(0.01)
            return task

        tasks = [await asked(0)]
        while service.batcher._running is None or service.batcher._queue:
            await asyncio.sleep(0.01)  # until the first is being computed
        tasks.append(await asked(1))
        await service.load(other_folder)
        tasks.append(await asked(2))
        gate.set()
        return [await task for task in tasks]

    first, old, new = run(folder, scenario)
    assert first.model.version == old.model.version == version_of(folder)
    assert old.results[0].scores == pytest.approx(first.results[0].scores, rel=1e-5)
    assert new.model.version == version_of(other_folder) and new.results[0].scores != old.results[0].scores
    [alone] = Served(other_folder, 512, 1024, 0).score([Served(other_folder, 512, 1024, 0).cut(query(0))])
    assert new.results[0].scores == pytest.approx(alone.results[0].scores, rel=1e-5)


def test_a_checkpoint_that_is_none_changes_nothing(folder, tmp_path, query):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / CARD_FILE).write_text('{"settings": {"views": 1}}')

    async def scenario(service):
        before = await service.score(query(), 30)
        told = []
        for bad in (tmp_path / "missing", broken):
            await service.load(bad)
            told.append((await service.describe()).reload_failure)
        after = await service.score(query(), 30)
        await service.load(folder)
        return before, after, told, (await service.describe()).reload_failure

    before, after, told, last = run(folder, scenario)
    assert before == after and last == ""
    assert "no discriminator.json" in told[0] and "not of this version" in told[1]
    with pytest.raises(FileNotFoundError, match="give the folder of a trained discriminator"):
        run(tmp_path / "missing", scenario)


def test_a_watched_link_is_followed_only_where_that_is_wanted(folder, other_folder, tmp_path, query):
    link = tmp_path / "latest"
    link.symlink_to(folder)

    def point(target):
        new = tmp_path / "new"
        new.symlink_to(target)
        new.replace(link)

    async def scenario(service):
        point(other_folder)
        seen = [(await service.describe()).model.version]
        for _ in range(100):
            await asyncio.sleep(0.05)
            seen.append((await service.describe()).model.version)
            if seen[-1] != seen[0]:
                break
        return seen

    seen = run(link, scenario, watch_s=0.05)
    assert seen[0] == version_of(folder) and seen[-1] == version_of(other_folder)
    point(folder)
    assert set(run(link, scenario)) == {version_of(folder)}


class _Images(BaseHTTPRequestHandler):
    """`/image` is one, `/elsewhere` a redirect to it, `/large` never ends, `/drip` comes byte by byte."""

    image = b""
    asked: list[str] = []

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append(self.path)
        self.send_response({"/elsewhere": 302, "/missing": 404}.get(self.path, 200))
        self.send_header("Location", "/image")
        self.end_headers()
        try:
            for byte in self.image[:300] if self.path == "/drip" else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
            for _ in range({"/image": 1, "/drip": 0}.get(self.path, 4096)):
                self.wfile.write(self.image)
        except OSError:
            pass

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def origin(png):
    """Where `_Images` are."""
    _Images.image, _Images.asked = png(), []
    server = HTTPServer(("127.0.0.1", 0), _Images)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_are_fetched_from_allowed_origins_only(origin, png, response):
    port = origin.rpartition(":")[2]

    def ask(url: str, *origins: str) -> Query:
        intake = Intake(ServeSettings(image_origins=origins, limits={"body_mb": 0.5}))
        return asyncio.run(intake.query(ScoreRequest(prompt="red", images=[url], responses=[response()])))

    def refusal(url: str, *origins: str) -> str:
        with pytest.raises(EndpointError) as caught:
            ask(url, *origins)
        return caught.value.code

    assert ask(f"{origin}/image", origin).prompt.images == (png(),)
    assert _Images.asked == ["/image"]
    for url in (f"{origin}/image", f"{origin}@evil/", "http://localhost/image", f"{origin}1/image", "ftp://x/y"):
        assert refusal(url, *((origin,) if not url.endswith(f"{port}/image") else ())) == ("url_not_allowed")
    assert refusal(f"http://u:p@127.0.0.1:{port}/image", origin) == "url_not_allowed"
    assert _Images.asked == ["/image"], "nothing was asked"
    assert refusal(f"{origin}/elsewhere", origin) == refusal(f"{origin}/missing", origin) == "bad_image"
    assert refusal(f"{origin}/large", origin) == "image_too_large"
    assert "/elsewhere" in _Images.asked and _Images.asked.count("/image") == 1, "no redirect is followed"


def test_an_image_that_drips_in_is_not_waited_for(origin, serving, response):
    """Each byte comes in time, and all of them together do not."""
    body = {"prompt": "red", "images": [f"{origin}/drip"], "responses": [response()]}
    with serving(image_origins=[origin], fetch_timeout_s=0.5) as client:
        answer = client.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_image")
    assert answer.json()["error"]["message"] == "image 0: not fetched within 0.5 s"
    with serving(image_origins=[origin], fetch_timeout_s=60) as client:
        answer = client.post("/v1/score", json=body | {"timeout_s": 0.5})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline")
    with serving(image_origins=[origin], fetch_timeout_s=60, limits={"timeout_s": 0.5}) as client:
        answer = client.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline")


@pytest.mark.parametrize("origin", ["images.org", "https://images.org/", "file:///x", "https://u@images.org"])
def test_an_origin_is_scheme_and_host(origin):
    with pytest.raises(ValueError, match="is no origin"):
        ServeSettings(image_origins=(origin,))
