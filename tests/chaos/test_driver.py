"""The front door under fire: Ctrl-C in a supervised stage, a driver killed in the loop, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from prism_ray.report.metrics import read_metrics
from prism_ray.stages.replay import read_record

ROOT = Path(__file__).resolve().parents[2]
UPDATES, GROUPS = 6, 2
SMALL = [
    "name=small", "stages=[rlvr-sft]", "cluster.cpus=2", "journal.keep=true",
    "verify.environment=slow_environment:prism-test/Parity-v0",
    "testbed.pretrain=64", "testbed.base=256", "testbed.sft=64", "testbed.align=8", "testbed.rlvr=64",
    "testbed.evaluate=8", "testbed.evaluate_unseen=4",
    "trainer.log_every=1000", "trainer.cpus_per_rank=0.5",
    "base.pretrain.steps=2", "base.clean.steps=30", "sft.steps=2",
    "rollout.cpus_per_engine=0.5", "rollout.kv_cache_gb=0.05", "rollout.group_size=4", "rollout.max_response_tokens=64",
    "learner.cpus_per_rank=0.5",
    "align.updates=2", f"rlvr.updates={UPDATES - 2}",
    f"rlvr.loop.groups_per_step={GROUPS}", "rlvr.loop.checkpoint_every=2",
]  # fmt: skip

pytestmark = pytest.mark.long


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / "align.py"), f"runs={folder}", *SMALL, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "verify")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def wait_for(condition, process: subprocess.Popen, timeout_s: float = 400.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def check_all_end(processes: list[psutil.Process]) -> None:
    """Ray's two agents of a node take about a minute: they try to report that their raylet is gone."""
    _, alive = psutil.wait_procs(processes, timeout=180)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, [title(p)[:200] for p in left]


def updates(run: Path) -> int:
    return sum(row["stage"] == "rlvr-sft" for row in read_metrics(run / "metrics.jsonl"))


def training(process: subprocess.Popen) -> bool:
    """Whether a supervised stage has its ranks."""
    return any("RayTrainWorker" in title(p) for p in family(process))


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


def replayed(run: Path) -> tuple[str, list[dict]]:
    command = [sys.executable, str(ROOT / "jobs" / "replay.py"), str(run), "--stage", "rlvr-sft"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (run / "replay" / "rlvr-sft" / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.mark.timeout(900)
def test_ctrl_c_and_a_killed_driver_cost_nothing_and_leave_nothing(tmp_path):
    run = tmp_path / "small"
    first = start(tmp_path, "base.pretrain.steps=1000000")
    wait_for(lambda: training(first), first)
    processes = family(first)
    os.killpg(first.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors[-4000:]
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert not (run / "base" / "done.json").exists(), "the stage was over before it was interrupted"
    check_all_end(processes)

    second = start(tmp_path)
    wait_for(lambda: updates(run) >= 3, second)
    processes = family(second)
    second.kill()
    second.wait()

    third = start(tmp_path)  # at once: what is still ending must not be in its way
    _, errors = third.communicate(timeout=400)
    assert third.returncode == 0, errors[-4000:]
    check_all_end(processes)
    check_exactly_once(run)
    check_replay(run)


def check_exactly_once(run: Path) -> None:
    record = read_record(run / "journal" / "rlvr-sft")
    trained = [record.tickets[group]["position"] for version in range(UPDATES) for group in record.updates[version]]
    assert Counter(trained) == Counter(range(UPDATES * GROUPS))


def check_replay(run: Path) -> None:
    """The journal's groups give the same losses each time, and those of the run itself."""
    said, first = replayed(run)
    _, both = replayed(run)
    assert len(first) == UPDATES and len(both) == 2 * UPDATES
    same = {"policy/loss", "policy/grad_norm", "policy/entropy", "reward/mean"}
    again = [{name: row[name] for name in same} for row in both[UPDATES:]]
    assert again == [{name: row[name] for name in same} for row in first]
    assert any(abs(row["policy/loss"]) > 1e-4 for row in first), "nothing was learned, so nothing was compared"
    rows = {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "rlvr-sft"}
    assert [row["policy/loss"] for row in first] == pytest.approx([rows[i + 1]["policy/loss"] for i in range(UPDATES)])
    assert f"update {UPDATES}: loss" in said
    shown = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "replay.py"), str(run), "--stage", "rlvr-sft", "--show"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and f"update {UPDATES}" in shown.stdout, shown.stderr[-2000:]
    one = next(iter(read_record(run / "journal" / "rlvr-sft").tickets))
    shown = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "replay.py"), str(run), "--stage", "rlvr-sft", "--show", str(one)],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "rollout 0" in shown.stdout and "reward" in shown.stdout, shown.stderr[-2000:]
