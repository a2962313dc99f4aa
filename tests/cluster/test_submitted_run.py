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
SMALL = [
    "name=small", "stages=[align]", "trainer.cpus_per_rank=0.5",
    "rollout.cpus_per_engine=2", "learner.cpus_per_rank=2", "discriminator.cpus_per_rank=0.5",
    "testbed.pretrain=64", "testbed.base=512", "testbed.sft=64", "testbed.align=48",
    "testbed.rlvr=24", "testbed.evaluate=16", "testbed.evaluate_unseen=4",
    "base.pretrain.steps=4", "base.clean.steps=150", "sft.steps=6",
    "warmup.prompts_per_step=4", "warmup.held_out_prompts=4", "warmup.min_steps=1", "warmup.max_steps=2",
    "warmup.target_accuracy=0",
    "rollout.group_size=4", "rollout.max_response_tokens=64",
    "align.updates=4", "align.loop.groups_per_step=2", "align.loop.checkpoint_every=4",
]  # fmt: skip
COMMAND = ("jobs/align.py", "--config", "configs/tiny.yaml", *SMALL)
GRACE = ("--runtime-env", "configs/job.yaml")

pytestmark = pytest.mark.long


@pytest.mark.timeout(1800)
def test_a_submitted_run_is_stopped_and_goes_on(tmp_path):
    run = tmp_path / "runs" / "small"
    with Nodes(*NODES, PRISM_RAY_HOME=str(tmp_path)) as nodes:
        first, said = nodes.submitted("first", tmp_path / "first.txt", *COMMAND, options=GRACE), tmp_path / "first.txt"
        wait_for(lambda: aligned(run) >= 1, first, said)
        assert "align 1/4" in said.read_text() or "align: 4 steps" in said.read_text(), "nothing to follow"
        stopped = nodes.ray("job", "stop", "first", timeout_s=240)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        first.wait(timeout=60)
        assert "STOPPED" in nodes.ray("job", "status", "first").stdout
        assert f"interrupted; the same command continues it: {run}" in said.read_text(), said.read_text()[-4000:]
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        state = json.loads((run / "align" / "state" / "latest.json").read_text())
        assert 1 <= aligned(run) < 4 and state, "it was over before it was stopped"

        done = nodes.submit(*COMMAND, options=GRACE, timeout_s=900)
        assert done.returncode == 0, done.stdout[-4000:]
        assert f"done: {run / 'summary.json'}" in done.stdout and "succeeded" in done.stdout
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "align"] == [1, 2, 3, 4]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert (run / "align" / "checkpoint" / "config.json").exists()


def aligned(run: Path) -> int:
    return sum(row["stage"] == "align" for row in read_metrics(run / "metrics.jsonl"))


def wait_for(condition, process: subprocess.Popen, said: Path, timeout_s: float = 900.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, said.read_text()[-4000:]
        assert time.monotonic() < deadline, said.read_text()[-4000:]
        time.sleep(0.2)
