"""What a job does otherwise when it was submitted to a cluster."""

import json
from pathlib import Path

import pytest

from prism_ray.config.collect import CollectSettings
from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.config.serve import ServeJobSettings
from prism_ray.runtime import cluster
from prism_ray.runtime.submitted import (
    HOME,
    JOB_CONFIG,
    STOP_WAIT,
    at_home,
    found,
    given_environment,
    kept,
    short_grace,
)


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """The environment that Ray gives the command of a submitted job, in a copy of what was submitted."""
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg.zip"}, "metadata": {}}))
    monkeypatch.setenv(HOME, "/shared/home")
    monkeypatch.delenv(STOP_WAIT, raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)


OVERRIDES = ["policy=models/qwen", "data.align=[data, more, /corpora/x]", "discriminator.policy=models/small"]


def test_relative_paths_of_a_submitted_job_are_at_home_unless_they_came_along(submitted):
    settings = at_home(load_config(RunSettings, None, OVERRIDES), output="runs")
    assert settings.runs == Path("/shared/home/runs"), "written into a copy that Ray deletes"
    assert settings.policy == Path("/shared/home/models/qwen")
    assert settings.discriminator.policy == Path("/shared/home/models/small")
    assert settings.data.align == [Path("data"), Path("/shared/home/more"), Path("/corpora/x")]
    assert settings.named_paths()["data.align"] == settings.data.align
    given = ["prompts=[data]", "output=/else/where", "teacher.url=http://localhost:8000/v1", "teacher.model=m"]
    collected = at_home(load_config(CollectSettings, None, given), output="output")
    assert collected.output == Path("/else/where") and collected.prompts == [Path("data")]
    served = at_home(load_config(ServeJobSettings, None, ["checkpoint=data/judge", "tokens.file=data"]), output=None)
    assert served.checkpoint == Path("/shared/home/data/judge") and served.tokens.file == Path("data")
    assert kept(Path("data")) == Path("/shared/home/data") and found(Path("data")) == Path("data")


def test_home_is_the_users_own_where_the_cluster_names_none(submitted, monkeypatch):
    monkeypatch.delenv(HOME)
    assert at_home(RunSettings(), output="runs").runs == Path.home() / "prism_ray" / "runs"


def test_nothing_moves_in_a_job_that_was_not_submitted(monkeypatch):
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    monkeypatch.setenv(HOME, "/shared/home")
    settings = load_config(RunSettings, None, OVERRIDES)
    assert at_home(settings, output="runs") is settings
    assert kept(Path("runs")) == found(Path("runs")) == Path("runs")
    assert short_grace(120.0) is None


@pytest.mark.parametrize(("granted", "warned"), [(None, True), ("60", True), ("120", False), ("180", False)])
def test_a_stop_that_leaves_no_time_to_save_is_told(submitted, monkeypatch, granted, warned):
    if granted:
        monkeypatch.setenv(STOP_WAIT, granted)
    said = short_grace(ClusterSettings().stop_grace_s)
    assert (said is not None) == warned
    if said:
        assert f"{granted or 3} s" in said and "120 s" in said and "configs/job.yaml" in said and STOP_WAIT in said


def test_variables_the_job_came_with_are_known(submitted, monkeypatch):
    assert given_environment() == {}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}}))
    assert given_environment() == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": None}))
    assert given_environment() == {}


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_an_address_that_no_run_can_join_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(cluster.ClusterError, match="ray job submit") as refused:
        cluster.start(ClusterSettings())
    assert address in str(refused.value)


@pytest.mark.parametrize("port", ["1", "", "many"])
def test_a_cluster_that_does_not_answer_is_a_sentence_and_no_hang(monkeypatch, port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(cluster.ClusterError, match="unset both to run on this machine"):
        cluster.start(ClusterSettings(address="auto"))
