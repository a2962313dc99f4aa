"""`ray job submit` against a cluster of several nodes with a token: what reaches the job, and how it ends."""

import json
from pathlib import Path

import pytest

from tests.cluster.nodes import Nodes, can_unshare

BAD = ("jobs/align.py", "--config", "configs/tiny.yaml", "learner.lrr=1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One that all nodes see, and one that workers do not see into."""
    shared, hidden = (tmp_path_factory.mktemp(name) for name in ("shared", "hidden"))
    (hidden / "policy").mkdir()
    return shared, hidden


@pytest.fixture(scope="module")
def nodes(folders):
    shared, hidden = folders
    with Nodes(1, 1, hidden=hidden, PRISM_RAY_HOME=str(shared)) as running:
        yield running


@pytest.mark.long
def test_a_job_finds_its_package_and_a_lasting_folder_on_every_node(nodes, folders):
    options = ["--runtime-env-json", json.dumps({"env_vars": {"OMP_NUM_THREADS": "2"}})]
    done = nodes.submit("tests/cluster/probe.py", *map(str, folders), options=options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    shared, hidden = folders
    copy = Path(found["cwd"])
    assert Path(found["package"]).is_relative_to(copy) and "working_dir_files" in copy.parts
    assert {"jobs", "configs", "prism_ray"} <= set(found["shipped"])
    assert not {".git", ".venv", "runs"} & set(found["shipped"])
    assert found["runs"] == str(shared / "runs")
    assert len(found["nodes"]) == 2
    for node in found["nodes"]:
        assert "working_dir_files" in node["package"], "imported from elsewhere than what was submitted"
        assert (node["threads"], node["hub"]) == ("2", "1"), "what the job was submitted with comes before our own"
    assert found["shared"] == ""
    if can_unshare():
        assert "does not see the folder" in found["output"] and str(hidden / "run") in found["output"]
        assert "policy" in found["input"] and "all nodes share" in found["input"]


@pytest.mark.long
def test_a_bad_configuration_fails_the_job_with_its_sentence(nodes):
    done = nodes.submit(*BAD)
    assert done.returncode == 1, "Ray's own exit code for a job that failed"
    assert "exit code 2" in done.stdout
    assert "There is no setting learner.lrr; did you mean learner.lr?" in done.stdout


@pytest.mark.long
def test_without_the_token_nobody_submits(nodes):
    done = nodes.ray("job", "list", RAY_AUTH_TOKEN="another")
    assert done.returncode != 0 and "token" in (done.stdout + done.stderr).lower()
