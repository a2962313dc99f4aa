"""The application on a real Ray Serve: over HTTP, under load, while it changes, and when parts of it are lost."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from prism_ray.config.yaml12 import parse
from prism_ray.endpoint.client import AsyncClient, Client
from prism_ray.endpoint.wire import MSGPACK, SCORE, ScoreAnswer, pack
from prism_ray.records import Prompt
from prism_ray.serve.auth import digest_of
from prism_ray.serve.deployment import INGRESS, SCORER
from prism_ray.serve.intake import Query
from prism_ray.serve.scoring import Served, version_of

pytestmark = pytest.mark.long

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "serve.yaml"
SMALL = {
    "name": "tiny",
    "replicas": {"cpus": 0.2, "most": 1},
    "queue": {"requests": 6, "batch_tokens": 1024},
    "limits": {"prompt_tokens": 512},
}


def config_with(args: dict[str, Any], checkpoint: Path, port: int) -> ServeDeploySchema:
    """The shipped config file with other arguments, checkpoint and port."""
    config = parse(CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] = args
    application["deployments"][0]["user_config"]["checkpoint"] = str(checkpoint)
    return ServeDeploySchema.model_validate(config)


def deploy(config: ServeDeploySchema) -> None:
    """What `serve deploy` asks of Serve, without the dashboard it goes through."""
    _get_global_client().deploy_apps(config)


def until(condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        time.sleep(0.2)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory) -> Path:
    """A copy of the discriminator that tests may remove."""
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("deployed") / "discriminator"))


@pytest.fixture(scope="module")
def url(cluster, checkpoint, port, token) -> Iterator[str]:
    args = SMALL | {"tokens": {"file": str(checkpoint.parent / "tokens")}}
    (checkpoint.parent / "tokens").write_text(f"tests {digest_of(token)}\n")
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        proxy_location="HeadOnly",
        controller_options=parse(CONFIG.read_text())["controller_options"],
    )
    deploy(config_with(args, checkpoint, port))
    url = f"http://127.0.0.1:{port}"
    until(lambda: is_ready(url), "the endpoint to be ready")
    yield url
    serve.shutdown()


@pytest.fixture
def question(png, response) -> dict[str, Any]:
    return {
        "prompt": "<image> count red",
        "images": [png()],
        "responses": [response(), response(" blue two"), "broken"],
    }


def test_it_answers_as_the_scorer_does(url, token, question, response, folder):
    reference = response(" red two")
    with Client(url, token) as client:
        answer = client.score(**question, reference=reference)
        many = client.score_many([question] * 3)
        preferred = client.compare(question["prompt"], response(), "broken", question["images"])
        model = client.model()
    prompt = Prompt("p", ({"role": "user", "content": question["prompt"]},), tuple(question["images"]), reference)
    served = Served(folder, 512, 1024, 0)
    [said] = served.score([served.cut(Query(prompt, tuple(question["responses"])))])
    assert [r.valid for r in answer.results] == [True, True, False]
    for ours, theirs in zip(answer.results, said.results, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-5) and ours.reward == pytest.approx(theirs.reward)
        assert ours.spans == theirs.spans and ours.reason == theirs.reason
    assert [m.results[0].scores for m in many] == [pytest.approx(answer.results[0].scores, rel=1e-5)] * 3
    assert preferred.preference.combined == 1.0
    assert (model.model.name, model.model.version) == ("tiny", version_of(folder))
    assert model.limits["prompt_tokens"] == 512


def test_without_a_token_nothing_but_health_and_the_description_is_told(url, token):
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
        refused = httpx.get(f"{url}/v1/model", headers=header)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] in ("no_token", "wrong_token") and token not in refused.text
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert "/v1/score" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_overload_turns_requests_away_and_answers_the_others(url, token, question):
    async def flood() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": MSGPACK}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(client.post(SCORE, content=pack(question)) for _ in range(60)))

    answers = asyncio.run(flood())
    turned_away = [a for a in answers if a.status_code == 503]
    assert len(turned_away) + sum(a.status_code == 200 for a in answers) == 60
    assert turned_away and len(turned_away) < 60
    assert all(a.json()["error"]["code"] == "overloaded" and int(a.headers["retry-after"]) >= 1 for a in turned_away)
    assert any("x-request-id" not in a.headers for a in turned_away), "none by the proxy itself"


def test_a_client_that_is_patient_gets_everything_under_overload(url, token, question):
    async def ask() -> list[ScoreAnswer]:
        async with AsyncClient(url, token) as client:
            return await asyncio.gather(*(client.score(**question) for _ in range(30)))

    assert len(asyncio.run(ask())) == 30


def test_a_client_that_hangs_up_costs_nobody_anything(url, token, question):
    async def hang_up() -> None:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": MSGPACK}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=0.02) as client:
            calls = [client.post(SCORE, content=pack(question)) for _ in range(12)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            gone = [f for f in found if isinstance(f, httpx.TransportError)]
            refused = [f for f in found if isinstance(f, httpx.Response) and f.status_code == 503]
            assert gone and len(gone) + len(refused) == len(calls), "those that are one too many are told so at once"

    asyncio.run(hang_up())
    with Client(url, token) as client:
        assert client.score(**question).results[0].valid
        assert client.model().waiting_tokens == 0


def test_new_weights_are_taken_up_without_a_dropped_request(url, token, question, checkpoint, other_folder, port):
    """Then a checkpoint that is none is refused while the old one goes on, and goes on when its files are removed."""
    args = SMALL | {"tokens": {"file": str(checkpoint.parent / "tokens")}}
    old, new = version_of(checkpoint), version_of(other_folder)

    async def ask_until(seen: list[ScoreAnswer], client: AsyncClient, version: str) -> None:
        while not seen or seen[-1].model.version != version:
            seen.append(await client.score(**question))

    async def change() -> list[ScoreAnswer]:
        seen: list[ScoreAnswer] = []
        async with AsyncClient(url, token, patience_s=0.0) as client:  # nothing is asked twice: any refusal is an error
            await ask_until(seen, client, old)
            await asyncio.to_thread(deploy, config_with(args, other_folder, port))
            async with asyncio.timeout(120):
                await asyncio.gather(*(ask_until(seen, client, new) for _ in range(3)))
        return seen

    seen = asyncio.run(change())
    by_version = {a.model.version: a.results[0].scores for a in seen}
    assert set(by_version) == {old, new} and by_version[old] != by_version[new]
    with Client(url, token) as client:
        deploy(config_with(args, checkpoint.parent / "gone", port))
        until(lambda: client.model().reload_failure != "", "the failure to be told")
        assert "discriminator.json" in client.model().reload_failure
        assert client.score(**question).model.version == new
        deploy(config_with(args, checkpoint, port))
        until(lambda: client.model().model.version == old, "the first weights to be back")
        shutil.rmtree(checkpoint)
        assert client.score(**question).results[0].scores == pytest.approx(by_version[old], rel=1e-5)
        assert client.model().reload_failure == ""


def test_a_scorer_that_dies_is_replaced(url, token, question, checkpoint, folder):
    shutil.copytree(folder, checkpoint, dirs_exist_ok=True)
    dead = _replicas(SCORER)
    for actor in dead:
        ray.kill(ray.get_actor(actor, namespace="serve"))
    answer = httpx.post(
        f"{url}{SCORE}", content=pack(question), timeout=60,
        headers={"Authorization": f"Bearer {token}", "Content-Type": MSGPACK},
    )  # fmt: skip
    assert answer.status_code in (200, 503)
    with Client(url, token) as client:
        assert client.score(**question).results[0].valid
    assert not set(dead) & set(_replicas(SCORER))


def test_an_ingress_that_dies_is_told_as_an_error_of_ours(url, token, question):
    """Serve's proxy answers then, in plain text and with a traceback."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": MSGPACK}
    answers = []
    for actor in _replicas(INGRESS):
        ray.kill(ray.get_actor(actor, namespace="serve"))
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        deadline = time.monotonic() + 60
        while not answers or (answers[-1].status_code != 200 and time.monotonic() < deadline):
            answers.append(client.post(SCORE, content=pack(question)))
    assert answers[-1].status_code == 200
    for answer in answers[:-1]:
        assert answer.status_code == 503 and answer.json()["error"]["code"] in ("unavailable", "overloaded")
        assert int(answer.headers["retry-after"]) >= 1 and "Traceback" not in answer.text


def test_more_requests_than_a_scorer_should_have_bring_up_another(url, token, question, folder, checkpoint, port):
    before = set(_replicas(SCORER))
    replicas = {"cpus": 0.2, "most": 2, "target_requests": 1, "upscale_delay_s": 0.1}
    args = SMALL | {"tokens": {"file": str(checkpoint.parent / "tokens")}, "replicas": replicas}
    deploy(config_with(args, folder, port))

    async def ask() -> None:
        async with AsyncClient(url, token) as client, asyncio.timeout(240):
            while len(set(_replicas(SCORER)) - before) < 2:
                await asyncio.gather(*(client.score(**question) for _ in range(6)))

    asyncio.run(ask())


def _replicas(deployment: str) -> list[str]:
    """Names of the actors of a deployment."""
    every = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in every if f"#{deployment}#" in actor["name"]]
