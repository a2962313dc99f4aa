"""`jobs/serve.py` as a person runs it, and the config file for `serve deploy`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from prism_ray.config.load import ConfigError, settings_of
from prism_ray.config.serve import ServeJobSettings, ServeSettings
from prism_ray.config.yaml12 import parse
from prism_ray.serve.auth import digest_of
from prism_ray.serve.client import Client
from prism_ray.serve.deployment import INGRESS, SCORER, application, build
from prism_ray.serve.local import StartError, checked

ROOT = Path(__file__).resolve().parents[2]
CONFIG = parse((ROOT / "configs" / "serve.yaml").read_text())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "jobs" / "serve.py"), *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(program, capture_output=True, text=True, timeout=200, env=variables)


def test_the_config_file_is_one_that_serve_deploys():
    config = ServeDeploySchema.model_validate(CONFIG)
    [deployed] = config.applications
    assert deployed.import_path == f"{build.__module__}:{build.__name__}" and deployed.route_prefix == "/"
    made = build(deployed.args)
    bound = made._bound_deployment
    scorer = bound.init_args[1]._bound_deployment
    assert (bound.name, scorer.name) == (INGRESS, SCORER)
    assert [d.name for d in deployed.deployments] == [SCORER]
    assert set(deployed.deployments[0].user_config) == set(scorer.user_config) == {"checkpoint"}
    scaling = scorer._deployment_config.autoscaling_config
    assert scaling is not None and (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scorer.ray_actor_options["num_gpus"] == 1 and bound.num_replicas == 2


def test_settings_in_a_config_file_are_checked_like_all_others():
    with pytest.raises(
        ConfigError, match=r"args: There is no setting limits.response; did you mean limits.responses\?"
    ):
        build({"limits": {"response": 3}})
    with pytest.raises(ConfigError, match="replicas.most is 1, fewer than replicas.least = 2"):
        build({"replicas": {"least": 2}})
    assert settings_of(ServeSettings, {"name": "x"}).name == "x"


def test_every_setting_of_replicas_and_queue_reaches_serve(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    settings = ServeSettings.model_validate(
        {
            "checkpoint": tmp_path / "link",
            "queue": {"requests": 7},
            "replicas": {
                "least": 2, "most": 5, "target_requests": 3, "upscale_delay_s": 4, "downscale_delay_s": 6, "cpus": 0.5,
                "ingresses": 3,
            },
        }
    )  # fmt: skip
    ingress = application(settings)._bound_deployment
    scorer = ingress.init_args[1]._bound_deployment
    scaling = scorer._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (4, 6)
    assert scorer.max_ongoing_requests == scorer._deployment_config.max_queued_requests == 7
    assert ingress.max_ongoing_requests > 5 * 7 and ingress.num_replicas == 3
    assert scorer.ray_actor_options["num_cpus"] == 0.5
    assert scorer.user_config == {"checkpoint": str(tmp_path / "link")}, "a watched link must stay one"


def test_what_is_wrong_is_told_before_anything_starts(folder, tmp_path, monkeypatch):
    def settings(**given) -> ServeJobSettings:
        return ServeJobSettings.model_validate({"checkpoint": folder, "port": free_port()} | given)

    monkeypatch.delenv("PRISM_SERVE_TOKENS", raising=False)
    assert checked(settings()).tokens.anonymous, "only this machine reaches the loopback address"
    for given, what in (
        ({"checkpoint": None}, "give --checkpoint"),
        ({"checkpoint": tmp_path}, "no discriminator.json; give the folder of a trained discriminator"),
        ({"host": "0.0.0.0"}, "nobody may ask"),
        ({"tokens": {"file": str(tmp_path / "missing")}}, "cannot be read"),
        ({"host": "192.0.2.1", "tokens": {"anonymous": True}}, "cannot be used"),
    ):
        with pytest.raises(StartError, match=what):
            checked(settings(**given))
    other = r"port \d+ of 127.0.0.1 cannot be used \(something else listens there\)"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError, match=other):
        checked(settings(port=taken.getsockname()[1]))


def test_the_command_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_job("--checkpoint", str(folder), f"port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "something else listens there" in done.stderr.splitlines()[-1]
    done = run_job("--new-token")
    (_, token, *_), (_, digest, *_) = (line.split() for line in done.stdout.splitlines())
    assert done.returncode == 0 and digest_of(token) == digest


@pytest.mark.long
def test_it_serves_until_ctrl_c(folder, token, response):
    """From the command to an answer, a second one on the same port, and the end: every process is gone."""
    port = free_port()
    arguments = [f"--checkpoint={folder}", f"port={port}", "cluster.cpus=2", "replicas.cpus=0.5"]
    environment = {"PYTHONPATH": str(ROOT), "PRISM_SERVE_TOKENS": digest_of(token), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    killer = threading.Timer(300, job.kill)
    killer.start()
    try:
        assert job.stdout is not None
        lines = [job.stdout.readline() for _ in range(3)]
        assert f"http://127.0.0.1:{port}" in lines[0] and f"http://127.0.0.1:{port}/docs" in lines[1]
        with Client(f"http://127.0.0.1:{port}", token) as client:
            assert client.score("count red", response()).results[0].valid
        assert run_job(*arguments, **environment).returncode == 2
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 130 and errors.splitlines()[-1] == "stopped"
    finally:
        killer.cancel()
        job.kill()
        job.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.2)
    raise AssertionError("something still listens")
