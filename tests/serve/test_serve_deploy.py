"""`serve deploy configs/serve.yaml` as a person types it, through the dashboard of a cluster that was just started."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from prism_ray.config.serve import TokenSettings
from prism_ray.config.yaml12 import parse
from prism_ray.endpoint.wire import MSGPACK, SCORE, pack
from prism_ray.serve.auth import digest_of
from prism_ray.serve.client import Client
from prism_ray.serve.scoring import version_of
from tests.cluster.nodes import RAY, ROOT, Nodes, free_ports

pytestmark = pytest.mark.long

SERVE = str(Path(RAY).parent / "serve")


def shipped(file: Path, checkpoint: Path, port: str) -> Path:
    """The shipped config file for this machine: no GPUs, small queues, this checkpoint and port."""
    config = parse((ROOT / "configs" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": int(port)}
    config["applications"][0]["args"] = {
        "name": "tiny",
        "replicas": {"cpus": 0.2, "most": 1},
        "queue": {"requests": 4, "batch_tokens": 1024},
        "limits": {"prompt_tokens": 512},
    }
    config["applications"][0]["deployments"][0]["user_config"]["checkpoint"] = str(checkpoint)
    file.write_text(yaml.safe_dump(config))
    return file


def deploy(nodes: Nodes, file: Path) -> None:
    command = [SERVE, "deploy", str(file), "--address", nodes.environment["RAY_API_SERVER_ADDRESS"]]
    done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


def version_served(url: str, token: str) -> str:
    """The version that answers; empty while none does."""
    try:
        answer = httpx.get(f"{url}/v1/model", headers={"Authorization": f"Bearer {token}"})
    except httpx.HTTPError:
        return ""
    return answer.json()["model"]["version"] if answer.status_code == 200 else ""


def until_served(url: str, token: str, version: str) -> None:
    deadline = time.monotonic() + 180
    while (found := version_served(url, token)) != version:
        assert time.monotonic() < deadline, f"waited 180 s for version {version}; {found or 'nothing'} is served"
        time.sleep(0.3)


def test_the_shipped_file_is_deployed_turns_away_in_the_proxy_and_takes_up_another_checkpoint(
    folder, other_folder, token, tmp_path, png, response
):
    [port] = free_ports(1)
    url, file = f"http://127.0.0.1:{port}", tmp_path / "serve.yaml"
    question = {"prompt": "<image> count red", "images": [png()], "responses": [response(), "broken"]}
    variables = {TokenSettings().variable: digest_of(token), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Nodes(4, **variables) as nodes:
        deploy(nodes, shipped(file, folder, port))
        until_served(url, token, version_of(folder))
        with Client(url, token) as client:
            assert [r.valid for r in client.score(**question).results] == [True, False]

        async def flood() -> list[httpx.Response]:
            headers = {"Authorization": f"Bearer {token}", "Content-Type": MSGPACK}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
                return await asyncio.gather(*(client.post(SCORE, content=pack(question)) for _ in range(60)))

        answers = asyncio.run(flood())
        assert {a.status_code for a in answers} == {200, 503}
        turned_away = [a for a in answers if a.status_code == 503]
        assert all(a.json()["error"]["code"] == "overloaded" for a in turned_away)
        assert any("x-request-id" not in a.headers for a in turned_away), "none by the proxy itself"

        deploy(nodes, shipped(file, other_folder, port))
        until_served(url, token, version_of(other_folder))
