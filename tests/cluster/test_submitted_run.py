"""A small run through `ray job submit` on several nodes: followed, stopped, and taken up by the next submission."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from prism_ray.report.metrics import read_metrics
from tests.cluster.nodes import Nodes

# Engine and learner need two CPUs each, which only the workers have, and no worker has four: the policy's weights must
# go from one to the other, which sees neither its memory nor its session's files.
NODES = (2, 3, 3)
UPDATES = 6
SMALL = [
    "name=small", "stages=[rlvr-sft]", "trainer.cpus_per_rank=0.5", "rollout.cpus_per_engine=2",
    "learner.cpus_per_rank=2",
    "testbed.pretrain=64", "testbed.base=256", "testbed.sft=64", "testbed.align=8", "testbed.rlvr=64",
    "testbed.evaluate=8", "testbed.evaluate_unseen=4",
    "base.pretrain.steps=2", "base.clean.steps=30", "sft.steps=2",
    "rollout.kv_cache_gb=0.05", "rollout.group_size=4", "rollout.max_response_tokens=64",
    "align.updates=2", f"rlvr.updates={UPDATES - 2}",
    "rlvr.loop.groups_per_step=2", f"rlvr.loop.checkpoint_every={UPDATES}",
]  # fmt: skip
COMMAND = ("jobs/align.py", "--config", "configs/tiny.yaml", *SMALL)
GRACE = ("--runtime-env", "configs/job.yaml")

pytestmark = pytest.mark.long


@pytest.mark.timeout(1800)
def test_a_submitted_run_is_stopped_and_goes_on(tmp_path):
    run = tmp_path / "runs" / "small"
    with Nodes(*NODES, PRISM_RAY_HOME=str(tmp_path)) as nodes:
        first, said = nodes.submitted("first", tmp_path / "first.txt", *COMMAND, options=GRACE), tmp_path / "first.txt"
        wait_for(lambda: updates(run) >= 1, first, said)
        assert f"rlvr-sft: {UPDATES} steps" in said.read_text(), "nothing to follow"
        stopped = nodes.ray("job", "stop", "first")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        first.wait(timeout=60)
        assert "STOPPED" in nodes.ray("job", "status", "first").stdout.upper()
        assert f"interrupted; the same command continues it: {run}" in said.read_text(), said.read_text()[-4000:]
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        saved = json.loads((run / "rlvr-sft" / "state" / "latest.json").read_text())
        before = updates(run)
        assert saved and 1 <= before < UPDATES, "it was over before it was stopped"

        done = nodes.submit(*COMMAND, options=GRACE, timeout_s=900)
        assert done.returncode == 0, done.stdout[-4000:]
        assert f"done: {run / 'summary.json'}" in done.stdout and "succeeded" in done.stdout
        assert f"rlvr-sft goes on at update {before}" in done.stdout, "begun anew"
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "rlvr-sft"]
    assert steps == list(range(1, UPDATES + 1))
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert (run / "rlvr-sft" / "checkpoint" / "config.json").exists()


def updates(run: Path) -> int:
    return sum(row["stage"] == "rlvr-sft" for row in read_metrics(run / "metrics.jsonl"))


def wait_for(condition, process: subprocess.Popen, said: Path, timeout_s: float = 900.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, said.read_text()[-4000:]
        assert time.monotonic() < deadline, said.read_text()[-4000:]
        time.sleep(0.2)
